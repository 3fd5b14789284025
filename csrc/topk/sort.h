// Sorting of the pairs (bits, index).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace npeff {

// Stable, by key(bits, index), least significant digit first. bits, index: (n,), sorted in place. Keys are ≥ 0; digits in
// which all keys agree are passed over.
template <class Key>
void radix_sort(uint32_t* bits, int64_t* index, int64_t n, Key key) {
  constexpr int digit = 11;
  uint64_t all_or = 0, all_and = ~uint64_t{0};
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t k = key(bits[i], index[i]);
    all_or |= k;
    all_and &= k;
  }
  std::vector<uint32_t> other_bits(n);
  std::vector<int64_t> other_index(n);
  uint32_t *from_bits = bits, *to_bits = other_bits.data();
  int64_t *from_index = index, *to_index = other_index.data();
  for (int shift = 0; shift < 64; shift += digit) {
    const uint64_t mask = (uint64_t{1} << digit) - 1;
    if ((((all_or ^ all_and) >> shift) & mask) == 0) continue;
    std::array<int64_t, (1 << digit) + 1> start{};
    for (int64_t i = 0; i < n; ++i) ++start[((key(from_bits[i], from_index[i]) >> shift) & mask) + 1];
    for (int d = 0; d < (1 << digit); ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = start[(key(from_bits[i], from_index[i]) >> shift) & mask]++;
      to_bits[to] = from_bits[i];
      to_index[to] = from_index[i];
    }
    std::swap(from_bits, to_bits);
    std::swap(from_index, to_index);
  }
  if (from_bits != bits) {
    std::copy_n(from_bits, n, bits);
    std::copy_n(from_index, n, index);
  }
}

// By index, ascending; no two are equal. For input that consists of ascending runs which interleave by long stretches, as
// blocks of a gradient leave behind: runs are merged by stretches, with one copy in all. False, with nothing changed,
// where stretches are short.
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
