#include "segments/segments.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"

namespace npeff {
namespace {

// Calls body(example) for all examples, those with about as many rows on each thread. work: multiply-adds in all.
template <class Body>
void for_examples(const int64_t* offsets, int64_t n, int64_t work, int threads, Body body) {
  const std::vector<int64_t> bounds = parts_by_entries(offsets, n, 16 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, work < 1 << 15 ? 1 : threads, [&](int64_t part) {
    for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) body(i);
  });
}

// ⟨row s, row t⟩ by merging their ascending columns.
template <class Index>
double dot(const Csr<Index>& a, int64_t s, int64_t t) {
  int64_t i = a.indptr[s], j = a.indptr[t];
  const int64_t i_end = a.indptr[s + 1], j_end = a.indptr[t + 1];
  double sum = 0;
  while (i < i_end && j < j_end) {
    const Index x = a.indices[i], y = a.indices[j];
    if (x == y) sum += static_cast<double>(a.values[i]) * a.values[j];
    i += x <= y;
    j += y <= x;
  }
  return sum;
}

}  // namespace

void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads) {
  for_examples(offsets, n, offsets[n] * r, threads, [=](int64_t i) {
    float* sum = out + i * r;
    std::fill_n(sum, r, 0.0f);
    for (const float* row = p + offsets[i] * r; row < p + offsets[i + 1] * r; row += r)
      for (int64_t j = 0; j < r; ++j) sum[j] += row[j] * row[j];
  });
}

template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads) {
  for_examples(offsets, n, a.nnz, threads, [=](int64_t i) {
    double sum = 0;
    for (int64_t s = offsets[i]; s < offsets[i + 1]; ++s)
      for (int64_t t = offsets[i]; t <= s; ++t) {
        const double product = dot(a, s, t);
        sum += (s == t ? 1 : 2) * product * product;
      }
    out[i] = std::sqrt(sum);
  });
}

template void fisher_norms<int32_t>(const Csr<int32_t>&, const int64_t*, int64_t, double*, int);
template void fisher_norms<int64_t>(const Csr<int64_t>&, const int64_t*, int64_t, double*, int);

}  // namespace npeff
