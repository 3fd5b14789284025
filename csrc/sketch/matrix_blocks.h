// The two-sided map of sketch.h by blocks: bucket(i, j) = bucket(i) xor bucket(j), signs multiplied.
//
// A block takes a stretch of a row of x, which is some rows of the matrix end to end, and adds its entries as integers,
// scaled so that the largest of the stretch has 2^38 steps: addition of integers has no order. Stretches become float32,
// and are added in float64, in order, by SketchGatherBlocks.
#pragma once

#include "sketch/blocks.h"

namespace npeff {

template <class T>
struct SketchMatrixBlocks {
  static constexpr int threads = 256;
  struct Shared {
    int64_t largest;
    int64_t sums[1];  // (part_buckets,)
  };
  const T* x;  // (n_rows, width), `stride` entries apart
  int64_t n_rows, width, stride, columns, d;
  const uint32_t *row_places, *column_places;  // bucket·2 + (1 where the sign is −)
  const int64_t* first;                        // (n_rows,): the matrix row that each row of x begins with
  double weight;
  int64_t stretches, stretch, parts, part_buckets;
  float* sums;  // (n_rows, stretches, d)

  int64_t shared_bytes() const { return sizeof(Shared) + part_buckets * sizeof(int64_t); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t part = id % parts, at = id / parts % stretches, row = id / parts / stretches;
    const int64_t first_bucket = part * part_buckets;
    const int64_t n_buckets = first_bucket + part_buckets < d ? part_buckets : d - first_bucket;
    const int64_t from = at * stretch, to = from + stretch < width ? from + stretch : width;
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
    const double scale = sketch_step_scale(largest);
    block.each([&](int t) {
      int64_t i = first[row] + (from + t) / columns, j = (from + t) % columns;
      const int64_t down = threads / columns, right = threads % columns;
      for (int64_t e = from + t; finite && e < to; e += threads) {
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
      float* const out = sums + (row * stretches + at) * d + first_bucket;
      for (int64_t i = t; i < n_buckets; i += threads)
        out[i] = finite ? static_cast<float>(weight * static_cast<double>(s.sums[i]) / scale) : bit_cast<float>(0x7fc00000u);
    });
  }
};

template <class Queue, class T>
SketchPlan sketch_matrix_plan(const Queue& queue, int64_t d, int64_t n_rows, int64_t width) {
  using Blocks = SketchMatrixBlocks<T>;
  const int64_t fit = (queue.most_shared_bytes() - static_cast<int64_t>(sizeof(typename Blocks::Shared))) / 8;
  const int64_t parts = ceil_div(d, fit);
  SketchPlan plan{0, 0, parts, ceil_div(d, parts), 0};
  plan.stretch = sketch_stretch(queue, d, n_rows, width);
  plan.stretches = larger<int64_t>(ceil_div(width, plan.stretch), 1);
  plan.workspace = n_rows * plan.stretches * d;
  return plan;
}

// order, starts: rows by target, and within a target by first. workspace: sketch_matrix_plan's.
template <class Queue, class T>
void sketch_matrix_by_blocks(Queue& queue, int64_t d, double weight, const T* x, int64_t n_rows, int64_t width,
                             int64_t stride, int64_t columns, const uint32_t* row_places, const uint32_t* column_places,
                             const int64_t* first, const int64_t* order, const int64_t* starts, int64_t n_targets,
                             float* workspace, double* sums) {
  if (n_rows == 0 || width == 0 || n_targets == 0) return;
  const SketchPlan plan = sketch_matrix_plan<Queue, T>(queue, d, n_rows, width);
  queue.run(n_rows * plan.stretches * plan.parts,
            SketchMatrixBlocks<T>{x, n_rows, width, stride, columns, d, row_places, column_places, first, weight,
                                  plan.stretches, plan.stretch, plan.parts, plan.part_groups, workspace});
  queue.run(ceil_div<int64_t>(n_targets * d, SketchGatherBlocks::threads),
            SketchGatherBlocks{workspace, n_targets, plan.stretches, d, order, starts, sums});
}

}  // namespace npeff
