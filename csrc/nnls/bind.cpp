#include <optional>

#include "nnls/nnls.h"
#include "common/tensor_view.h"

namespace npeff {
namespace {

constexpr int64_t most_sweeps = 1'000'000;

py::tuple to_tuple(const NnlsStatus& status) { return py::make_tuple(status.bad_row, status.iterations); }

void check_tol(double tol) {
  if (!(tol >= 0)) fail("tol: expected ≥ 0, got " + std::to_string(tol));
}

// Whether Python has an error to raise: a signal came, such as Ctrl-C. Asked on the main thread, signals are seen to.
bool interrupted() {
  const py::gil_scoped_acquire gil;
  return PyErr_Occurred() || PyErr_CheckSignals() != 0;
}

template <class T>
py::tuple run(py::handle gram, py::handle cross, py::handle w, py::object kkt, int64_t max_sweeps, double tol, int threads) {
  const TensorView gram_view(gram, "gram"), cross_view(cross, "cross"), w_view(w, "w", write);
  check_threads(threads);
  check_tol(tol);
  if (max_sweeps < 0 || max_sweeps > most_sweeps)
    fail("max_sweeps: expected 0 … " + std::to_string(most_sweeps) + ", got " + std::to_string(max_sweeps));
  const auto* c = cross_view.as<const T>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const T>({r, r});
  auto* out = w_view.as<T>({n, r});
  std::optional<TensorView> kkt_view;
  T* residual = nullptr;
  check_apart({&gram_view, &cross_view, &w_view});
  if (!kkt.is_none()) {
    residual = kkt_view.emplace(kkt, "kkt", write).template as<T>({n});
    check_apart({&gram_view, &cross_view, &w_view, &*kkt_view});
  }
  NnlsStatus status{};
  {
    const py::gil_scoped_release release;
    status = nnls<T>(g, c, out, n, r, max_sweeps, static_cast<T>(tol), residual, threads, interrupted);
  }
  if (status.stopped) throw py::error_already_set();
  return to_tuple(status);
}

py::tuple run_exact(py::handle gram, py::handle cross, py::handle w, py::handle kkt, double tol, int threads) {
  const TensorView gram_view(gram, "gram"), cross_view(cross, "cross"),
      w_view(w, "w", write), kkt_view(kkt, "kkt", write);
  check_threads(threads);
  check_tol(tol);
  const auto* c = cross_view.as<const double>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const double>({r, r});
  auto* out = w_view.as<double>({n, r});
  auto* residual = kkt_view.as<double>({n});
  check_apart({&gram_view, &cross_view, &w_view, &kkt_view});
  NnlsStatus status{};
  {
    const py::gil_scoped_release release;
    status = nnls_exact(g, c, out, n, r, tol, residual, threads);
  }
  return to_tuple(status);
}

}  // namespace

void bind_nnls(py::module_& m) {
  const char* doc =
      "Coordinate descent: gram (r, r), cross (n, r), w (n, r) in and out, kkt (n,) out or None. "
      "(first row with a non-finite value or -1, sweeps made).";
  m.def("nnls_f32", &run<float>, doc, "gram"_a, "cross"_a, "w"_a, "kkt"_a, "max_sweeps"_a, "tol"_a, "threads"_a);
  m.def("nnls_f64", &run<double>, doc, "gram"_a, "cross"_a, "w"_a, "kkt"_a, "max_sweeps"_a, "tol"_a, "threads"_a);
  m.def("nnls_exact", &run_exact, "Active sets from the support of w, float64; arguments and result as for nnls_f64.",
        "gram"_a, "cross"_a, "w"_a, "kkt"_a, "tol"_a, "threads"_a);
}

}  // namespace npeff
