// ‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F of every example's sparse rows.
#pragma once

#include "common/csr.h"

namespace npeff {

// Example i owns rows offsets[i] … offsets[i+1] − 1 of a; columns ascend within a row. Products and sums in float64.
//   offsets (n + 1,), out (n,)
template <class Index>
void fisher_norms(const Csr<Index>& a, const int64_t* offsets, int64_t n, double* out, int threads);

}  // namespace npeff
