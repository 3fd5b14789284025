// Steps of a block: the key of a given rank.
#pragma once

#include "common/block.h"

namespace npeff {

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

}  // namespace npeff
