#include <optional>

#include "cuda_bindings.h"
#include "device_view.h"

namespace npeff {
namespace {

int64_t workspace_for(int device, int64_t n, int64_t r) { return cuda::nnls_workspace({device, nullptr}, n, r); }

template <class T>
void nnls(const DeviceView& gram, const DeviceView& cross, const DeviceView& w, const DeviceView* kkt, int64_t max_sweeps,
          double tol, const DeviceView& workspace, const DeviceView& status, uintptr_t stream) {
  const auto* c = cross.as<const T>({any, any});
  const int64_t n = cross.shape(0), r = cross.shape(1);
  const auto* g = gram.as<const T>({r, r});
  auto* out = w.as<T>({n, r});
  auto* residual = kkt ? kkt->as<T>({n}) : nullptr;
  auto* found = status.as<int64_t>({2});
  const cuda::Stream where = kkt ? stream_of(stream, {&gram, &cross, &w, &workspace, &status, kkt})
                                 : stream_of(stream, {&gram, &cross, &w, &workspace, &status});
  auto* space = workspace.as<T>({any});
  const int64_t need = workspace_for(where.device, n, r);
  if (workspace.shape(0) < need)
    fail("workspace: expected at least " + std::to_string(need) + " entries, got " + std::to_string(workspace.shape(0)));
  const py::gil_scoped_release release;
  cuda::nnls(where, g, c, out, n, r, max_sweeps, static_cast<T>(tol), residual, space, found);
}

void run_nnls(py::handle gram, py::handle cross, py::handle w, py::object kkt, int64_t max_sweeps, double tol,
              py::handle workspace, py::handle status, uintptr_t stream) {
  const DeviceView gram_view(gram, "gram"), cross_view(cross, "cross"), w_view(w, "w", Access::write),
      space(workspace, "workspace", Access::write), status_view(status, "status", Access::write);
  if (max_sweeps < 0 || !(tol >= 0)) fail("max_sweeps, tol: expected ≥ 0");
  std::optional<DeviceView> residual;
  if (!kkt.is_none()) residual.emplace(kkt, "kkt", Access::write);
  const auto run = cross_view.dtype() == "float64" ? &nnls<double> : &nnls<float>;
  run(gram_view, cross_view, w_view, residual ? &*residual : nullptr, max_sweeps, tol, space, status_view, stream);
}

// body(T{}, Sum{}) for the dtype of x.
template <class Body>
void by_dtype(const DeviceView& x, Body body) {
  if (x.dtype() == "float64") body(double{}, double{});
  else if (x.dtype() == "float16") body(Half{}, float{});
  else if (x.dtype() == "bfloat16") body(Bfloat16{}, float{});
  else body(float{}, float{});
}

void run_cross(py::handle p, py::handle row_offsets, py::handle out, uintptr_t stream) {
  const DeviceView p_view(p, "p"), offsets_view(row_offsets, "row_offsets"),
      out_view(out, "out", Access::write);
  by_dtype(p_view, [&](auto entry, auto sum) {
    const auto* rows = p_view.as<const decltype(entry)>({any, any});
    const int64_t r = p_view.shape(1);
    auto* sums = out_view.as<decltype(sum)>({any, r});
    const int64_t n = out_view.shape(0);
    const auto* offsets = offsets_view.as<const int64_t>({n + 1});
    const cuda::Stream where = stream_of(stream, {&p_view, &offsets_view, &out_view});
    const py::gil_scoped_release release;
    cuda::cross(where, rows, offsets, n, r, sums);
  });
}

void run_spread_multiply(py::handle w, py::handle p, py::handle row_offsets, py::handle out, uintptr_t stream) {
  const DeviceView w_view(w, "w"), p_view(p, "p"), offsets_view(row_offsets, "row_offsets"),
      out_view(out, "out", Access::write);
  by_dtype(p_view, [&](auto entry, auto product) {
    const auto* weights = w_view.as<const decltype(entry)>({any, any});
    const int64_t n = w_view.shape(0), r = w_view.shape(1);
    const auto* rows = p_view.as<const decltype(entry)>({any, r});
    const auto* offsets = offsets_view.as<const int64_t>({n + 1});
    auto* products = out_view.as<decltype(product)>({p_view.shape(0), r});
    const cuda::Stream where = stream_of(stream, {&w_view, &offsets_view, &out_view});
    if (p_view.device() != where.device) fail("expected all arguments on one device, p is on another");
    check_same_or_apart(out_view, p_view);
    const py::gil_scoped_release release;
    cuda::spread_multiply(where, weights, rows, offsets, n, r, products);
  });
}

}  // namespace

void bind_cuda_solver(py::module_& m) {
  m.def("nnls_workspace", &workspace_for, py::arg("device"), py::arg("n"), py::arg("r"), "Entries of nnls's workspace.");
  m.def("nnls", &run_nnls, py::arg("gram"), py::arg("cross"), py::arg("w"), py::arg("kkt"), py::arg("max_sweeps"),
        py::arg("tol"), py::arg("workspace"), py::arg("status"), py::arg("stream"),
        "Coordinate descent, float32 or float64: gram (r, r), cross (n, r), w (n, r) in and out, kkt (n,) out or None, "
        "workspace (nnls_workspace,), status (2,) int64 out: first row with a non-finite value or 2^63 - 1, sweeps.");
  m.def("cross", &run_cross, py::arg("p"), py::arg("row_offsets"), py::arg("out"), py::arg("stream"),
        "out (n, r) = sums of squares of p (R, r) over each example's rows; 16-bit p give float32.");
  m.def("spread_multiply", &run_spread_multiply, py::arg("w"), py::arg("p"), py::arg("row_offsets"), py::arg("out"),
        py::arg("stream"), "out (R, r) = p (R, r) times the example's row of w (n, r); 16-bit w and p give float32.");
}

}  // namespace npeff
