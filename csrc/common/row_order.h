// The rows of a block in the order of the targets (selectors, sketches) that they go to.
#pragma once

#include <cstdint>
#include <vector>

namespace npeff {

struct RowOrder {
  const int64_t* order;   // (n_rows,) rows by target
  const int64_t* starts;  // (n_targets + 1,) where each target's rows begin in order
  int64_t n_targets;

  // The targets that have rows.
  std::vector<int64_t> used() const {
    std::vector<int64_t> targets;
    for (int64_t t = 0; t < n_targets; ++t)
      if (starts[t] < starts[t + 1]) targets.push_back(t);
    return targets;
  }
};

}  // namespace npeff
