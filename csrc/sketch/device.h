// The kernels of sketch.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/device.h"
#include "sketch/matrix_blocks.h"

namespace npeff {

inline SketchMap flat_map(int64_t d, int copies, uint64_t seed) {
  if (copies < 1 || copies > SketchKeys::most_copies)
    fail("copies: expected 1 … " + std::to_string(SketchKeys::most_copies) + ", got " + std::to_string(copies));
  if (d < 1 || d % (sketch_lanes * copies)) fail("d: expected a multiple of 16·copies, got " + std::to_string(d));
  return {d, copies, seed};
}

template <class D>
int64_t sketch_workspace_on(int device, const std::string& dtype, int64_t d, int copies, int64_t n_rows, int64_t width) {
  const SketchKeys map(flat_map(d, copies, 0));
  const typename D::Queue queue(device, 0, "sketch_workspace");
  return by_dtype<Half, Bfloat16, float>(dtype, [&](auto entry) {
    return sketch_plan<typename D::Queue, decltype(entry)>(queue, map, n_rows, width).workspace;
  });
}

template <class D>
void sketch_rows_on(int64_t d, int copies, uint64_t seed, py::handle block, py::handle bases, py::handle order,
                    py::handle starts, py::handle workspace, py::handle sums, uintptr_t stream) {
  const TensorView x(block, "block", D::read), base_view(bases, "bases", D::read), order_view(order, "order", D::read),
      starts_view(starts, "starts", D::read), space(workspace, "workspace", D::write), sums_view(sums, "sums", D::write);
  const SketchKeys map(flat_map(d, copies, seed));
  auto* out = sums_view.as<double>({any, d});
  const int64_t n_targets = sums_view.shape(0);
  by_dtype<Half, Bfloat16, float>(x.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* data = x.as<const T>({any, any}, true);
    const int64_t n = x.shape(0), width = x.shape(1), stride = x.stride(0);
    const auto* base = base_view.as<const int64_t>({n});
    const auto* by_target = order_view.as<const int64_t>({n});
    const auto* begins = starts_view.as<const int64_t>({n_targets + 1});
    auto* partial = space.as<float>({any});
    auto queue = D::queue(stream, "sketch_rows", {&x, &base_view, &order_view, &starts_view, &space, &sums_view});
    check_workspace(space, sketch_plan<typename D::Queue, T>(queue, map, n, width).workspace);
    const py::gil_scoped_release release;
    sketch_rows_by_blocks(queue, map, data, n, width, stride, base, by_target, begins, n_targets, partial, out);
  });
}

template <class D>
int64_t sketch_matrix_workspace_on(int device, const std::string& dtype, int64_t d, int64_t n_rows, int64_t width) {
  flat_map(d, 1, 0);
  const typename D::Queue queue(device, 0, "sketch_matrix_workspace");
  return by_dtype<Half, Bfloat16, float>(dtype, [&](auto entry) {
    return sketch_matrix_plan<typename D::Queue, decltype(entry)>(queue, d, n_rows, width).workspace;
  });
}

template <class D>
void sketch_matrix_on(int64_t d, double weight, py::handle block, py::handle row_places, py::handle column_places,
                      py::handle first, py::handle order, py::handle starts, py::handle workspace, py::handle sums,
                      uintptr_t stream) {
  const TensorView x(block, "block", D::read), down(row_places, "row_places", D::read),
      across(column_places, "column_places", D::read), first_view(first, "first", D::read),
      order_view(order, "order", D::read), starts_view(starts, "starts", D::read), space(workspace, "workspace", D::write),
      sums_view(sums, "sums", D::write);
  flat_map(d, 1, 0);
  auto* out = sums_view.as<double>({any, d});
  const int64_t n_targets = sums_view.shape(0);
  by_dtype<Half, Bfloat16, float>(x.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* data = x.as<const T>({any, any}, true);
    const int64_t n = x.shape(0), width = x.shape(1), stride = x.stride(0);
    const auto* rows = reinterpret_cast<const uint32_t*>(down.as<const int32_t>({any}));
    const auto* columns = reinterpret_cast<const uint32_t*>(across.as<const int32_t>({any}));
    const int64_t n_columns = across.shape(0);
    if (n_columns < 1 || width % n_columns) fail("block: expected whole rows of the matrix");
    const auto* begins = first_view.as<const int64_t>({n});
    const auto* by_target = order_view.as<const int64_t>({n});
    const auto* bounds = starts_view.as<const int64_t>({n_targets + 1});
    auto* partial = space.as<float>({any});
    auto queue = D::queue(stream, "sketch_matrix",
                          {&x, &down, &across, &first_view, &order_view, &starts_view, &space, &sums_view});
    check_workspace(space, sketch_matrix_plan<typename D::Queue, T>(queue, d, n, width).workspace);
    const py::gil_scoped_release release;
    sketch_matrix_by_blocks(queue, d, weight, data, n, width, stride, n_columns, rows, columns, begins, by_target, bounds,
                            n_targets, partial, out);
  });
}

