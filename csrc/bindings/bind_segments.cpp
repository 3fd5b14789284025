#include "bindings.h"
#include "npeff/segments.h"
#include "tensor_view.h"

namespace npeff {
namespace {

void check_offsets(const int64_t* offsets, int64_t n, int64_t n_rows) {
  bool ascend = offsets[0] == 0 && offsets[n] == n_rows;
  for (int64_t i = 0; ascend && i < n; ++i) ascend = offsets[i] <= offsets[i + 1];
  if (!ascend) fail("row_offsets: expected to ascend from 0 to " + std::to_string(n_rows) + ", the number of rows of p");
}

void run_cross(py::handle p, py::handle row_offsets, py::handle out, int threads) {
  const TensorView p_view(p, "p", Access::read), offsets_view(row_offsets, "row_offsets", Access::read),
      out_view(out, "out", Access::write);
  const auto* rows = p_view.as<const float>({any, any});
  const int64_t n = out_view.ndim() == 2 ? out_view.shape(0) : 0, r = p_view.shape(1);
  auto* sums = out_view.as<float>({any, r});
  const auto* offsets = offsets_view.as<const int64_t>({n + 1});
  check_offsets(offsets, n, p_view.shape(0));
  const py::gil_scoped_release release;
  cross(rows, offsets, n, r, sums, threads);
}

void run_spread_multiply(py::handle w, py::handle p, py::handle row_offsets, py::handle out, int threads) {
  const TensorView w_view(w, "w", Access::read), p_view(p, "p", Access::read),
      offsets_view(row_offsets, "row_offsets", Access::read), out_view(out, "out", Access::write);
  const auto* weights = w_view.as<const float>({any, any});
  const int64_t n = w_view.shape(0), r = w_view.shape(1);
  const auto* rows = p_view.as<const float>({any, r});
  const auto* offsets = offsets_view.as<const int64_t>({n + 1});
  auto* products = out_view.as<float>({p_view.shape(0), r});
  check_offsets(offsets, n, p_view.shape(0));
  const py::gil_scoped_release release;
  spread_multiply(weights, rows, offsets, n, r, products, threads);
}

}  // namespace

void bind_segments(py::module_& m) {
  m.def("cross", &run_cross, py::arg("p"), py::arg("row_offsets"), py::arg("out"), py::arg("threads"),
        "out (n, r) = sums of squares of p (R, r) over each example's rows.");
  m.def("spread_multiply", &run_spread_multiply, py::arg("w"), py::arg("p"), py::arg("row_offsets"), py::arg("out"),
        py::arg("threads"), "out (R, r) = p (R, r) times the example's row of w (n, r).");
}

}  // namespace npeff
