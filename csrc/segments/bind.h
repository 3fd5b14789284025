// The kernels of segments.h: arguments from Python, and the calls.
#pragma once

#include "common/device.h"
#include "segments/blocks.h"
#include "segments/segments.h"

namespace npeff {

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

inline void run_fisher_norms(const CsrView& a, py::handle row_offsets, py::handle out, int threads) {
  const TensorView offsets_view(row_offsets, "row_offsets"), out_view(out, "out", write);
  a.require_ascending();
  auto* norms = out_view.as<double>({any});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_in<Host>(offsets_view, n, a.n_rows());
  Host::begin(threads, "fisher_norms", {&a.indptr, &a.indices, &a.values, &offsets_view, &out_view});
  a.visit([&](const auto& csr) { fisher_norms(csr, offsets, n, norms, threads); });
}

template <class D>
void bind_segments(py::module_& m) {
  m.def("cross", &run_cross<D>, py::kw_only(), "p"_a, "row_offsets"_a, "out"_a, py::arg(D::run),
        "out (n, r) = sums of squares of p (R, r) over each example's rows. float32; on a device also float64.");
  if constexpr (D::on_host)
    m.def("fisher_norms", &run_fisher_norms, py::kw_only(), "a"_a, "row_offsets"_a, "out"_a, "threads"_a,
          "out (n,) float64 = Frobenius norms of the examples' A A'; columns ascend within a row.");
}

}  // namespace npeff
