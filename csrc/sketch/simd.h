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
  float* space;     // see SketchGroups
};

// How the rows of a sequence are shared out among groups of four.
struct SketchGroups {
  int64_t steps, columns, groups, at_once;  // steps and columns of a group; groups of all steps; of these, kept at a time
  int64_t space;                            // floats that the work needs

  NPEFF_INLINE explicit SketchGroups(const SketchOuter& run) : steps(run.t < 1 ? 1 : run.t < 3 ? run.t : 4), columns(4 / steps) {
    groups = ceil_div(run.t, steps);
    at_once = (int64_t{1} << 16) / run.d;  // 1 MB
    at_once = at_once < 1 ? 1 : at_once < groups ? at_once : groups;
    space = (at_once + 1) * run.d * 4 + larger(run.n_delta, run.n_input);
  }
};

struct SketchSimd {
  // Adds a stretch of a row; the same bits whatever the instruction set.
  void (*run)(const SketchRun& run);
  // products = d times the sketches of Σ_t delta[t, c] ⊗ input[t]; d a power of two.
  void (*outer)(const SketchOuter& run);
};
NPEFF_SIMD(SketchSimd, sketch_simd)

}  // namespace npeff
