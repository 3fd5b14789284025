#include "cuda_bindings.h"
#include "device_view.h"

namespace npeff {
namespace {

template <class Index, class Dense, class Value>
void spmm(const DeviceView& indptr, const DeviceView& indices, const DeviceView& values, const DeviceView& dense,
          const DeviceView& out, uintptr_t stream) {
  const auto* starts = indptr.as<const int64_t>({any});
  const int64_t n_rows = indptr.shape(0) - 1;
  if (n_rows < 0) fail("indptr: expected shape (rows + 1,)");
  if (indices.ndim() != 1) fail("indices: expected shape (nnz,)");
  const auto* columns = indices.as<const Index>({any});
  const auto* entries = values.as<const Value>({indices.shape(0)});
  const auto* d = dense.as<const Dense>({any, any});
  auto* result = out.as<Value>({n_rows, dense.shape(1)});
  const cuda::Stream where = stream_of(stream, {&indptr, &indices, &values, &dense, &out});
  const int64_t nnz = indices.shape(0), r = dense.shape(1);
  const py::gil_scoped_release release;
  cuda::spmm(where, n_rows, starts, columns, entries, nnz, d, r, result);
}

template <class Index>
auto spmm_for(const std::string& dense) {
  if (dense == "float64") return &spmm<Index, double, double>;
  if (dense == "float16") return &spmm<Index, Half, float>;
  if (dense == "bfloat16") return &spmm<Index, Bfloat16, float>;
  return &spmm<Index, float, float>;
}

void run_spmm(py::handle indptr, py::handle indices, py::handle values, py::handle dense, py::handle out, uintptr_t stream) {
  const DeviceView starts(indptr, "indptr"), columns(indices, "indices"), entries(values, "values"), d(dense, "dense"),
      result(out, "out", Access::write);
  const auto run = columns.dtype() == "int32" ? spmm_for<int32_t>(d.dtype()) : spmm_for<int64_t>(d.dtype());
  run(starts, columns, entries, d, result, stream);
}

void run_gram_panel(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle k, uintptr_t stream) {
  const DeviceCsr a(indptr, indices, values, n_columns);
  const DeviceView out(k, "k", Access::write);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  const cuda::Stream where = stream_of(stream, {&a.indptr, &a.indices, &a.values, &out});
  a.visit([&](const auto& csr) { cuda::gram_panel(where, csr, sums); });
}

void run_mirror(py::handle k, uintptr_t stream) {
  const DeviceView out(k, "k", Access::write);
  if (out.ndim() != 2) fail("k: expected a square matrix");
  const int64_t n = out.shape(0);
  auto* square = out.as<float>({n, n});
  const cuda::Stream where = stream_of(stream, {&out});
  const py::gil_scoped_release release;
  cuda::mirror(where, square, n);
}

void run_fisher_norms(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle row_offsets,
                      py::handle out, uintptr_t stream) {
  const DeviceCsr a(indptr, indices, values, n_columns);
  const DeviceView offsets_view(row_offsets, "row_offsets"), out_view(out, "out", Access::write);
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_view.as<const int64_t>({n + 1});
  const cuda::Stream where = stream_of(stream, {&a.indptr, &a.indices, &a.values, &offsets_view, &out_view});
  a.visit([&](const auto& csr) { cuda::fisher_norms(where, csr, offsets, n, norms); });
}

}  // namespace

void bind_cuda_sparse(py::module_& m) {
  m.def("spmm", &run_spmm, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("dense"), py::arg("out"),
        py::arg("stream"),
        "out (R, r) = CSR (R, columns) times dense (columns, r): float32 values with a dense of float32, float16 or "
        "bfloat16, or all float64. The structure must be sound: indices are not looked at before use.");
  m.def("gram_panel", &run_gram_panel, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("n_columns"),
        py::arg("k"), py::arg("stream"), "Adds A·Aᵀ to the lower triangle of k; columns ascend within a row.");
  m.def("mirror", &run_mirror, py::arg("k"), py::arg("stream"), "Copies the lower triangle to the upper one.");
  m.def("fisher_norms", &run_fisher_norms, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("n_columns"),
        py::arg("row_offsets"), py::arg("out"), py::arg("stream"),
        "out (n,) float64 = Frobenius norms of the examples' A A'; columns ascend within a row.");
}

}  // namespace npeff
