#include "gram/simd.h"

#include <cmath>

#include "common/simd.h"

namespace npeff::NPEFF_ISA {

using Floats = Simd<float>;
constexpr int lanes = Floats::lanes, together = lanes == 16 ? 4 : 2;  // vectors of one step that fit the registers
constexpr int steps = 4;                                              // steps that are multiplied at a time

inline double sum_of(Floats::Vec v) {
  double sum = 0;
  for (int l = 0; l < lanes; ++l) sum += v[l];
  return sum;
}

// out (t, t): the inner products of the steps x (t, n) below the diagonal, half of them on it, zero above. Returns the
// square of the norm of all inner products.
double half_products(const float* x, int64_t t, int64_t n, float* out) {
  double squares = 0;
  for (int64_t i0 = 0; i0 < t; i0 += steps)
    for (int64_t j0 = 0; j0 < t; j0 += steps) {
      Floats::Vec sums[steps][steps] = {};
      float rest[steps][steps] = {};
      const float *a[steps], *b[steps];
      for (int s = 0; s < steps; ++s) {
        a[s] = x + (i0 + s < t ? i0 + s : t - 1) * n;
        b[s] = x + (j0 + s < t ? j0 + s : t - 1) * n;
      }
      int64_t k = j0 <= i0 ? 0 : n;
      for (; k + lanes <= n; k += lanes) {
        Floats::Vec right[steps];
#pragma GCC unroll 4
        for (int j = 0; j < steps; ++j) right[j] = Floats::load(b[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < steps; ++i) {
          const Floats::Vec left = Floats::load(a[i] + k);
#pragma GCC unroll 4
          for (int j = 0; j < steps; ++j) sums[i][j] += left * right[j];
        }
      }
      for (; k < n; ++k)
        for (int i = 0; i < steps; ++i)
          for (int j = 0; j < steps; ++j) rest[i][j] += a[i][k] * b[j][k];
      for (int i = 0; i < steps && i0 + i < t; ++i)
        for (int j = 0; j < steps && j0 + j < t; ++j) {
          const int64_t row = i0 + i, column = j0 + j;
          const double product = column <= row ? sum_of(sums[i][j]) + rest[i][j] : 0;
          squares += (column < row ? 2 : 1) * product * product;
          out[row * t + column] = static_cast<float>(column == row ? product / 2 : product);
        }
    }
  return squares;
}

// gram (width, width) += delta_uᵀ (half products) delta_t of `vectors` vectors of each step; returns their sum of squares.
//   delta (t, width, ·): steps `down` and columns `right` entries apart; sums (width, lanes)
template <int vectors>
double add_products(const float* half, int64_t stride, const float* delta, int64_t t, int64_t down, int64_t right,
                    int64_t width, float* sums, double* gram) {
  Floats::Vec squares = {};
  for (int64_t r = 0; r < width; ++r) {
    for (int64_t i = 0; i < width * lanes; i += lanes) Floats::store(sums + i, Floats::Vec{});
    for (int64_t first = 0; first < t; first += steps) {
      Floats::Vec v[steps][vectors] = {};
      const float* weights[steps];
      for (int s = 0; s < steps; ++s) weights[s] = half + (first + s < t ? first + s : t - 1) * stride;
      const int64_t n = first + steps < t ? steps : t - first;
      for (int64_t u = 0; u < first + n; ++u) {
        Floats::Vec x[vectors];
#pragma GCC unroll 4
        for (int k = 0; k < vectors; ++k) x[k] = Floats::load(delta + u * down + r * right + k * lanes);
#pragma GCC unroll 4
        for (int s = 0; s < steps; ++s)
#pragma GCC unroll 4
          for (int k = 0; k < vectors; ++k) v[s][k] += x[k] * weights[s][u];
      }
      for (int64_t other = 0; other < width; ++other) {
        Floats::Vec sum = Floats::load(sums + other * lanes);
        const float* const own = delta + first * down + other * right;
        for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
          for (int k = 0; k < vectors; ++k) {
            const Floats::Vec x = Floats::load(own + s * down + k * lanes);
            sum += v[s][k] * x;
            if (other == r) squares += x * x;
          }
        Floats::store(sums + other * lanes, sum);
      }
    }
    for (int64_t other = 0; other < width; ++other) gram[r * width + other] += sum_of(Floats::load(sums + other * lanes));
  }
  return sum_of(squares);
}

void outer_gram(const OuterGram& run) {
  const int64_t t = run.t, width = run.width, down = run.columns * run.n_delta, right = run.n_delta;
  float *const half = run.space, *const sums = half + t * t, *const rest = sums + width * lanes;
  const double norm = std::sqrt(half_products(run.input, t, run.n_input, half));
  for (int64_t slot = 0; slot < run.columns / width; ++slot) {
    const float* const delta = run.delta + slot * width * right;
    double* const gram = run.gram + slot * width * width;
    double squares = 0;
    for (int64_t i = 0; i < width * width; ++i) gram[i] = 0;
    int64_t used = norm * 0 == 0 ? 0 : t;  // beyond a place, a causal model's steps have no δ; but 0 · ∞ shows
    for (int64_t u = t; u > 0 && used == 0; --u)
      for (int64_t i = 0; i < width * right && used == 0; ++i)
        if (delta[(u - 1) * down + i] != 0) used = u;
    int64_t k = 0;
    for (; k + together * lanes <= right; k += together * lanes)
      squares += add_products<together>(half, t, delta + k, used, down, right, width, sums, gram);
    for (; k + lanes <= right; k += lanes)
      squares += add_products<1>(half, t, delta + k, used, down, right, width, sums, gram);
    if (k < right) {
      for (int64_t u = 0; u < used; ++u)
        for (int64_t r = 0; r < width; ++r)
          for (int64_t l = 0; l < lanes; ++l)
            rest[(u * width + r) * lanes + l] = k + l < right ? delta[u * down + r * right + k + l] : 0;
      squares += add_products<1>(half, t, rest, used, width * lanes, lanes, width, sums, gram);
    }
    for (int64_t r = 0; r < width; ++r)
      for (int64_t other = 0; other <= r; ++other) {
        const double both = gram[r * width + other] + gram[other * width + r];
        gram[r * width + other] = gram[other * width + r] = both;
      }
    run.size[slot] = norm * squares;
  }
}

const GramSimd gram_simd{outer_gram};

}  // namespace npeff::NPEFF_ISA
