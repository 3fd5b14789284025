#include "fisher_norms/fisher_norms.h"

#include <cmath>

#include "common/csr.h"
#include "common/parallel.h"

namespace npeff {
namespace {

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

template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads) {
  const std::vector<int64_t> bounds = parts_by_entries(offsets, n, 16 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, threads, [&](int64_t part) {
    for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) {
      double sum = 0;
      for (int64_t s = offsets[i]; s < offsets[i + 1]; ++s)
        for (int64_t t = offsets[i]; t <= s; ++t) {
          const double product = dot(a, s, t);
          sum += (s == t ? 1 : 2) * product * product;
        }
      out[i] = std::sqrt(sum);
    }
  });
}

template void fisher_norms<int32_t>(const Csr<int32_t>&, const int64_t*, int64_t, double*, int);
template void fisher_norms<int64_t>(const Csr<int64_t>&, const int64_t*, int64_t, double*, int);

}  // namespace npeff
