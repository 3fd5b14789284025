// The kernels of gram.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/device.h"
#include "gram/blocks.h"

namespace npeff {

template <class D>
void gram_panel_on(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle k,
                   uintptr_t stream) {
  const CsrView a(indptr, indices, values, n_columns, D::read);
  const TensorView out(k, "k", D::write);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  auto queue = D::queue(stream, "gram_panel", {&a.indptr, &a.indices, &a.values, &out});
  a.visit([&](const auto& csr) { gram_panel_by_blocks(queue, csr, sums); });
}

template <class D>
void mirror_on(py::handle k, uintptr_t stream) {
  const TensorView out(k, "k", D::write);
  if (out.ndim() != 2) fail("k: expected a square matrix");
  const int64_t n = out.shape(0);
  auto* square = out.as<float>({n, n});
  auto queue = D::queue(stream, "mirror", {&out});
  const py::gil_scoped_release release;
  mirror_by_blocks(queue, square, n);
}

template <class D>
void bind_device_gram(py::module_& m) {
  m.def("gram_panel", &gram_panel_on<D>, "indptr"_a, "indices"_a, "values"_a, "n_columns"_a, "k"_a, "stream"_a,
        "Adds A·Aᵀ to the lower triangle of k; columns ascend within a row.");
  m.def("mirror", &mirror_on<D>, "k"_a, "stream"_a, "Copies the lower triangle to the upper one.");
}

}  // namespace npeff
