// The two-sided map of sketch.h by blocks: bucket(i, j) = bucket(i) xor bucket(j), signs multiplied.
//
// A block takes a stretch of a row of x, which is some rows of the matrix end to end, and adds its entries as integers,
// scaled so that the largest of the stretch has 2^38 steps: addition of integers has no order, and the error is that of
// float64 for sums of up to 2^24 such entries. Stretches become float32, and are added in float64, in order, by
// SketchGather. Where an entry is not finite, the stretch's buckets become NaN.
#pragma once

#include "sketch/blocks.h"

namespace npeff {

template <class T>
struct SketchMatrixBlocks {
  static constexpr int threads = 256;
  struct Shared {
    int64_t largest;
    int64_t sums[1];  // as many as the block has buckets
  };
  const T* x;  // (n_rows, width), `stride` entries apart
  int64_t width, stride, columns, d;
  const uint32_t *row_places, *column_places;  // bucket·2 + (1 where the sign is −)
  const int64_t* first;                        // (n_rows,): the matrix row that each row of x begins with
  double weight;
  SketchPlan plan;
  float* sums;  // (n_rows, stretches, d)

  int64_t shared_bytes() const { return sizeof(Shared) + plan.part_size * sizeof(int64_t); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t at = id / plan.parts % plan.stretches, row = id / plan.parts / plan.stretches;
    const int64_t first_bucket = id % plan.parts * plan.part_size;
    const int64_t n_buckets = first_bucket + plan.part_size < d ? plan.part_size : d - first_bucket;
    const int64_t from = at * plan.stretch, to = from + plan.stretch < width ? from + plan.stretch : width;
    const T* const own = x + row * stride;
    block.each([&](int t) {
      if (t == 0) s.largest = 0;
      for (int64_t i = t; i < n_buckets; i += threads) s.sums[i] = 0;
    });
    block.each([&](int t) {
      int64_t largest = 0;
      for (int64_t e = from + t; e < to; e += threads)
        largest = larger<int64_t>(largest, bit_cast<uint32_t>(widen(own[e])) & 0x7fffffffu);
      Block::raise(&s.largest, largest);
    });
    const int64_t largest = block.uniform(s.largest);
    const bool finite = largest < 0x7f800000;
    // 2^(38 − exponent of the largest): by the bits of a double, whose exponents reach further.
    const double scale = bit_cast<double>((1023 + 38 - (larger<int64_t>(largest >> 23, 1) - 127)) << 52);
    block.each([&](int t) {
      if (!finite) return;
      int64_t i = first[row] + (from + t) / columns, j = (from + t) % columns;
      const int64_t down = threads / columns, right = threads % columns;
      for (int64_t e = from + t; e < to; e += threads) {
        const uint32_t both = row_places[i] ^ column_places[j];
        const int64_t bucket = int64_t{both >> 1} - first_bucket;
        const auto step = static_cast<int64_t>(static_cast<double>(widen(own[e])) * scale);
        if (bucket >= 0 && bucket < n_buckets) Block::add(&s.sums[bucket], both & 1 ? -step : step);
        i += down;
        j += right;
        if (j >= columns) {
          j -= columns;
          ++i;
        }
      }
    });
    block.each([&](int t) {
      float* const out = sums + (row * plan.stretches + at) * d + first_bucket;
      for (int64_t i = t; i < n_buckets; i += threads)
        out[i] = finite ? static_cast<float>(weight * static_cast<double>(s.sums[i]) / scale) : bit_cast<float>(0x7fc00000u);
    });
  }
};

template <class T, class Queue>
void sketch_matrix(int64_t d, double weight, const T* x, int64_t n_rows, int64_t width, int64_t columns, int64_t stride,
                   const uint32_t* row_places, const uint32_t* column_places, const int64_t* first, const RowOrder& rows,
                   double* sums, Queue& queue) {
  if (n_rows == 0 || width == 0 || rows.n_targets == 0) return;
  SketchPlan plan = sketch_parts(queue, d, sizeof(typename SketchMatrixBlocks<T>::Shared), sizeof(int64_t));
  cut_rows(queue, plan, d, n_rows, width, 1);
  sketch_stretches<SketchMatrixBlocks<T>>(queue, plan, d, n_rows, rows, sums, x, width, stride, columns, d, row_places,
                                          column_places, first, weight);
}

}  // namespace npeff
