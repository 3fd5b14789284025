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
  } else {
    m.def("gram_panel", &run_gram_panel<D>, py::kw_only(), "a"_a, "k"_a, py::arg(D::run),
          "Adds A·Aᵀ to the lower triangle of k; columns ascend within a row.");
  }
}

}  // namespace npeff
