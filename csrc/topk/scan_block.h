// The scan of the streaming top-k (blocks.h): a block reads a stretch of a row, 16 entries per thread at a time,
// collects what beats the threshold in shared memory, and appends it to the selector's candidates when there is much.
#pragma once

#include "topk/state.h"

namespace npeff {

template <class T>
struct TopkScan {
  static constexpr int threads = 256, together = 16 / sizeof(T), loads = 16 / together, tile = 16 * threads;
  static constexpr uint32_t flush_above = 1024;
  struct Shared {
    int64_t base;
    uint32_t n;
    uint32_t bits[tile + flush_above], at[tile + flush_above];
  };
  DeviceSelectors selectors;
  Push<T> push;
  int64_t chunks, groups_each;  // blocks per row, and how many groups of `together` entries each takes

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t row = id / chunks;
    const T* const x = push.x + row * push.stride;
    // Groups are aligned in memory; the first may begin before the row, the last end behind it.
    const auto skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(T) % together);
    const int64_t from = id % chunks * groups_each, all = ceil_div<int64_t>(push.width + skew, together);
    const int64_t to = from + groups_each < all ? from + groups_each : all, origin = from * together - skew;
    if (from >= to) return;
    const int64_t target = push.targets[row], base = push.bases[row];
    SelectorState& state = selectors.states[target];
    uint32_t* const bits = selectors.bits + target * selectors.capacity;
    int64_t* const index = selectors.index + target * selectors.capacity;
    const Threshold threshold = state.threshold;
    once(block, [&] { s.n = 0; });
    for (int64_t start = from; start < to; start += threads * loads) {
      block.each([&](int t) {
        T raw[loads][together];
NPEFF_UNROLL
        for (int q = 0; q < loads; ++q) {
          const int64_t group = start + q * threads + t, column = group * together - skew;
          if (group < to && column >= 0 && column + together <= push.width) {
            load_together<together>(x + column, raw[q]);
          } else {
NPEFF_UNROLL
            for (int v = 0; v < together; ++v)
              raw[q][v] = group < to && column + v >= 0 && column + v < push.width ? x[column + v] : T{};
          }
        }
NPEFF_UNROLL
        for (int q = 0; q < loads; ++q) {
NPEFF_UNROLL
          for (int v = 0; v < together; ++v) {
            const auto found = bit_cast<uint32_t>(widen(raw[q][v]));
            const uint32_t magnitude = found & topk_magnitude;
            if (magnitude < threshold.magnitude) continue;
            const int64_t group = start + q * threads + t, column = group * together - skew + v;
            if (!admits(threshold, magnitude, base + column)) continue;
            if (group >= to || column < 0 || column >= push.width) continue;
            const uint32_t place = Block::add(&s.n, 1u);
            s.bits[place] = found;
            s.at[place] = static_cast<uint32_t>(column - origin);
          }
        }
      });
      const uint32_t n = block.uniform(s.n);
      if (n == 0 || (n <= flush_above && start + threads * loads < to)) continue;
      once(block, [&] {
        s.base = Block::add(&state.size, static_cast<int64_t>(n));
        s.n = 0;
      });
      const int64_t first = block.uniform(s.base);
      block.each([&](int t) {
        for (int64_t i = t; i < n && first + i < selectors.capacity; i += threads) {
          bits[first + i] = s.bits[i];
          index[first + i] = base + origin + s.at[i];
        }
      });
    }
  }
};

}  // namespace npeff
