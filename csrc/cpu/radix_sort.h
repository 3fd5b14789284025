// Stable sort of the pairs (bits, index) by key(bits, index), least significant digit first.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace npeff {

// bits, index: (n,), sorted in place. Keys are ≥ 0; digits in which all keys agree are passed over.
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

}  // namespace npeff
