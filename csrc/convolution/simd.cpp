// The inner loops of convolution_gradients: sums over positions, kept in registers, of inputs times vectors of δ.
#include <cstring>

#include "common/simd.h"
#include "convolution/simd.h"

namespace npeff::NPEFF_ISA {
namespace {

using S = Simd<float>;
constexpr int W = S::lanes;

#if defined(__AVX512F__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

// Vectors whose sums for `taps` taps fit into the registers, beside the vectors themselves and one input.
constexpr int fitting(int taps) {
  const int most = (registers - 1) / (taps + 1);
  return most < 1 ? 1 : most > 6 ? 6 : most;
}

template <int taps, int vectors>
void sums(const PatchRun& run) {
  S::Vec sum[taps][vectors];
#pragma GCC unroll 8
  for (int k = 0; k < taps; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[k][v] = run.add ? S::load(run.sums + k * run.stride + v * W) : S::Vec{};
  const float* delta = run.panel;
  for (int64_t y = 0; y < run.rows; ++y) {
    const float* under = run.inputs + y * run.row_step;
    for (int64_t x = 0; x < run.width; ++x, under += run.step, delta += vectors * W) {
      S::Vec d[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) d[v] = S::load(delta + v * W);
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) {
        const float a = under[k * run.dilation];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[k][v] += a * d[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < taps; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) S::store(run.sums + k * run.stride + v * W, sum[k][v]);
}

template <int taps, int... vectors>
void choose(const PatchRun& run, std::integer_sequence<int, vectors...>) {
  ((run.vectors == vectors + 1 ? sums<taps, vectors + 1>(run) : void()), ...);
}

template <int... taps>
void choose_taps(const PatchRun& run, std::integer_sequence<int, taps...>) {
  ((run.taps == taps + 1 ? choose<taps + 1>(run, std::make_integer_sequence<int, fitting(taps + 1)>()) : void()), ...);
}

// Transposes a W × W block: in each stage, rows i and i + h exchange the parts that lie in each other's half.
template <int h>
void transpose(S::Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & h)) exchange<h>(v[i], v[i + h], each_lane);
  if constexpr (h > 1) transpose<h / 2>(v);
}

}  // namespace

int patch_vectors(int taps) { return fitting(taps); }

void patch_sums(const PatchRun& run) { choose_taps(run, std::make_integer_sequence<int, 7>()); }

void transpose_rows(const float* const* rows, int count, int64_t n, float* out, int64_t stride) {
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    S::Vec v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = i < count && rows[i] ? S::load(rows[i] + j) : S::Vec{};
    transpose<W / 2>(v);
    for (int i = 0; i < W; ++i) {
      if (count == W) S::store(out + (j + i) * stride, v[i]);
      else std::memcpy(out + (j + i) * stride, &v[i], count * sizeof(float));
    }
  }
  for (; j < n; ++j)
    for (int i = 0; i < count; ++i) out[j * stride + i] = rows[i] ? rows[i][j] : 0;
}

const ConvolutionSimd convolution_simd{vector_bytes, patch_vectors, patch_sums, transpose_rows};

}  // namespace npeff::NPEFF_ISA
