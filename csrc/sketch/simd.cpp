#include "common/simd.h"
#include "sketch/simd.h"

namespace npeff::NPEFF_ISA {
namespace {

// Adds one whole block, x (16,), to the 16 sums of its group; signs and order of lanes as the hash says.
inline void add_block(const float* x, uint64_t hash, double* sums) {
  const uint32_t signs = sketch_signs(hash), turn = sketch_turn(hash);
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i v = _mm512_loadu_si512(x);
  v = _mm512_mask_xor_epi32(v, static_cast<__mmask16>(signs), v, _mm512_set1_epi32(INT32_MIN));
  v = _mm512_permutexvar_epi32(_mm512_xor_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(turn))), v);
  const __m256 low = _mm512_castps512_ps256(_mm512_castsi512_ps(v));
  const __m256 high = _mm512_extractf32x8_ps(_mm512_castsi512_ps(v), 1);
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(high)));
#elif defined(__AVX2__)
  const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1), top = _mm256_set1_epi32(INT32_MIN);
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i at = _mm256_xor_si256(lane, _mm256_set1_epi32(static_cast<int32_t>(turn & 7)));
  for (uint32_t half = 0; half < 2; ++half) {
    const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(signs >> (8 * half))), bit);
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * half));
    v = _mm256_xor_si256(v, _mm256_and_si256(_mm256_cmpeq_epi32(mine, bit), top));
    const __m256 turned = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(v, at));
    double* out = sums + 8 * (half ^ (turn >> 3));
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(turned));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(turned, 1));
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_loadu_pd(out), low));
    _mm256_storeu_pd(out + 4, _mm256_add_pd(_mm256_loadu_pd(out + 4), high));
  }
#else
  for (uint32_t l = 0; l < sketch_lanes; ++l) {
    const double value = x[l];
    sums[l ^ turn] += (signs >> l) & 1 ? -value : value;
  }
#endif
}

// Lanes first … first + n − 1 of a block, from x[0] on.
inline void add_part(const float* x, uint32_t first, uint32_t n, uint64_t hash, double* sums) {
  const uint32_t signs = sketch_signs(hash), turn = sketch_turn(hash);
  for (uint32_t l = first; l < first + n; ++l) {
    const double value = x[l - first];
    sums[l ^ turn] += (signs >> l) & 1 ? -value : value;
  }
}

// Whole blocks: n of them from block number `block` on.
template <int copies>
void add_blocks(const SketchRun& run, const float* x, uint64_t block, int64_t n) {
  const uint32_t groups = run.map->groups, begin = run.begin, size = run.end - run.begin;
  const bool all = begin == 0 && run.end == groups * copies;
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < copies; ++c) {
      const uint64_t hash = sketch_hash(run.map->keys[c], block + i);
      const uint32_t group = sketch_group(hash, groups) + c * groups;
      if (all || group - begin < size) add_block(x + sketch_lanes * i, hash, run.sums + int64_t{sketch_lanes} * group);
    }
}

void add_edge(const SketchRun& run, const float* x, uint64_t block, uint32_t first, uint32_t n) {
  for (int c = 0; c < run.map->copies; ++c) {
    const uint64_t hash = sketch_hash(run.map->keys[c], block);
    const uint32_t group = sketch_group(hash, run.map->groups) + c * run.map->groups;
    if (group - run.begin < run.end - run.begin) add_part(x, first, n, hash, run.sums + int64_t{sketch_lanes} * group);
  }
}

}  // namespace

void sketch_run(const SketchRun& run) {
  const float* x = run.x;
  int64_t left = run.n;
  auto block = static_cast<uint64_t>(run.base) / sketch_lanes;
  const auto first = static_cast<uint32_t>(run.base % sketch_lanes);
  if (first && left) {
    const int64_t n = left < sketch_lanes - first ? left : sketch_lanes - first;
    add_edge(run, x, block++, first, static_cast<uint32_t>(n));
    x += n;
    left -= n;
  }
  const int64_t whole = left / sketch_lanes;
  switch (run.map->copies) {
    case 1: add_blocks<1>(run, x, block, whole); break;
    case 2: add_blocks<2>(run, x, block, whole); break;
    case 4: add_blocks<4>(run, x, block, whole); break;
    default:
      for (int64_t i = 0; i < whole; ++i) add_edge(run, x + sketch_lanes * i, block + i, 0, sketch_lanes);
  }
  if (left % sketch_lanes)
    add_edge(run, x + sketch_lanes * whole, block + whole, 0, static_cast<uint32_t>(left % sketch_lanes));
}

// In place, unnormalised: butterflies level by level, beyond a vector's width two levels at a time.
void walsh_hadamard(float* x, int64_t d) {
  using S = Simd<float>;
  int64_t step = 1;
  for (; step < S::lanes && step < d; step *= 2)
    for (int64_t i = 0; i < d; i += 2 * step)
      for (int64_t j = i; j < i + step; ++j) {
        const float a = x[j], b = x[j + step];
        x[j] = a + b;
        x[j + step] = a - b;
      }
  while (step < d) {
    if (4 * step <= d) {
      for (int64_t i = 0; i < d; i += 4 * step)
        for (int64_t j = i; j < i + step; j += S::lanes) {
          const S::Vec a = S::load(x + j), b = S::load(x + j + step);
          const S::Vec c = S::load(x + j + 2 * step), e = S::load(x + j + 3 * step);
          const S::Vec ab = a + b, a_b = a - b, ce = c + e, c_e = c - e;
          S::store(x + j, ab + ce);
          S::store(x + j + step, a_b + c_e);
          S::store(x + j + 2 * step, ab - ce);
          S::store(x + j + 3 * step, a_b - c_e);
        }
      step *= 4;
    } else {
      for (int64_t j = 0; j < step; j += S::lanes) {
        const S::Vec a = S::load(x + j), b = S::load(x + j + step);
        S::store(x + j, a + b);
        S::store(x + j + step, a - b);
      }
      step *= 2;
    }
  }
}

const SketchSimd sketch_simd{sketch_run, walsh_hadamard};

}  // namespace npeff::NPEFF_ISA
