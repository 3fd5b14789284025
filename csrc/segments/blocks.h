// segments.h by blocks: a thread takes a few neighbouring columns of one example, neighbours take the next.
#pragma once

#include "common/block.h"
#include "segments/segments.h"

namespace npeff {

// The columns of one thread, `together` of them, of which rows are aligned to as many entries: step(row's entries, at) for
// each row of their example.
template <class T, int together>
struct SegmentColumns {
  const T* p;              // (R, r)
  const int64_t* offsets;  // (n + 1,)
  int64_t r;

  template <class Step>
  NPEFF_INLINE void each_row(int64_t at, const Step& step) const {
    const int64_t i = at / r, j = at % r, end = offsets[i + 1];
NPEFF_UNROLL_4
    for (int64_t row = offsets[i]; row < end; ++row) {
      T entries[together];
      load_together<together>(p + row * r + j, entries);
      step(entries, row * r + j);
    }
  }
};

// out (n, r)
template <class T, int together>
struct CrossColumns {
  using Sum = typename SumOf<T>::type;
  SegmentColumns<T, together> columns;
  const T* w;  // there is none
  Sum* out;

  template <class Block>
  NPEFF_INLINE void at(int64_t i) const {
    Sum sums[together] = {};
    columns.each_row(i * together, [&](const T* entries, int64_t) { add_squares(entries, together, sums); });
    store_together<together>(sums, out + i * together);
  }
};

// w (n, r), out (R, r): may be p when Sum is T
template <class T, int together>
struct SpreadMultiplyColumns {
  using Sum = typename SumOf<T>::type;
  SegmentColumns<T, together> columns;
  const T* w;
  Sum* out;

  template <class Block>
  NPEFF_INLINE void at(int64_t i) const {
    T weights[together];
    load_together<together>(w + i * together, weights);
    columns.each_row(i * together, [&](const T* entries, int64_t at) {
      Sum products[together];
      multiply_row(weights, entries, together, products);
      store_together<together>(products, out + at);
    });
  }
};

// Columns<T, together> with as many columns at once as r and the pointers' alignment allow.
template <template <class, int> class Columns, class T, class Queue>
void run_segments(const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, typename SumOf<T>::type* out, Queue& queue) {
  constexpr int most = 16 / sizeof(typename SumOf<T>::type);
  if (n * r == 0) return;
  const auto addresses = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(w);
  if (r % most == 0 && addresses % 16 == 0) run_elements(queue, n * r / most, Columns<T, most>{{p, offsets, r}, w, out});
  else run_elements(queue, n * r, Columns<T, 1>{{p, offsets, r}, w, out});
}

template <class T, class Queue>
void cross(const T* p, const int64_t* offsets, int64_t n, int64_t r, typename SumOf<T>::type* out, Queue& queue) {
  run_segments<CrossColumns>(static_cast<const T*>(nullptr), p, offsets, n, r, out, queue);
}

template <class T, class Queue>
void spread_multiply(const T* w, const T* p, const int64_t* offsets, int64_t n, int64_t r, typename SumOf<T>::type* out, Queue& queue) {
  run_segments<SpreadMultiplyColumns>(w, p, offsets, n, r, out, queue);
}

}  // namespace npeff
