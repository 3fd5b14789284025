// A counting sort by column, stable, so that the result's indices ascend: every thread counts the columns of its rows,
// and then knows where in each column its entries begin.
#include <vector>

#include "csr_parts.h"
#include "npeff/parallel.h"
#include "npeff/spmm.h"

namespace npeff {

template <class Index>
void csr_transpose(const Csr<Index>& a, int64_t* indptr, Index* indices, float* values, int threads) {
  const int64_t nnz = a.indptr[a.n_rows];
  // More threads than entries per column would spend their time on counts.
  const int64_t most = nnz < 1 << 16 ? 1 : std::min<int64_t>(threads, 1 + nnz / (2 * a.n_columns + 1));
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, most);
  const auto parts = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<std::vector<int64_t>> start(parts);
  parallel_for(parts, threads, [&](int64_t p) {
    start[p].assign(a.n_columns, 0);
    for (int64_t e = a.indptr[bounds[p]]; e < a.indptr[bounds[p + 1]]; ++e) ++start[p][a.indices[e]];
  });
  int64_t total = 0;
  for (int64_t c = 0; c < a.n_columns; ++c) {
    indptr[c] = total;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t count = start[p][c];
      start[p][c] = total;
      total += count;
    }
  }
  indptr[a.n_columns] = total;
  parallel_for(parts, threads, [&](int64_t p) {
    for (int64_t i = bounds[p]; i < bounds[p + 1]; ++i)
      for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
        const int64_t to = start[p][a.indices[e]]++;
        indices[to] = static_cast<Index>(i);
        values[to] = a.values[e];
      }
  });
}

template void csr_transpose(const Csr<int32_t>&, int64_t*, int32_t*, float*, int);
template void csr_transpose(const Csr<int64_t>&, int64_t*, int64_t*, float*, int);

}  // namespace npeff
