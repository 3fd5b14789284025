// Lawson & Hanson's active-set method on the normal equations, from a warm start. The free coordinates carry a
// Cholesky factor that grows by a row when one enters, and is redone from the place where one leaves. Part of simd.cpp.
#pragma once

#include "common/simd.h"
#include "nnls/simd.h"

namespace npeff::NPEFF_ISA {
namespace {

double dot(const double* a, const double* b, int64_t n) {
  using S = Simd<double>;
  S::Vec sum{};
  int64_t i = 0;
  for (; i + S::lanes <= n; i += S::lanes) sum += S::load(a + i) * S::load(b + i);
  double total = 0;
  for (int l = 0; l < S::lanes; ++l) total += sum[l];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

void subtract(double* y, double factor, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] -= factor * x[i];
}

// A column whose part beyond the span of the others is smaller than this (relative, squared) counts as dependent.
constexpr double dependent = 1e-12;

class ActiveSet {
 public:
  ActiveSet(const NnlsRow& row)
      : gram_(row.gram), cross_(row.cross), w_(row.w), r_(row.r), factor_(row.scratch), diagonal_(factor_ + r_ * r_),
        target_(diagonal_ + r_), gradient_(target_ + r_), free_(reinterpret_cast<int64_t*>(gradient_ + r_)),
        state_(free_ + r_) {
    for (int64_t j = 0; j < r_; ++j) {
      const double c = cross_[j] < 0 ? -cross_[j] : cross_[j];
      scale_ = c > scale_ ? c : scale_;
    }
    if (!(scale_ > 0)) scale_ = 1;
  }

  int64_t run(double tol, double* residual) {
    start();
    int64_t steps = 0;
    for (const int64_t most = 3 * r_ + 50; steps < most; ++steps) {
      descend();
      refine(0.1 * tol);
      if (!enter(0.5 * tol)) break;
    }
    *residual = largest_violation();
    return steps + 1;
  }

 private:
  enum State : int64_t { bound, held, barred };  // at 0; free; at 0 and dependent on the free ones

  // The support of w, without the coordinates that the solution on it makes negative.
  void start() {
    for (int64_t j = 0; j < r_; ++j) {
      state_[j] = bound;
      if (w_[j] > 0 && gram_[j * r_ + j] > 0 && append(j)) continue;
      w_[j] = 0;
    }
    for (bool feasible = false; !feasible;) {
      solve();
      feasible = true;
      for (int64_t i = n_ - 1; i >= 0; --i)
        if (target_[i] <= 0) {
          release(i);
          feasible = false;
        }
      if (!feasible) rebuild(0);
    }
    for (int64_t i = 0; i < n_; ++i) w_[free_[i]] = target_[i];
  }

  // Adds coordinate j to the free ones; false when its column depends on theirs.
  bool append(int64_t j) {
    double* row = factor_ + n_ * r_;
    for (int64_t i = 0; i < n_; ++i)
      row[i] = (gram_[j * r_ + free_[i]] - dot(factor_ + i * r_, row, i)) / diagonal_[i];
    const double rest = gram_[j * r_ + j] - dot(row, row, n_);
    if (!(rest > dependent * gram_[j * r_ + j])) return false;
    diagonal_[n_] = __builtin_sqrt(rest);
    free_[n_++] = j;
    state_[j] = held;
    return true;
  }

  // Takes the i-th free coordinate out; the factor is wrong from row i on until rebuild(i).
  void release(int64_t i) {
    w_[free_[i]] = 0;
    state_[free_[i]] = bound;
    for (--n_; i < n_; ++i) free_[i] = free_[i + 1];
  }

  void rebuild(int64_t from) {
    const int64_t n = n_;
    n_ = from;
    for (int64_t i = from; i < n; ++i) {
      const int64_t j = free_[i];
      if (append(j)) continue;
      w_[j] = 0;
      state_[j] = bound;
    }
  }

