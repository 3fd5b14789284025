#include "topk_guess.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace npeff {

bool guess_threshold(const Piece* pieces, int64_t n_pieces, int64_t k, uint32_t* guess) {
  const int64_t total = total_length(pieces, n_pieces);
  if (total < 1 << 15 || total / 4 < k) return false;
  // About 64 entries of the sample among the k largest give the k-th well enough; each costs a cache line.
  const int64_t size = std::clamp<int64_t>(64 * (total / k), 512, 8192);
  std::vector<uint32_t> sample;
  sample.reserve(size);
  const double stride = static_cast<double>(total) / static_cast<double>(size);
  uint64_t random = 0x9e3779b97f4a7c15u;
  int64_t piece = 0, start = 0;
  for (int64_t i = 0; i < size; ++i) {  // one entry at a random place in each of `size` equal stretches
    random = random * 6364136223846793005u + 1442695040888963407u;
    const double within = static_cast<double>(random >> 40) * 0x1p-24;
    const auto at = std::min(total - 1, static_cast<int64_t>((static_cast<double>(i) + within) * stride));
    while (at - start >= pieces[piece].length && piece + 1 < n_pieces) start += pieces[piece++].length;
    uint32_t bits;
    std::memcpy(&bits, pieces[piece].data + (at - start), sizeof bits);
    sample.push_back(bits & 0x7fffffffu);
  }
  const double expected = static_cast<double>(k) / stride;
  const auto rank = static_cast<int64_t>(expected + 3.0 * std::sqrt(expected) + 3.0);
  if (rank > size / 2) return false;
  std::nth_element(sample.begin(), sample.begin() + (rank - 1), sample.end(), std::greater<>());
  *guess = sample[rank - 1];
  return *guess < 0x7f800000u;
}

}  // namespace npeff
