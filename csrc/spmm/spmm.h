// Products of compressed sparse rows (CSR) with dense matrices, and sums over the rows of examples.
#pragma once

#include "common/csr.h"

namespace npeff {

// out = A · dense, for the processor and (blocks.h) for devices: the arguments are stated here alone.
template <class Index, class T = float>
struct Spmm {
  Csr<Index, T> a;
  const T* dense;  // (n_columns, r)
  int64_t r;
  T* out;          // (n_rows, r); overlaps nothing
};
template <class Index>
void spmm(const Spmm<Index>& product, int threads);

// out_ij = Σ over the rows of example i of p_row,j².
//   p (R, r), offsets (n + 1,): example i owns rows offsets[i] … offsets[i+1] − 1; out (n, r)
void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads);

// CSR of Aᵀ; within a row, indices ascend if A's rows are in order (they are: that of the entries of A).
//   indptr (n_columns + 1,), indices (nnz,), values (nnz,): overlap nothing
template <class Index>
void csr_transpose(const Csr<Index>& a, int64_t* indptr, Index* indices, float* values, int threads);

}  // namespace npeff
