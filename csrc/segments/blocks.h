// The sums of squares of segments.h by blocks: a thread takes a few neighbouring columns of one example, neighbours take the
// next.
#pragma once

#include "common/block.h"

namespace npeff {

// A thread's columns of one example, `together` of them, of which rows are aligned to as many entries.
template <class T, int together>
struct CrossColumns {
  const T* p;              // (R, r)
  const int64_t* offsets;  // (n + 1,)
  int64_t r;
  T* out;                  // (n, r)

  template <class Block>
  NPEFF_INLINE void at(int64_t thread) const {
    const int64_t at = thread * together, i = at / r, j = at % r, end = offsets[i + 1];
    T sums[together] = {};
NPEFF_UNROLL_4
    for (int64_t row = offsets[i]; row < end; ++row) {
      T entries[together];
      load_together<together>(p + row * r + j, entries);
      for (int c = 0; c < together; ++c) sums[c] += entries[c] * entries[c];
    }
    store_together<together>(sums, out + at);
  }
};

// With as many columns at once as r and the pointers' alignment allow.
template <class T, class Queue>
void cross(const T* p, const int64_t* offsets, int64_t n, int64_t r, T* out, Queue& queue) {
  constexpr int most = 16 / sizeof(T);
  if (n * r == 0) return;
  const auto addresses = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(p);
  if (r % most == 0 && addresses % 16 == 0) run_elements(queue, n * r / most, CrossColumns<T, most>{p, offsets, r, out});
  else run_elements(queue, n * r, CrossColumns<T, 1>{p, offsets, r, out});
}

}  // namespace npeff
