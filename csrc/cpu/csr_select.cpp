#include <algorithm>
#include <atomic>
#include <vector>

#include "csr_parts.h"
#include "npeff/parallel.h"
#include "npeff/sparse_gram.h"

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

}  // namespace npeff
