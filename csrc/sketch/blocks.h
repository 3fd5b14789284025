// The flat map of sketch.h by blocks. Sums have no atomics of floats in them, so that their bits are the same every time:
//
//   rows    a block takes a stretch of a row and keeps float32 sums in shared memory. It sorts the 16-element blocks of
//           a tile by the owner of their group of buckets; an owner is four threads, four buckets of a group
//           each, and adds what falls on its own buckets in the order of the input, read from device memory. Stretches
//           are long against d, so that the sums cost little to write; they are added in float64, in order, by
//   gather  one thread per bucket.
//   csr     entries of a sparse row meet in no order; they are added as integers, scaled so that the row's largest
//           entry has 2^38 steps: the error is that of float64 for sums of up to 2^24 such entries, and addition of
//           integers has no order.
#pragma once

#include "common/block.h"
#include "common/half_types.h"
#include "sketch/sketch.h"
#include "sketch/hash.h"

namespace npeff {

// A map with its hash keys.
struct SketchKeys {
  static constexpr int most_copies = 64;
  uint64_t keys[most_copies];
  int copies;
  uint32_t groups;  // groups of buckets per copy
  int64_t d;

  explicit SketchKeys(const SketchMap& map)
      : keys{}, copies(map.copies), groups(static_cast<uint32_t>(map.d / (sketch_lanes * map.copies))), d(map.d) {
    for (int c = 0; c < copies; ++c) keys[c] = sketch_key(map.seed, c);
  }
};

template <class T>
struct SketchRowsBlocks {
  static constexpr int threads = 256, lanes = sketch_lanes, quad = 4, quads = lanes / quad, owners = threads / quads;
  static constexpr int items = 2048, tile = items * lanes, each_has = items / threads, words = items / 32, ahead = 4;
  static_assert(words % quads == 0, "an owner's threads count as many words each");
  struct Item {
    uint32_t item_group;  // its number in the tile, and its group within those of this block in the lower 16 bits
    uint32_t turn_signs;
  };
  struct Shared {
    Item sorted[items];                  // by owner, and by number
    uint32_t mine[owners][words + 1];    // bit i: item i belongs to the owner; + 1: owners fall on different banks
    uint16_t before[owners][words + 2];  // items of the owner before those of a word; then all of them
    uint32_t first[owners + 1];          // where each owner's items begin
    alignas(16) float sums[quad];        // (n_groups · 16,)
  };
  SketchKeys map;
  const T* x;  // (n_rows, width), `stride` entries apart
  int64_t n_rows, width, stride;
  const int64_t* bases;        // (n_rows,)
  int64_t stretches, stretch;  // per row, and their length: a multiple of the tile
  int64_t parts, part_groups;  // parts of the bucket groups of all copies, taken by different blocks
  float* sums;                 // (n_rows, stretches, d)

  int64_t shared_bytes() const { return sizeof(Shared) + part_groups * lanes * sizeof(float); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t part = id % parts, at = id / parts % stretches, row = id / parts / stretches;
    const int64_t all_groups = int64_t{map.groups} * map.copies, first_group = part * part_groups;
    const int64_t n_groups = first_group + part_groups < all_groups ? part_groups : all_groups - first_group;
    const int64_t from = at * stretch, to = from + stretch < width ? from + stretch : width;
    const int64_t base = bases[row];
    block.each([&](int t) {
      for (int64_t i = t; i < n_groups * lanes; i += threads) s.sums[i] = 0;
      clear(s, t);
    });
    // Tiles begin where blocks of 16 parameters do: `lead` places before the stretch.
    const int64_t lead = (base + from) % lanes;
    for (int64_t start = from - lead; start < to; start += tile) {
      const auto low = static_cast<uint32_t>(start < from ? from - start : 0);
      const auto high = static_cast<uint32_t>(to - start < tile ? to - start : tile);
      for (int copy = 0; copy < map.copies; ++copy)
        add_tile(block, s, copy, static_cast<uint64_t>((base + start) / lanes), x + (row * stride + start), low, high,
                 first_group, n_groups);
    }
    block.each([&](int t) {
      float* const out = sums + (row * stretches + at) * map.d + first_group * lanes;
      for (int64_t i = t; i < n_groups * lanes; i += threads) out[i] = s.sums[i];
    });
  }

 private:
  static constexpr uint32_t none = ~uint32_t{0};

  NPEFF_INLINE static void clear(Shared& s, int t) {
    for (int i = t; i < owners * (words + 1); i += threads) (&s.mine[0][0])[i] = 0;
  }

