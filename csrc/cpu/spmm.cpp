#include "npeff/spmm.h"

#include <algorithm>

#include "cache.h"
#include "csr_parts.h"
#include "isa.h"
#include "npeff/csr_seek.h"
#include "npeff/parallel.h"

namespace npeff {
namespace {

void row_times(const int32_t* indices, const float* values, int64_t n, const float* dense, int64_t r, float* out, bool add) {
  kernels().spmm_row_i32(indices, values, n, dense, r, r, out, add);
}
void row_times(const int64_t* indices, const float* values, int64_t n, const float* dense, int64_t r, float* out, bool add) {
  kernels().spmm_row_i64(indices, values, n, dense, r, r, out, add);
}

// Columns taken at a time: as many rows of dense as fit into half the cache, so that all rows of A find them there.
// All of them where dense fits anyway, or where rows are too short to be cut up.
int64_t columns_at_once(int64_t n_rows, int64_t n_columns, int64_t nnz, int64_t r) {
  const int64_t fit = std::max<int64_t>(1, l2_bytes() / 2 / (r * static_cast<int64_t>(sizeof(float))));
  const int64_t blocks = std::min((n_columns + fit - 1) / fit, nnz / (8 * n_rows + 1));
  return blocks < 3 ? n_columns : (n_columns + blocks - 1) / blocks;
}

template <class Index>
bool ascending(const Csr<Index>& a, int64_t begin, int64_t end) {
  bool ok = true;
  for (int64_t i = begin; i < end && ok; ++i)
    for (int64_t e = a.indptr[i] + 1; e < a.indptr[i + 1]; ++e) ok &= a.indices[e - 1] <= a.indices[e];
  return ok;
}

// Rows begin … end − 1, by blocks of columns.
template <class Index>
void multiply_rows(const Csr<Index>& a, int64_t begin, int64_t end, const float* dense, int64_t r, float* out) {
  int64_t width = columns_at_once(end - begin, a.n_columns, a.indptr[end] - a.indptr[begin], r);
  if (width < a.n_columns && !ascending(a, begin, end)) width = a.n_columns;
  std::vector<int64_t> cursor(a.indptr + begin, a.indptr + end);
  for (int64_t start = 0; start == 0 || start < a.n_columns; start += std::max<int64_t>(width, 1))
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = cursor[i - begin], last = a.indptr[i + 1];
      const int64_t to = start + width < a.n_columns ? seek(a.indices, from, last, start + width) : last;
      row_times(a.indices + from, a.values + from, to - from, dense, r, out + i * r, start > 0);
      cursor[i - begin] = to;
    }
}

}  // namespace

template <class Index>
void spmm(const Csr<Index>& a, const float* dense, int64_t r, float* out, int threads) {
  if (r == 0) return;
  const int64_t work = a.indptr[a.n_rows] * r;
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, work < 1 << 16 ? 1 : 2 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, threads,
               [&](int64_t part) { multiply_rows(a, bounds[part], bounds[part + 1], dense, r, out); });
}

template void spmm(const Csr<int32_t>&, const float*, int64_t, float*, int);
template void spmm(const Csr<int64_t>&, const float*, int64_t, float*, int);

}  // namespace npeff
