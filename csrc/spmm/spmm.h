// Products of compressed sparse rows (CSR) with dense matrices.
#pragma once

#include "common/csr.h"

namespace npeff {

// out = A · dense.
//   dense (n_columns, r), out (n_rows, r); out overlaps nothing
template <class Index>
void spmm(const Csr<Index>& a, const float* dense, int64_t r, float* out, int threads);

// CSR of Aᵀ; within a row, indices ascend if A's rows are in order (they are: that of the entries of A).
//   indptr (n_columns + 1,), indices (nnz,), values (nnz,): overlap nothing
template <class Index>
void csr_transpose(const Csr<Index>& a, int64_t* indptr, Index* indices, float* values, int threads);

}  // namespace npeff
