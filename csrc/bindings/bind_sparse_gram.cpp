#include "bindings.h"
#include "csr_view.h"
#include "npeff/sparse_gram.h"

namespace npeff {
namespace {

// body(csr), without the GIL, for either index type.
template <class Body>
void visit(const CsrView& a, Body body) {
  const auto run = [&](const auto& csr) {
    const py::gil_scoped_release release;
    body(csr);
  };
  if (a.narrow()) run(a.as<int32_t>());
  else run(a.as<int64_t>());
}

void run_counts(py::handle indptr, py::handle indices, py::handle values, py::handle counts, int threads) {
  const TensorView out(counts, "counts", Access::write);
  auto* c = out.as<int64_t>({any});
  visit(CsrView(indptr, indices, values, out.shape(0), threads), [=](const auto& a) { column_counts(a, c, threads); });
}

void run_select_indptr(py::handle indptr, py::handle indices, py::handle values, py::handle map, py::handle indptr_out,
                       int threads) {
  const TensorView map_view(map, "map", Access::read), out(indptr_out, "indptr_out", Access::write);
  const auto* m = map_view.as<const int32_t>({any});
  const CsrView a(indptr, indices, values, map_view.shape(0), threads);
  auto* starts = out.as<int64_t>({a.n_rows() + 1});
  visit(a, [=](const auto& csr) { select_columns_indptr(csr, m, starts, threads); });
}

void run_select(py::handle indptr, py::handle indices, py::handle values, py::handle map, py::handle indptr_out,
                py::handle indices_out, py::handle values_out, int threads) {
  const TensorView map_view(map, "map", Access::read), starts_view(indptr_out, "indptr_out", Access::read),
      indices_view(indices_out, "indices_out", Access::write), values_view(values_out, "values_out", Access::write);
  const auto* m = map_view.as<const int32_t>({any});
  const CsrView a(indptr, indices, values, map_view.shape(0), threads);
  const auto* starts = starts_view.as<const int64_t>({a.n_rows() + 1});
  auto* columns = indices_view.as<int32_t>({starts[a.n_rows()]});
  auto* kept = values_view.as<float>({starts[a.n_rows()]});
  visit(a, [=](const auto& csr) { select_columns(csr, m, starts, columns, kept, threads); });
}

void run_to_dense(py::handle indptr, py::handle indices, py::handle values, py::handle out, int threads) {
  const TensorView view(out, "out", Access::write);
  if (view.ndim() != 2) fail("out: expected a matrix");
  const CsrView a(indptr, indices, values, view.shape(1), threads);
  auto* dense = view.as<float>({a.n_rows(), any});
  const Csr<int32_t> csr = a.as<int32_t>();
  const py::gil_scoped_release release;
  to_dense(csr, dense, threads);
}

template <void (*gram)(const Csr<int32_t>&, float*, int)>
void run_gram(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle k, int threads) {
  const TensorView out(k, "k", Access::write);
  const CsrView a(indptr, indices, values, n_columns, threads);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  const Csr<int32_t> csr = a.as<int32_t>();
  const py::gil_scoped_release release;
  gram(csr, sums, threads);
}

void run_mirror(py::handle k, int threads) {
  const TensorView out(k, "k", Access::write);
  if (out.ndim() != 2) fail("k: expected a square matrix");
  const int64_t n = out.shape(0);
  auto* square = out.as<float>({n, n});
  const py::gil_scoped_release release;
  mirror(square, n, threads);
}

}  // namespace

void bind_sparse_gram(py::module_& m) {
  m.def("column_counts", &run_counts, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("counts"),
        py::arg("threads"), "Fills counts (columns,) int64.");
  m.def("select_columns_indptr", &run_select_indptr, py::arg("indptr"), py::arg("indices"), py::arg("values"),
        py::arg("map"), py::arg("indptr_out"), py::arg("threads"),
        "Fills the indptr of the columns with map (columns,) int32 not below 0.");
  m.def("select_columns", &run_select, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("map"),
        py::arg("indptr_out"), py::arg("indices_out"), py::arg("values_out"), py::arg("threads"),
        "Fills indices (int32) and values of those columns, renamed by map.");
  m.def("to_dense", &run_to_dense, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("out"),
        py::arg("threads"), "out (R, columns) = the matrix; int32 indices.");
  m.def("gram_scatter", &run_gram<gram_scatter>, py::arg("indptr"), py::arg("indices"), py::arg("values"),
        py::arg("n_columns"), py::arg("k"), py::arg("threads"), "Adds A·Aᵀ to the lower triangle of k, by entries.");
  m.def("gram_panel", &run_gram<gram_panel>, py::arg("indptr"), py::arg("indices"), py::arg("values"),
        py::arg("n_columns"), py::arg("k"), py::arg("threads"), "Adds A·Aᵀ to the lower triangle of k, by panels.");
  m.def("mirror", &run_mirror, py::arg("k"), py::arg("threads"), "Copies the lower triangle to the upper one.");
}

}  // namespace npeff
