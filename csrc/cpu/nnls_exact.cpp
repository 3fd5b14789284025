#include <algorithm>
#include <vector>

#include "aligned.h"
#include "finite.h"
#include "isa.h"
#include "npeff/checked.h"
#include "npeff/nnls.h"
#include "npeff/parallel.h"

namespace npeff {

NnlsStatus nnls_exact(const double* gram, const double* cross, double* w, int64_t n, int64_t r, double tol, double* kkt,
                      int threads) {
  const int64_t parts = std::min<int64_t>(n, 64 * threads);
  std::vector<int64_t> steps(parts, 0), bad(parts, -1);
  parallel_for(parts, n * r * r < 1 << 16 ? 1 : threads, [&](int64_t part) {
    Aligned<double> scratch(checked_sum({checked_product({r, r}), checked_product({5, r})}));
    const Range range = part_of(n, part, parts);
    for (int64_t i = range.begin; i < range.end && bad[part] < 0; ++i) {
      if (finite(cross + i * r, r) && finite(w + i * r, r))
        steps[part] = std::max(steps[part], kernels().nnls_active_set(
                                                {gram, cross + i * r, w + i * r, scratch.data(), r}, tol, kkt + i));
      else bad[part] = i;
      if (!finite(w + i * r, r)) bad[part] = i;
    }
  });
  NnlsStatus status{-1, 0, false};
  for (int64_t part = parts - 1; part >= 0; --part) {
    if (bad[part] >= 0) status.bad_row = bad[part];
    status.iterations = std::max(status.iterations, steps[part]);
  }
  return status;
}

}  // namespace npeff
