// The kernels of spmm.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/device.h"
#include "spmm/blocks.h"

namespace npeff {

template <class D>
void spmm_on(py::handle indptr, py::handle indices, py::handle values, py::handle dense, py::handle out, uintptr_t stream) {
  const TensorView dense_view(dense, "dense", D::read), out_view(out, "out", D::write);
  const CsrView a(indptr, indices, values, dense_view.shape(0), D::read);
  by_dtype<double, Half, Bfloat16, float>(dense_view.dtype(), [&](auto entry) {
    using T = decltype(entry);
    using Sum = typename SumOf<T>::type;
    const auto* d = dense_view.as<const T>({any, any});
    const int64_t r = dense_view.shape(1);
    auto* result = out_view.as<Sum>({a.n_rows(), r});
    auto queue = D::queue(stream, "spmm", {&a.indptr, &a.indices, &a.values, &dense_view, &out_view});
    a.visit<Sum>([&](const auto& csr) {
      spmm_by_blocks(queue, csr.n_rows, csr.indptr, csr.indices, csr.values, a.nnz(), d, r, result);
    });
  });
}

template <class D>
void bind_device_spmm(py::module_& m) {
  m.def("spmm", &spmm_on<D>, "indptr"_a, "indices"_a, "values"_a, "dense"_a, "out"_a, "stream"_a,
        "out (R, r) = CSR (R, columns) times dense (columns, r): float32 values with a dense of float32, float16 or "
        "bfloat16, or all float64. The structure must be sound: indices are not looked at before use.");
}

}  // namespace npeff
