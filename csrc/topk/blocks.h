// The blocks of the streaming top-k (topk.h) for devices with many processors. A push is three kernels:
//
//   prepare  one block per selector: guesses a threshold from a sample of what comes and what is held
//   scan     many blocks: appends what beats the threshold to the selector's candidates, in any order
//   settle   one block per selector: if the guess was too high, or more came than there is room for, what was appended
//            is dropped and this block alone reads the input again, selecting whenever its buffer is full; at last
//            it selects if there are too many candidates for the next push
//
// so that the host need not know whether a guess was right. The order of the candidates does not matter: an entry is
// identified by its flat index.
#pragma once

#include "topk/scan_block.h"

namespace npeff {

template <class T>
struct TopkPrepare {
  static constexpr int threads = topk_threads;
  struct Shared {
    NarrowShared narrow;
    uint32_t sample[8192];
  };
  DeviceSelectors selectors;
  Push<T> push;

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    SelectorState& state = selectors.states[id];
    uint32_t* const bits = selectors.bits + id * selectors.capacity;
    int64_t* const index = selectors.index + id * selectors.capacity;
    const int64_t first = push.rows.starts[id], last = push.rows.starts[id + 1], k = selectors.k;
    const int64_t length = (last - first) * push.width, size = block.uniform(state.size), seen = block.uniform(state.seen);
    once(block, [&] {
      if (seen == 0) state.threshold = first_threshold(selectors.keep_zeros != 0);
      state.before = size;
      state.seen = seen + length;
      state.guessed = 0;
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
        const uint32_t found = at < length ? push.bits(push.rows.order[first + at / push.width], at % push.width) : bits[at - length];
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
    once(block, [&] {
      if (full) state.size = state.before = k;
      state.threshold_before = narrowed;
      // What is held sets a threshold of its own, which may be higher.
      state.guessed = guess > narrowed.magnitude;
      state.threshold = state.guessed ? Threshold{guess, topk_anywhere} : narrowed;
    });
  }
};

template <class T>
struct TopkSettle {
  static constexpr int threads = topk_threads;
  struct Shared {
    NarrowShared narrow;
    int64_t count;
  };
  DeviceSelectors selectors;
  Push<T> push;

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    SelectorState& state = selectors.states[id];
    uint32_t* const bits = selectors.bits + id * selectors.capacity;
    int64_t* const index = selectors.index + id * selectors.capacity;
    const SelectorState now = block.uniform(state);
    int64_t size = now.size;
    Threshold threshold = now.threshold;
    bool again = size > selectors.capacity;
    if (!again && now.guessed && size - now.before < selectors.k) {
      once(block, [&] { s.count = 0; });
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
    once(block, [&] {
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
    for (int64_t r = push.rows.starts[id]; r < push.rows.starts[id + 1]; ++r) {
      const int64_t row = push.rows.order[r], base = push.bases[row];
      for (int64_t start = 0; start < push.width; start += tile) {
        if (size + tile > selectors.capacity) {
          threshold = narrow(block, s.narrow, bits, index, size, selectors.k);
          size = selectors.k;
        }
        once(block, [&] { s.count = size; });
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
};

// The order by index is made in two kernels: Finish deals the k best out to windows of the index range, in any order
// within one; Order, with many blocks, sets a bit for each index of a window: an entry's place is the number of bits
// before its own. Indices of a selector are distinct.
constexpr int topk_windows = 2048;

// Where Finish leaves, in the unused end of a selector's candidates, what Order needs.
struct TopkDealt {
  int64_t *least, *width, *used, *starts;  // lowest index; of a window; number of windows; (topk_windows + 1,)
  uint32_t* bits;                   // (k,) the entries by window
  int64_t* index;

  NPEFF_INLINE TopkDealt(const DeviceSelectors& selectors, int64_t id)
      : least(selectors.index + id * selectors.capacity + 3 * selectors.k), width(least + 1),
        used(least + 2), starts(least + 3),
        bits(selectors.bits + id * selectors.capacity + 2 * selectors.k),
        index(selectors.index + id * selectors.capacity + 2 * selectors.k) {}
};

// counts (n,). Empties the selectors.
struct TopkFinish {
  static constexpr int threads = topk_threads, each_has = topk_windows / threads, at_once = 8;
  static constexpr int64_t narrowest = 1 << 17;  // entries of a window
  struct Shared {
    NarrowShared narrow;
    uint32_t counts[topk_windows];
  };
  DeviceSelectors selectors;
  int64_t* counts;

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    SelectorState& state = selectors.states[id];
    uint32_t* const bits = selectors.bits + id * selectors.capacity;
    int64_t* const index = selectors.index + id * selectors.capacity;
    const TopkDealt dealt(selectors, id);
    int64_t n = block.uniform(state.size);
    if (n > selectors.k) {
      narrow(block, s.narrow, bits, index, n, selectors.k);
      n = selectors.k;
    }
    typename Block::template Local<int64_t> lowest(block), highest(block);
    block.each([&](int t) {
      for (int w = t; w < topk_windows; w += threads) s.counts[w] = 0;
      int64_t least = INT64_MAX, most = 0;
NPEFF_UNROLL_4
      for (int64_t i = t; i < n; i += threads) {
        least = index[i] < least ? index[i] : least;
        most = index[i] > most ? index[i] : most;
      }
      lowest[t] = least;
      highest[t] = -most;
    });
    const int64_t least = lowest_of(block, s.narrow.cut.ends, lowest), most = -lowest_of(block, s.narrow.cut.ends, highest);
    const int64_t width = n == 0 ? 1 : larger<int64_t>((most - least) / topk_windows + 1, narrowest);
    const auto in_batches = [&](auto take) {  // loads run ahead of the atomics
      block.each([&](int t) {
        for (int64_t start = t; start < n; start += at_once * threads) {
          uint32_t b[at_once];
          int64_t x[at_once];
NPEFF_UNROLL
          for (int q = 0; q < at_once; ++q) {
            const int64_t i = start + q * threads;
            b[q] = i < n ? bits[i] : 0;
            x[q] = i < n ? index[i] : -1;
          }
NPEFF_UNROLL
          for (int q = 0; q < at_once; ++q)
            if (x[q] >= 0) take(b[q], x[q], &s.counts[(x[q] - least) / width]);
        }
      });
    };
    in_batches([&](uint32_t, int64_t, uint32_t* count) { Block::add(count, 1u); });
    typename Block::template Local<uint32_t> before(block);
    block.each([&](int t) {
      before[t] = 0;
      for (int w = 0; w < each_has; ++w) before[t] += s.counts[t * each_has + w];
    });
    exclusive_scan(block, s.narrow.cut.scan, before);
    block.each([&](int t) {
      uint32_t sum = before[t];
      for (int w = t * each_has; w < (t + 1) * each_has; ++w) {
        const uint32_t count = s.counts[w];
        s.counts[w] = sum;
        dealt.starts[w] = sum;
        sum += count;
      }
    });
    in_batches([&](uint32_t b, int64_t x, uint32_t* count) {
      const uint32_t to = Block::add(count, 1u);
      dealt.bits[to] = b;
      dealt.index[to] = x;
    });
    once(block, [&] {
      *dealt.least = least;
      *dealt.width = width;
      *dealt.used = n == 0 ? 0 : (most - least) / width + 1;
      dealt.starts[topk_windows] = n;
      counts[id] = n;
      state = {};
    });
  }
};

// indices and values (n, k), by index; −1 and 0 behind the last.
struct TopkOrder {
  static constexpr int threads = 256, words = TopkFinish::narrowest / 32, each_has = words / threads;
  struct Shared {
    int64_t next;
    uint32_t marks[words + threads], before[words + threads];  // word w at w + w / each_has: on different banks
    uint32_t scan[2][threads];
  };
  DeviceSelectors selectors;
  int64_t share;  // blocks of each selector: block b takes windows b, b + share, …
  int64_t* indices;
  float* values;
  static NPEFF_INLINE int64_t place_of(int64_t bit) { return bit / 32 + bit / 32 / each_has; }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t selector = id / share, k = selectors.k;
    const TopkDealt dealt(selectors, selector);
    int64_t* const to_index = indices + selector * k;
    float* const to_value = values + selector * k;
    const int64_t n = dealt.starts[topk_windows], least = *dealt.least, width = *dealt.width, used = *dealt.used;
    block.each([&](int t) {
      for (int64_t i = n + id % share * threads + t; i < k; i += share * threads) {
        to_index[i] = -1;
        to_value[i] = 0;
      }
    });
    for (int64_t window = id % share; window < used; window += share) {
      const int64_t first = dealt.starts[window], last = dealt.starts[window + 1];
      // A window wider than there are bits is taken piece by piece; a piece begins at the lowest index that is left.
      int64_t begin = least + window * width, done = first;
      while (done < last) {
        block.each([&](int t) {
          for (int w = t; w < words + threads; w += threads) s.marks[w] = 0;
          if (t == 0) s.next = INT64_MAX;
        });
        block.each([&](int t) {
          for (int64_t i = first + t; i < last; i += threads) {
            const int64_t at = dealt.index[i] - begin;
            if (at >= TopkFinish::narrowest) Block::lower(&s.next, dealt.index[i]);
            else if (at >= 0) Block::set(&s.marks[place_of(at)], uint32_t{1} << at % 32);
          }
        });
        typename Block::template Local<uint32_t> before(block);
        block.each([&](int t) {
          before[t] = 0;
          for (int w = 0; w < each_has; ++w) before[t] += bits_set(s.marks[t * (each_has + 1) + w]);
        });
        const int64_t count = exclusive_scan(block, s.scan, before);
        block.each([&](int t) {
          uint32_t sum = before[t];
          for (int w = t * (each_has + 1); w < t * (each_has + 1) + each_has; ++w) {
            s.before[w] = sum;
            sum += bits_set(s.marks[w]);
          }
        });
        block.each([&](int t) {
          for (int64_t i = first + t; i < last; i += threads) {
            const int64_t at = dealt.index[i] - begin;
            if (at < 0 || at >= TopkFinish::narrowest) continue;
            const uint32_t lower = s.marks[place_of(at)] & ((uint32_t{1} << at % 32) - 1);
            const int64_t to = done + s.before[place_of(at)] + bits_set(lower);
            to_index[to] = dealt.index[i];
            to_value[to] = bit_cast<float>(dealt.bits[i]);
          }
        });
        begin = block.uniform(s.next);
        done = begin == INT64_MAX ? last : done + count;
      }
    }
  }
};

// ---- what the host does -------------------------------------------------------------------------------------------

template <class T, class Queue>
void topk_push(const DeviceSelectors& selectors, const Push<T>& push, Queue& queue) {
  using Scan = TopkScan<T>;
  if (push.n_rows == 0 || push.width == 0) return;
  queue.run(selectors.n, TopkPrepare<T>{selectors, push});
  // About 16 blocks per processor, of whole tiles.
  const int64_t groups = ceil_div<int64_t>(push.width + Scan::together - 1, Scan::together), tile = Scan::threads * Scan::loads;
  const int64_t share = ceil_div(groups * push.n_rows, 16 * queue.processors());
  const int64_t groups_each = ceil_div(share < groups ? share : groups, tile) * tile, chunks = ceil_div(groups, groups_each);
  queue.run(push.n_rows * chunks, Scan{selectors, push, chunks, groups_each});
  queue.run(selectors.n, TopkSettle<T>{selectors, push});
}

// counts (n,); indices and values (n, k), by index, −1 and 0 behind the last. Empties the selectors.
template <class Queue>
void topk_finish(const DeviceSelectors& selectors, int64_t* counts, int64_t* indices, float* values, Queue& queue) {
  if (selectors.n == 0) return;
  queue.run(selectors.n, TopkFinish{selectors, counts});
  const int64_t share = ceil_div<int64_t>(24 * queue.processors(), selectors.n);
  queue.run(selectors.n * share, TopkOrder{selectors, share, indices, values});
}

}  // namespace npeff
