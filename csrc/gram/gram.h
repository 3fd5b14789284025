// Parts of K = A·Aᵀ for compressed sparse rows A. Each adds to the lower triangle of K, diagonal included:
//
//   K (n_rows, n_rows); above the diagonal its entries are undefined until mirror()
//
// Columns of A that few rows share are multiplied fastest entry by entry (gram_scatter), those that many share as a
// panel (gram_panel), and those that nearly all share as a dense matrix product (which the caller makes).
#pragma once

#include "common/csr.h"

namespace npeff {

// In all of these, columns ascend within a row, and none comes twice.

// Number of rows that hold each column: counts (n_columns,).
template <class Index>
void column_counts(const Csr<Index>& a, int64_t* counts, int threads);

// The columns c with map[c] ≥ 0, renamed to map[c]; map (n_columns,). First the new indptr (n_rows + 1,), then the
// new indices and values (indptr[n_rows],), in the old order: each row in the place that indptr gives it, which must
// ascend from 0. Returns a row that has another number of entries than its place, or −1.
template <class Index>
void select_columns_indptr(const Csr<Index>& a, const int32_t* map, int64_t* indptr, int threads);
template <class Index>
int64_t select_columns(const Csr<Index>& a, const int32_t* map, const int64_t* indptr, int32_t* indices, float* values,
                       int threads);

// out (n_rows, n_columns) = A.
void to_dense(const Csr<int32_t>& a, float* out, int threads);

// K += A·Aᵀ at the cost of Σ_columns count²/2 scattered multiply-adds.
void gram_scatter(const Csr<int32_t>& a, float* k, int threads);

// K += A·Aᵀ at the cost of Σ_columns count·n_rows/2 multiply-adds in vectors.
void gram_panel(const Csr<int32_t>& a, float* k, int threads);

// Copies the lower triangle of k (n, n) to the upper one.
void mirror(float* k, int64_t n, int threads);

}  // namespace npeff
