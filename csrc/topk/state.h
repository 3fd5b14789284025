// What the blocks of the streaming top-k (blocks.h) share: selections in device memory, a push, the key of a given rank,
// and the narrowing to the k best.
#pragma once

#include "common/block.h"
#include "common/csr.h"
#include "topk/order.h"

namespace npeff {

// Of zeros when nothing was pushed.
struct SelectorState {
  int64_t size;    // candidates held (beyond the capacity: counted, but not written)
  int64_t seen;    // entries pushed
  int64_t before;  // candidates before the push under way
  Threshold threshold, threshold_before;
  int64_t guessed;  // whether threshold is a guess that has to be checked
};

// n running selections in memory that the caller gives, full of zeros, and does not read.
struct DeviceSelectors {
  int64_t n, k, capacity;
  int64_t keep_zeros;
  SelectorState* states;  // (n,)
  int64_t* index;         // (n, capacity)
  uint32_t* bits;         // (n, capacity)

  static NPEFF_INLINE int64_t capacity_for(int64_t k) { return 4 * k + 16384; }
  NPEFF_INLINE DeviceSelectors(void* memory, int64_t n, int64_t k, bool keep_zeros)
      : n(n), k(k), capacity(capacity_for(k)), keep_zeros(keep_zeros),
        states(static_cast<SelectorState*>(memory)), index(reinterpret_cast<int64_t*>(states + n)),
        bits(reinterpret_cast<uint32_t*>(index + n * capacity)) {}

  NPEFF_INLINE int64_t limit() const { return 2 * k + 8192; }     // most candidates between pushes
  NPEFF_INLINE int64_t most_kept() const { return k + k / 16; }   // most candidates before a guess
};

template <class T>
struct Push {
  const T* x;              // (n_rows, width), `stride` entries apart
  int64_t n_rows, width, stride;
  const int64_t* targets;  // (n_rows,) selector of each row
  const int64_t* bases;    // (n_rows,) flat index of column 0
  RowOrder rows;           // by selector

  // One entry as the bits of a float32.
  NPEFF_INLINE uint32_t bits(int64_t row, int64_t column) const { return bit_cast<uint32_t>(widen(x[row * stride + column])); }
};

// Where a ranking was cut: `upto` keys are ≤ key, `below` of them surely smaller; upto > rank only if keys are equal.
struct Cut {
  uint64_t key;
  int64_t below, upto;
};

template <int threads>
struct CutShared {
  static constexpr int buckets = 2048;
  int64_t bucket, below, upto;
  uint32_t counts[buckets];
  union {
    uint32_t scan[2][threads];
    int64_t ends[threads];
  };
};

// The cut at the rank-th smallest (from 1) of the keys of the entries i < n with chosen(i), which are at least `rank`.
// Keys are below 2^63.
template <class Block, class Chosen, class Key>
NPEFF_INLINE Cut cut_at(const Block& block, CutShared<Block::threads>& s, int64_t n, int64_t rank, Chosen chosen, Key key) {
  constexpr int threads = Block::threads, buckets = CutShared<threads>::buckets, each_has = buckets / threads;
  static_assert(buckets % threads == 0, "buckets fall to threads in equal parts");
  constexpr int at_once = 8;
  const auto in_batches = [&](int t, auto take) {  // loads run ahead of the atomics
    for (int64_t start = t; start < n; start += at_once * threads) {
      int64_t keys[at_once];
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q) {
        const int64_t i = start + q * threads;
        keys[q] = i < n && chosen(i) ? static_cast<int64_t>(key(i)) : -1;
      }
NPEFF_UNROLL
      for (int q = 0; q < at_once; ++q)
        if (keys[q] >= 0) take(keys[q]);
    }
  };
  typename Block::template Local<int64_t> lowest(block), highest(block);
  block.each([&](int t) {
    int64_t least = INT64_MAX, most = 0;
    in_batches(t, [&](int64_t k) {
      least = k < least ? k : least;
      most = k > most ? k : most;
    });
    lowest[t] = least;
    highest[t] = -most;
  });
  int64_t least = lowest_of(block, s.ends, lowest), most = -lowest_of(block, s.ends, highest), below = 0;
  for (;;) {
    int shift = 0;
    while ((most - least) >> shift >= buckets) ++shift;
    block.each([&](int t) {
      for (int b = t; b < buckets; b += threads) s.counts[b] = 0;
    });
    block.each([&](int t) {
      in_batches(t, [&](int64_t k) {
        if (k >= least && k <= most) Block::add(&s.counts[(k - least) >> shift], 1u);
      });
    });
    typename Block::template Local<uint32_t> before(block);
    block.each([&](int t) {
      before[t] = 0;
      for (int b = 0; b < each_has; ++b) before[t] += s.counts[t * each_has + b];
    });
    exclusive_scan(block, s.scan, before);
    block.each([&](int t) {
      int64_t sum = below + before[t];
      for (int b = t * each_has; b < (t + 1) * each_has; ++b) {
        const int64_t next = sum + s.counts[b];
        if (sum < rank && next >= rank) {
          s.bucket = b;
          s.below = sum;
          s.upto = next;
        }
        sum = next;
      }
    });
    const int64_t bucket = block.uniform(s.bucket), upto = block.uniform(s.upto);
    below = block.uniform(s.below);
    const int64_t first = least + (bucket << shift), last = first + (int64_t{1} << shift) - 1;
    if (shift == 0 || upto == rank) return {static_cast<uint64_t>(last < most ? last : most), below, upto};
    least = first;
    most = last < most ? last : most;
  }
}

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
  once(block, [&] { s.size = 0; });
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
