// What the blocks of the streaming top-k (blocks.h) share: selections in device memory, a push, and the narrowing.
#pragma once

#include "topk/block_select.h"
#include "common/half_types.h"
#include "common/row_order.h"
#include "topk/order.h"

namespace npeff {

struct SelectorState {
  int64_t size;    // candidates held (beyond the capacity: counted, but not written)
  int64_t seen;    // entries pushed
  int64_t before;  // candidates before the push under way
  Threshold threshold, threshold_before;
  int64_t guessed;  // whether threshold is a guess that has to be checked
};

// n running selections in memory that the caller gives and does not read.
struct DeviceSelectors {
  int64_t n, k, capacity;
  int64_t keep_zeros;
  int64_t* status;        // (2,): row and flat index of the first non-finite value pushed since reset; row −1: none
  SelectorState* states;  // (n,)
  int64_t* index;         // (n, capacity)
  uint32_t* bits;         // (n, capacity)

  static NPEFF_INLINE int64_t capacity_for(int64_t k) { return 4 * k + 16384; }
  static NPEFF_INLINE int64_t bytes(int64_t n, int64_t k) {
    return 2 * sizeof(int64_t) + n * static_cast<int64_t>(sizeof(SelectorState)) + n * capacity_for(k) * 12;
  }
  NPEFF_INLINE DeviceSelectors(void* memory, int64_t n, int64_t k, bool keep_zeros)
      : n(n), k(k), capacity(capacity_for(k)), keep_zeros(keep_zeros), status(static_cast<int64_t*>(memory)),
        states(reinterpret_cast<SelectorState*>(status + 2)), index(reinterpret_cast<int64_t*>(states + n)),
        bits(reinterpret_cast<uint32_t*>(index + n * capacity)) {}

  NPEFF_INLINE int64_t limit() const { return 2 * k + 8192; }     // most candidates between pushes
  NPEFF_INLINE int64_t most_kept() const { return k + k / 16; }   // most candidates before a guess
};

constexpr int64_t topk_all_finite = INT64_MAX;

template <class T>
struct Push {
  const T* x;              // (n_rows, width), `stride` entries apart
  int64_t n_rows, width, stride;
  const int64_t* targets;  // (n_rows,) selector of each row
  const int64_t* bases;    // (n_rows,) flat index of column 0
  RowOrder rows;           // by selector
  int64_t* bad;            // (n_rows,) scratch: lowest flat index of a non-finite value

  // One entry as the bits of a float32.
  NPEFF_INLINE uint32_t bits(int64_t row, int64_t column) const { return bit_cast<uint32_t>(widen(x[row * stride + column])); }
};

constexpr int topk_threads = 1024;

struct NarrowShared {
  uint32_t size;
  CutShared<topk_threads> cut;
};

// Keeps the k best of n > k candidates, in any order; the threshold that they set.
template <class Block>
NPEFF_INLINE Threshold narrow(const Block& block, NarrowShared& s, uint32_t* bits, int64_t* index, int64_t n, int64_t k) {
  const Cut by_size = cut_at(block, s.cut, n, k, [](int64_t) { return true; },
                             [&](int64_t i) { return static_cast<uint64_t>(topk_magnitude - (bits[i] & topk_magnitude)); });
  Threshold threshold{topk_magnitude - static_cast<uint32_t>(by_size.key), topk_anywhere};
  if (by_size.upto > k) {  // ties at the threshold: the lowest indices stay
    const Cut by_index = cut_at(block, s.cut, n, k - by_size.below,
                                [&](int64_t i) { return (bits[i] & topk_magnitude) == threshold.magnitude; },
                                [&](int64_t i) { return static_cast<uint64_t>(index[i]); });
    threshold.index = static_cast<int64_t>(by_index.key) + 1;
  }
  constexpr int at_once = 8;
  struct Held { uint32_t bits[at_once]; int64_t index[at_once]; };
  typename Block::template Local<Held> held(block);
  block.each([&](int t) {
    if (t == 0) s.size = 0;
  });
  for (int64_t start = 0; start < n; start += at_once * Block::threads) {  // in place: reads run ahead of writes
    block.each([&](int t) {
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q) {
        const int64_t i = start + q * Block::threads + t;
        if (i >= n) continue;
        held[t].bits[q] = bits[i];
        held[t].index[q] = index[i];
      }
    });
    block.each([&](int t) {
      bool stays[at_once];
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q)
        stays[q] = start + q * Block::threads + t < n && admits(threshold, held[t].bits[q] & topk_magnitude, held[t].index[q]);
      uint32_t count = 0;
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q) count += stays[q];
      if (count == 0) return;
      int64_t to = Block::add(&s.size, count);  // once a thread: all meet at this one number
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q) {
        if (!stays[q]) continue;
        bits[to] = held[t].bits[q];
        index[to++] = held[t].index[q];
      }
    });
  }
  return threshold;
}

}  // namespace npeff
