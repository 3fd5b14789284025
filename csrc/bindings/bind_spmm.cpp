#include "bindings.h"
#include "csr_view.h"
#include "npeff/spmm.h"
#include "tensor_view.h"

namespace npeff {
namespace {

void run_spmm(py::handle indptr, py::handle indices, py::handle values, py::handle dense, py::handle out, int threads) {
  const TensorView dense_view(dense, "dense", Access::read), out_view(out, "out", Access::write);
  const auto* d = dense_view.as<const float>({any, any});
  const int64_t r = dense_view.shape(1);
  const CsrView a(indptr, indices, values, dense_view.shape(0), threads);
  auto* result = out_view.as<float>({a.n_rows(), r});
  const auto multiply = [&](auto csr) {
    const py::gil_scoped_release release;
    spmm(csr, d, r, result, threads);
  };
  if (a.narrow()) multiply(a.as<int32_t>());
  else multiply(a.as<int64_t>());
}

template <class Index>
void transpose(const CsrView& a, int64_t n_columns, const TensorView& indptr, const TensorView& indices,
               const TensorView& values, int threads) {
  const Csr<Index> csr = a.as<Index>();
  auto* starts = indptr.as<int64_t>({n_columns + 1});
  auto* rows = indices.as<Index>({a.nnz()});
  auto* turned = values.as<float>({a.nnz()});
  const py::gil_scoped_release release;
  csr_transpose(csr, starts, rows, turned, threads);
}

void run_transpose(py::handle indptr, py::handle indices, py::handle values, py::handle indptr_out,
                   py::handle indices_out, py::handle values_out, int threads) {
  const TensorView starts(indptr_out, "indptr_out", Access::write), rows(indices_out, "indices_out", Access::write),
      turned(values_out, "values_out", Access::write);
  if (starts.ndim() != 1 || starts.shape(0) < 1) fail("indptr_out: expected shape (columns + 1,)");
  const int64_t n_columns = starts.shape(0) - 1;
  const CsrView a(indptr, indices, values, n_columns, threads);
  if (a.narrow()) transpose<int32_t>(a, n_columns, starts, rows, turned, threads);
  else transpose<int64_t>(a, n_columns, starts, rows, turned, threads);
}

}  // namespace

void bind_spmm(py::module_& m) {
  m.def("spmm", &run_spmm, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("dense"), py::arg("out"),
        py::arg("threads"), "out (R, r) = CSR (R, columns) times dense (columns, r).");
  m.def("csr_transpose", &run_transpose, py::arg("indptr"), py::arg("indices"), py::arg("values"),
        py::arg("indptr_out"), py::arg("indices_out"), py::arg("values_out"), py::arg("threads"),
        "Fills the CSR arrays of the transposed matrix.");
}

}  // namespace npeff
