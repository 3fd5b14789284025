// npeff._native: the CPU kernels.
#include "common/csr_view.h"
#include "common/isa.h"

namespace npeff {

void bind_convolution(py::module_& m);
void bind_fisher_norms(py::module_& m);
void bind_gram(py::module_& m);
void bind_nnls(py::module_& m);
void bind_segments(py::module_& m);
void bind_sketch(py::module_& m);
void bind_spmm(py::module_& m);
void bind_topk(py::module_& m);

}  // namespace npeff

PYBIND11_MODULE(_native, m) {
  using namespace npeff;
  m.doc() = "CPU kernels of npeff. Call them through npeff.kernels.";
  register_errors();
  m.def("isa", &isa_name, "The instruction set in use: base, avx2 or avx512.");
  m.def("has_isa", [](const std::string& name) { return has_isa(name.c_str()); }, "name"_a,
        "Whether this build and this processor have it.");
  m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); }, "name"_a,
        "Use it from now on; False when it is not there.");
  const auto checked = [](py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, int threads) {
    auto matrix = std::make_unique<CsrView>(indptr, indices, values, n_columns);
    matrix->check_structure(threads);
    return matrix;
  };
  py::class_<CsrView>(m, "Csr",
                      "A CSR matrix: indptr (R + 1,) int64, indices (nnz,) int32 or int64, values (nnz,) float32, shared "
                      "and checked once. The arrays must not be written to as long as it is in use.")
      .def(py::init(checked), "indptr"_a, "indices"_a, "values"_a, "n_columns"_a, "threads"_a)
      .def("require_ascending", &CsrView::require_ascending,
           "Refuses columns that do not ascend within their row, or come twice in one.");
  for (const auto bind : {bind_convolution, bind_fisher_norms, bind_gram, bind_nnls, bind_segments, bind_sketch, bind_spmm,
                          bind_topk})
    bind(m);
}
