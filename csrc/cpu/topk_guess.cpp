#include "topk_guess.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "npeff/topk_order.h"

namespace npeff {

bool guess_threshold(const Piece* pieces, int64_t n_pieces, int64_t k, uint32_t* guess) {
  const int64_t total = total_length(pieces, n_pieces);
  if (!guess_pays(total, k)) return false;
  const int64_t size = sample_size(total, k), rank = sample_rank(size, total, k);
  if (rank == 0) return false;
  std::vector<uint32_t> sample(size);
  int64_t piece = 0, start = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = sample_place(i, size, total);
    while (at - start >= pieces[piece].length && piece + 1 < n_pieces) start += pieces[piece++].length;
    uint32_t bits;
    std::memcpy(&bits, pieces[piece].data + (at - start), sizeof bits);
    sample[i] = bits & topk_magnitude;
  }
  std::nth_element(sample.begin(), sample.begin() + (rank - 1), sample.end(), std::greater<>());
  *guess = sample[rank - 1];
  return *guess < topk_infinity;
}

}  // namespace npeff
