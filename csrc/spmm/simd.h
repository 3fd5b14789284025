// The inner loop of products with sparse rows, for each instruction set.
#pragma once

#include "common/isa.h"

namespace npeff {

struct SpmmSimd {
  // out (width,) = (or +=, with add) Σ_e values[e] · dense[indices[e], :width], rows of dense `stride` apart.
  void (*row_i32)(const int32_t* indices, const float* values, int64_t n, const float* dense, int64_t stride, int64_t width,
                  float* out, bool add);
  void (*row_i64)(const int64_t* indices, const float* values, int64_t n, const float* dense, int64_t stride, int64_t width,
                  float* out, bool add);
};
NPEFF_SIMD(SpmmSimd, spmm_simd)

}  // namespace npeff
