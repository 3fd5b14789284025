// Products of compressed sparse rows (CSR) with dense matrices.
//
//   indptr  (n_rows + 1,)  row i holds entries indptr[i] … indptr[i+1] − 1
//   indices (nnz,)         column of each entry; Index: int32_t or int64_t
//   values  (nnz,)
#pragma once

#include <cstdint>

namespace npeff {

template <class Index>
struct Csr {
  int64_t n_rows, n_columns;
  const int64_t* indptr;
  const Index* indices;
  const float* values;
};

// What is wrong with a matrix, found in one pass: the first row whose indptr descends or that holds a column outside
// [0, n_columns), and the first row whose columns do not ascend or that holds one twice; −1 when there is none.
// All functions expect that there is no bad row; those that need ascending columns say so.
struct CsrCheck { int64_t bad_row, unsorted_row; };
template <class Index>
CsrCheck csr_check(const Csr<Index>& a, int64_t nnz, int threads);

// out = A · dense.
//   dense (n_columns, r), out (n_rows, r); out overlaps nothing
template <class Index>
void spmm(const Csr<Index>& a, const float* dense, int64_t r, float* out, int threads);

// CSR of Aᵀ; within a row, indices ascend if A's rows are in order (they are: that of the entries of A).
//   indptr (n_columns + 1,), indices (nnz,), values (nnz,): overlap nothing
template <class Index>
void csr_transpose(const Csr<Index>& a, int64_t* indptr, Index* indices, float* values, int threads);

}  // namespace npeff
