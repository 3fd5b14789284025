#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace npeff {

// Whether x (n,) holds neither NaN nor infinity: one more than an exponent of ones carries into the sign's place.
template <class T>
bool finite(const T* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int sign = 8 * sizeof(T) - 1, mantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr Bits exponent = (Bits{1} << sign) - (Bits{1} << mantissa);
  Bits carried = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof bits);
    carried |= (bits & exponent) + (Bits{1} << mantissa);
  }
  return carried >> sign == 0;
}

}  // namespace npeff
