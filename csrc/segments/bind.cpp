#include "segments/segments.h"
#include "common/tensor_view.h"

namespace npeff {
namespace {

void run_cross(py::handle p, py::handle row_offsets, py::handle out, int threads) {
  const TensorView p_view(p, "p"), offsets_view(row_offsets, "row_offsets"),
      out_view(out, "out", write);
  check_threads(threads);
  const auto* rows = p_view.as<const float>({any, any});
  const int64_t r = p_view.shape(1);
  auto* sums = out_view.as<float>({any, r});
  const int64_t n = out_view.shape(0);
  const auto* offsets = offsets_in(offsets_view, n, p_view.shape(0));
  check_apart({&p_view, &offsets_view, &out_view});
  const py::gil_scoped_release release;
  cross(rows, offsets, n, r, sums, threads);
}

void run_spread_multiply(py::handle w, py::handle p, py::handle row_offsets, py::handle out, int threads) {
  const TensorView w_view(w, "w"), p_view(p, "p"),
      offsets_view(row_offsets, "row_offsets"), out_view(out, "out", write);
  check_threads(threads);
  const auto* weights = w_view.as<const float>({any, any});
  const int64_t n = w_view.shape(0), r = w_view.shape(1);
  const auto* rows = p_view.as<const float>({any, r});
  auto* products = out_view.as<float>({p_view.shape(0), r});
  const auto* offsets = offsets_in(offsets_view, n, p_view.shape(0));
  check_apart({&w_view, &offsets_view, &out_view});
  check_same_or_apart(out_view, p_view);
  const py::gil_scoped_release release;
  spread_multiply(weights, rows, offsets, n, r, products, threads);
}

}  // namespace

void bind_segments(py::module_& m) {
  m.def("cross", &run_cross, "p"_a, "row_offsets"_a, "out"_a, "threads"_a,
        "out (n, r) = sums of squares of p (R, r) over each example's rows.");
  m.def("spread_multiply", &run_spread_multiply, "w"_a, "p"_a, "row_offsets"_a, "out"_a, "threads"_a,
        "out (R, r) = p (R, r) times the example's row of w (n, r); out may be p.");
}

}  // namespace npeff
