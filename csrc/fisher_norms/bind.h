// The kernel of fisher_norms.h: arguments from Python, and the call.
#pragma once

#include "common/device.h"
#include "fisher_norms/blocks.h"
#include "fisher_norms/fisher_norms.h"

namespace npeff {

template <class D>
void run_fisher_norms(const CsrView& a, py::handle row_offsets, py::handle out, typename D::Run run) {
  const TensorView offsets_view(row_offsets, "row_offsets", D::read), out_view(out, "out", D::write);
  a.require_ascending();
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_in<D>(offsets_view, n, a.n_rows());
  auto where = D::begin(run, "fisher_norms", {&a.indptr, &a.indices, &a.values, &offsets_view, &out_view});
  a.visit([&](const auto& csr) { fisher_norms(csr, offsets, n, norms, where); });
}

template <class D>
void bind_fisher_norms(py::module_& m) {
  m.def("fisher_norms", &run_fisher_norms<D>, py::kw_only(), "a"_a, "row_offsets"_a, "out"_a, py::arg(D::run),
        "out (n,) float64 = Frobenius norms of the examples' A A'; columns ascend within a row.");
}

}  // namespace npeff
