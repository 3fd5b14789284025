// Non-negative least squares in normal form, many right-hand sides at once:
//
//   minimise over w ≥ 0, for each row i:   ½ wᵀ gram w − cross_iᵀ w
//
// Gradient: gram w − cross_i. KKT residual of a row: the largest |violation_j| over the largest |cross_ij| (over 1 if
// cross_i = 0), where violation_j is the gradient where w_j > 0, and min(gradient, 0) where w_j = 0.
// Coordinates with gram_jj ≤ 0 are set to 0 and left out of the residual.
#pragma once

#include "common/host_device.h"

namespace npeff {

// All solvers write status (2,): the first row of cross or w (before or after) with a non-finite value (w and residual are
// then undefined), or nnls_all_finite; and the most sweeps (or active-set steps) that any row took.
constexpr int64_t nnls_all_finite = INT64_MAX;

// Cyclic coordinate descent, at most max_sweeps; a row stops once its residual during a sweep is ≤ tol. Rows do not
// influence each other, down to the last bit.
//   gram     (r, r)  symmetric
//   cross    (n, r)
//   w        (n, r)  in: where to start; out: the result. Must not overlap the others.
//   residual (n,)    in: rows whose residual is ≤ tol are not swept; out: the residual that a row's last sweep met on its
//                    way, or with kkt (the work of one more sweep) that at the result
// T: float or double. One sweep costs n·r² multiply-adds, less where whole coordinates are zero.
template <class T>
void nnls(const T* gram, const T* cross, T* w, int64_t n, int64_t r, int64_t max_sweeps, T tol, bool kkt,
          T* residual, int64_t* status, int threads);

// To optimality, by an active set that starts from the support of w (Lawson & Hanson 1974, ch. 23, on the normal
// equations with Cholesky factors); linearly dependent columns of gram do no harm.
//   residual (n,)    out: at the result
void nnls_exact(const double* gram, const double* cross, double* w, int64_t n, int64_t r, double tol, double* residual,
                int64_t* status, int threads);

// ---- one coordinate of the descent, for a row of the problem or (as a vector) for several

// How far a coordinate is from optimal, given its gradient.
template <class V>
NPEFF_INLINE V nnls_violation(V w, V gradient) { return w > 0 ? size_of(gradient) : -gradient; }

// The coordinate's best value, all others kept: max(0, w − gradient / gram_jj).
template <class V, class T>
NPEFF_INLINE V nnls_moved(V w, V gradient, T inverse_diagonal) { return larger(w - gradient * inverse_diagonal, V{}); }

// Where to start from a given coefficient.
template <class T>
NPEFF_INLINE T nnls_start(T w, T inverse_diagonal) { return w > 0 && inverse_diagonal > 0 ? w : T{0}; }

template <class T>
NPEFF_INLINE T nnls_inverse(T diagonal) { return diagonal > 0 ? 1 / diagonal : T{0}; }

// Entry `at` of gram by panels of `block` columns: (padded / block, r, block), zero beyond r.
template <class T>
NPEFF_INLINE T nnls_packed(const T* gram, int64_t r, int64_t block, int64_t at) {
  const int64_t column = at / (r * block) * block + at % block;
  return column < r ? gram[at / block % r * r + column] : T{0};
}

}  // namespace npeff
