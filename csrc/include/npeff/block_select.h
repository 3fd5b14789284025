// Steps of a block: the key of a given rank, and a stable sort.
#pragma once

#include "npeff/block.h"

namespace npeff {

// Where a ranking was cut: `upto` keys are ≤ key, `below` of them surely smaller; upto > rank only if keys are equal.
struct Cut {
  uint64_t key;
  int64_t below, upto;
};

template <int threads>
struct CutShared {
  static constexpr int buckets = 2048;
  int64_t least, most, bucket, below, upto;
  uint32_t counts[buckets];
  uint32_t scan[2][threads];
};

// The cut at the rank-th smallest (from 1) of the keys of entries i < n with chosen(i); there are that many. Keys < 2^63.
template <class Block, class Chosen, class Key>
NPEFF_INLINE Cut cut_at(const Block& block, CutShared<Block::threads>& s, int64_t n, int64_t rank, Chosen chosen, Key key) {
  constexpr int threads = Block::threads, buckets = CutShared<threads>::buckets, each_has = buckets / threads;
  static_assert(buckets % threads == 0, "buckets fall to threads in equal parts");
  block.each([&](int t) {
    if (t == 0) {
      s.least = INT64_MAX;
      s.most = 0;
      s.below = 0;
    }
  });
  block.each([&](int t) {
    int64_t least = INT64_MAX, most = 0;
    for (int64_t i = t; i < n; i += threads) {
      if (!chosen(i)) continue;
      const auto k = static_cast<int64_t>(key(i));
      least = k < least ? k : least;
      most = k > most ? k : most;
    }
    Block::lower(&s.least, least);
    Block::raise(&s.most, most);
  });
  int64_t least = block.uniform(s.least), most = block.uniform(s.most), below = 0;
  for (;;) {
    int shift = 0;
    while ((most - least) >> shift >= buckets) ++shift;
    block.each([&](int t) {
      for (int b = t; b < buckets; b += threads) s.counts[b] = 0;
    });
    block.each([&](int t) {
      for (int64_t i = t; i < n; i += threads) {
        if (!chosen(i)) continue;
        const auto k = static_cast<int64_t>(key(i));
        if (k >= least && k <= most) Block::add(&s.counts[(k - least) >> shift], 1u);
      }
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

template <int threads>
struct SortShared {
  static constexpr int digits = 16;
  int64_t least, most;
  uint32_t counts[digits * threads];
  uint32_t scan[2][threads];
};

// Stable sort of the pairs (bits[i], index[i]), i < n < 2^32, by key(bits, index) ascending (< 2^63); a scratch of the
// same size. Returns whether the result is in the scratch.
template <class Block, class Key>
NPEFF_INLINE bool sort_pairs(const Block& block, SortShared<Block::threads>& s, uint32_t* bits, int64_t* index,
                             uint32_t* other_bits, int64_t* other_index, int64_t n, Key key) {
  constexpr int threads = Block::threads, digits = SortShared<threads>::digits;
  block.each([&](int t) {
    if (t == 0) {
      s.least = INT64_MAX;
      s.most = 0;
    }
  });
  block.each([&](int t) {
    int64_t least = INT64_MAX, most = 0;
    for (int64_t i = t; i < n; i += threads) {
      const int64_t k = key(bits[i], index[i]);
      least = k < least ? k : least;
      most = k > most ? k : most;
    }
    Block::lower(&s.least, least);
    Block::raise(&s.most, most);
  });
  const int64_t least = block.uniform(s.least), most = block.uniform(s.most), part = ceil_div<int64_t>(n, threads);
  bool swapped = false;
  for (int shift = 0; n > 1 && shift < 63 && (most - least) >> shift > 0; shift += 4) {
    const auto digit = [&](int64_t i) { return static_cast<int>(((key(bits[i], index[i]) - least) >> shift) % digits); };
    // A thread counts a stretch of the entries; digit by digit, thread by thread, the counts are places in the result.
    block.each([&](int t) {
      for (int d = 0; d < digits; ++d) s.counts[d * threads + t] = 0;
      for (int64_t i = t * part; i < (t + 1) * part && i < n; ++i) ++s.counts[digit(i) * threads + t];
    });
    typename Block::template Local<uint32_t> before(block);
    block.each([&](int t) {
      before[t] = 0;
      for (int d = 0; d < digits; ++d) before[t] += s.counts[t * digits + d];
    });
    exclusive_scan(block, s.scan, before);
    block.each([&](int t) {
      uint32_t sum = before[t];
      for (int d = 0; d < digits; ++d) {
        const uint32_t count = s.counts[t * digits + d];
        s.counts[t * digits + d] = sum;
        sum += count;
      }
    });
    block.each([&](int t) {
      for (int64_t i = t * part; i < (t + 1) * part && i < n; ++i) {
        const uint32_t to = s.counts[digit(i) * threads + t]++;
        other_bits[to] = bits[i];
        other_index[to] = index[i];
      }
    });
    uint32_t* const b = bits;
    int64_t* const x = index;
    bits = other_bits;
    index = other_index;
    other_bits = b;
    other_index = x;
    swapped = !swapped;
  }
  return swapped;
}

}  // namespace npeff
