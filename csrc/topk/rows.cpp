#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/rows_by_target.h"
#include "topk/topk.h"

namespace npeff {
namespace {

// How many of n groups go to one thread each, as long as that keeps all threads busy; the last few are split among
// all threads, when they are long enough.
int64_t whole_groups(int64_t n, int64_t length, int threads) {
  return length >= 1 << 18 && n < 8 * threads ? n / threads * threads : n;
}

}  // namespace

Nonfinite push_rows(std::vector<Selector>& selectors, const float* x, int64_t n_rows, int64_t width, int64_t stride,
                    const int64_t* targets, const int64_t* bases, int threads) {
  const RowsByTarget rows(targets, nullptr, n_rows);
  const std::vector<int64_t>&order = rows.order, &starts = rows.starts;
  const int64_t n_groups = rows.n_groups();
  std::vector<Piece> pieces(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) pieces[i] = {x + order[i] * stride, width, bases[order[i]]};

  std::vector<int64_t> bad(n_groups, -1);
  const auto push = [&](int64_t g, int n_threads) {
    Selector& selector = selectors[rows.target(order[starts[g]])];
    bad[g] = selector.push(pieces.data() + starts[g], starts[g + 1] - starts[g], n_threads);
  };
  if (n_rows * width < 1 << 14) threads = 1;
  const int64_t whole = n_groups == 0 ? 0 : whole_groups(n_groups, width * n_rows / n_groups, threads);
  parallel_for(whole, threads, [&](int64_t g) { push(g, 1); });
  for (int64_t g = whole; g < n_groups; ++g) push(g, threads);

  Nonfinite first{-1, -1};
  for (int64_t g = 0; g < n_groups; ++g) {
    if (bad[g] < 0) continue;
    for (int64_t i = starts[g]; i < starts[g + 1]; ++i) {
      const int64_t row = order[i], within = bad[g] - bases[row];
      if (within >= 0 && within < width && (first.row < 0 || row < first.row)) first = {row, bad[g]};
    }
  }
  return first;
}

Nonfinite push_outers(std::vector<Selector>& selectors, const Outers& x, int threads) {
  std::vector<int64_t> bad(x.b, -1);
  parallel_for(x.b, threads, [&](int64_t e) {
    const float *delta = x.delta + e * x.columns * x.n, *inputs = x.inputs + e * x.k;
    std::vector<Outer> outers(x.columns);
    for (int64_t c = 0; c < x.columns; ++c, delta += x.n) {
      const int64_t base = x.base + c * x.column_stride;
      outers[c] = x.turned ? Outer{inputs, x.k, delta, x.n, base} : Outer{delta, x.n, inputs, x.k, base};
    }
    bad[e] = selectors[x.first + e].push(outers.data(), x.columns);
  });
  for (int64_t e = 0; e < x.b; ++e)
    if (bad[e] >= 0) return {e, bad[e]};
  return {-1, -1};
}

Nonfinite topk_rows(const float* x, int64_t n_rows, int64_t width, int64_t stride, int64_t k, bool by_magnitude,
                    int64_t* indices, float* values, int threads) {
  const int64_t whole = whole_groups(n_rows, width, threads);
  std::vector<int64_t> bad(n_rows, -1);
  const auto select = [&](Selector& selector, int64_t row, int n_threads) {
    const Piece piece{x + row * stride, width, 0};
    selector.reset();
    bad[row] = selector.push(&piece, 1, n_threads);
    if (bad[row] >= 0) return;
    selector.finish();
    selector.copy_to(indices + row * k, values + row * k, by_magnitude);
  };
  std::atomic<int64_t> next{0};
  parallel_for(threads, n_rows * width < 1 << 14 ? 1 : threads, [&](int64_t) {
    Selector selector(k, true);  // one per thread: its buffer stays in that thread's cache
    for (int64_t row; (row = next.fetch_add(1)) < whole;) select(selector, row, 1);
  });
  Selector selector(k, true);
  for (int64_t row = whole; row < n_rows; ++row) select(selector, row, threads);

  for (int64_t row = 0; row < n_rows; ++row)
    if (bad[row] >= 0) return {row, bad[row]};
  return {-1, -1};
}

}  // namespace npeff
