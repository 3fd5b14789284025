// Arrays that start on a cache line, and the size of the cache.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <new>

namespace npeff {

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
