#include <utility>

#include "common/simd.h"
#include "spmm/simd.h"

namespace npeff::NPEFF_ISA {
namespace {

using S = Simd<float>;
constexpr int most = 8;  // vectors of sums held in registers

// `count` vectors of out, at offsets; the sums stay in registers over all entries.
template <int count, class Index>
void columns(const Index* indices, const float* values, int64_t n, const float* dense, int64_t stride,
             const int64_t* offsets, float* out, bool add) {
  constexpr int64_t ahead = 16;  // entries between a prefetch and its use: rows of dense come in no order
  S::Vec sum[count];
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) sum[v] = add ? S::load(out + offsets[v]) : S::Vec{};
  for (int64_t e = 0; e < n; ++e) {
    const float* row = dense + static_cast<int64_t>(indices[e]) * stride;
    if (e + ahead < n) {
      const float* next = dense + static_cast<int64_t>(indices[e + ahead]) * stride;
#pragma GCC unroll 8
      for (int v = 0; v < count; ++v) __builtin_prefetch(next + offsets[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < count; ++v) sum[v] += values[e] * S::load(row + offsets[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) S::store(out + offsets[v], sum[v]);
}

template <class Index, int... counts>
void choose(int count, const Index* indices, const float* values, int64_t n, const float* dense, int64_t stride,
            const int64_t* offsets, float* out, bool add, std::integer_sequence<int, counts...>) {
  ((count == counts + 1 ? columns<counts + 1>(indices, values, n, dense, stride, offsets, out, add) : void()), ...);
}

template <class Index>
void row(const Index* indices, const float* values, int64_t n, const float* dense, int64_t stride, int64_t width,
         float* out, bool add) {
  if (width < S::lanes) {
    for (int64_t c = 0; c < width; ++c) {
      float sum = add ? out[c] : 0;
      for (int64_t e = 0; e < n; ++e) sum += values[e] * dense[static_cast<int64_t>(indices[e]) * stride + c];
      out[c] = sum;
    }
    return;
  }
  // Vectors in near-equal groups. The last vector ends with the row and may overlap the one before it, which is of
  // the same group: both are loaded before either is stored, and hold the same sums where they overlap.
  const int64_t vectors = (width + S::lanes - 1) / S::lanes, groups = (vectors + most - 1) / most;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = vectors * group / groups;
    const auto count = static_cast<int>(vectors * (group + 1) / groups - first);
    int64_t offsets[most];
    for (int v = 0; v < count; ++v) {
      const int64_t at = (first + v) * S::lanes;
      offsets[v] = at < width - S::lanes ? at : width - S::lanes;
    }
    choose(count, indices, values, n, dense, stride, offsets, out, add, std::make_integer_sequence<int, most>());
  }
}

}  // namespace

const SpmmSimd spmm_simd{row<int32_t>, row<int64_t>};

}  // namespace npeff::NPEFF_ISA
