// Products of compressed sparse rows (CSR) with dense matrices.
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

// CSR of Aᵀ; within a row, indices ascend if A's rows are in order (they are: that of the entries of A).
//   indptr (n_columns + 1,), indices (nnz,), values (nnz,): overlap nothing
template <class Index>
void csr_transpose(const Csr<Index>& a, int64_t* indptr, Index* indices, float* values, int threads);

}  // namespace npeff
