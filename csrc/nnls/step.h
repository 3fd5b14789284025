// One coordinate of the coordinate descent of nnls.h, for a row of the problem or (as a vector) for several.
#pragma once

#include "common/host_device.h"

namespace npeff {

// How far a coordinate is from optimal, given its gradient.
template <class V>
NPEFF_INLINE V nnls_violation(V w, V gradient) { return w > 0 ? size_of(gradient) : -gradient; }

// The coordinate's best value, all others kept: max(0, w − gradient / gram_jj).
template <class V, class T>
NPEFF_INLINE V nnls_moved(V w, V gradient, T inverse_diagonal) { return larger(w - gradient * inverse_diagonal, V{}); }

// Where to start from a given coefficient.
template <class T>
NPEFF_INLINE T nnls_start(T w, T inverse_diagonal) { return w > 0 && inverse_diagonal > 0 ? w : T{0}; }

template <class T>
NPEFF_INLINE T nnls_inverse(T diagonal) { return diagonal > 0 ? 1 / diagonal : T{0}; }

// Entry `at` of gram by panels of `block` columns: (padded / block, r, block), zero beyond r.
template <class T>
NPEFF_INLINE T nnls_packed(const T* gram, int64_t r, int64_t block, int64_t at) {
  const int64_t column = at / (r * block) * block + at % block;
  return column < r ? gram[at / block % r * r + column] : T{0};
}

}  // namespace npeff
