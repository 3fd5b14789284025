// Vectors of the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace npeff::NPEFF_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));
  typedef T Vec __attribute__((vector_size(vector_bytes)));
  typedef T Unaligned __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));

  static Vec load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(T* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

// The lanes of a (0 …) and b (those after a's), in the order given.
template <int... lane, class Vec>
inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  typedef int32_t Order __attribute__((vector_size(vector_bytes)));
  return __builtin_shuffle(a, b, Order{lane...});
#endif
}

constexpr std::make_integer_sequence<int, Simd<float>::lanes> each_lane;

// Lanes of a with the bit `step` change places with those of b without it.
template <int step, int... lane>
inline void exchange(Simd<float>::Vec& a, Simd<float>::Vec& b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = Simd<float>::lanes;
  const Simd<float>::Vec low = shuffle<(lane & step ? lanes + lane - step : lane)...>(a, b);
  b = shuffle<(lane & step ? lanes + lane : lane + step)...>(a, b);
  a = low;
}

// Whether any bit is set.
template <class Vec>
inline bool any_bit(Vec v) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  typedef long long Words __attribute__((vector_size(vector_bytes)));
  const Words w = (Words)v;
  return (w[0] | w[1]) != 0;
#endif
}

}  // namespace npeff::NPEFF_ISA
