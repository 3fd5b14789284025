// The blocks of the streaming top-k (topk.h) for devices with many processors. A push is three kernels:
//
//   prepare  one block per selector: guesses a threshold from a sample of what comes and what is held
//   scan     many blocks: appends what beats the threshold to the selector's candidates, in any order
//   settle   one block per selector: if the guess was too high, or more came than there is room for, what was appended
//            is dropped and this block alone goes over the input again, selecting whenever its buffer is full; at last
//            it selects if there are too many candidates for the next push
//
// so that the host need not know how a guess turned out. Order among the candidates never matters: an entry is told
// from all others by its flat index.
#pragma once

#include "npeff/topk_scan_block.h"

namespace npeff {

struct TopkReset {
  static constexpr int threads = 256;
  struct Shared { char none; };
  Selectors selectors;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t i = id * threads + t;
      const Threshold first = first_threshold(selectors.keep_zeros != 0);
      if (i < selectors.n) selectors.states[i] = {0, 0, 0, first, first, 0};
      if (i < 2) selectors.status[i] = -1;
    });
  }
};

struct TopkPrepare {
  static constexpr int threads = topk_threads;
  struct Shared {
    NarrowShared narrow;
    uint32_t sample[8192];
  };
  Selectors selectors;
  Push push;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    SelectorState& state = selectors.states[id];
    uint32_t* const bits = selectors.bits + id * selectors.capacity;
    int64_t* const index = selectors.index + id * selectors.capacity;
    const int64_t first = push.starts[id], last = push.starts[id + 1], k = selectors.k;
    const int64_t length = (last - first) * push.width, size = block.uniform(state.size), seen = block.uniform(state.seen);
    block.each([&](int t) {
      for (int64_t i = first + t; i < last; i += threads) push.bad[push.order[i]] = topk_all_finite;
      if (t == 0) {
        state.before = size;
        state.seen = seen + length;
        state.guessed = 0;
      }
    });
    // Among `length` new entries as large as those seen, about k·length/seen will beat the threshold: with few of
    // them a guess costs more than it saves.
    const int64_t total = length + size;
    if (length < seen || length == 0 || !guess_pays(total, k)) return;
    const int64_t n = sample_size(total, k), rank = sample_rank(n, total, k);
    if (rank == 0) return;
    block.each([&](int t) {
      for (int64_t i = t; i < n; i += threads) {
        const int64_t at = sample_place(i, n, total);
        const uint32_t found = at < length ? push.bits(push.order[first + at / push.width], at % push.width) : bits[at - length];
        s.sample[i] = found & topk_magnitude;
      }
    });
    const Cut cut = cut_at(block, s.narrow.cut, n, rank, [](int64_t) { return true; },
                           [&](int64_t i) { return static_cast<uint64_t>(topk_magnitude - s.sample[i]); });
    const auto guess = topk_magnitude - static_cast<uint32_t>(cut.key);
    const Threshold before = block.uniform(state.threshold);
    if (guess >= topk_infinity || guess <= before.magnitude) return;
    const bool full = size > selectors.most_kept();
    const Threshold narrowed = full ? narrow(block, s.narrow, bits, index, size, k) : before;
    block.each([&](int t) {
      if (t > 0) return;
      if (full) state.size = state.before = k;
      state.threshold_before = narrowed;
      // What is held sets a threshold of its own, which may be higher.
      state.guessed = guess > narrowed.magnitude;
      state.threshold = state.guessed ? Threshold{guess, topk_anywhere} : narrowed;
    });
  }
};

struct TopkSettle {
  static constexpr int threads = topk_threads;
  struct Shared {
    NarrowShared narrow;
    int64_t count;
  };
  Selectors selectors;
  Push push;
  int64_t shared_bytes() const { return sizeof(Shared); }

