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

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014, variant 13 of Stafford).
NPEFF_INLINE uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

template <class I> NPEFF_INLINE I ceil_div(I a, I b) { return (a + b - 1) / b; }

// ---- 16-bit floats as they lie in memory, and their way to float32: all arithmetic is done there

struct Half { uint16_t bits; };      // IEEE binary16
struct Bfloat16 { uint16_t bits; };  // the upper half of a float32

NPEFF_INLINE float widen(float x) { return x; }

NPEFF_INLINE float widen(Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

NPEFF_INLINE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float tiny = static_cast<float>(rest) * 0x1p-24f;  // zero and subnormal
  return sign ? -tiny : tiny;
#endif
}

// `count` consecutive entries from an address that is a multiple of their bytes together (at most 16).
template <int count, class T>
NPEFF_INLINE void load_together(const T* from, T* to) {
  struct alignas(sizeof(T) * count) Pack { T entries[count]; };
  const Pack pack = *reinterpret_cast<const Pack*>(from);
  for (int i = 0; i < count; ++i) to[i] = pack.entries[i];
}

// The other way; on the device in one access.
template <int count, class T>
NPEFF_INLINE void store_together(const T* from, T* to) {
  struct alignas(sizeof(T) * count) Pack { T entries[count]; };
  Pack pack;
  for (int i = 0; i < count; ++i) pack.entries[i] = from[i];
  *reinterpret_cast<Pack*>(to) = pack;
}

}  // namespace npeff
