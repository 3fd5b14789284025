// fisher_norms.h by blocks: one block per example; the entries of one row are looked up in the other.
#pragma once

#include "common/block.h"
#include "common/csr.h"

namespace npeff {

// a: columns ascend within a row; offsets (n + 1,), out (n,)
template <class Index>
struct FisherNormBlocks {
  static constexpr int threads = 256;
  struct Shared { double sums[threads]; };
  Csr<Index> a;
  const int64_t* offsets;
  int64_t n;
  double* out;

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    double total = 0;
    for (int64_t i = offsets[id]; i < offsets[id + 1]; ++i)
      for (int64_t j = offsets[id]; j <= i; ++j) {
        block.each([&](int t) { s.sums[t] = dot(i, j, t); });
        for (int half = threads / 2; half > 0; half /= 2)
          block.each([&](int t) {
            if (t < half) s.sums[t] += s.sums[t + half];
          });
        const double product = block.uniform(s.sums[0]);
        total += (i == j ? 1 : 2) * product * product;
      }
    block.each([&](int t) {
      if (t == 0) out[id] = __builtin_sqrt(total);
    });
  }

 private:
  // Thread t's share of ⟨row i, row j⟩: every threads-th entry of row i.
  NPEFF_INLINE double dot(int64_t i, int64_t j, int t) const {
    double sum = 0;
    int64_t at = a.indptr[j];
    const int64_t end = a.indptr[j + 1];
    for (int64_t e = a.indptr[i] + t; e < a.indptr[i + 1]; e += threads) {
      at = seek(a.indices, at, end, static_cast<int64_t>(a.indices[e]));
      if (at < end && a.indices[at] == a.indices[e]) sum += static_cast<double>(a.values[e]) * a.values[at];
    }
    return sum;
  }
};

template <class Index, class Queue>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, Queue& queue) {
  queue.run(n, FisherNormBlocks<Index>{a, offsets, n, out});
}

}  // namespace npeff
