// Memory: sizes in arithmetic that notices when a number does not fit, arrays that start on a cache line, and the size of
// the cache.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <new>
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

// An uninitialised array.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T) + 64, std::align_val_t{64}))) {}
  ~Aligned() { ::operator delete(data_, std::align_val_t{64}); }
  Aligned(Aligned&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Aligned& operator=(Aligned&&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Bytes of a core's own second-level cache; 512 KiB when the system does not say.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size >= 1 << 17) return size;
#endif
  return 1 << 19;
}

}  // namespace npeff
