#include "common/csr.h"

#include <algorithm>

#include "common/parallel.h"

namespace npeff {

std::vector<int64_t> parts_by_entries(const int64_t* indptr, int64_t n_rows, int64_t parts) {
  parts = std::max<int64_t>(1, std::min(parts, n_rows));
  std::vector<int64_t> bounds{0};
  const auto weight = [&](int64_t row) { return indptr[row] + row; };
  for (int64_t p = 1; p <= parts; ++p) {
    int64_t lo = bounds.back(), hi = n_rows;  // the first row at or after the p-th share
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (weight(middle) < weight(n_rows) * static_cast<double>(p) / static_cast<double>(parts)) lo = middle + 1;
      else hi = middle;
    }
    bounds.push_back(p == parts ? n_rows : lo);
  }
  return bounds;
}

template <class Index>
CsrCheck csr_check(const Csr<Index>& a, int threads) {
  using Bits = std::make_unsigned_t<Index>;
  if (a.indptr[0] != 0) return {0, -1};
  for (int64_t i = 0; i < a.n_rows; ++i)
    if (a.indptr[i + 1] < a.indptr[i] || a.indptr[i + 1] > a.nnz) return {i, -1};
  if (a.indptr[a.n_rows] != a.nnz) return {std::max<int64_t>(a.n_rows - 1, 0), -1};
  // The largest column that an index may be: beyond what Index holds, all of its numbers ≥ 0 are columns.
  constexpr auto most = static_cast<int64_t>(static_cast<Bits>(-1) >> 1);
  const Bits last = static_cast<Bits>(std::min(a.n_columns - 1, most));
  const std::vector<int64_t> bounds = parts_by_entries(a.indptr, a.n_rows, a.nnz < 1 << 16 ? 1 : threads);
  std::vector<CsrCheck> found(bounds.size(), CsrCheck{-1, -1});
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, threads, [&](int64_t part) {
    CsrCheck mine{-1, -1};
    for (int64_t i = bounds[part]; i < bounds[part + 1] && mine.bad_row < 0; ++i) {
      const int64_t begin = a.indptr[i], end = a.indptr[i + 1];
      // By the sign bits of differences: loops without a branch.
      Bits outside = 0, falling = 0;
      for (int64_t e = begin; e < end; ++e) {
        const auto column = static_cast<Bits>(a.indices[e]);
        outside |= column | (last - column);
      }
      for (int64_t e = begin + 1; e < end; ++e)
        falling |= static_cast<Bits>(a.indices[e]) - static_cast<Bits>(a.indices[e - 1]) - 1;
      if (static_cast<Index>(outside) < 0 || (a.n_columns == 0 && begin < end)) mine.bad_row = i;
      if (static_cast<Index>(falling) < 0 && mine.unsorted_row < 0) mine.unsorted_row = i;
    }
    found[part] = mine;
  });
  CsrCheck first{-1, -1};
  for (const CsrCheck& part : found) {
    if (first.bad_row < 0) first.bad_row = part.bad_row;
    if (first.unsorted_row < 0) first.unsorted_row = part.unsorted_row;
  }
  return first;
}

template CsrCheck csr_check(const Csr<int32_t>&, int);
template CsrCheck csr_check(const Csr<int64_t>&, int);

}  // namespace npeff
