#include "blocks.h"

#include <limits>
#include <vector>

#include "npeff/fisher_norms_blocks.h"
#include "npeff/gram_blocks.h"
#include "npeff/nnls_blocks.h"
#include "npeff/segment_blocks.h"
#include "npeff/spmm_blocks.h"

namespace npeff {
namespace {

template <class T>
py::tuple nnls_of(const TensorView& gram, const TensorView& cross, const TensorView& w, const TensorView& kkt,
                  int64_t max_sweeps, double tol, int64_t slots, uint64_t seed) {
  const auto* c = cross.as<const T>({any, any});
  const int64_t n = cross.shape(0), r = cross.shape(1);
  HostQueue queue(seed);
  slots = slots ? slots : nnls_slots(queue, n);
  std::vector<T> workspace(NnlsProblem<T>::workspace(r, slots), std::numeric_limits<T>::quiet_NaN());
  int64_t status[2] = {-7, -7};
  NnlsProblem<T> problem{gram.as<const T>({r, r}), c, w.as<T>({n, r}), kkt.as<T>({n}), status, n, r, slots, nullptr, nullptr, nullptr};
  nnls_by_blocks(queue, problem, workspace.data(), max_sweeps, static_cast<T>(tol));
  return py::make_tuple(status[0] == nnls_all_finite ? -1 : status[0], status[1]);
}

py::tuple run_nnls(py::handle gram, py::handle cross, py::handle w, py::handle kkt, int64_t max_sweeps, double tol,
                   int64_t slots, uint64_t seed) {
  const TensorView g(gram, "gram", Access::read), c(cross, "cross", Access::read), out(w, "w", Access::write), k(kkt, "kkt", Access::write);
  return (c.dtype() == "float64" ? &nnls_of<double> : &nnls_of<float>)(g, c, out, k, max_sweeps, tol, slots, seed);
}

template <class Index, class Dense>
void spmm_of(const TensorView& indptr, const TensorView& indices, const TensorView& values, const TensorView& dense,
             const TensorView& out, uint64_t seed) {
  using Sum = typename SumOf<Dense>::type;
  const auto* starts = indptr.as<const int64_t>({any});
  const int64_t n_rows = indptr.shape(0) - 1, nnz = indices.shape(0);
  const auto* d = dense.as<const Dense>({any, any});
  HostQueue queue(seed);
  spmm_by_blocks(queue, n_rows, starts, indices.as<const Index>({any}), values.as<const Sum>({nnz}), nnz, d, dense.shape(1),
                 out.as<Sum>({n_rows, dense.shape(1)}));
}

template <class Index>
auto spmm_for(const std::string& dense) {
  if (dense == "float64") return &spmm_of<Index, double>;
  if (dense == "float16") return &spmm_of<Index, Half>;
  if (dense == "bfloat16") return &spmm_of<Index, Bfloat16>;
  return &spmm_of<Index, float>;
}

void run_spmm(py::handle indptr, py::handle indices, py::handle values, py::handle dense, py::handle out, uint64_t seed) {
  const TensorView starts(indptr, "indptr", Access::read), columns(indices, "indices", Access::read),
      entries(values, "values", Access::read), d(dense, "dense", Access::read), result(out, "out", Access::write);
  (columns.dtype() == "int32" ? spmm_for<int32_t>(d.dtype()) : spmm_for<int64_t>(d.dtype()))(starts, columns, entries, d, result, seed);
}

void run_gram(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle k, uint64_t seed) {
  const CsrView a(indptr, indices, values, n_columns, 1);
  const TensorView out(k, "k", Access::write);
  auto* sums = out.as<float>({a.n_rows(), a.n_rows()});
  HostQueue queue(seed);
  if (a.narrow()) gram_panel_by_blocks(queue, a.as<int32_t>(), sums);
  else gram_panel_by_blocks(queue, a.as<int64_t>(), sums);
  mirror_by_blocks(queue, sums, a.n_rows());
}

void run_fisher_norms(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, py::handle offsets,
                      py::handle out, uint64_t seed) {
  const CsrView a(indptr, indices, values, n_columns, 1);
  const TensorView o(offsets, "row_offsets", Access::read), norms(out, "out", Access::write);
  auto* to = norms.as<double>({any});
  const auto* rows = o.as<const int64_t>({norms.shape(0) + 1});
  HostQueue queue(seed);
  if (a.narrow()) fisher_norms_by_blocks(queue, a.as<int32_t>(), rows, norms.shape(0), to);
  else fisher_norms_by_blocks(queue, a.as<int64_t>(), rows, norms.shape(0), to);
}

template <class T>
void cross_of(const TensorView& p, const TensorView& offsets, const TensorView& out, uint64_t seed) {
  using Sum = typename SumOf<T>::type;
  const auto* rows = p.as<const T>({any, any});
  const int64_t r = p.shape(1);
  auto* sums = out.as<Sum>({any, r});
  const int64_t n = out.shape(0);
  HostQueue queue(seed);
  run_segments<CrossBlocks, T>(queue, offsets.as<const int64_t>({n + 1}), n, r, sums, rows);
}

template <class T>
void spread_of(const TensorView& w, const TensorView& p, const TensorView& offsets, const TensorView& out, uint64_t seed) {
  using Sum = typename SumOf<T>::type;
  const auto* weights = w.as<const T>({any, any});
  const int64_t n = w.shape(0), r = w.shape(1);
  HostQueue queue(seed);
  run_segments<SpreadMultiplyBlocks, T>(queue, offsets.as<const int64_t>({n + 1}), n, r, out.as<Sum>({p.shape(0), r}),
                                        weights, p.as<const T>({any, r}));
}

void run_cross(py::handle p, py::handle offsets, py::handle out, uint64_t seed) {
  const TensorView rows(p, "p", Access::read), o(offsets, "row_offsets", Access::read), sums(out, "out", Access::write);
  const auto run = rows.dtype() == "float64" ? &cross_of<double> : rows.dtype() == "float16" ? &cross_of<Half>
                   : rows.dtype() == "bfloat16" ? &cross_of<Bfloat16> : &cross_of<float>;
  run(rows, o, sums, seed);
}

void run_spread(py::handle w, py::handle p, py::handle offsets, py::handle out, uint64_t seed) {
  const TensorView weights(w, "w", Access::read), rows(p, "p", Access::read), o(offsets, "row_offsets", Access::read),
      products(out, "out", Access::write);
  const auto run = rows.dtype() == "float64" ? &spread_of<double> : rows.dtype() == "float16" ? &spread_of<Half>
                   : rows.dtype() == "bfloat16" ? &spread_of<Bfloat16> : &spread_of<float>;
  run(weights, rows, o, products, seed);
}

}  // namespace

void bind_solver_blocks(py::module_& m) {
  m.def("nnls", &run_nnls, py::arg("gram"), py::arg("cross"), py::arg("w"), py::arg("kkt"), py::arg("max_sweeps"), py::arg("tol"),
        py::arg("slots"), py::arg("seed"));
  m.def("spmm", &run_spmm, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("dense"), py::arg("out"), py::arg("seed"));
  m.def("gram", &run_gram, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("n_columns"), py::arg("k"), py::arg("seed"));
  m.def("fisher_norms", &run_fisher_norms, py::arg("indptr"), py::arg("indices"), py::arg("values"), py::arg("n_columns"),
        py::arg("row_offsets"), py::arg("out"), py::arg("seed"));
  m.def("cross", &run_cross, py::arg("p"), py::arg("row_offsets"), py::arg("out"), py::arg("seed"));
  m.def("spread_multiply", &run_spread, py::arg("w"), py::arg("p"), py::arg("row_offsets"), py::arg("out"), py::arg("seed"));
}

}  // namespace npeff
