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

struct SketchSimd {
  // Adds a stretch of a row; the same bits whatever the instruction set.
  void (*run)(const SketchRun& run);
  // x (d,) becomes its Walsh–Hadamard transform, unnormalised; d a power of two.
  void (*walsh_hadamard)(float* x, int64_t d);
};
NPEFF_SIMD(SketchSimd, sketch_simd)

}  // namespace npeff
