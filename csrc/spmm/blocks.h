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

// A thread's columns of one example for cross(), `together` of them, of which rows are aligned to as many entries.
template <class T, int together>
struct CrossColumns {
  const T* p;              // (R, r)
  const int64_t* offsets;  // (n + 1,)
  int64_t r;
  T* out;                  // (n, r)

  template <class Block>
  NPEFF_INLINE void at(int64_t thread) const {
    const int64_t at = thread * together, i = at / r, j = at % r, end = offsets[i + 1];
    T sums[together] = {};
NPEFF_UNROLL_4
    for (int64_t row = offsets[i]; row < end; ++row) {
      T entries[together];
      load_together<together>(p + row * r + j, entries);
      for (int c = 0; c < together; ++c) sums[c] += entries[c] * entries[c];
    }
    store_together<together>(sums, out + at);
  }
};

// With as many columns at once as r and the pointers' alignment allow.
template <class T, class Queue>
void cross(const T* p, const int64_t* offsets, int64_t n, int64_t r, T* out, Queue& queue) {
  constexpr int most = 16 / sizeof(T);
  if (n * r == 0) return;
  const auto addresses = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(p);
  if (r % most == 0 && addresses % 16 == 0) run_elements(queue, n * r / most, CrossColumns<T, most>{p, offsets, r, out});
  else run_elements(queue, n * r, CrossColumns<T, 1>{p, offsets, r, out});
}

}  // namespace npeff
