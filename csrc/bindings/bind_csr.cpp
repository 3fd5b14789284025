#include "bindings.h"
#include "csr_view.h"

namespace npeff {

void bind_csr(py::module_& m) {
  py::class_<CsrView>(m, "Csr",
                      "A CSR matrix: indptr (R + 1,) int64, indices (nnz,) int32 or int64, values (nnz,) float32, shared "
                      "and checked once. The arrays must not be written to as long as it is in use.")
      .def(py::init<py::handle, py::handle, py::handle, int64_t, int>(), py::arg("indptr"), py::arg("indices"),
           py::arg("values"), py::arg("n_columns"), py::arg("threads"))
      .def("require_ascending", &CsrView::require_ascending,
           "Refuses columns that do not ascend within their row, or come twice in one.");
}

}  // namespace npeff