  // x ← (L Lᵀ)⁻¹ x over the free coordinates.
  void solve_in_place(double* x) const {
    for (int64_t i = 0; i < n_; ++i) x[i] = (x[i] - dot(factor_ + i * r_, x, i)) / diagonal_[i];
    for (int64_t i = n_ - 1; i >= 0; --i) {
      x[i] /= diagonal_[i];
      subtract(x, x[i], factor_ + i * r_, i);
    }
  }

  void solve() {
    for (int64_t i = 0; i < n_; ++i) target_[i] = cross_[free_[i]];
    solve_in_place(target_);
  }

  // Moves w to the minimum over the free coordinates, binding those that reach 0 on the way.
  void descend() {
    while (n_ > 0) {
      solve();
      int64_t blocking = -1;
      double reach = 1;
      for (int64_t i = 0; i < n_; ++i) {
        if (target_[i] > 0) continue;
        const double w = w_[free_[i]], ratio = w > 0 ? w / (w - target_[i]) : 0;
        if (blocking < 0 || ratio < reach) {
          reach = ratio;
          blocking = i;
        }
      }
      for (int64_t i = 0; i < n_; ++i) {
        double& w = w_[free_[i]];
        w = blocking < 0 ? target_[i] : w + reach * (target_[i] - w);
        if (w < 0) w = 0;
      }
      if (blocking < 0) return;
      release(blocking);
      rebuild(blocking);
    }
  }

  void compute_gradient() {
    for (int64_t j = 0; j < r_; ++j) gradient_[j] = -cross_[j];
    for (int64_t i = 0; i < n_; ++i) subtract(gradient_, -w_[free_[i]], gram_ + free_[i] * r_, r_);
  }

  // Newton steps against rounding, as long as they help and stay inside.
  void refine(double tol) {
    compute_gradient();
    for (int attempt = 0; attempt < 3; ++attempt) {
      double worst = 0;
      for (int64_t i = 0; i < n_; ++i) {
        target_[i] = gradient_[free_[i]];
        const double g = target_[i] < 0 ? -target_[i] : target_[i];
        worst = g > worst ? g : worst;
      }
      if (worst <= tol * scale_) return;
      solve_in_place(target_);
      for (int64_t i = 0; i < n_; ++i)
        if (!(w_[free_[i]] - target_[i] > 0)) return;
      for (int64_t i = 0; i < n_; ++i) w_[free_[i]] -= target_[i];
      compute_gradient();
    }
  }

  // Frees the bound coordinate with the steepest descent; false at the optimum.
  bool enter(double tol) {
    for (int64_t j = 0; j < r_; ++j)
      if (state_[j] == barred) state_[j] = bound;
    for (;;) {
      int64_t best = -1;
      double steepest = tol * scale_;
      for (int64_t j = 0; j < r_; ++j)
        if (state_[j] == bound && gram_[j * r_ + j] > 0 && -gradient_[j] > steepest) {
          steepest = -gradient_[j];
          best = j;
        }
      if (best < 0) return false;
      if (append(best)) return true;
      state_[best] = barred;
    }
  }

  double largest_violation() {
    compute_gradient();
    double worst = 0;
    for (int64_t j = 0; j < r_; ++j) {
      if (!(gram_[j * r_ + j] > 0)) continue;
      const double violation = w_[j] > 0 && gradient_[j] > 0 ? gradient_[j] : -gradient_[j];
      worst = violation > worst ? violation : worst;
    }
    return worst / scale_;
  }

  const double *gram_, *cross_;
  double* w_;
  int64_t r_, n_ = 0;  // coordinates in all, and free
  double scale_ = 0;
  double* factor_;     // (r, r): row i is that of the i-th free coordinate, below the diagonal
  double* diagonal_;   // (r,): of the factor
  double* target_;     // (r,): solution over the free coordinates
  double* gradient_;   // (r,)
  int64_t* free_;      // (r,): the free coordinates, in the factor's order
  int64_t* state_;     // (r,)
};

}  // namespace

int64_t nnls_active_set(const NnlsRow& row, double tol, double* residual) { return ActiveSet(row).run(tol, residual); }

}  // namespace npeff::NPEFF_ISA
