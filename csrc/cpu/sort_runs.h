// Sorting what consists of ascending runs that interleave by long stretches, as blocks of a gradient leave behind.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace npeff {

// bits, index: (n,), sorted in place by index, ascending; no two are equal. Runs are merged by stretches, one copy in
// all. False, with nothing changed, where stretches are short: sort otherwise.
inline bool sort_runs(uint32_t* bits, int64_t* index, int64_t n) {
  struct Run { int64_t at, end; };
  const int64_t most = 64 + n / 16;
  std::vector<Run> heap;
  for (int64_t i = 0; i < n; ++i) {
    if (i && index[i - 1] < index[i]) continue;
    if (static_cast<int64_t>(heap.size()) == most) return false;
    if (i) heap.back().end = i;
    heap.push_back({i, n});
  }
  if (heap.size() <= 1) return true;
  const auto later = [index](const Run& a, const Run& b) { return index[a.at] > index[b.at]; };
  std::make_heap(heap.begin(), heap.end(), later);
  std::vector<uint32_t> sorted_bits(n);
  std::vector<int64_t> sorted_index(n);
  int64_t filled = 0;
  for (int64_t stretches = 0; !heap.empty(); ++stretches) {
    if (stretches == most) return false;
    std::pop_heap(heap.begin(), heap.end(), later);
    Run run = heap.back();
    heap.pop_back();
    int64_t to = run.end;
    if (!heap.empty()) {  // up to the next run's first, by steps that double
      const int64_t next = index[heap.front().at];
      int64_t step = 1;
      while (run.at + step < run.end && index[run.at + step] < next) step *= 2;
      to = std::lower_bound(index + run.at + step / 2, index + std::min(run.at + step, run.end), next) - index;
    }
    std::copy(bits + run.at, bits + to, sorted_bits.begin() + filled);
    std::copy(index + run.at, index + to, sorted_index.begin() + filled);
    filled += to - run.at;
    if (to == run.end) continue;
    heap.push_back({to, run.end});
    std::push_heap(heap.begin(), heap.end(), later);
  }
  std::copy(sorted_bits.begin(), sorted_bits.end(), bits);
  std::copy(sorted_index.begin(), sorted_index.end(), index);
  return true;
}

}  // namespace npeff