  // Blocks 0 … n − 1: the selectors. Block n: the status.
  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    if (id == selectors.n) return report(block, s);
    SelectorState& state = selectors.states[id];
    uint32_t* const bits = selectors.bits + id * selectors.capacity;
    int64_t* const index = selectors.index + id * selectors.capacity;
    const SelectorState now = block.uniform(state);
    int64_t size = now.size;
    Threshold threshold = now.threshold;
    bool again = size > selectors.capacity;
    if (!again && now.guessed && size - now.before < selectors.k) {
      block.each([&](int t) {
        if (t == 0) s.count = 0;
      });
      block.each([&](int t) {
        int64_t reach = 0;
        for (int64_t i = t; i < now.before; i += threads) reach += (bits[i] & topk_magnitude) >= threshold.magnitude;
        Block::add(&s.count, reach);
      });
      if (size - now.before + block.uniform(s.count) < selectors.k) {
        again = true;
        threshold = now.threshold_before;
      }
    }
    if (again) size = go_over(block, s, id, bits, index, now.before, threshold);
    if (size > selectors.limit()) {
      threshold = narrow(block, s.narrow, bits, index, size, selectors.k);
      size = selectors.k;
    }
    block.each([&](int t) {
      if (t > 0) return;
      state.size = size;
      state.threshold = threshold;
      state.guessed = 0;
    });
  }

 private:
  // The push once more, by this block alone, after the `size` candidates that stood before it.
  template <class Block>
  NPEFF_INLINE int64_t go_over(const Block& block, Shared& s, int64_t id, uint32_t* bits, int64_t* index, int64_t size,
                               Threshold& threshold) const {
    constexpr int64_t tile = 4 * threads;
    for (int64_t r = push.starts[id]; r < push.starts[id + 1]; ++r) {
      const int64_t row = push.order[r], base = push.bases[row];
      for (int64_t start = 0; start < push.width; start += tile) {
        if (size + tile > selectors.capacity) {
          threshold = narrow(block, s.narrow, bits, index, size, selectors.k);
          size = selectors.k;
        }
        block.each([&](int t) {
          if (t == 0) s.count = size;
        });
        block.each([&](int t) {
          for (int64_t column = start + t; column < start + tile && column < push.width; column += threads) {
            const uint32_t found = push.bits(row, column);
            if (!admits(threshold, found & topk_magnitude, base + column)) continue;
            const int64_t to = Block::add(&s.count, int64_t{1});
            bits[to] = found;
            index[to] = base + column;
          }
        });
        size = block.uniform(s.count);
      }
    }
    return size;
  }

  template <class Block>
  NPEFF_INLINE void report(const Block& block, Shared& s) const {
    block.each([&](int t) {
      if (t == 0) s.count = INT64_MAX;
    });
    block.each([&](int t) {
      for (int64_t row = t; row < push.n_rows; row += threads)
        if (push.bad[row] != topk_all_finite) Block::lower(&s.count, row);
    });
    const int64_t row = block.uniform(s.count);
    block.each([&](int t) {
      if (t > 0 || row == INT64_MAX || selectors.status[0] >= 0) return;
      selectors.status[0] = row;
      selectors.status[1] = push.bad[row];
    });
  }
};

// counts (n,); indices and values (n, k), by index or by descending magnitude, −1 and 0 behind the last. Empties the
// selectors, but leaves the status.
struct TopkFinish {
  static constexpr int threads = topk_threads;
  union Shared {
    NarrowShared narrow;
    SortShared<threads> sort;
  };
  Selectors selectors;
  int64_t by_magnitude;
  int64_t* counts;
  int64_t* indices;
  float* values;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    SelectorState& state = selectors.states[id];
    uint32_t* bits = selectors.bits + id * selectors.capacity;
    int64_t* index = selectors.index + id * selectors.capacity;
    uint32_t* other_bits = bits + 2 * selectors.k;
    int64_t* other_index = index + 2 * selectors.k;
    const int64_t k = selectors.k;
    int64_t n = block.uniform(state.size);
    if (n > k) {
      narrow(block, s.narrow, bits, index, n, k);
      n = k;
    }
    const auto sort = [&](auto key) {
      if (!sort_pairs(block, s.sort, bits, index, other_bits, other_index, n, key)) return;
      uint32_t* const b = bits;
      int64_t* const x = index;
      bits = other_bits;
      index = other_index;
      other_bits = b;
      other_index = x;
    };
    sort([](uint32_t, int64_t i) { return i; });
    if (by_magnitude) sort([](uint32_t b, int64_t) { return static_cast<int64_t>(topk_magnitude - (b & topk_magnitude)); });
    block.each([&](int t) {
      for (int64_t i = t; i < k; i += threads) {
        indices[id * k + i] = i < n ? index[i] : -1;
        values[id * k + i] = i < n ? bit_cast<float>(bits[i]) : 0.0f;
      }
      if (t > 0) return;
      const Threshold first = first_threshold(selectors.keep_zeros != 0);
      counts[id] = n;
      state = {0, 0, 0, first, first, 0};
    });
  }
};

// ---- what the host does -------------------------------------------------------------------------------------------

template <class Queue>
void topk_reset(Queue& queue, const Selectors& selectors) {
  queue.run(ceil_div<int64_t>(selectors.n + 2, TopkReset::threads), TopkReset{selectors});
}

template <class T, class Queue>
void topk_scan(Queue& queue, const Selectors& selectors, const Push& push) {
  using Scan = TopkScan<T>;
  // About 16 blocks per processor, of whole tiles.
  const int64_t groups = ceil_div<int64_t>(push.width + Scan::together - 1, Scan::together), tile = Scan::threads * Scan::loads;
  const int64_t share = ceil_div(groups * push.n_rows, 16 * queue.processors());
  const int64_t groups_each = ceil_div(share < groups ? share : groups, tile) * tile, chunks = ceil_div(groups, groups_each);
  queue.run(push.n_rows * chunks, Scan{selectors, push, chunks, groups_each});
}

template <class Queue>
void topk_push(Queue& queue, const Selectors& selectors, const Push& push) {
  if (push.n_rows == 0 || push.width == 0) return;
  queue.run(selectors.n, TopkPrepare{selectors, push});
  switch (push.type) {
    case PushType::float16: topk_scan<Half>(queue, selectors, push); break;
    case PushType::bfloat16: topk_scan<Bfloat16>(queue, selectors, push); break;
    default: topk_scan<float>(queue, selectors, push);
  }
  queue.run(selectors.n + 1, TopkSettle{selectors, push});
}

template <class Queue>
void topk_finish(Queue& queue, const Selectors& selectors, bool by_magnitude, int64_t* counts, int64_t* indices, float* values) {
  if (selectors.n > 0) queue.run(selectors.n, TopkFinish{selectors, by_magnitude, counts, indices, values});
}

}  // namespace npeff
