// 16-bit floats as they lie in memory, and their way to float32: all arithmetic is done there.
#pragma once

#include "common/host_device.h"

namespace npeff {

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
