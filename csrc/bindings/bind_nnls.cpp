#include <optional>

#include "bindings.h"
#include "npeff/nnls.h"
#include "tensor_view.h"

namespace npeff {
namespace {

py::tuple to_tuple(const NnlsStatus& status) { return py::make_tuple(status.bad_row, status.iterations); }

template <class T>
py::tuple run(py::handle gram, py::handle cross, py::handle w, py::object kkt, int64_t max_sweeps, double tol, int threads) {
  const TensorView gram_view(gram, "gram", Access::read), cross_view(cross, "cross", Access::read), w_view(w, "w", Access::write);
  const auto* c = cross_view.as<const T>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const T>({r, r});
  auto* out = w_view.as<T>({n, r});
  std::optional<TensorView> kkt_view;
  T* residual = nullptr;
  if (!kkt.is_none()) residual = kkt_view.emplace(kkt, "kkt", Access::write).as<T>({n});
  NnlsStatus status{};
  {
    const py::gil_scoped_release release;
    status = nnls<T>(g, c, out, n, r, max_sweeps, static_cast<T>(tol), residual, threads);
  }
  return to_tuple(status);
}

py::tuple run_exact(py::handle gram, py::handle cross, py::handle w, py::handle kkt, double tol, int threads) {
  const TensorView gram_view(gram, "gram", Access::read), cross_view(cross, "cross", Access::read),
      w_view(w, "w", Access::write), kkt_view(kkt, "kkt", Access::write);
  const auto* c = cross_view.as<const double>({any, any});
  const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
  const auto* g = gram_view.as<const double>({r, r});
  auto* out = w_view.as<double>({n, r});
  auto* residual = kkt_view.as<double>({n});
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
  m.def("nnls_f32", &run<float>, doc, py::arg("gram"), py::arg("cross"), py::arg("w"), py::arg("kkt"),
        py::arg("max_sweeps"), py::arg("tol"), py::arg("threads"));
  m.def("nnls_f64", &run<double>, doc, py::arg("gram"), py::arg("cross"), py::arg("w"), py::arg("kkt"),
        py::arg("max_sweeps"), py::arg("tol"), py::arg("threads"));
  m.def("nnls_exact", &run_exact, "Active sets from the support of w, float64; arguments and result as for nnls_f64.",
        py::arg("gram"), py::arg("cross"), py::arg("w"), py::arg("kkt"), py::arg("tol"), py::arg("threads"));
}

}  // namespace npeff
