#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace npeff {

// Bounds of at most `parts` runs of rows with about as many entries (plus rows) each: bounds[p] … bounds[p+1] − 1.
inline std::vector<int64_t> parts_by_entries(const int64_t* indptr, int64_t n_rows, int64_t parts) {
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

}  // namespace npeff
