#pragma once

#include <algorithm>
#include <cstdint>

namespace npeff {

// The first entry in [from, end) whose column is ≥ limit, columns ascending; in steps that double.
template <class Index>
int64_t seek(const Index* indices, int64_t from, int64_t end, int64_t limit) {
  int64_t step = 8, to = from;
  while (to < end && indices[to] < limit) {
    from = to;
    to += step;
    step *= 2;
  }
  return std::lower_bound(indices + from, indices + std::min(to, end), limit) - indices;
}

}  // namespace npeff
