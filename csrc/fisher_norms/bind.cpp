#include "common/csr_view.h"
#include "fisher_norms/fisher_norms.h"

namespace npeff {
namespace {

void run(const CsrView& a, py::handle row_offsets, py::handle out, int threads) {
  const TensorView offsets_view(row_offsets, "row_offsets"), out_view(out, "out", write);
  check_threads(threads);
  a.require_ascending();
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_in(offsets_view, n, a.n_rows());
  a.check_outputs({&out_view});
  check_apart({&out_view, &offsets_view});
  a.visit([=](const auto& csr) { fisher_norms(csr, offsets, n, norms, threads); });
}

}  // namespace

void bind_fisher_norms(py::module_& m) {
  m.def("fisher_norms", &run, "a"_a, "row_offsets"_a, "out"_a, "threads"_a,
        "out (n,) float64 = Frobenius norms of the examples' A A'.");
}

}  // namespace npeff
