// segments.h by blocks: a thread takes a few neighbouring columns of one example, neighbours take the next; norms have a block
// for each example.
#pragma once

#include "common/block.h"
#include "segments/segments.h"

namespace npeff {

// A thread's columns of one example, `together` of them, of which rows are aligned to as many entries: the sums of squares
// of its rows, or (spread) each of its rows times that of w.
template <class T, int together, bool spread>
struct SegmentColumns {
  const T *w, *p;          // (n, r) with spread, (R, r)
  const int64_t* offsets;  // (n + 1,)
  int64_t r;
  T* out;                  // (n, r), with spread (R, r)

  template <class Block>
  NPEFF_INLINE void at(int64_t thread) const {
    const int64_t at = thread * together, i = at / r, j = at % r, end = offsets[i + 1];
    T own[together] = {};  // sums, or weights
    if (spread) load_together<together>(w + at, own);
NPEFF_UNROLL_4
    for (int64_t row = offsets[i]; row < end; ++row) {
      T entries[together], products[together];
      load_together<together>(p + row * r + j, entries);
      if (!spread) {
        add_squares(entries, together, own);
      } else {
        multiply_row(own, entries, together, products);
        store_together<together>(products, out + row * r + j);
      }
    }
    if (!spread) store_together<together>(own, out + at);
  }
};

// With as many columns at once as r and the pointers' alignment allow.
template <bool spread, class T, class Queue>
void run_segments(const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, T* out, Queue& queue) {
  constexpr int most = 16 / sizeof(T);
  if (n * r == 0) return;
  const auto addresses = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(w);
  if (r % most == 0 && addresses % 16 == 0) run_elements(queue, n * r / most, SegmentColumns<T, most, spread>{w, p, offsets, r, out});
  else run_elements(queue, n * r, SegmentColumns<T, 1, spread>{w, p, offsets, r, out});
}

template <class T, class Queue>
void cross(const T* p, const int64_t* offsets, int64_t n, int64_t r, T* out, Queue& queue) {
  run_segments<false>(static_cast<const T*>(nullptr), p, offsets, n, r, out, queue);
}

template <class T, class Queue>
void spread_multiply(const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, T* out, Queue& queue) {
  run_segments<true>(w, p, offsets, n, r, out, queue);
}

// One block per example: the entries of one row are looked up in the other. Columns ascend within a row; offsets (n + 1,),
// out (n,).
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
