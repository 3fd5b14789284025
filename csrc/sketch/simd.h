// The inner loops of sketch.cpp, for each instruction set.
#pragma once

#include "common/isa.h"
#include "sketch/hash.h"

namespace npeff {

// A stretch of one row on its way into a sketch.
struct SketchRun {
  const SketchMap* map;
  const float* x;       // (n,)
  int64_t n, base;      // flat index of x[0]
  double* sums;         // (d,), added to
  uint32_t begin, end;  // only blocks that fall on these groups, of those of all copies
};

// One sequence on its way into the two-sided sketches of its columns.
struct SketchOuter {
  int64_t d, t, columns;
  const float *delta, *input;  // (t, columns, n_delta), (t, n_input)
  int64_t n_delta, n_input;
  const uint32_t *delta_places, *input_places;
  float* products;  // (columns, d)
  float* space;     // see SketchSimd::outer_space
};

struct SketchSimd {
  // Adds a stretch of a row; the same bits whatever the instruction set.
  void (*run)(const SketchRun& run);
  // products = d times the sketches of Σ_t delta[t, c] ⊗ input[t]; d a power of two.
  void (*outer)(const SketchOuter& run);
  // The number of floats that it needs as space.
  int64_t (*outer_space)(const SketchOuter& run);
};
NPEFF_SIMD(SketchSimd, sketch_simd)

}  // namespace npeff
