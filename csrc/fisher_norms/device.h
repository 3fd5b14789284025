// The kernels of fisher_norms.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/device.h"
#include "fisher_norms/blocks.h"

namespace npeff {

template <class D>
void fisher_norms_on(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle row_offsets,
                     py::handle out, uintptr_t stream) {
  const CsrView a(indptr, indices, values, n_columns, D::read);
  const TensorView offsets_view(row_offsets, "row_offsets", D::read), out_view(out, "out", D::write);
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_view.as<const int64_t>({n + 1});
  auto queue = D::queue(stream, "fisher_norms", {&a.indptr, &a.indices, &a.values, &offsets_view, &out_view});
  a.visit([&](const auto& csr) { fisher_norms_by_blocks(queue, csr, offsets, n, norms); });
}

template <class D>
void bind_device_fisher_norms(py::module_& m) {
  m.def("fisher_norms", &fisher_norms_on<D>, "indptr"_a, "indices"_a, "values"_a, "n_columns"_a, "row_offsets"_a, "out"_a,
        "stream"_a, "out (n,) float64 = Frobenius norms of the examples' A A'; columns ascend within a row.");
}

}  // namespace npeff
