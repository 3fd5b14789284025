// Sizes in arithmetic that notices when a number does not fit.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

namespace npeff {

// A size is too large for this machine; becomes Python's MemoryError.
struct SizeError : std::length_error {
  using std::length_error::length_error;
};

// The product of numbers ≥ 0.
inline int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors)
    if (factor < 0 || __builtin_mul_overflow(product, factor, &product)) throw SizeError("a size exceeds 2^63");
  return product;
}

inline int64_t checked_sum(std::initializer_list<int64_t> terms) {
  int64_t sum = 0;
  for (const int64_t term : terms)
    if (__builtin_add_overflow(sum, term, &sum)) throw SizeError("a size exceeds 2^63");
  return sum;
}

}  // namespace npeff
