// gram.h by blocks: a tile of rows is laid out dense in shared memory, a window of columns at a time, and a
// longer stretch of rows is multiplied with it entry by entry: one broadcast value times 64 neighbouring numbers. The
// sums stay in registers until the last window. Windows that no row of the tile has an entry in are skipped.
#pragma once

#include "common/block.h"
#include "common/csr.h"

namespace npeff {

// K (n, n) += A·Aᵀ on and below the diagonal. Columns ascend within a row.
template <class Index>
struct GramPanelBlocks {
  static constexpr int threads = 256, lanes = 32, warps = threads / lanes;
  static constexpr int tile = 64, window = 128, each_has = 16, stretch = warps * each_has;
  struct Shared {
    float panel[window][tile + 1];              // + 1: entries of one row fall on different banks
    int64_t first;                              // column of the window
    int64_t from[tile + stretch], to[tile + stretch];  // entries of the tile's rows and the stretch's, in the window
  };
  Csr<Index> a;
  float* k;
  int64_t tiles() const { return ceil_div<int64_t>(a.n_rows, tile); }
  int64_t blocks() const { return tiles() * ceil_div<int64_t>(a.n_rows, stretch); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const int64_t n = a.n_rows, all = (n + tile - 1) / tile, left = id % all * tile, top = id / all * stretch;
    if (top + stretch <= left) return;  // above the diagonal
    const auto row_of = [&](int place) { return place < tile ? left + place : top + (place - tile); };
    struct Sums { float at[each_has][2]; };
    typename Block::template Local<Sums> sums(block);
    block.each([&](int t) {
      for (int q = 0; q < each_has; ++q) sums[t].at[q][0] = sums[t].at[q][1] = 0;
      for (int place = t; place < tile + stretch; place += threads)
        s.to[place] = row_of(place) < n ? a.indptr[row_of(place)] : 0;
      if (t == 0) s.first = INT64_MAX;
    });
    for (;;) {
      block.each([&](int t) {
        if (t >= tile || row_of(t) >= n) return;
        if (s.to[t] < a.indptr[row_of(t) + 1]) Block::lower(&s.first, static_cast<int64_t>(a.indices[s.to[t]]));
      });
      const int64_t first = block.uniform(s.first);
      if (first == INT64_MAX) break;
      block.each([&](int t) {
        for (int i = t; i < window * tile; i += threads) s.panel[i / tile][i % tile] = 0;
        for (int place = t; place < tile + stretch; place += threads) {
          const int64_t row = row_of(place);
          if (row >= n) continue;
          const int64_t end = a.indptr[row + 1];
          s.from[place] = seek(a.indices, s.to[place], end, first);
          s.to[place] = seek(a.indices, s.from[place], end, first + window);
        }
        if (t == 0) s.first = INT64_MAX;
      });
      block.each([&](int t) {
        for (int i = t / lanes; i < tile; i += warps)
          if (left + i < n)
            for (int64_t e = s.from[i] + t % lanes; e < s.to[i]; e += lanes) s.panel[a.indices[e] - first][i] = a.values[e];
      });
      block.each([&](int t) {
        const int lane = t % lanes;
NPEFF_UNROLL
        for (int q = 0; q < each_has; ++q) {
          const int place = tile + q * warps + t / lanes;
          if (row_of(place) >= n) continue;
          const int64_t end = s.to[place];
NPEFF_UNROLL_4
          for (int64_t e = s.from[place]; e < end; ++e) {
            const float value = a.values[e];
            const float* line = s.panel[a.indices[e] - first];
            sums[t].at[q][0] += value * line[lane];
            sums[t].at[q][1] += value * line[lane + lanes];
          }
        }
      });
    }
    block.each([&](int t) {
NPEFF_UNROLL
      for (int q = 0; q < each_has; ++q) {
        const int64_t row = top + q * warps + t / lanes, column = left + t % lanes;
        if (row >= n) continue;
        if (column <= row) k[row * n + column] += sums[t].at[q][0];
        if (column + lanes <= row) k[row * n + column + lanes] += sums[t].at[q][1];
      }
    });
  }
};

template <class Index, class Queue>
void gram_panel(const Csr<Index>& a, float* k, Queue& queue) {
  const GramPanelBlocks<Index> blocks{a, k};
  queue.run(blocks.blocks(), blocks);
}

}  // namespace npeff
