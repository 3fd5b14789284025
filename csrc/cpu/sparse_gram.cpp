#include "npeff/sparse_gram.h"

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "cache.h"
#include "isa.h"
#include "npeff/checked.h"
#include "npeff/csr_seek.h"
#include "npeff/parallel.h"

namespace npeff {

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
        kernels().spmm_row_i32(a.indices + from[i], a.values + from[i], to[i] - from[i],
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
