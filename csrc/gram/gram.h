// K = A·Aᵀ for compressed sparse rows A, added to the lower triangle of K, diagonal included:
//
//   K (n_rows, n_rows); its entries above the diagonal are undefined
//
// A column that `count` of the n_rows rows share costs count²/2 multiply-adds when its entries are multiplied one by one,
// each a scattered access; count·n_rows/2 in vectors, against a dense panel of rows in the cache; n_rows²/2 at the full
// rate of a dense matrix product, which the caller makes. Each column goes the way that is cheapest for it. Rates measured
// on one core (AVX-512): 0.45 scattered, 13 panel, 55 dense multiply-adds a nanosecond.
#pragma once

#include "common/csr.h"

namespace npeff {

constexpr double scatter_below = 1.0 / 30;  // share of the rows below which a column's entries are multiplied one by one
constexpr double dense_above = 1.0 / 3;     // share of the rows above which a column is left to the dense product

// K += A·Aᵀ of the columns that are not dense. names (n_columns,): 0, 1, … for the dense columns, in order, and −1 for all
// others. Returns the number of dense columns. Columns ascend within a row, and none comes twice.
template <class Index>
int64_t sparse_gram(const Csr<Index>& a, int32_t* names, float* k, int threads);

// out (n_rows, width) = the columns of A with names first … first + width − 1.
template <class Index>
void to_dense(const Csr<Index>& a, const int32_t* names, int64_t first, int64_t width, float* out, int threads);

// out_i = ‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F for the sparse rows A_i of example i; columns ascend within a row. Products and sums in
// float64.
//   offsets (n + 1,): example i owns rows offsets[i] … offsets[i+1] − 1; out (n,)
template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads);

// The inner products of columns Σ_t delta[t, c] ⊗ input[t] with those of their own run of `width` columns, without the
// outer products: Σ_tu (input_t · input_u) (delta_tc · delta_uc').
//   delta (b, t, columns, n_delta), input (b, t, n_input), gram (b, columns, width)
//   size (b, columns / width): the norm of the inner products of input, times the squares of delta; gram's terms are at most
//   that large together
void outer_gram(const float* delta, const float* input, int64_t b, int64_t t, int64_t columns, int64_t n_delta,
                int64_t n_input, int64_t width, double* gram, double* size, int threads);

}  // namespace npeff
