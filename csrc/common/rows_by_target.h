// The rows of a block in the order of the targets that they go to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace npeff {

struct RowsByTarget {
  std::vector<int64_t> order;   // (n_rows,) rows by target, and within a target by key; else as they were
  std::vector<int64_t> starts;  // (n_groups + 1,) where each group of rows with one target begins in order

  // targets (n_rows,); null: row i goes to target i. keys (n_rows,); null: none.
  RowsByTarget(const int64_t* targets, const int64_t* keys, int64_t n_rows) : order(n_rows), targets_(targets) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      if (target(a) != target(b)) return target(a) < target(b);
      return keys != nullptr && keys[a] < keys[b];
    });
    for (int64_t i = 0; i < n_rows; ++i)
      if (i == 0 || target(order[i]) != target(order[i - 1])) starts.push_back(i);
    starts.push_back(n_rows);
  }

  int64_t n_groups() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t target(int64_t row) const { return targets_ ? targets_[row] : row; }

 private:
  const int64_t* targets_;
};

}  // namespace npeff
