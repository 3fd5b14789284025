// Rows that belong to examples: example i owns rows offsets[i] … offsets[i+1] − 1 of p.
#pragma once

#include <cstdint>

namespace npeff {

// out_ij = Σ over the rows of example i of p_row,j².
//   p (R, r), offsets (n + 1,), out (n, r)
void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads);

// out_row,j = w_example(row),j · p_row,j; out may be p.
//   w (n, r), p (R, r), offsets (n + 1,), out (R, r)
void spread_multiply(const float* w, const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out,
                     int threads);

}  // namespace npeff
