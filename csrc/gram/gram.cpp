#include "gram/gram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "gram/simd.h"
#include "spmm/simd.h"
#include "spmm/spmm.h"

namespace npeff {
namespace {

// Number of rows that hold each column: (n_columns,).
template <class Index>
std::vector<int64_t> column_counts(const Csr<Index>& a, int threads) {
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, threads);
  const auto parts = static_cast<int64_t>(bounds.size()) - 1;
  std::vector<std::vector<int32_t>> mine(parts);
  parallel_for(parts, threads, [&](int64_t p) {
    mine[p].assign(a.n_columns, 0);
    for (int64_t e = a.indptr[bounds[p]]; e < a.indptr[bounds[p + 1]]; ++e) ++mine[p][a.indices[e]];
  });
  std::vector<int64_t> counts(a.n_columns, 0);
  for (int64_t c = 0; c < a.n_columns; ++c)
    for (int64_t p = 0; p < parts; ++p) counts[c] += mine[p][c];
  return counts;
}

// Gives the columns with chosen(count) the names 0, 1, … and all others −1; returns their number.
template <class Chosen>
int64_t name_columns(const std::vector<int64_t>& counts, const Chosen& chosen, int32_t* names) {
  int64_t n = 0;
  for (size_t c = 0; c < counts.size(); ++c) names[c] = chosen(counts[c]) ? static_cast<int32_t>(n++) : -1;
  if (n > std::numeric_limits<int32_t>::max()) throw SizeError("sparse_gram: more than 2^31 columns of one sort");
  return n;
}

// The n columns of a matrix that have names, under these names.
struct Selection {
  std::vector<int64_t> indptr;
  std::vector<int32_t> indices;
  std::vector<float> values;
  Csr<int32_t> csr;

  template <class Index>
  Selection(const Csr<Index>& a, const std::vector<int32_t>& names, int64_t n, int threads) : indptr(a.n_rows + 1) {
    parallel_for(a.n_rows, threads, [&](int64_t i) {
      for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) indptr[i + 1] += names[a.indices[e]] >= 0;
    });
    for (int64_t i = 0; i < a.n_rows; ++i) indptr[i + 1] += indptr[i];
    indices.resize(indptr[a.n_rows]);
    values.resize(indptr[a.n_rows]);
    parallel_for(a.n_rows, threads, [&](int64_t i) {
      int64_t to = indptr[i];
      for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
        const int32_t column = names[a.indices[e]];
        if (column < 0) continue;
        indices[to] = column;
        values[to++] = a.values[e];
      }
    });
    csr = {a.n_rows, n, indptr[a.n_rows], indptr.data(), indices.data(), values.data()};
  }
};

// K += A·Aᵀ at the cost of Σ_columns count²/2 scattered multiply-adds.
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

// K += A·Aᵀ at the cost of Σ_columns count·n_rows/2 multiply-adds in vectors.
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
int64_t sparse_gram(const Csr<Index>& a, int32_t* names, float* k, int threads) {
  const std::vector<int64_t> counts = column_counts(a, threads);
  const double scattered = 1 + scatter_below * static_cast<double>(a.n_rows), dense = dense_above * static_cast<double>(a.n_rows);
  const auto is_scattered = [=](int64_t count) { return count > 0 && static_cast<double>(count) < scattered; };
  const auto is_dense = [=](int64_t count) { return count > 0 && !is_scattered(count) && static_cast<double>(count) > dense; };
  const auto is_panel = [=](int64_t count) { return count > 0 && !is_scattered(count) && !is_dense(count); };
  std::vector<int32_t> own(a.n_columns);
  if (const int64_t n = name_columns(counts, is_scattered, own.data())) gram_scatter(Selection(a, own, n, threads).csr, k, threads);
  if (const int64_t n = name_columns(counts, is_panel, own.data())) gram_panel(Selection(a, own, n, threads).csr, k, threads);
  return name_columns(counts, is_dense, names);
}

template <class Index>
void to_dense(const Csr<Index>& a, const int32_t* names, int64_t first, int64_t width, float* out, int threads) {
  parallel_for(a.n_rows, threads, [&](int64_t i) {
    float* row = out + i * width;
    std::fill_n(row, width, 0.0f);
    for (int64_t e = a.indptr[i]; e < a.indptr[i + 1]; ++e) {
      const int64_t name = names[a.indices[e]], at = name - first;
      if (name >= 0 && at >= 0 && at < width) row[at] = a.values[e];
    }
  });
}

template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads) {
  const std::vector<int64_t> bounds = parts_by_entries(offsets, n, 16 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, a.nnz < 1 << 15 ? 1 : threads, [&](int64_t part) {
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

template void fisher_norms(const Csr<int32_t>&, const int64_t*, int64_t, double*, int);
template void fisher_norms(const Csr<int64_t>&, const int64_t*, int64_t, double*, int);
template int64_t sparse_gram(const Csr<int32_t>&, int32_t*, float*, int);
template int64_t sparse_gram(const Csr<int64_t>&, int32_t*, float*, int);
template void to_dense(const Csr<int32_t>&, const int32_t*, int64_t, int64_t, float*, int);
template void to_dense(const Csr<int64_t>&, const int32_t*, int64_t, int64_t, float*, int);

void outer_gram(const float* delta, const float* input, int64_t b, int64_t t, int64_t columns, int64_t n_delta,
                int64_t n_input, int64_t width, double* gram, double* size, int threads) {
  if (columns == 0) return;  // however many steps there are
  parallel_for(b, threads, [&](int64_t i) {
    const std::unique_ptr<float[]> space(new float[checked_sum({checked_product({t, t}), checked_product({16, t + 1, width})})]);
    gram_simd().outer({t, columns, width, delta + i * t * columns * n_delta, input + i * t * n_input, n_delta, n_input,
                       space.get(), gram + i * columns * width, size + i * (columns / width)});
  });
}

}  // namespace npeff
