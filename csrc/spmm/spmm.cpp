#include "spmm/spmm.h"

#include <algorithm>

#include "common/memory.h"
#include "common/parallel.h"
#include "spmm/simd.h"

namespace npeff {
namespace {

auto row_of(const Csr<int32_t>&) { return spmm_simd().row_i32; }
auto row_of(const Csr<int64_t>&) { return spmm_simd().row_i64; }

// Columns taken at a time: as many rows of dense as fit into half the cache, so that all rows of A find them there.
// All of them where dense fits anyway, or where rows are too short to be cut up.
int64_t columns_at_once(int64_t n_rows, int64_t n_columns, int64_t nnz, int64_t r) {
  const int64_t fit = std::max<int64_t>(1, l2_bytes() / 2 / (r * static_cast<int64_t>(sizeof(float))));
  const int64_t blocks = std::min((n_columns + fit - 1) / fit, nnz / (8 * n_rows + 1));
  return blocks < 3 ? n_columns : (n_columns + blocks - 1) / blocks;
}

// Rows begin … end − 1, by blocks of columns.
template <class Index>
void multiply_rows(const Spmm<Index>& product, int64_t begin, int64_t end) {
  const auto& [a, dense, r, out] = product;
  const int64_t nnz = a.indptr[end] - a.indptr[begin];
  const int64_t width = a.ascending ? columns_at_once(end - begin, a.n_columns, nnz, r) : a.n_columns;
  const auto row = row_of(a);
  std::vector<int64_t> cursor(a.indptr + begin, a.indptr + end);
  for (int64_t start = 0; start == 0 || start < a.n_columns; start += std::max<int64_t>(width, 1))
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = cursor[i - begin], last = a.indptr[i + 1];
      const int64_t to = start + width < a.n_columns ? seek(a.indices, from, last, start + width) : last;
      row(a.indices + from, a.values + from, to - from, dense, r, r, out + i * r, start > 0);
      cursor[i - begin] = to;
    }
}

}  // namespace

template <class Index>
void spmm(const Spmm<Index>& product, int threads) {
  if (product.r == 0) return;
  const Csr<Index>& a = product.a;
  const int64_t work = a.indptr[a.n_rows] * product.r;
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, work < 1 << 16 ? 1 : 2 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, threads,
               [&](int64_t part) { multiply_rows(product, bounds[part], bounds[part + 1]); });
}

template void spmm(const Spmm<int32_t>&, int);
template void spmm(const Spmm<int64_t>&, int);

void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads) {
  const std::vector<int64_t> bounds = parts_by_entries(offsets, n, 16 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, offsets[n] * r < 1 << 15 ? 1 : threads, [&](int64_t part) {
    for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) {
      float* sum = out + i * r;
      std::fill_n(sum, r, 0.0f);
      for (const float* row = p + offsets[i] * r; row < p + offsets[i + 1] * r; row += r)
        for (int64_t j = 0; j < r; ++j) sum[j] += row[j] * row[j];
    }
  });
}

// A counting sort by column, stable, so that the result's indices ascend: every thread counts the columns of its rows,
// and then knows where in each column its entries begin.
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
