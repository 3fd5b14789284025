#include <cstring>

#include "topk/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace npeff::NPEFF_ISA {
namespace {

constexpr uint32_t magnitude = 0x7fffffffu;

inline uint32_t bits_of(const float* x) {
  uint32_t b;
  std::memcpy(&b, x, sizeof b);
  return b;
}

// Positions within x of what was appended, and how many.
struct Hits {
  uint32_t* bits;
  int32_t* at;
  int64_t n;
};

// No branch on the answer: a candidate is written always, and kept by moving on.
inline void scan_one(const float* x, int32_t i, int32_t floor, Hits& hits) {
  const uint32_t b = bits_of(x + i);
  hits.bits[hits.n] = b;
  hits.at[hits.n] = i;
  hits.n += static_cast<int32_t>(b & magnitude) > floor;
}

#if defined(__AVX512F__)

constexpr int step = 16;

inline void scan_step(const float* x, int32_t i, int32_t floor, Hits& hits) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i v = _mm512_loadu_si512(x + i);
  const __mmask16 above =
      _mm512_cmpgt_epi32_mask(_mm512_and_si512(v, _mm512_set1_epi32(magnitude)), _mm512_set1_epi32(floor));
  _mm512_storeu_si512(hits.bits + hits.n, _mm512_maskz_compress_epi32(above, v));
  _mm512_storeu_si512(hits.at + hits.n, _mm512_maskz_compress_epi32(above, _mm512_add_epi32(lane, _mm512_set1_epi32(i))));
  hits.n += _mm_popcnt_u32(above);
}

#elif defined(__AVX2__)

constexpr int step = 32;

inline void scan_step(const float* x, int32_t i, int32_t floor, Hits& hits) {
  const __m256i mask = _mm256_set1_epi32(magnitude), bar = _mm256_set1_epi32(floor);
  uint32_t above = 0;
  for (int j = 0; j < 4; ++j) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8 * j));
    const __m256i greater = _mm256_cmpgt_epi32(_mm256_and_si256(v, mask), bar);
    above |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(greater))) << (8 * j);
  }
  for (; above; above &= above - 1) {
    const int32_t at = i + __builtin_ctz(above);
    hits.bits[hits.n] = bits_of(x + at);
    hits.at[hits.n++] = at;
  }
}

#else

constexpr int step = 16;

inline void scan_step(const float* x, int32_t i, int32_t floor, Hits& hits) {
  int32_t b[step];
  std::memcpy(b, x + i, sizeof b);
  int32_t above = 0;
  for (int j = 0; j < step; ++j) above |= floor - (b[j] & static_cast<int32_t>(magnitude));  // sign bit: above
  if (above >= 0) return;
  for (int j = 0; j < step; ++j) scan_one(x, i + j, floor, hits);
}

#endif

}  // namespace

int64_t scan(const float* x, int64_t n, int64_t base, int32_t floor, uint32_t* bits, int64_t* index) {
  int32_t at[scan_chunk + scan_slack];
  Hits hits{bits, at, 0};
  const auto end = static_cast<int32_t>(n);
  int32_t i = 0;
  for (; i + step <= end; i += step) {
    __builtin_prefetch(x + i + 1024);
    scan_step(x, i, floor, hits);
  }
  for (; i < end; ++i) scan_one(x, i, floor, hits);
  for (int64_t j = 0; j < hits.n; ++j) index[j] = base + at[j];
  return hits.n;
}

Magnitudes magnitudes(const uint32_t* bits, int64_t n) {
  uint32_t least = magnitude, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = bits[i] & magnitude;
    least = m < least ? m : least;
    largest = m > largest ? m : largest;
  }
  return {least, largest};
}

int64_t keep(uint32_t* bits, int64_t* index, int64_t n, uint32_t threshold, int64_t last) {
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i bar = _mm512_set1_epi32(static_cast<int32_t>(threshold)), end = _mm512_set1_epi64(last);
  for (; i + 16 <= n; i += 16) {  // reads run ahead of writes of as many entries, so in place is safe
    const __m512i b = _mm512_loadu_si512(bits + i), m = _mm512_and_si512(b, _mm512_set1_epi32(magnitude));
    const __m512i low = _mm512_loadu_si512(index + i), high = _mm512_loadu_si512(index + i + 8);
    const auto early = static_cast<__mmask16>(_mm512_cmple_epi64_mask(low, end) | _mm512_cmple_epi64_mask(high, end) << 8);
    const auto stay = static_cast<__mmask16>(_mm512_cmpgt_epi32_mask(m, bar) | (_mm512_cmpeq_epi32_mask(m, bar) & early));
    // Compressed in registers and stored whole: compressing stores take a hundred cycles on Zen 4.
    const __mmask8 first = static_cast<__mmask8>(stay), second = static_cast<__mmask8>(stay >> 8);
    _mm512_storeu_si512(bits + kept, _mm512_maskz_compress_epi32(stay, b));
    _mm512_storeu_si512(index + kept, _mm512_maskz_compress_epi64(first, low));
    _mm512_storeu_si512(index + kept + _mm_popcnt_u32(first), _mm512_maskz_compress_epi64(second, high));
    kept += _mm_popcnt_u32(stay);
  }
#endif
  for (; i < n; ++i) {
    const uint32_t b = bits[i], m = b & magnitude;
    const int64_t at = index[i];
    bits[kept] = b;
    index[kept] = at;
    kept += (m > threshold) | ((m == threshold) & (at <= last));
  }
  return kept;
}

void multiply(float factor, const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = factor * x[i];
}

const TopkSimd topk_simd{scan, magnitudes, keep, multiply};

}  // namespace npeff::NPEFF_ISA
