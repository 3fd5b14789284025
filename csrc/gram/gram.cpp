#include "gram/gram.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/checked.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "spmm/simd.h"
#include "spmm/spmm.h"

namespace npeff {

template <class Index>
void column_counts(const Csr<Index>& a, int64_t* counts, int threads) {
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, threads);
  const auto parts = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<std::vector<int32_t>> mine(parts);
  parallel_for(parts, threads, [&](int64_t p) {
    mine[p].assign(a.n_columns, 0);
    for (int64_t e = a.indptr[bounds[p]]; e < a.indptr[bounds[p + 1]]; ++e) ++mine[p][a.indices[e]];
  });
  for (int64_t c = 0; c < a.n_columns; ++c) {
    counts[c] = 0;
    for (int64_t p = 0; p < parts; ++p) counts[c] += mine[p][c];
  }
}

template <class Index>
void select_columns_indptr(const Csr<Index>& a, const int32_t* map, int64_t* indptr, int threads) {
  parallel_for(a.n_rows, threads, [&](int64_t i) {
    int64_t count = 0;
    for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) count += map[a.indices[e]] >= 0;
    indptr[i + 1] = count;
  });
  indptr[0] = 0;
  for (int64_t i = 0; i < a.n_rows; ++i) indptr[i + 1] += indptr[i];
}

template <class Index>
int64_t select_columns(const Csr<Index>& a, const int32_t* map, const int64_t* indptr, int32_t* indices, float* values,
                       int threads) {
  std::atomic<int64_t> bad{-1};
  parallel_for(a.n_rows, threads, [&](int64_t i) {
    int64_t to = indptr[i], kept = 0;
    const int64_t room = indptr[i + 1] - to;
    for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
      const int32_t column = map[a.indices[e]];
      if (column < 0 || ++kept > room) continue;
      indices[to] = column;
      values[to++] = a.values[e];
    }
    if (kept != room) bad.store(i, std::memory_order_relaxed);
  });
  return bad;
}

void to_dense(const Csr<int32_t>& a, float* out, int threads) {
  parallel_for(a.n_rows, threads, [&](int64_t i) {
    float* row = out + i * a.n_columns;
    std::fill_n(row, a.n_columns, 0.0f);
    for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) row[a.indices[e]] = a.values[e];
  });
}

template void column_counts(const Csr<int32_t>&, int64_t*, int);
template void column_counts(const Csr<int64_t>&, int64_t*, int);
template void select_columns_indptr(const Csr<int32_t>&, const int32_t*, int64_t*, int);
template void select_columns_indptr(const Csr<int64_t>&, const int32_t*, int64_t*, int);
template int64_t select_columns(const Csr<int32_t>&, const int32_t*, const int64_t*, int32_t*, float*, int);
template int64_t select_columns(const Csr<int64_t>&, const int32_t*, const int64_t*, int32_t*, float*, int);

void gram_scatter(const Csr<int32_t>& a, float* k, int threads) {
  const int64_t nnz = a.indptr[a.n_rows];
  std::vector<int64_t> starts(checked_sum({a.n_columns, 1})), place(nnz);
  std::vector<int32_t> rows(nnz);
  std::vector<float> values(nnz);
  csr_transpose(a, starts.data(), rows.data(), values.data(), threads);
  // Where each entry of A stands in its column: the entries before it belong to earlier rows.
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t e = 0; e < nnz; ++e) place[e] = next[a.indices[e]]++;
  parallel_for(a.n_rows, threads, [&](int64_t i) {
    float* sums = k + i * a.n_rows;
    for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
      const float v = a.values[e];
      for (int64_t t = starts[a.indices[e]]; t <= place[e]; ++t) sums[rows[t]] += v * values[t];
    }
  });
}

void gram_panel(const Csr<int32_t>& a, float* k, int threads) {
  // A tile of rows, transposed and dense, by blocks of columns that fit into half the cache; then all rows below it
  // are multiplied with it.
  constexpr int64_t tile = 64;
  const int64_t n = a.n_rows, block = std::max<int64_t>(256, l2_bytes() / 2 / (tile * static_cast<int64_t>(sizeof(float))));
  const int64_t blocks = checked_sum({a.n_columns, block - 1}) / block;
  std::vector<int64_t> bound(checked_product({blocks + 1, n}));  // bound[b·n + i]: first entry of row i in block b or later
  parallel_for(n, threads, [&](int64_t i) {
    bound[i] = a.indptr[i];
    for (int64_t b = 1; b <= blocks; ++b)
      bound[b * n + i] = seek(a.indices, bound[(b - 1) * n + i], a.indptr[i + 1], b * block);
  });
  parallel_for((n + tile - 1) / tile, threads, [&](int64_t part) {
    const int64_t first = part * tile, width = std::min(tile, n - first);
    Aligned<float> panel(block * tile);
    std::fill_n(panel.data(), block * tile, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t* from = bound.data() + b * n;
      const int64_t* to = from + n;
      const auto entry = [&](int64_t e, int64_t j) -> float& {
        return panel[(a.indices[e] - b * block) * tile + (j - first)];
      };
      for (int64_t j = first; j < first + width; ++j)
        for (int64_t e = from[j]; e < to[j]; ++e) entry(e, j) = a.values[e];
      for (int64_t i = first; i < n; ++i)
        spmm_simd().row_i32(a.indices + from[i], a.values + from[i], to[i] - from[i],
                               panel.data() - b * block * tile, tile, width, k + i * n + first, true);
      for (int64_t j = first; j < first + width; ++j)
        for (int64_t e = from[j]; e < to[j]; ++e) entry(e, j) = 0;
    }
  });
}

void mirror(float* k, int64_t n, int threads) {
  constexpr int64_t tile = 64;
  parallel_for((n + tile - 1) / tile, threads, [&](int64_t part) {
    const int64_t first = part * tile, last = std::min(n, first + tile);
    for (int64_t across = 0; across < last; across += tile)  // k[across…, first…] from k[first…, across…]
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = across; j < std::min(across + tile, i); ++j) k[j * n + i] = k[i * n + j];
  });
}

}  // namespace npeff
