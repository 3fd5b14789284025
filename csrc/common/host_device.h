// Macros and helpers for code that is compiled for the processor and for CUDA devices.
#pragma once

#include <cstdint>

#ifndef NPEFF_HOST_DEVICE
#ifdef __CUDACC__
#define NPEFF_HOST_DEVICE __host__ __device__
#else
#define NPEFF_HOST_DEVICE
#endif
#endif

// Always inlined: files compiled for different instruction sets must not share copies of a function.
#define NPEFF_INLINE NPEFF_HOST_DEVICE inline __attribute__((always_inline))

// What the device alone does; and unrolling of the next loop there (the processor's compilers know better).
#ifdef __CUDA_ARCH__
#define NPEFF_ON_DEVICE(...) __VA_ARGS__
#define NPEFF_UNROLL _Pragma("unroll")
#define NPEFF_UNROLL_4 _Pragma("unroll 4")
#else
#define NPEFF_ON_DEVICE(...)
#define NPEFF_UNROLL
#define NPEFF_UNROLL_4
#endif

namespace npeff {

// The bits of `from` as another type of the same size.
template <class To, class From>
NPEFF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// The larger of two, and the absolute value: of numbers, and of vectors element by element.
template <class V> NPEFF_INLINE V larger(V a, V b) { return a > b ? a : b; }
template <class V> NPEFF_INLINE V size_of(V a) { return a < 0 ? -a : a; }

NPEFF_INLINE uint32_t bits_set(uint32_t word) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__popc(word));
#else
  return static_cast<uint32_t>(__builtin_popcount(word));
#endif
}

template <class I> NPEFF_INLINE I ceil_div(I a, I b) { return (a + b - 1) / b; }

}  // namespace npeff
