// A first threshold for the selection, from a sample of the input.
#pragma once

#include <cstdint>
#include <functional>

#include "npeff/topk.h"

namespace npeff {

// Sets *guess to a magnitude that a little more than k of all entries reach, most probably.
// False when the input is too short for it to pay.
//   bits_at(position): an entry as bits, position < total; asked for ascending positions
bool guess_threshold(int64_t total, int64_t k, const std::function<uint32_t(int64_t)>& bits_at, uint32_t* guess);

inline int64_t total_length(const Piece* pieces, int64_t n_pieces) {
  int64_t total = 0;
  for (int64_t p = 0; p < n_pieces; ++p) total += pieces[p].length;
  return total;
}

}  // namespace npeff
