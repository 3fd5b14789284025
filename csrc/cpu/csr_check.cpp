#include <algorithm>

#include "csr_parts.h"
#include "npeff/parallel.h"
#include "npeff/spmm.h"

namespace npeff {

template <class Index>
int64_t csr_bad_row(const Csr<Index>& a, int64_t nnz, int threads) {
  if (a.indptr[0] != 0) return 0;
  for (int64_t i = 0; i < a.n_rows; ++i)
    if (a.indptr[i + 1] < a.indptr[i] || a.indptr[i + 1] > nnz) return i;
  if (a.indptr[a.n_rows] != nnz) return std::max<int64_t>(a.n_rows - 1, 0);
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, nnz < 1 << 16 ? 1 : threads);
  std::vector<int64_t> bad(bounds.size(), -1);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, threads, [&](int64_t part) {
    for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) {
      Index least = 0, largest = -1;
      for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
        least = std::min(least, a.indices[e]);
        largest = std::max(largest, a.indices[e]);
      }
      if (least >= 0 && largest < a.n_columns) continue;
      bad[part] = i;
      return;
    }
  });
  for (const int64_t row : bad)
    if (row >= 0) return row;
  return -1;
}

template int64_t csr_bad_row(const Csr<int32_t>&, int64_t, int);
template int64_t csr_bad_row(const Csr<int64_t>&, int64_t, int);

}  // namespace npeff
