#include "topk_guess.h"

#include <algorithm>
#include <vector>

#include "npeff/topk_order.h"

namespace npeff {

bool guess_threshold(int64_t total, int64_t k, const std::function<uint32_t(int64_t)>& bits_at, uint32_t* guess) {
  if (!guess_pays(total, k)) return false;
  const int64_t size = sample_size(total, k), rank = sample_rank(size, total, k);
  if (rank == 0) return false;
  std::vector<uint32_t> sample(size);
  for (int64_t i = 0; i < size; ++i) sample[i] = bits_at(sample_place(i, size, total)) & topk_magnitude;
  std::nth_element(sample.begin(), sample.begin() + (rank - 1), sample.end(), std::greater<>());
  *guess = sample[rank - 1];
  return *guess < topk_infinity;
}

}  // namespace npeff
