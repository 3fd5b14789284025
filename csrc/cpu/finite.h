#pragma once

#include <cstdint>

namespace npeff {

// Whether x (n,) holds neither NaN nor infinity: 0·x is 0 for all other numbers.
template <class T>
bool finite(const T* x, int64_t n) {
  T zero = 0;
  for (int64_t i = 0; i < n; ++i) zero += x[i] * 0;
  return zero == 0;
}

}  // namespace npeff
