#include "sketch/sketch.h"

#include <memory>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "sketch/simd.h"

namespace npeff {

static constexpr int64_t small = 1 << 14;  // elements below which a second thread is not worth waking

void sketch_rows(const SketchMap& map, const float* x, int64_t n_rows, int64_t width, int64_t stride, const int64_t* bases,
                 const RowOrder& rows, double* sums, int threads) {
  const std::vector<int64_t> targets = rows.used();
  const auto n_targets = static_cast<int64_t>(targets.size());
  const int64_t all = int64_t{map.groups} * map.copies;
  if (n_rows * width < small) threads = 1;
  // With few targets, several threads share one: each takes the blocks that fall on its own groups of buckets, so that
  // no two add to one bucket and every bucket is given its terms in the same order.
  const int64_t parts = n_targets >= 4 * threads ? 1 : threads;
  parallel_for(n_targets * parts, threads, [&](int64_t task) {
    const int64_t target = targets[task / parts];
    const Range mine = part_of(all, task % parts, parts);
    for (int64_t i = rows.starts[target]; i < rows.starts[target + 1]; ++i) {
      const int64_t row = rows.order[i];
      sketch_simd().run({&map, x + row * stride, width, bases[row], sums + target * map.d, static_cast<uint32_t>(mine.begin),
                         static_cast<uint32_t>(mine.end)});
    }
  });
}

void sketch_matrix(int64_t d, double weight, const float* x, int64_t n_rows, int64_t width, int64_t columns, int64_t stride,
                   const uint32_t* row_places, const uint32_t* column_places, const int64_t* first, const RowOrder& rows,
                   double* sums, int threads) {
  const std::vector<int64_t> targets = rows.used();
  parallel_for(static_cast<int64_t>(targets.size()), n_rows * width < small ? 1 : threads, [&](int64_t task) {
    const int64_t target = targets[task];
    double* own = sums + target * d;
    for (int64_t i = rows.starts[target]; i < rows.starts[target + 1]; ++i) {
      const int64_t at = rows.order[i];
      for (int64_t row = 0; row < width / columns; ++row) {
        const uint32_t place = row_places[first[at] + row];
        const float* values = x + at * stride + row * columns;
        for (int64_t j = 0; j < columns; ++j) {
          const uint32_t both = place ^ column_places[j];  // signs multiply, buckets combine
          own[both >> 1] += (both & 1 ? -weight : weight) * static_cast<double>(values[j]);
        }
      }
    }
  });
}

void sketch_outer(int64_t d, double weight, const float* delta, const float* input, int64_t b, int64_t t, int64_t columns,
                  int64_t n_delta, int64_t n_input, const uint32_t* delta_places, const uint32_t* input_places,
                  double* sums, int threads) {
  if (columns == 0 || n_delta == 0 || n_input == 0) return;  // however many steps there are
  const int64_t n_products = checked_product({d, columns});
  parallel_for(b, threads, [&](int64_t i) {
    const double share = weight / static_cast<double>(d);
    SketchOuter run{d, t, columns, delta + i * t * columns * n_delta, input + i * t * n_input, n_delta, n_input,
                    delta_places, input_places, nullptr, nullptr};
    const std::unique_ptr<float[]> memory(new float[n_products + SketchGroups(run).space]);
    run.products = memory.get();
    run.space = run.products + n_products;
    sketch_simd().outer(run);
    double* own = sums + i * n_products;
    for (int64_t k = 0; k < n_products; ++k) own[k] += share * static_cast<double>(run.products[k]);
  });
}

}  // namespace npeff
