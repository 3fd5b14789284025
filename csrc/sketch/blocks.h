// The maps of sketch.h by blocks. Sums have no atomics of floats in them, so that their bits are the same every time:
//
//   rows    a block takes a stretch of a row and keeps float32 sums in shared memory. It sorts the 16-element blocks of
//           a tile by the owner of their group of buckets; an owner is four threads, four buckets of a group
//           each, and adds what falls on its own buckets in the order of the input, read from device memory. Stretches
//           are long against d, so that the sums cost little to write; they are added in float64, in order, by
//   gather  one thread per bucket.
//   matrix  a block takes a stretch of a row, which is some rows of the matrix end to end, and adds its entries as integers,
//           scaled so that the largest of the stretch has 2^38 steps: addition of integers has no order, and the error is
//           that of float64 for sums of up to 2^24 such entries. Stretches become float32 (NaN where an entry is not finite),
//           and are gathered likewise.
#pragma once

#include "common/block.h"
#include "common/memory.h"
#include "sketch/sketch.h"

namespace npeff {

// How rows are cut up among blocks.
struct SketchPlan {
  int64_t stretches, stretch;  // per row, and their length
  int64_t parts, part_size;    // parts of the buckets (or groups of them) that shared memory holds at a time
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
  SketchMap map;
  const T* x;  // (n_rows, width), `stride` entries apart
  int64_t width, stride;
  const int64_t* bases;  // (n_rows,)
  SketchPlan plan;       // in parts of the bucket groups of all copies
  float* sums;           // (n_rows, stretches, d)

