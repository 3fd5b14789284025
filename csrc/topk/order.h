// What it means to be among the k largest, and the guess at the k-th from a sample: for all implementations of topk.h.
#pragma once

#include "common/host_device.h"

namespace npeff {

// Magnitudes are the bits of |x| as an integer; NaN and infinities stand above all numbers.
constexpr uint32_t topk_magnitude = 0x7fffffffu, topk_infinity = 0x7f800000u;
constexpr int64_t topk_anywhere = int64_t{1} << 62;  // threshold index that admits ties at any place

// An entry is admitted when its magnitude is larger, or equal and its flat index lower.
struct Threshold {
  uint32_t magnitude;
  int64_t index;
};

NPEFF_INLINE Threshold first_threshold(bool keep_zeros) { return {0, keep_zeros ? topk_anywhere : -1}; }

NPEFF_INLINE bool admits(const Threshold& threshold, uint32_t magnitude, int64_t index) {
  return magnitude > threshold.magnitude || (magnitude == threshold.magnitude && index < threshold.index);
}

// ---- the guess: `size` of `total` entries, one at a random place in each of `size` equal stretches

// Whether it can pay, for the k largest of `total`.
NPEFF_INLINE bool guess_pays(int64_t total, int64_t k) { return total >= 1 << 15 && total / 4 >= k; }

// About 64 entries of the sample among the k largest give the k-th well enough; each costs a cache line.
NPEFF_INLINE int64_t sample_size(int64_t total, int64_t k) {
  const int64_t size = 64 * (total / k);
  return size < 512 ? 512 : size > 8192 ? 8192 : size;
}

NPEFF_INLINE int64_t sample_place(int64_t i, int64_t size, int64_t total) {
  const double within = static_cast<double>(mix((static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u) >> 40) * 0x1p-24;
  const auto at = static_cast<int64_t>((static_cast<double>(i) + within) * static_cast<double>(total) / static_cast<double>(size));
  return at < total ? at : total - 1;
}

// Rank in the sample that a little more than k of all entries reach, most probably; 0 when the sample is too small.
NPEFF_INLINE int64_t sample_rank(int64_t size, int64_t total, int64_t k) {
  const double expected = static_cast<double>(k) * static_cast<double>(size) / static_cast<double>(total);
  const auto rank = static_cast<int64_t>(expected + 3.0 * __builtin_sqrt(expected) + 3.0);
  return rank > size / 2 ? 0 : rank;
}

}  // namespace npeff