  // Adds entries low ≤ i < high of the tile at `entries`; leaves s.mine empty, as it was.
  template <class Block>
  NPEFF_INLINE void add_tile(const Block& block, Shared& s, int copy, uint64_t first_item, const T* entries,
                             uint32_t low, uint32_t high, int64_t first_group, int64_t n_groups) const {
    struct Held { Item items[each_has]; };
    typename Block::template Local<Held> held(block);
    const int here = static_cast<int>(ceil_div<uint32_t>(high, lanes));
    block.each([&](int t) {
NPEFF_UNROLL
      for (int q = 0; q < each_has; ++q) {
        const int i = q * threads + t;
        const uint64_t hash = sketch_hash(map.keys[copy], first_item + static_cast<uint64_t>(i));
        const int64_t group = int64_t{sketch_group(hash, map.groups)} + int64_t{copy} * map.groups - first_group;
        const bool mine = i < here && group >= 0 && group < n_groups;
        held[t].items[q] = {mine ? static_cast<uint32_t>(i) << 16 | static_cast<uint32_t>(group) : none,
                            sketch_turn(hash) << 16 | sketch_signs(hash)};
        if (mine) Block::add(&s.mine[group % owners][i / 32], uint32_t{1} << i % 32);
      }
    });
    block.each([&](int t) {  // each thread of an owner: its share of the words
      constexpr int share = words / quads;
      const int owner = t / quads, word = t % quads * share;
      uint32_t count = 0;
      for (int p = 0; p < word; ++p) count += bits_set(s.mine[owner][p]);
NPEFF_UNROLL
      for (int p = 0; p < share; ++p) {
        s.before[owner][word + p] = static_cast<uint16_t>(count);
        count += bits_set(s.mine[owner][word + p]);
      }
      if (word + share == words) s.before[owner][words] = static_cast<uint16_t>(count);
    });
    block.each([&](int t) {
      if (t > owners) return;
      uint32_t count = 0;
      for (int owner = 0; owner < t; ++owner) count += s.before[owner][words];
      s.first[t] = count;
    });
    block.each([&](int t) {
NPEFF_UNROLL
      for (int q = 0; q < each_has; ++q) {
        const Item item = held[t].items[q];
        if (item.item_group == none) continue;
        const int i = q * threads + t, owner = static_cast<int>((item.item_group & 0xffffu) % owners);
        const uint32_t lower = s.mine[owner][i / 32] & ((uint32_t{1} << i % 32) - 1);
        s.sorted[s.first[owner] + s.before[owner][i / 32] + bits_set(lower)] = item;
      }
    });
    // Blocks of 16 lie whole in the tile but for its ends, and four entries are one access where memory allows it.
    const bool wide = reinterpret_cast<uintptr_t>(entries) % (quad * sizeof(T)) == 0;
    block.each([&](int t) {
      clear(s, t);
      const auto own = static_cast<uint32_t>(t % quads);
      const uint32_t first = s.first[t / quads], last = s.first[t / quads + 1];
      for (uint32_t i = first; i < last; i += ahead) {  // loads run ahead of the sums
        T raw[ahead][quad];
        Item at[ahead];
NPEFF_UNROLL
        for (int q = 0; q < ahead; ++q) {
          at[q] = s.sorted[i + q < last ? i + q : first];
          const uint32_t place = (at[q].item_group >> 16) * lanes + (own ^ at[q].turn_signs >> 18) * quad;
          if (wide && i + q < last && place >= low && place + quad <= high) {
            load_together<quad>(entries + place, raw[q]);
          } else {
NPEFF_UNROLL
            for (int v = 0; v < quad; ++v)
              raw[q][v] = i + q < last && place + v >= low && place + v < high ? entries[place + v] : T{};
          }
        }
NPEFF_UNROLL
        for (int q = 0; q < ahead; ++q) {
          const uint32_t turn = at[q].turn_signs >> 16, signs = at[q].turn_signs >> (own ^ turn >> 2) * quad;
          float signed_values[quad], values[quad];
NPEFF_UNROLL
          for (int v = 0; v < quad; ++v)
            signed_values[v] = bit_cast<float>(bit_cast<uint32_t>(widen(raw[q][v])) ^ (signs >> v & 1) << 31);
          float* const to = s.sums + (at[q].item_group & 0xffffu) * lanes + own * quad;
NPEFF_UNROLL
          for (int v = 0; v < quad; ++v) {  // lane v ^ turn: by halves, since registers have no index
            const float one = turn & 1 ? signed_values[v ^ 1] : signed_values[v];
            const float other = turn & 1 ? signed_values[v ^ 3] : signed_values[v ^ 2];
            values[v] = turn & 2 ? other : one;
          }
          float sum[quad];
          load_together<quad>(to, sum);
NPEFF_UNROLL
          for (int v = 0; v < quad; ++v) sum[v] += values[v];
          store_together<quad>(sum, to);
        }
      }
    });
  }
};

// out[target, bucket] += Σ over the target's rows (in `order`) and their stretches.
struct SketchGatherBlocks {
  static constexpr int threads = 256;
  struct Shared { char none; };
  const float* partial;  // (n_rows, stretches, d)
  int64_t n_targets, stretches, d;
  const int64_t *order, *starts;  // rows by target, and within a target by base; (n_targets + 1,)
  double* out;                    // (n_targets, d)
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t at = id * threads + t;
      if (at >= n_targets * d) return;
      const int64_t target = at / d, bucket = at % d;
      if (starts[target] == starts[target + 1]) return;
      double sum = out[at];
      for (int64_t i = starts[target]; i < starts[target + 1]; ++i)
        for (int64_t p = 0; p < stretches; ++p) sum += partial[(order[i] * stretches + p) * d + bucket];
      out[at] = sum;
    });
  }
};

