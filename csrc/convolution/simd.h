// The inner loops of convolution.cpp, for each instruction set.
#pragma once

#include "common/isa.h"

namespace npeff {

// Sums over positions of inputs under one kernel row times vectors of δ; see convolution.cpp.
struct PatchRun {
  const float* panel;             // (rows · width, vectors · lanes)
  const float* inputs;            // under the first tap at the first position
  int64_t rows, width;            // positions
  int64_t row_step, step;         // elements of inputs from one row of positions, one position, to the next
  int64_t dilation;               // and from one tap to the next
  int taps, vectors;              // at most 7, patch_vectors(taps)
  float* sums;                    // (taps, stride): out, the first vectors · lanes of each row
  int64_t stride;
  bool add;                       // to what is there
};

struct ConvolutionSimd {
  int vector_bytes;
  // Vectors that a run of so many taps may have.
  int (*patch_vectors)(int taps);
  void (*patch_sums)(const PatchRun& run);
  // out[j · stride + i] = rows[i][j] for i < count ≤ lanes and j < n; a null row is zeros.
  void (*transpose_rows)(const float* const* rows, int count, int64_t n, float* out, int64_t stride);
};
NPEFF_SIMD(ConvolutionSimd, convolution_simd)

}  // namespace npeff
