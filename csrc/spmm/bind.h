// The kernels of spmm.h: arguments from Python, and the calls.
#pragma once

#include <limits>

#include "common/device.h"
#include "spmm/blocks.h"
#include "spmm/spmm.h"

namespace npeff {

template <class D>
void run_spmm(const CsrView& a, py::handle dense, py::handle out, typename D::Run run) {
  const TensorView dense_view(dense, "dense", D::read), out_view(out, "out", D::write);
  D::by_wide(dense_view, [&](auto entry) {
    using T = decltype(entry);
    const auto* d = dense_view.as<const T>({a.n_columns(), any});
    const int64_t r = dense_view.shape(1);
    auto* result = out_view.as<T>({a.n_rows(), r});
    auto where = D::begin(run, "spmm", {&a.indptr, &a.indices, &a.values, &dense_view, &out_view});
    a.visit<T>([&](const auto& csr) { spmm(Spmm<std::decay_t<decltype(*csr.indices)>, T>{csr, d, r, result}, where); });
  });
}

template <class D>
void run_cross(py::handle p, py::handle row_offsets, py::handle out, typename D::Run run) {
  const TensorView p_view(p, "p", D::read), offsets_view(row_offsets, "row_offsets", D::read), out_view(out, "out", D::write);
  D::by_wide(p_view, [&](auto entry) {
    using T = decltype(entry);
    const auto* rows = p_view.as<const T>({any, any});
    const int64_t r = p_view.shape(1);
    auto* sums = out_view.as<T>({any, r});
    const int64_t n = out_view.shape(0);
    const auto* offsets = offsets_in<D>(offsets_view, n, p_view.shape(0));
    auto where = D::begin(run, "cross", {&p_view, &offsets_view, &out_view});
    const py::gil_scoped_release release;
    cross(rows, offsets, n, r, sums, where);
  });
}

inline void run_transpose(const CsrView& a, py::handle indptr_out, py::handle indices_out, py::handle values_out, int threads) {
  const TensorView starts(indptr_out, "indptr_out", write), rows(indices_out, "indices_out", write),
      turned(values_out, "values_out", write);
  Host::begin(threads, "csr_transpose", {&starts, &rows, &turned, &a.indptr, &a.indices, &a.values});
  if (a.indices.dtype() == "int32" && a.n_rows() > std::numeric_limits<int32_t>::max())
    fail("indices: expected int64 for " + std::to_string(a.n_rows()) + " rows, got int32");
  auto* indptr = starts.as<int64_t>({a.n_columns() + 1});
  auto* values = turned.as<float>({a.nnz()});
  by_dtype<int32_t, int64_t>(a.indices.dtype(), [&](auto index) {
    auto* indices = rows.as<decltype(index)>({a.nnz()});
    const auto csr = a.as<decltype(index)>();
    const py::gil_scoped_release release;
    csr_transpose(csr, indptr, indices, values, threads);
  });
}

template <class D>
void bind_spmm(py::module_& m) {
  m.def("spmm", &run_spmm<D>, py::kw_only(), "a"_a, "dense"_a, "out"_a, py::arg(D::run),
        "out (R, r) = a (R, columns) times dense (columns, r), float32; on a device also float64.");
  m.def("cross", &run_cross<D>, py::kw_only(), "p"_a, "row_offsets"_a, "out"_a, py::arg(D::run),
        "out (n, r) = sums of squares of p (R, r) over each example's rows. float32; on a device also float64.");
  if constexpr (D::on_host)
    m.def("csr_transpose", &run_transpose, py::kw_only(), "a"_a, "indptr_out"_a, "indices_out"_a, "values_out"_a, "threads"_a,
          "Fills the CSR arrays of the transposed matrix.");
}

}  // namespace npeff
