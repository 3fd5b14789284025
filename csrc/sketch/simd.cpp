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

// Whole blocks: n of them from block number `block` on; each copy takes as many as the first-level cache holds.
void add_blocks(const SketchRun& run, const float* x, uint64_t block, int64_t n) {
  const uint32_t groups = run.map->groups, begin = run.begin, size = run.end - run.begin;
  const bool all = begin == 0 && run.end == groups * static_cast<uint32_t>(run.map->copies);
  constexpr int64_t at_once = 256;
  for (int64_t first = 0; first < n; first += at_once)
    for (int c = 0; c < run.map->copies; ++c) {
      const uint64_t key = run.map->keys[c];
      const int64_t end = first + at_once < n ? first + at_once : n;
      for (int64_t i = first; i < end; ++i) {
        const uint64_t hash = sketch_hash(key, block + i);
        const uint32_t group = sketch_group(hash, groups) + c * groups;
        if (all || group - begin < size) add_block(x + sketch_lanes * i, hash, run.sums + int64_t{sketch_lanes} * group);
      }
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
  add_blocks(run, x, block, whole);
  if (left % sketch_lanes)
    add_edge(run, x + sketch_lanes * whole, block + whole, 0, static_cast<uint32_t>(left % sketch_lanes));
}

using Floats = Simd<float>;

// One level within a vector: a + b in the lanes without the bit `step`, a - b in those with it.
template <int step, int... lane>
inline Floats::Vec butterfly(Floats::Vec v, std::integer_sequence<int, lane...>) {
  if constexpr (step < Floats::lanes) {
    constexpr Floats::Vec sign = {(lane & step ? -1.0f : 1.0f)...};
    v = shuffle<(lane ^ step)...>(v, v) + v * sign;
  }
  return v;
}

// ---- outer products: four rows side by side --------------------------------------------------------------------------
//
// Four rows are sketched together, bucket by bucket: their additions to a bucket are one of a quad of floats, and two
// levels fewer of their transforms lie within a vector. They are steps of one column, or where there are fewer steps, of
// several columns.

constexpr int lanes = Floats::lanes, quads = lanes / 4;
constexpr int64_t in_cache = 32768 / vector_bytes;  // vectors that are transformed within the first-level cache
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Signs __attribute__((vector_size(16)));

// Lane r of quad m of v[q] changes places with lane q of quad m of v[r].
inline void transpose(Floats::Vec* v) {
  exchange<1>(v[0], v[1], each_lane);
  exchange<1>(v[2], v[3], each_lane);
  exchange<2>(v[0], v[2], each_lane);
  exchange<2>(v[1], v[3], each_lane);
}

// Lane r of quad m of v goes to place r·quads + m.
template <int... lane>
inline Floats::Vec in_order(Floats::Vec v, std::integer_sequence<int, lane...>) {
  return shuffle<(4 * (lane % quads) + lane / quads)...>(v, v);
}

// out (d, 4) = the count sketches of four rows (n,).
void scatter_rows(const float* const* rows, int64_t n, const uint32_t* places, int64_t d, float* out) {
  constexpr Signs signs[2] = {{0, 0, 0, 0}, {1u << 31, 1u << 31, 1u << 31, 1u << 31}};
  for (int64_t i = 0; i < 4 * d; i += lanes) Floats::store(out + i, Floats::Vec{});
  const auto add = [&](uint32_t place, const float* four) {
    auto* const own = reinterpret_cast<Quad*>(out + 4 * int64_t{place >> 1});
    *own += (Quad)((Signs)*reinterpret_cast<const Quad*>(four) ^ signs[place & 1]);
  };
  alignas(vector_bytes) float four[4 * lanes];
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Floats::Vec v[4] = {Floats::load(rows[0] + i), Floats::load(rows[1] + i), Floats::load(rows[2] + i), Floats::load(rows[3] + i)};
    transpose(v);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) Floats::store(four + q * lanes, v[q]);
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) add(places[i + l], four + l % 4 * lanes + l / 4 * 4);
  }
  for (; i < n; ++i) {
    for (int r = 0; r < 4; ++r) four[r] = rows[r][i];
    add(places[i], four);
  }
}

// Levels of transforms, x (n, lanes), between vectors step, …, radix/2·step apart; before them those within a vector.
template <int radix, bool within>
void levels(float* x, int64_t n, int64_t step) {
  for (int64_t i = 0; i < n; i += radix * step)
    for (int64_t j = i; j < i + step; ++j) {
      Floats::Vec v[radix];
#pragma GCC unroll 8
      for (int k = 0; k < radix; ++k) {
        v[k] = Floats::load(x + (j + k * step) * lanes);
        if constexpr (within) v[k] = butterfly<8>(butterfly<4>(v[k], each_lane), each_lane);
      }
#pragma GCC unroll 4
      for (int apart = 1; apart < radix; apart *= 2)
#pragma GCC unroll 8
        for (int k = 0; k < radix; ++k)
          if (!(k & apart)) {
            const Floats::Vec a = v[k], b = v[k + apart];
            v[k] = a + b;
            v[k + apart] = a - b;
          }
#pragma GCC unroll 8
      for (int k = 0; k < radix; ++k) Floats::store(x + (j + k * step) * lanes, v[k]);
    }
}

void levels_from(float* x, int64_t n, int64_t step) {
  while (step < n) {
    const int64_t left = n / step;
    if (left >= 8) levels<8, false>(x, n, step);
    else if (left == 4) levels<4, false>(x, n, step);
    else levels<2, false>(x, n, step);
    step *= left >= 8 ? 8 : left;
  }
}

