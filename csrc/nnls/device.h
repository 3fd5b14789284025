// The kernels of nnls.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include <optional>

#include "common/device.h"
#include "nnls/blocks.h"

namespace npeff {

template <class D>
int64_t nnls_workspace_on(int device, int64_t n, int64_t r) {
  const typename D::Queue queue(device, 0, "nnls_workspace");
  return NnlsProblem<float>::workspace(r, nnls_slots(queue, n));
}

template <class D>
void nnls_on(py::handle gram, py::handle cross, py::handle w, py::object kkt, int64_t max_sweeps, double tol,
             py::handle workspace, py::handle status, uintptr_t stream) {
  const TensorView gram_view(gram, "gram", D::read), cross_view(cross, "cross", D::read), w_view(w, "w", D::write),
      space(workspace, "workspace", D::write), status_view(status, "status", D::write);
  if (max_sweeps < 0 || !(tol >= 0)) fail("max_sweeps, tol: expected ≥ 0");
  std::optional<TensorView> kkt_view;
  if (!kkt.is_none()) kkt_view.emplace(kkt, "kkt", D::write);
  by_dtype<double, float>(cross_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* c = cross_view.as<const T>({any, any});
    const int64_t n = cross_view.shape(0), r = cross_view.shape(1);
    const auto* g = gram_view.as<const T>({r, r});
    auto* out = w_view.as<T>({n, r});
    auto* residual = kkt_view ? kkt_view->as<T>({n}) : nullptr;
    auto* found = status_view.as<int64_t>({2});
    auto* entries = space.as<T>({any});
    const TensorView& last = kkt_view ? *kkt_view : status_view;
    auto queue = D::queue(stream, "nnls", {&gram_view, &cross_view, &w_view, &space, &status_view, &last});
    const int64_t slots = nnls_slots(queue, n);
    check_workspace(space, NnlsProblem<T>::workspace(r, slots));
    const NnlsProblem<T> problem{g, c, out, residual, found, n, r, slots, nullptr, nullptr, nullptr};
    const py::gil_scoped_release release;
    nnls_by_blocks(queue, problem, entries, max_sweeps, static_cast<T>(tol));
  });
}

template <class D>
void bind_device_nnls(py::module_& m) {
  m.def("nnls_workspace", &nnls_workspace_on<D>, "device"_a, "n"_a, "r"_a, "Entries of nnls's workspace.");
  m.def("nnls", &nnls_on<D>, "gram"_a, "cross"_a, "w"_a, "kkt"_a, "max_sweeps"_a, "tol"_a, "workspace"_a, "status"_a,
        "stream"_a,
        "Coordinate descent, float32 or float64: gram (r, r), cross (n, r), w (n, r) in and out, kkt (n,) out or None, "
        "workspace (nnls_workspace,), status (2,) int64 out: first row with a non-finite value or 2^63 - 1, sweeps.");
}

}  // namespace npeff
