// The kernels of gram.h: arguments from Python, and the calls.
#pragma once

#include "common/device.h"
#include "gram/blocks.h"
#include "gram/gram.h"

namespace npeff {

inline int64_t run_sparse_gram(const CsrView& a, py::handle names, py::handle k, int threads) {
  const TensorView names_view(names, "names", write), out(k, "k", write);
  a.require_ascending();
  auto* dense = names_view.as<int32_t>({a.n_columns()});
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  Host::begin(threads, "sparse_gram", {&out, &names_view, &a.indptr, &a.indices, &a.values});
  int64_t n_dense = 0;
  a.visit([&](const auto& csr) { n_dense = sparse_gram(csr, dense, sums, threads); });
  return n_dense;
}

inline void run_to_dense(const CsrView& a, py::handle names, int64_t first, py::handle out, int threads) {
  const TensorView names_view(names, "names"), view(out, "out", write);
  const auto* numbers = names_view.as<const int32_t>({a.n_columns()});
  auto* dense = view.as<float>({a.n_rows(), any});
  const int64_t width = view.shape(1);
  Host::begin(threads, "to_dense", {&view, &names_view, &a.indptr, &a.indices, &a.values});
  a.visit([=](const auto& csr) { to_dense(csr, numbers, first, width, dense, threads); });
}

inline void run_fisher_norms(const CsrView& a, py::handle row_offsets, py::handle out, int threads) {
  const TensorView offsets_view(row_offsets, "row_offsets"), out_view(out, "out", write);
  a.require_ascending();
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_in<Host>(offsets_view, n, a.n_rows());
  Host::begin(threads, "fisher_norms", {&a.indptr, &a.indices, &a.values, &offsets_view, &out_view});
  a.visit([&](const auto& csr) { fisher_norms(csr, offsets, n, norms, threads); });
}

inline void run_outer_gram(py::handle delta, py::handle input, py::handle gram, py::handle size, int threads) {
  const TensorView g(delta, "delta"), a(input, "input"), out(gram, "gram", write), sizes(size, "size", write);
  const auto* left = g.as<const float>({any, any, any, any});
  const int64_t b = g.shape(0), t = g.shape(1), columns = g.shape(2);
  const auto* right = a.as<const float>({b, t, any});
  auto* products = out.as<double>({b, columns, any});
  const int64_t width = out.shape(2);
  if (columns > 0 && (width < 1 || columns % width != 0))
    fail("gram: expected runs of columns that share out " + std::to_string(columns) + ", got " + std::to_string(width));
  auto* largest = sizes.as<double>({b, columns > 0 ? columns / width : 0});
  Host::begin(threads, "outer_gram", {&g, &a, &out, &sizes});
  const py::gil_scoped_release release;
  outer_gram(left, right, b, t, columns, g.shape(3), a.shape(2), width, products, largest, threads);
}

template <class D>
void run_gram_panel(const CsrView& a, py::handle k, typename D::Run run) {
  const TensorView out(k, "k", D::write);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  auto where = D::begin(run, "gram_panel", {&a.indptr, &a.indices, &a.values, &out});
  a.visit([&](const auto& csr) { gram_panel(csr, sums, where); });
}

template <class D>
void bind_gram(py::module_& m) {
  if constexpr (D::on_host) {
    m.def("sparse_gram", &run_sparse_gram, py::kw_only(), "a"_a, "names"_a, "k"_a, "threads"_a,
          "Adds the part of A·Aᵀ of all columns but the dense ones, whose number is returned, to the lower triangle of k; "
          "names (columns,) int32: the dense ones' numbers, −1 for others.");
    m.def("to_dense", &run_to_dense, py::kw_only(), "a"_a, "names"_a, "first"_a, "out"_a, "threads"_a,
          "out (R, width) = the columns with names (columns,) int32 from first on.");
    m.def("fisher_norms", &run_fisher_norms, py::kw_only(), "a"_a, "row_offsets"_a, "out"_a, "threads"_a,
          "out (n,) float64 = Frobenius norms of the examples' A A'; columns ascend within a row.");
    m.def("outer_gram", &run_outer_gram, py::kw_only(), "delta"_a, "input"_a, "gram"_a, "size"_a, "threads"_a,
          "gram (b, R, width) float64 = inner products of the R columns Σ_t delta[b, t, R] ⊗ input[b, t], each with those of "
          "its own run of width columns; size (b, R / width) float64: at most how large their terms are together.");
  } else {
    m.def("gram_panel", &run_gram_panel<D>, py::kw_only(), "a"_a, "k"_a, py::arg(D::run),
          "Adds A·Aᵀ to the lower triangle of k; columns ascend within a row.");
  }
}

}  // namespace npeff
