// segments.h by blocks: a thread takes one column of one example, neighbours take neighbouring columns.
#pragma once

#include "npeff/block.h"
#include "npeff/segment_rows.h"

namespace npeff {

// p (R, r), offsets (n + 1,), out (n, r)
template <class T>
struct CrossBlocks {
  using Sum = typename SumOf<T>::type;
  static constexpr int threads = 256;
  struct Shared { char none; };
  const T* p;
  const int64_t* offsets;
  int64_t n, r;
  Sum* out;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t at = id * threads + t;
      if (at >= n * r) return;
      const int64_t i = at / r, j = at % r, first = offsets[i];
      Sum sum = 0;
      for (int64_t row = first; row < offsets[i + 1]; ++row) add_squares(p + row * r + j, 1, &sum);
      out[at] = sum;
    });
  }
};

// w (n, r), p (R, r), offsets (n + 1,), out (R, r): may be p when Sum is T
template <class T>
struct SpreadMultiplyBlocks {
  using Sum = typename SumOf<T>::type;
  static constexpr int threads = 256;
  struct Shared { char none; };
  const T *w, *p;
  const int64_t* offsets;
  int64_t n, r;
  Sum* out;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t at = id * threads + t;
      if (at >= n * r) return;
      const int64_t i = at / r, j = at % r, first = offsets[i];
      for (int64_t row = first; row < offsets[i + 1]; ++row) multiply_row(w + at, p + row * r + j, 1, out + row * r + j);
    });
  }
};

template <class Queue, class Blocks>
void run_segments(Queue& queue, const Blocks& blocks) {
  if (blocks.n * blocks.r > 0) queue.run(ceil_div<int64_t>(blocks.n * blocks.r, Blocks::threads), blocks);
}

}  // namespace npeff