// The Walsh–Hadamard transforms of four rows side by side, x (d, 4), unnormalised; d a power of two from 16 on.
void transform_rows(float* x, int64_t d) {
  const int64_t n = d / quads, part = n < in_cache ? n : in_cache;
  for (int64_t i = 0; i < n; i += part) {
    const int64_t radix = part < 8 ? 4 : 8;
    if (radix == 4) levels<4, true>(x + i * lanes, part, 1);
    else levels<8, true>(x + i * lanes, part, 1);
    levels_from(x + i * lanes, part, radix);
  }
  levels_from(x, n, part);
}

// out (n, d) = the first n of four rows side by side, x (d, 4).
void to_rows(const float* x, int64_t d, int64_t n, float* out) {
  for (int64_t k = 0; k < d; k += lanes) {
    Floats::Vec v[4];
    for (int q = 0; q < 4; ++q) v[q] = Floats::load(x + 4 * k + q * lanes);
    transpose(v);
    for (int64_t r = 0; r < n; ++r) Floats::store(out + r * d + k, in_order(v[r], each_lane));
  }
}

// products (columns, d), as add_products leaves them, become d times the sketches; space (d, 4).
void transform_back(float* products, int64_t d, int64_t columns, float* space) {
  for (int64_t column = 0; column < columns; column += 4) {
    float* const own = products + column * d;
    const int64_t n = columns - column < 4 ? columns - column : 4;
    for (int64_t k = 0; k < d; k += lanes) {
      Floats::Vec v[4] = {};
      for (int64_t r = 0; r < n; ++r) v[r] = Floats::load(own + r * d + k);
      transpose(v);
      for (int q = 0; q < 4; ++q) Floats::store(space + 4 * k + q * lanes, v[q]);
    }
    transform_rows(space, d);
    to_rows(space, d, n, own);
  }
}

// products (columns, d) += the products of four rows' transforms, summed over the steps of each column, both (d, 4). Of each
// `lanes` entries, entry 4m + q is that of bucket q·quads + m.
void add_products(const float* delta, const float* input, int64_t d, const SketchGroups& grouping, int64_t columns,
                  float* products) {
  for (int64_t k = 0; k < d; k += lanes) {
    Floats::Vec v[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      v[q] = Floats::load(delta + 4 * k + q * lanes) * Floats::load(input + 4 * k + q * lanes);
    if (grouping.steps == 4) {  // sums over the lanes of each quad
      exchange<1>(v[0], v[1], each_lane);
      exchange<1>(v[2], v[3], each_lane);
      Floats::Vec some = v[0] + v[1], others = v[2] + v[3];
      exchange<2>(some, others, each_lane);
      Floats::store(products + k, Floats::load(products + k) + (some + others));
      continue;
    }
    transpose(v);
    for (int64_t r = 0; r < columns * grouping.steps; ++r) {
      float* const own = products + r / grouping.steps * d + k;
      Floats::store(own, Floats::load(own) + v[r]);
    }
  }
}

bool any_nonzero(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] != 0) return true;
  return false;
}

void outer(const SketchOuter& run) {
  const SketchGroups grouping(run);
  const int64_t d = run.d, size = 4 * d;
  float *const inputs = run.space, *const one = inputs + grouping.at_once * size;
  float* const nothing = one + size;  // a row of zeros
  for (int64_t i = 0; i < larger(run.n_delta, run.n_input); ++i) nothing[i] = 0;
  for (int64_t i = 0; i < run.columns * d; ++i) run.products[i] = 0;
  const float* rows[4];
  for (int64_t first = 0; first < grouping.groups; first += grouping.at_once) {
    const int64_t end = first + grouping.at_once < grouping.groups ? first + grouping.at_once : grouping.groups;
    for (int64_t group = first; group < end; ++group) {
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t step = group * grouping.steps + r % grouping.steps;
        rows[r] = step < run.t ? run.input + step * run.n_input : nothing;
      }
      scatter_rows(rows, run.n_input, run.input_places, d, inputs + (group - first) * size);
      transform_rows(inputs + (group - first) * size, d);
    }
    for (int64_t column = 0; column < run.columns; column += grouping.columns) {
      const int64_t left = run.columns - column, n = left < grouping.columns ? left : grouping.columns;
      for (int64_t group = first; group < end; ++group) {
        // Beyond a place, a causal model's steps have no δ; but 0 · ∞ shows, and each entry of a transform sums all others.
        const float* const four = inputs + (group - first) * size;
        bool filled = (four[0] + four[1] + four[2] + four[3]) * 0 != 0;
        for (int64_t r = 0; r < 4; ++r) {
          const int64_t step = group * grouping.steps + r % grouping.steps, own = r / grouping.steps;
          const bool there = step < run.t && own < n;
          rows[r] = there ? run.delta + (step * run.columns + column + own) * run.n_delta : nothing;
          filled = filled || any_nonzero(rows[r], run.n_delta);
        }
        if (!filled) continue;
        scatter_rows(rows, run.n_delta, run.delta_places, d, one);
        transform_rows(one, d);
        if (run.t == 1) {  // nothing to sum
          for (int64_t i = 0; i < size; i += lanes) Floats::store(one + i, Floats::load(one + i) * Floats::load(inputs + i));
          transform_rows(one, d);
          to_rows(one, d, n, run.products + column * d);
          continue;
        }
        add_products(one, inputs + (group - first) * size, d, grouping, n, run.products + column * d);
      }
    }
  }
  if (run.t > 1) transform_back(run.products, d, run.columns, one);
}

const SketchSimd sketch_simd{sketch_run, outer};

}  // namespace npeff::NPEFF_ISA
