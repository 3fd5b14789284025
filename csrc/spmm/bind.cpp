#include <limits>

#include "common/csr_view.h"
#include "spmm/spmm.h"
#include "common/tensor_view.h"

namespace npeff {
namespace {

void run_spmm(const CsrView& a, py::handle dense, py::handle out, int threads) {
  const TensorView dense_view(dense, "dense"), out_view(out, "out", write);
  check_threads(threads);
  const auto* d = dense_view.as<const float>({a.n_columns(), any});
  const int64_t r = dense_view.shape(1);
  auto* result = out_view.as<float>({a.n_rows(), r});
  a.check_outputs({&out_view});
  check_apart({&out_view, &dense_view});
  a.visit([=](const auto& csr) { spmm(csr, d, r, result, threads); });
}

template <class Index>
void transpose(const CsrView& a, const TensorView& indptr, const TensorView& indices, const TensorView& values, int threads) {
  if (a.n_rows() > std::numeric_limits<Index>::max())
    fail("indices: expected int64 for " + std::to_string(a.n_rows()) + " rows, got int32");
  const Csr<Index> csr = a.as<Index>();
  auto* starts = indptr.as<int64_t>({a.n_columns() + 1});
  auto* rows = indices.as<Index>({a.nnz()});
  auto* turned = values.as<float>({a.nnz()});
  const py::gil_scoped_release release;
  csr_transpose(csr, starts, rows, turned, threads);
}

void run_transpose(const CsrView& a, py::handle indptr_out, py::handle indices_out, py::handle values_out, int threads) {
  const TensorView starts(indptr_out, "indptr_out", write), rows(indices_out, "indices_out", write),
      turned(values_out, "values_out", write);
  check_threads(threads);
  a.check_outputs({&starts, &rows, &turned});
  if (a.narrow()) transpose<int32_t>(a, starts, rows, turned, threads);
  else transpose<int64_t>(a, starts, rows, turned, threads);
}

}  // namespace

void bind_spmm(py::module_& m) {
  m.def("spmm", &run_spmm, "a"_a, "dense"_a, "out"_a, "threads"_a,
        "out (R, r) = a (R, columns) times dense (columns, r).");
  m.def("csr_transpose", &run_transpose, "a"_a, "indptr_out"_a, "indices_out"_a, "values_out"_a, "threads"_a,
        "Fills the CSR arrays of the transposed matrix.");
}

}  // namespace npeff
