// spmm.h by blocks: a warp's lanes take neighbouring columns of the result; rows with many entries are shared by the
// warps of a block, each taking every `ways`-th entry, and their sums are added in order. The same bits every time.
#pragma once

#include "common/block.h"
#include "spmm/spmm.h"

namespace npeff {

template <class Index, class T, int together>
struct SpmmBlocks {
  static constexpr int threads = 256, lanes = 32, warps = threads / lanes, strip = lanes * together;
  struct Shared { T sums[warps][strip]; };
  Spmm<Index, T> x;  // rows of dense are aligned to `together` entries
  int64_t ways;      // 1 or warps
  int64_t strips() const { return ceil_div<int64_t>(x.r, strip); }
  int64_t blocks() const { return ceil_div<int64_t>(x.a.n_rows, warps / ways) * strips(); }

  template <class Block>
  NPEFF_INLINE void operator()(const Block& block, Shared& s, int64_t id) const {
    const Csr<Index, T>& a = x.a;
    const int64_t r = x.r, all = (r + strip - 1) / strip, first = id / all * (warps / ways), start = id % all * strip;
    block.each([&](int t) {
      const int warp = t / lanes;
      const int64_t row = first + warp / ways, column = start + t % lanes * together;
      if (row >= a.n_rows || column >= r) return;
      T sum[together] = {};
      const int64_t end = a.indptr[row + 1];
NPEFF_UNROLL_4
      for (int64_t e = a.indptr[row] + warp % ways; e < end; e += ways) {
        const T value = a.values[e];
        T entries[together];
        load_together<together>(x.dense + static_cast<int64_t>(a.indices[e]) * r + column, entries);
        for (int v = 0; v < together; ++v) sum[v] += value * entries[v];
      }
      for (int v = 0; v < together; ++v) {
        if (ways == 1) x.out[row * r + column + v] = sum[v];
        else s.sums[warp][t % lanes * together + v] = sum[v];
      }
    });
    if (ways == 1) return;
    block.each([&](int t) {
      for (int c = t; c < strip && start + c < r; c += threads) {
        T sum = s.sums[0][c];
        for (int warp = 1; warp < warps; ++warp) sum += s.sums[warp][c];
        x.out[first * r + start + c] = sum;
      }
    });
  }
};

template <class Index, class T, class Queue>
void spmm(const Spmm<Index, T>& product, Queue& queue) {
  const Csr<Index, T>& a = product.a;
  if (a.n_rows == 0 || product.r == 0) return;
  constexpr int together = 16 / sizeof(T);
  const auto run = [&](auto blocks) {
    blocks.ways = a.nnz / a.n_rows >= 64 ? blocks.warps : 1;
    queue.run(blocks.blocks(), blocks);
  };
  if (product.r % together == 0 && reinterpret_cast<uintptr_t>(product.dense) % 16 == 0)
    run(SpmmBlocks<Index, T, together>{product, 1});
  else
    run(SpmmBlocks<Index, T, 1>{product, 1});
}

}  // namespace npeff
