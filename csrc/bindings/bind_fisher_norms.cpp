#include "bindings.h"
#include "csr_view.h"
#include "npeff/fisher_norms.h"
#include "tensor_view.h"

namespace npeff {
namespace {

void run(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle row_offsets,
         py::handle out, int threads) {
  const TensorView offsets_view(row_offsets, "row_offsets", Access::read), out_view(out, "out", Access::write);
  const CsrView a(indptr, indices, values, n_columns, threads);
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_view.as<const int64_t>({n + 1});
  bool ascend = offsets[0] == 0 && offsets[n] == a.n_rows();
  for (int64_t i = 0; ascend && i < n; ++i) ascend = offsets[i] <= offsets[i + 1];
  if (!ascend) fail("row_offsets: expected to ascend from 0 to " + std::to_string(a.n_rows()) + ", the number of rows");
  const auto compute = [&](auto csr) {
    const py::gil_scoped_release release;
    fisher_norms(csr, offsets, n, norms, threads);
  };
  if (a.narrow()) compute(a.as<int32_t>());
  else compute(a.as<int64_t>());
}

}  // namespace

void bind_fisher_norms(py::module_& m) {
  m.def("fisher_norms", &run, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("n_columns"),
        py::arg("row_offsets"), py::arg("out"), py::arg("threads"),
        "out (n,) float64 = Frobenius norms of the examples' A A'.");
}

}  // namespace npeff
