#include "common/csr_view.h"
#include "gram/gram.h"

namespace npeff {
namespace {

void run_counts(const CsrView& a, py::handle counts, int threads) {
  const TensorView out(counts, "counts", write);
  check_threads(threads);
  a.require_ascending();
  auto* c = out.as<int64_t>({a.n_columns()});
  a.check_outputs({&out});
  a.visit([=](const auto& csr) { column_counts(csr, c, threads); });
}

void run_select_indptr(const CsrView& a, py::handle map, py::handle indptr_out, int threads) {
  const TensorView map_view(map, "map"), out(indptr_out, "indptr_out", write);
  check_threads(threads);
  const auto* m = map_view.as<const int32_t>({a.n_columns()});
  auto* starts = out.as<int64_t>({a.n_rows() + 1});
  a.check_outputs({&out});
  check_apart({&out, &map_view});
  a.visit([=](const auto& csr) { select_columns_indptr(csr, m, starts, threads); });
}

void run_select(const CsrView& a, py::handle map, py::handle indptr_out, py::handle indices_out, py::handle values_out,
                int threads) {
  const TensorView map_view(map, "map"), starts_view(indptr_out, "indptr_out"),
      indices_view(indices_out, "indices_out", write), values_view(values_out, "values_out", write);
  check_threads(threads);
  const auto* m = map_view.as<const int32_t>({a.n_columns()});
  auto* columns = indices_view.as<int32_t>({any});
  auto* kept = values_view.as<float>({indices_view.shape(0)});
  const auto* starts = offsets_in(starts_view, a.n_rows(), indices_view.shape(0));
  a.check_outputs({&indices_view, &values_view});
  check_apart({&indices_view, &values_view, &map_view, &starts_view});
  int64_t bad = -1;
  a.visit([&](const auto& csr) { bad = select_columns(csr, m, starts, columns, kept, threads); });
  if (bad >= 0)
    fail("indptr_out: expected what select_columns_indptr gives for this map; row " + std::to_string(bad) + " differs");
}

void run_to_dense(const CsrView& a, py::handle out, int threads) {
  const TensorView view(out, "out", write);
  check_threads(threads);
  a.require_ascending();
  auto* dense = view.as<float>({a.n_rows(), a.n_columns()});
  a.check_outputs({&view});
  const Csr<int32_t> csr = a.as<int32_t>();
  const py::gil_scoped_release release;
  to_dense(csr, dense, threads);
}

template <void (*gram)(const Csr<int32_t>&, float*, int)>
void run_gram(const CsrView& a, py::handle k, int threads) {
  const TensorView out(k, "k", write);
  check_threads(threads);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  a.check_outputs({&out});
  const Csr<int32_t> csr = a.compact();
  const py::gil_scoped_release release;
  gram(csr, sums, threads);
}

void run_mirror(py::handle k, int threads) {
  const TensorView out(k, "k", write);
  check_threads(threads);
  if (out.ndim() != 2) fail("k: expected a square matrix");
  const int64_t n = out.shape(0);
  auto* square = out.as<float>({n, n});
  const py::gil_scoped_release release;
  mirror(square, n, threads);
}

}  // namespace

void bind_gram(py::module_& m) {
  m.def("column_counts", &run_counts, "a"_a, "counts"_a, "threads"_a, "Fills counts (columns,) int64.");
  m.def("select_columns_indptr", &run_select_indptr, "a"_a, "map"_a, "indptr_out"_a, "threads"_a,
        "Fills the indptr of the columns with map (columns,) int32 not below 0.");
  m.def("select_columns", &run_select, "a"_a, "map"_a, "indptr_out"_a, "indices_out"_a, "values_out"_a, "threads"_a,
        "Fills indices (int32) and values of those columns, renamed by map.");
  m.def("to_dense", &run_to_dense, "a"_a, "out"_a, "threads"_a,
        "out (R, columns) = the matrix; int32 indices.");
  m.def("gram_scatter", &run_gram<gram_scatter>, "a"_a, "k"_a, "threads"_a,
        "Adds A·Aᵀ to the lower triangle of k, by entries; memory for as many columns as the last one that holds an entry.");
  m.def("gram_panel", &run_gram<gram_panel>, "a"_a, "k"_a, "threads"_a,
        "Adds A·Aᵀ to the lower triangle of k, by panels; memory for rows times blocks of columns up to the last one used.");
  m.def("mirror", &run_mirror, "k"_a, "threads"_a, "Copies the lower triangle to the upper one.");
}

}  // namespace npeff