// 2^(38 − exponent of the largest |float32|, given by its bits): by the bits of a double, whose exponents reach further.
NPEFF_INLINE double sketch_step_scale(int64_t largest) {
  const int64_t exponent = larger<int64_t>(largest >> 23, 1) - 127;
  return bit_cast<double>((1023 + 38 - exponent) << 52);
}

// sums (n_rows, d) += the sketches of CSR rows whose entries are finite; a row with others gets NaN.
template <class Index>
struct SketchCsrBlocks {
  static constexpr int threads = 256;
  struct Shared {
    int64_t largest;
    int64_t sums[1];  // (part_groups · 16,)
  };
  SketchKeys map;
  Csr<Index> a;
  int64_t parts, part_groups;
  double* sums;
  int64_t shared_bytes() const { return sizeof(Shared) + part_groups * sketch_lanes * sizeof(int64_t); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t row = id / parts, first_group = id % parts * part_groups, all_groups = int64_t{map.groups} * map.copies;
    const int64_t n_groups = first_group + part_groups < all_groups ? part_groups : all_groups - first_group;
    const int64_t from = a.indptr[row], to = a.indptr[row + 1];
    int64_t* const own = s.sums;
    block.each([&](int t) {
      if (t == 0) s.largest = 0;
      for (int64_t i = t; i < n_groups * sketch_lanes; i += threads) own[i] = 0;
    });
    block.each([&](int t) {
      int64_t largest = 0;
      for (int64_t e = from + t; e < to; e += threads)
        largest = larger<int64_t>(largest, bit_cast<uint32_t>(a.values[e]) & 0x7fffffffu);
      Block::raise(&s.largest, largest);
    });
    const int64_t largest = block.uniform(s.largest);
    const bool finite = largest < 0x7f800000;
    const double scale = sketch_step_scale(largest);
    block.each([&](int t) {
      for (int64_t e = from + t; finite && e < to; e += threads) {
        const auto index = static_cast<uint64_t>(a.indices[e]);
        const auto lane = static_cast<uint32_t>(index % sketch_lanes);
        const auto step = static_cast<int64_t>(static_cast<double>(a.values[e]) * scale);
        for (int c = 0; c < map.copies; ++c) {
          const uint64_t hash = sketch_hash(map.keys[c], index / sketch_lanes);
          const int64_t group = int64_t{sketch_group(hash, map.groups)} + int64_t{c} * map.groups - first_group;
          if (group < 0 || group >= n_groups) continue;
          const int64_t bucket = group * sketch_lanes + (lane ^ sketch_turn(hash));
          Block::add(&own[bucket], (sketch_signs(hash) >> lane) & 1 ? -step : step);
        }
      }
    });
    block.each([&](int t) {
      double* const out = sums + row * map.d + first_group * sketch_lanes;
      for (int64_t i = t; i < n_groups * sketch_lanes; i += threads)
        out[i] += finite ? static_cast<double>(own[i]) / scale : bit_cast<double>(uint64_t{0x7ff8} << 48);
    });
  }
};

