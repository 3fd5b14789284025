// The kernels of nnls.h: arguments from Python, and the calls.
#pragma once

#include <optional>

#include "common/device.h"
#include "nnls/blocks.h"
#include "nnls/nnls.h"

namespace npeff {

inline void check_tol(double tol) {
  if (!(tol >= 0)) fail("tol: expected ≥ 0, got " + std::to_string(tol));
}

// Whether Python has an error to raise: a signal came, such as Ctrl-C. Asked on the main thread, signals are seen to.
inline bool interrupted() {
  const py::gil_scoped_acquire gil;
  return PyErr_Occurred() || PyErr_CheckSignals() != 0;
}

// As the kernels write it: the first row with a non-finite value (or nnls_all_finite), and the iterations.
inline void write_status(const NnlsStatus& result, int64_t* status) {
  status[0] = result.bad_row < 0 ? nnls_all_finite : result.bad_row;
  status[1] = result.iterations;
}

template <class D>
void run_nnls(py::handle gram, py::handle cross, py::handle w, py::object kkt, int64_t max_sweeps, double tol,
              py::handle status, typename D::Run run) {
  const TensorView gram_view(gram, "gram", D::read), cross_view(cross, "cross", D::read), w_view(w, "w", D::write),
      status_view(status, "status", D::write);
  check_tol(tol);
  if (max_sweeps < 0 || max_sweeps > 1'000'000) fail("max_sweeps: expected 0 … 1000000, got " + std::to_string(max_sweeps));
  std::optional<TensorView> kkt_view;
  if (!kkt.is_none()) kkt_view.emplace(kkt, "kkt", D::write);
  bool stopped = false;
  by_dtype<double, float>(cross_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* c = cross_view.as<const T>({any, any});
    const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
    const auto* g = gram_view.as<const T>({r, r});
    auto* out = w_view.as<T>({n, r});
    auto* residual = kkt_view ? kkt_view->as<T>({n}) : nullptr;
    auto* found = status_view.as<int64_t>({2});
    const TensorView& last = kkt_view ? *kkt_view : status_view;
    auto where = D::begin(run, "nnls", {&gram_view, &cross_view, &w_view, &status_view, &last});
    const py::gil_scoped_release release;
    if constexpr (D::on_host) {
      const NnlsStatus result = nnls<T>(g, c, out, n, r, max_sweeps, static_cast<T>(tol), residual, where, interrupted);
      stopped = result.stopped;
      write_status(result, found);
    } else {
      nnls<T>(g, c, out, n, r, max_sweeps, static_cast<T>(tol), residual, found, where);
    }
  });
  if (stopped) throw py::error_already_set();
}

inline void run_nnls_exact(py::handle gram, py::handle cross, py::handle w, py::handle kkt, double tol, py::handle status,
                           int threads) {
  const TensorView gram_view(gram, "gram"), cross_view(cross, "cross"), w_view(w, "w", write), kkt_view(kkt, "kkt", write),
      status_view(status, "status", write);
  check_tol(tol);
  const auto* c = cross_view.as<const double>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const double>({r, r});
  auto* out = w_view.as<double>({n, r});
  auto* residual = kkt_view.as<double>({n});
  auto* found = status_view.as<int64_t>({2});
  Host::begin(threads, "nnls_exact", {&gram_view, &cross_view, &w_view, &kkt_view, &status_view});
  const py::gil_scoped_release release;
  write_status(nnls_exact(g, c, out, n, r, tol, residual, threads), found);
}

template <class D>
void bind_nnls(py::module_& m) {
  m.def("nnls", &run_nnls<D>, py::kw_only(), "gram"_a, "cross"_a, "w"_a, "kkt"_a, "max_sweeps"_a, "tol"_a, "status"_a,
        py::arg(D::run),
        "Coordinate descent, float32 or float64: gram (r, r), cross (n, r), w (n, r) in and out, kkt (n,) out or None, "
        "status (2,) int64 out: first row with a non-finite value or 2^63 - 1, sweeps.");
  if constexpr (D::on_host)
    m.def("nnls_exact", &run_nnls_exact, py::kw_only(), "gram"_a, "cross"_a, "w"_a, "kkt"_a, "tol"_a, "status"_a, "threads"_a,
          "Active sets from the support of w, float64; arguments as for nnls, status with the steps made.");
}

}  // namespace npeff
