// Rows that belong to examples: example i owns rows offsets[i] … offsets[i+1] − 1 of p.
#pragma once

#include "common/csr.h"

namespace npeff {

// out_ij = Σ over the rows of example i of p_row,j².
//   p (R, r), offsets (n + 1,), out (n, r)
void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads);

// out_i = ‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F for the sparse rows A_i of example i; columns ascend within a row. Products and sums in
// float64.
//   offsets (n + 1,), out (n,)
template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads);

}  // namespace npeff