// out = scale · sums, both (n_rows, d); bad: lowest row with a non-finite value, if below what is there.
struct SketchFinishBlocks {
  static constexpr int threads = 256;
  struct Shared { char none; };
  const double* sums;
  int64_t n_rows, d;
  double scale;
  float* out;
  int64_t* bad;
  int64_t shared_bytes() const { return sizeof(Shared); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared&, int64_t id) const {
    block.each([&](int t) {
      const int64_t at = id * threads + t;
      if (at >= n_rows * d) return;
      const auto value = static_cast<float>(scale * sums[at]);
      out[at] = value;
      if (!(value * 0 == 0)) Block::lower(bad, at / d);
    });
  }
};

// ---- what the host does -------------------------------------------------------------------------------------------

struct SketchPlan {
  int64_t stretch, stretches, parts, part_groups;
  int64_t workspace;  // floats
};

// Parts of the bucket groups that shared memory holds at a time, `bytes` per bucket beside `fixed` bytes.
template <class Queue>
SketchPlan sketch_parts(const Queue& queue, const SketchKeys& map, int64_t fixed, int64_t bytes) {
  const int64_t groups = int64_t{map.groups} * map.copies;
  const int64_t fit = larger<int64_t>((queue.most_shared_bytes() - fixed) / (bytes * sketch_lanes), 1);
  const int64_t parts = ceil_div(groups, fit);
  return {0, 0, parts, ceil_div(groups, parts), 0};
}

// Entries of a row that a block takes: few enough that every processor has some; but not so few against d that their
// sums cost more to write and read than the entries (a quarter as much), and no fewer than 4096.
template <class Queue>
int64_t sketch_stretch(const Queue& queue, int64_t d, int64_t n_rows, int64_t width) {
  const int64_t share = ceil_div<int64_t>(larger<int64_t>(n_rows * width, 1), 8 * queue.processors());
  const int64_t length = larger<int64_t>(share, larger<int64_t>(8 * d, 4096));
  return length < width ? length : larger<int64_t>(width, 1);
}

template <class Queue, class T>
SketchPlan sketch_plan(const Queue& queue, const SketchKeys& map, int64_t n_rows, int64_t width) {
  using Blocks = SketchRowsBlocks<T>;
  SketchPlan plan = sketch_parts(queue, map, sizeof(typename Blocks::Shared), sizeof(float));
  plan.stretch = ceil_div<int64_t>(sketch_stretch(queue, map.d, n_rows, width), Blocks::tile) * Blocks::tile;
  plan.stretches = larger<int64_t>(ceil_div(width, plan.stretch), 1);
  plan.workspace = n_rows * plan.stretches * map.d;
  return plan;
}

// order, starts: rows by target, and within a target by base. workspace: sketch_plan's.
template <class Queue, class T>
void sketch_rows_by_blocks(Queue& queue, const SketchKeys& map, const T* x, int64_t n_rows, int64_t width, int64_t stride,
                           const int64_t* bases, const int64_t* order, const int64_t* starts, int64_t n_targets,
                           float* workspace, double* sums) {
  if (n_rows == 0 || width == 0 || n_targets == 0) return;
  const SketchPlan plan = sketch_plan<Queue, T>(queue, map, n_rows, width);
  queue.run(n_rows * plan.stretches * plan.parts,
            SketchRowsBlocks<T>{map, x, n_rows, width, stride, bases, plan.stretches, plan.stretch, plan.parts,
                                plan.part_groups, workspace});
  queue.run(ceil_div<int64_t>(n_targets * map.d, SketchGatherBlocks::threads),
            SketchGatherBlocks{workspace, n_targets, plan.stretches, map.d, order, starts, sums});
}

template <class Queue, class Index>
void sketch_csr_by_blocks(Queue& queue, const SketchKeys& map, const Csr<Index>& a, double* sums) {
  using Blocks = SketchCsrBlocks<Index>;
  if (a.n_rows == 0) return;
  const SketchPlan plan = sketch_parts(queue, map, sizeof(typename Blocks::Shared), sizeof(int64_t));
  queue.run(a.n_rows * plan.parts, Blocks{map, a, plan.parts, plan.part_groups, sums});
}

template <class Queue>
void sketch_finish_by_blocks(Queue& queue, const double* sums, int64_t n_rows, int64_t d, double scale, float* out, int64_t* bad) {
  if (n_rows * d > 0)
    queue.run(ceil_div<int64_t>(n_rows * d, SketchFinishBlocks::threads), SketchFinishBlocks{sums, n_rows, d, scale, out, bad});
}

}  // namespace npeff