template <class D>
void sketch_csr_on(int64_t d, int copies, uint64_t seed, py::handle indptr, py::handle indices, py::handle values,
                   int64_t n_columns, py::handle sums, uintptr_t stream) {
  const CsrView a(indptr, indices, values, n_columns, D::read);
  const TensorView view(sums, "sums", D::write);
  const SketchKeys map(flat_map(d, copies, seed));
  auto* out = view.as<double>({a.n_rows(), d});
  auto queue = D::queue(stream, "sketch_csr", {&a.indptr, &a.indices, &a.values, &view});
  a.visit([&](const auto& csr) { sketch_csr_by_blocks(queue, map, csr, out); });
}

template <class D>
void sketch_finish_on(py::handle sums, double scale, py::handle out, py::handle bad, uintptr_t stream) {
  const TensorView sums_view(sums, "sums", D::read), out_view(out, "out", D::write), bad_view(bad, "bad", D::write);
  const auto* s = sums_view.as<const double>({any, any});
  const int64_t n = sums_view.shape(0), d = sums_view.shape(1);
  auto* o = out_view.as<float>({n, d});
  auto* b = bad_view.as<int64_t>({1});
  auto queue = D::queue(stream, "sketch_finish", {&sums_view, &out_view, &bad_view});
  const py::gil_scoped_release release;
  sketch_finish_by_blocks(queue, s, n, d, scale, o, b);
}

template <class D>
void bind_device_sketch(py::module_& m) {
  m.def("sketch_workspace", &sketch_workspace_on<D>, "device"_a, "dtype"_a, "d"_a, "copies"_a, "n_rows"_a, "width"_a,
        "float32 entries of sketch_rows's workspace for a block of that dtype.");
  m.def("sketch_rows", &sketch_rows_on<D>, "d"_a, "copies"_a, "seed"_a, "block"_a, "bases"_a, "order"_a, "starts"_a,
        "workspace"_a, "sums"_a, "stream"_a,
        "sums (targets, d) float64 += the flat map's sketches of block (b, width) float32, float16 or bfloat16; int64: "
        "bases (b,), order (b,): rows by target and base, starts (targets + 1,).");
  m.def("sketch_matrix_workspace", &sketch_matrix_workspace_on<D>, "device"_a, "dtype"_a, "d"_a, "n_rows"_a, "width"_a,
        "float32 entries of sketch_matrix's workspace for a block of that dtype.");
  m.def("sketch_matrix", &sketch_matrix_on<D>, "d"_a, "weight"_a, "block"_a, "row_places"_a, "column_places"_a, "first"_a,
        "order"_a, "starts"_a, "workspace"_a, "sums"_a, "stream"_a,
        "sums (targets, d) float64 += weight times the two-sided map's sketches of block (b, rows·columns): int32 places "
        "of the matrix's rows and columns; int64 first (b,), order (b,) by target and first, starts (targets + 1,).");
  m.def("sketch_csr", &sketch_csr_on<D>, "d"_a, "copies"_a, "seed"_a, "indptr"_a, "indices"_a, "values"_a, "n_columns"_a,
        "sums"_a, "stream"_a, "sums (R, d) float64 += the flat map's sketches of CSR rows.");
  m.def("sketch_finish", &sketch_finish_on<D>, "sums"_a, "scale"_a, "out"_a, "bad"_a, "stream"_a,
        "out (n, d) float32 = scale times sums; bad (1,) int64: lowered to the first row with a non-finite value.");
}

}  // namespace npeff
