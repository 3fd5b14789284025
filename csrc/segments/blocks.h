// segments.h by blocks: a thread takes a few neighbouring columns of one example, neighbours take the next.
#pragma once

#include "common/block.h"
#include "segments/segments.h"

namespace npeff {

// p (R, r), offsets (n + 1,), out (n, r); rows aligned to `together` entries
template <class T, int together>
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
      const int64_t at = (id * threads + t) * together;
      if (at >= n * r) return;
      const int64_t i = at / r, j = at % r, end = offsets[i + 1];
      Sum sums[together] = {};
NPEFF_UNROLL_4
      for (int64_t row = offsets[i]; row < end; ++row) {
        T entries[together];
        load_together<together>(p + row * r + j, entries);
        add_squares(entries, together, sums);
      }
      store_together<together>(sums, out + at);
    });
  }
};

// w (n, r), p (R, r), offsets (n + 1,), out (R, r): may be p when Sum is T; rows aligned to `together` entries
template <class T, int together>
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
      const int64_t at = (id * threads + t) * together;
      if (at >= n * r) return;
      const int64_t i = at / r, j = at % r, end = offsets[i + 1];
      T weights[together];
      load_together<together>(w + at, weights);
      for (int64_t row = offsets[i]; row < end; ++row) {
        T entries[together];
        Sum products[together];
        load_together<together>(p + row * r + j, entries);
        multiply_row(weights, entries, together, products);
        store_together<together>(products, out + row * r + j);
      }
    });
  }
};

// Blocks<T, together> with as many columns at once as r and the pointers' alignment allow.
template <template <class, int> class Blocks, class T, class Queue, class... Pointers>
void run_segments(Queue& queue, const int64_t* offsets, int64_t n, int64_t r, typename SumOf<T>::type* out, Pointers... in) {
  constexpr int most = 16 / sizeof(typename SumOf<T>::type);
  if (n * r == 0) return;
  const auto run = [&](const auto& blocks, int together) {
    queue.run(ceil_div<int64_t>(n * r / together, blocks.threads), blocks);
  };
  const uintptr_t places = (reinterpret_cast<uintptr_t>(out) | ... | reinterpret_cast<uintptr_t>(in));
  if (r % most == 0 && places % 16 == 0) run(Blocks<T, most>{in..., offsets, n, r, out}, most);
  else run(Blocks<T, 1>{in..., offsets, n, r, out}, 1);
}

}  // namespace npeff
