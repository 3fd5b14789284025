// The kernels of segments.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/device.h"
#include "segments/blocks.h"

namespace npeff {

template <class D>
void cross_on(py::handle p, py::handle row_offsets, py::handle out, uintptr_t stream) {
  const TensorView p_view(p, "p", D::read), offsets_view(row_offsets, "row_offsets", D::read), out_view(out, "out", D::write);
  by_dtype<double, Half, Bfloat16, float>(p_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* rows = p_view.as<const T>({any, any});
    const int64_t r = p_view.shape(1);
    auto* sums = out_view.as<typename SumOf<T>::type>({any, r});
    const int64_t n = out_view.shape(0);
    const auto* offsets = offsets_view.as<const int64_t>({n + 1});
    auto queue = D::queue(stream, "cross", {&p_view, &offsets_view, &out_view});
    const py::gil_scoped_release release;
    run_segments<CrossBlocks, T>(queue, offsets, n, r, sums, rows);
  });
}

template <class D>
void spread_multiply_on(py::handle w, py::handle p, py::handle row_offsets, py::handle out, uintptr_t stream) {
  const TensorView w_view(w, "w", D::read), p_view(p, "p", D::read), offsets_view(row_offsets, "row_offsets", D::read),
      out_view(out, "out", D::write);
  by_dtype<double, Half, Bfloat16, float>(p_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* weights = w_view.as<const T>({any, any});
    const int64_t n = w_view.shape(0), r = w_view.shape(1);
    const auto* rows = p_view.as<const T>({any, r});
    const auto* offsets = offsets_view.as<const int64_t>({n + 1});
    auto* products = out_view.as<typename SumOf<T>::type>({p_view.shape(0), r});
    auto queue = D::queue(stream, "spread_multiply", {&w_view, &offsets_view, &out_view});
    if (p_view.device() != w_view.device()) fail("expected all arguments on one device, p is on another");
    check_same_or_apart(out_view, p_view);
    const py::gil_scoped_release release;
    run_segments<SpreadMultiplyBlocks, T>(queue, offsets, n, r, products, weights, rows);
  });
}

template <class D>
void bind_device_segments(py::module_& m) {
  m.def("cross", &cross_on<D>, "p"_a, "row_offsets"_a, "out"_a, "stream"_a,
        "out (n, r) = sums of squares of p (R, r) over each example's rows; 16-bit p give float32.");
  m.def("spread_multiply", &spread_multiply_on<D>, "w"_a, "p"_a, "row_offsets"_a, "out"_a, "stream"_a,
        "out (R, r) = p (R, r) times the example's row of w (n, r); 16-bit w and p give float32.");
}

}  // namespace npeff