  int64_t shared_bytes() const { return sizeof(Shared) + plan.part_size * lanes * sizeof(float); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t at = id / plan.parts % plan.stretches, row = id / plan.parts / plan.stretches;
    const int64_t all_groups = int64_t{map.groups} * map.copies, first_group = id % plan.parts * plan.part_size;
    const int64_t n_groups = first_group + plan.part_size < all_groups ? plan.part_size : all_groups - first_group;
    const int64_t from = at * plan.stretch, to = from + plan.stretch < width ? from + plan.stretch : width;
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
      float* const out = sums + (row * plan.stretches + at) * map.d + first_group * lanes;
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

// out[target, bucket] += Σ over the target's rows (in order) and their stretches.
struct SketchGather {
  const float* partial;  // (n_rows, stretches, d)
  int64_t stretches, d;
  RowOrder rows;  // within a target by base
  double* out;    // (n_targets, d)

  template <class Block>
  NPEFF_INLINE void at(int64_t i) const {
    const int64_t target = i / d, bucket = i % d;
    if (rows.starts[target] == rows.starts[target + 1]) return;
    double sum = out[i];
    for (int64_t at = rows.starts[target]; at < rows.starts[target + 1]; ++at)
      for (int64_t p = 0; p < stretches; ++p) sum += partial[(rows.order[at] * stretches + p) * d + bucket];
    out[i] = sum;
  }
};

// The two-sided map: bucket(i, j) = bucket(i) xor bucket(j), signs multiplied.
template <class T>
struct SketchMatrixBlocks {
  static constexpr int threads = 256;
  struct Shared {
    int64_t largest;
    int64_t sums[1];  // as many as the block has buckets
  };
  const T* x;  // (n_rows, width), `stride` entries apart
  int64_t width, stride, columns, d;
  const uint32_t *row_places, *column_places;  // bucket·2 + (1 where the sign is −)
  const int64_t* first;                        // (n_rows,): the matrix row that each row of x begins with
  double weight;
  SketchPlan plan;
  float* sums;  // (n_rows, stretches, d)

  int64_t shared_bytes() const { return sizeof(Shared) + plan.part_size * sizeof(int64_t); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t at = id / plan.parts % plan.stretches, row = id / plan.parts / plan.stretches;
    const int64_t first_bucket = id % plan.parts * plan.part_size;
    const int64_t n_buckets = first_bucket + plan.part_size < d ? plan.part_size : d - first_bucket;
    const int64_t from = at * plan.stretch, to = from + plan.stretch < width ? from + plan.stretch : width;
    const T* const own = x + row * stride;
    block.each([&](int t) {
      if (t == 0) s.largest = 0;
      for (int64_t i = t; i < n_buckets; i += threads) s.sums[i] = 0;
    });
    block.each([&](int t) {
      int64_t largest = 0;
      for (int64_t e = from + t; e < to; e += threads)
        largest = larger<int64_t>(largest, bit_cast<uint32_t>(widen(own[e])) & 0x7fffffffu);
      Block::raise(&s.largest, largest);
    });
    const int64_t largest = block.uniform(s.largest);
    const bool finite = largest < 0x7f800000;
    // 2^(38 − exponent of the largest): by the bits of a double, whose exponents reach further.
    const double scale = bit_cast<double>((1023 + 38 - (larger<int64_t>(largest >> 23, 1) - 127)) << 52);
    block.each([&](int t) {
      if (!finite) return;
      int64_t i = first[row] + (from + t) / columns, j = (from + t) % columns;
      const int64_t down = threads / columns, right = threads % columns;
      for (int64_t e = from + t; e < to; e += threads) {
        const uint32_t both = row_places[i] ^ column_places[j];
        const int64_t bucket = int64_t{both >> 1} - first_bucket;
        const auto step = static_cast<int64_t>(static_cast<double>(widen(own[e])) * scale);
        if (bucket >= 0 && bucket < n_buckets) Block::add(&s.sums[bucket], both & 1 ? -step : step);
        i += down;
        j += right;
        if (j >= columns) {
          j -= columns;
          ++i;
        }
      }
    });
    block.each([&](int t) {
      float* const out = sums + (row * plan.stretches + at) * d + first_bucket;
      for (int64_t i = t; i < n_buckets; i += threads)
        out[i] = finite ? static_cast<float>(weight * static_cast<double>(s.sums[i]) / scale) : bit_cast<float>(0x7fc00000u);
    });
  }
};

// ---- what the host does -------------------------------------------------------------------------------------------

// Parts of n buckets (or groups of them), `bytes` each beside `fixed` bytes.
template <class Queue>
SketchPlan sketch_parts(const Queue& queue, int64_t n, int64_t fixed, int64_t bytes) {
  const int64_t parts = ceil_div(n, larger<int64_t>((queue.most_shared_bytes() - fixed) / bytes, 1));
  return {0, 0, parts, ceil_div(n, parts)};
}

// Stretches of rows, of whole tiles: few enough entries that every processor has some; but not so few against d that their
// sums cost more to write and read than the entries (a quarter as much), and no fewer than 4096.
template <class Queue>
void cut_rows(const Queue& queue, SketchPlan& plan, int64_t d, int64_t n_rows, int64_t width, int64_t tile) {
  const int64_t share = ceil_div<int64_t>(larger<int64_t>(n_rows * width, 1), 8 * queue.processors());
  const int64_t length = larger<int64_t>(share, larger<int64_t>(8 * d, 4096));
  plan.stretch = ceil_div<int64_t>(length < width ? length : larger<int64_t>(width, 1), tile) * tile;
  plan.stretches = larger<int64_t>(ceil_div(width, plan.stretch), 1);
}

// Runs Blocks{entries..., plan, partial sums}, and adds the partial sums to those of the rows' targets.
template <class Blocks, class Queue, class... Entries>
void sketch_stretches(Queue& queue, const SketchPlan& plan, int64_t d, int64_t n_rows, const RowOrder& rows, double* sums,
                      const Entries&... entries) {
  float* const partial = queue.template scratch<float>(checked_product({n_rows, plan.stretches, d}));
  queue.run(n_rows * plan.stretches * plan.parts, Blocks{entries..., plan, partial});
  run_elements(queue, rows.n_targets * d, SketchGather{partial, plan.stretches, d, rows, sums});
}

template <class T, class Queue>
void sketch_rows(const SketchMap& map, const T* x, int64_t n_rows, int64_t width, int64_t stride, const int64_t* bases,
                 const RowOrder& rows, double* sums, Queue& queue) {
  using Blocks = SketchRowsBlocks<T>;
  if (n_rows == 0 || width == 0 || rows.n_targets == 0) return;
  SketchPlan plan = sketch_parts(queue, int64_t{map.groups} * map.copies, sizeof(typename Blocks::Shared),
                                 sketch_lanes * sizeof(float));
  cut_rows(queue, plan, map.d, n_rows, width, Blocks::tile);
  sketch_stretches<Blocks>(queue, plan, map.d, n_rows, rows, sums, map, x, width, stride, bases);
}

template <class T, class Queue>
void sketch_matrix(int64_t d, double weight, const T* x, int64_t n_rows, int64_t width, int64_t columns, int64_t stride,
                   const uint32_t* row_places, const uint32_t* column_places, const int64_t* first, const RowOrder& rows,
                   double* sums, Queue& queue) {
  if (n_rows == 0 || width == 0 || rows.n_targets == 0) return;
  SketchPlan plan = sketch_parts(queue, d, sizeof(typename SketchMatrixBlocks<T>::Shared), sizeof(int64_t));
  cut_rows(queue, plan, d, n_rows, width, 1);
  sketch_stretches<SketchMatrixBlocks<T>>(queue, plan, d, n_rows, rows, sums, x, width, stride, columns, d, row_places,
                                          column_places, first, weight);
}

}  // namespace npeff
