// The kernels of nnls.h: arguments from Python, and the calls.
#pragma once

#include "common/device.h"
#include "nnls/blocks.h"
#include "nnls/nnls.h"

namespace npeff {

inline void check_tol(double tol) {
  if (!(tol >= 0)) fail("tol: expected ≥ 0, got " + std::to_string(tol));
}

template <class D>
void run_nnls(py::handle gram, py::handle cross, py::handle w, py::handle residual, int64_t max_sweeps, double tol,
              bool kkt, py::handle status, typename D::Run run) {
  const TensorView gram_view(gram, "gram", D::read), cross_view(cross, "cross", D::read), w_view(w, "w", D::write),
      residual_view(residual, "residual", D::write), status_view(status, "status", D::write);
  check_tol(tol);
  if (max_sweeps < 0 || max_sweeps > 1'000'000) fail("max_sweeps: expected 0 … 1000000, got " + std::to_string(max_sweeps));
  by_dtype<double, float>(cross_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* c = cross_view.as<const T>({any, any});
    const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
    const auto* g = gram_view.as<const T>({r, r});
    auto* out = w_view.as<T>({n, r});
    auto* residuals = residual_view.as<T>({n});
    auto* found = status_view.as<int64_t>({2});
    auto where = D::begin(run, "nnls", {&gram_view, &cross_view, &w_view, &residual_view, &status_view});
    const py::gil_scoped_release release;
    nnls<T>(g, c, out, n, r, max_sweeps, static_cast<T>(tol), kkt, residuals, found, where);
  });
}

inline void run_nnls_exact(py::handle gram, py::handle cross, py::handle w, py::handle residual, double tol,
                           py::handle status, int threads) {
  const TensorView gram_view(gram, "gram"), cross_view(cross, "cross"), w_view(w, "w", write),
      residual_view(residual, "residual", write), status_view(status, "status", write);
  check_tol(tol);
  const auto* c = cross_view.as<const double>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const double>({r, r});
  auto* out = w_view.as<double>({n, r});
  auto* residuals = residual_view.as<double>({n});
  auto* found = status_view.as<int64_t>({2});
  Host::begin(threads, "nnls_exact", {&gram_view, &cross_view, &w_view, &residual_view, &status_view});
  const py::gil_scoped_release release;
  nnls_exact(g, c, out, n, r, tol, residuals, found, threads);
}

template <class D>
void bind_nnls(py::module_& m) {
  m.def("nnls", &run_nnls<D>, py::kw_only(), "gram"_a, "cross"_a, "w"_a, "residual"_a, "max_sweeps"_a, "tol"_a,
        "kkt"_a, "status"_a, py::arg(D::run),
        "Coordinate descent, float32 or float64: gram (r, r), cross (n, r), w (n, r) in and out, residual (n,): rows with "
        "at most tol are not swept, the others get that of their last sweep, or with kkt all rows that at the result. status "
        "(2,) int64 out: first row with a non-finite value or 2^63 - 1, sweeps.");
  if constexpr (D::on_host)
    m.def("nnls_exact", &run_nnls_exact, py::kw_only(), "gram"_a, "cross"_a, "w"_a, "residual"_a, "tol"_a, "status"_a, "threads"_a,
          "Active sets from the support of w, float64; arguments as for nnls, status with the steps made.");
}

}  // namespace npeff
