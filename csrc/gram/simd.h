// The inner loops of outer_gram(), for each instruction set.
#pragma once

#include "common/isa.h"

namespace npeff {

// One sequence of outer_gram().
struct OuterGram {
  int64_t t, columns, width;
  const float *delta, *input;  // (t, columns, n_delta), (t, n_input)
  int64_t n_delta, n_input;
  float* space;         // t² + 16·(t + 1)·width
  double *gram, *size;  // (columns, width), (columns / width,)
};

struct GramSimd {
  void (*outer)(const OuterGram& run);
};
NPEFF_SIMD(GramSimd, gram_simd)

}  // namespace npeff
