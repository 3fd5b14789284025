#include "segments/segments.h"

#include <algorithm>

#include "common/csr.h"
#include "common/parallel.h"

namespace npeff {
namespace {

// Calls body(example) for all examples, those with about as many rows on each thread.
template <class Body>
void for_examples(const int64_t* offsets, int64_t n, int64_t r, int threads, Body body) {
  const std::vector<int64_t> bounds = parts_by_entries(offsets, n, 4 * threads);
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, offsets[n] * r < 1 << 15 ? 1 : threads, [&](int64_t part) {
    for (int64_t i = bounds[part]; i < bounds[part + 1]; ++i) body(i);
  });
}

}  // namespace

void cross(const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out, int threads) {
  for_examples(offsets, n, r, threads, [=](int64_t i) {
    float* sum = out + i * r;
    std::fill_n(sum, r, 0.0f);
    for (int64_t row = offsets[i]; row < offsets[i + 1]; ++row) add_squares(p + row * r, r, sum);
  });
}

void spread_multiply(const float* w, const float* p, const int64_t* offsets, int64_t n, int64_t r, float* out,
                     int threads) {
  for_examples(offsets, n, r, threads, [=](int64_t i) {
    for (int64_t row = offsets[i]; row < offsets[i + 1]; ++row) multiply_row(w + i * r, p + row * r, r, out + row * r);
  });
}

}  // namespace npeff
