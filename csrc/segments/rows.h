// The sums and products of segments.h, for one row of an example: all columns of the row, or those of one thread.
#pragma once

#include "common/half_types.h"

namespace npeff {

// sums[c] += row[c]².
template <class T, class Sum>
NPEFF_INLINE void add_squares(const T* row, int64_t width, Sum* sums) {
  for (int64_t c = 0; c < width; ++c) sums[c] += static_cast<Sum>(widen(row[c])) * static_cast<Sum>(widen(row[c]));
}

// out[c] = w[c] · row[c]; out may be row.
template <class T, class Sum>
NPEFF_INLINE void multiply_row(const T* w, const T* row, int64_t width, Sum* out) {
  for (int64_t c = 0; c < width; ++c) out[c] = static_cast<Sum>(widen(w[c])) * static_cast<Sum>(widen(row[c]));
}

}  // namespace npeff
