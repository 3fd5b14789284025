// Places in the rows of CSR matrices.
#pragma once

#include "npeff/host_device.h"

namespace npeff {

// The first entry in [from, end) whose column is ≥ limit, columns ascending; in steps that double, then halving.
template <class Index>
NPEFF_INLINE int64_t seek(const Index* indices, int64_t from, int64_t end, int64_t limit) {
  int64_t step = 8, to = from;
  while (to < end && indices[to] < limit) {
    from = to;
    to += step;
    step *= 2;
  }
  to = to < end ? to : end;
  while (from < to) {
    const int64_t middle = from + (to - from) / 2;
    if (indices[middle] < limit) from = middle + 1;
    else to = middle;
  }
  return from;
}

}  // namespace npeff
