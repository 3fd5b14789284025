#include "cuda_bindings.h"
#include "device_view.h"
#include "npeff/sketch_blocks.h"

namespace npeff {
namespace {

SketchMap map_of(int64_t d, int copies, uint64_t seed) {
  if (copies < 1 || copies > SketchKeys::most_copies)
    fail("copies: expected 1 … " + std::to_string(SketchKeys::most_copies) + ", got " + std::to_string(copies));
  if (d < 1 || d % (sketch_lanes * copies)) fail("d: expected a multiple of 16·copies, got " + std::to_string(d));
  return {d, copies, seed};
}

// body(T{}) for the dtype of x.
template <class Body>
auto by_dtype(const std::string& dtype, Body body) {
  if (dtype == "float16") return body(Half{});
  if (dtype == "bfloat16") return body(Bfloat16{});
  return body(float{});
}

int64_t run_workspace(int device, const std::string& dtype, int64_t d, int copies, int64_t n_rows, int64_t width) {
  const SketchMap map = map_of(d, copies, 0);
  return by_dtype(dtype, [&](auto entry) {
    return cuda::sketch_workspace<decltype(entry)>({device, nullptr}, map, n_rows, width);
  });
}

void run_rows(int64_t d, int copies, uint64_t seed, py::handle block, py::handle bases, py::handle order, py::handle starts,
              py::handle workspace, py::handle sums, uintptr_t stream) {
  const DeviceView x(block, "block"), base_view(bases, "bases"), order_view(order, "order"), starts_view(starts, "starts"),
      space(workspace, "workspace", Access::write), sums_view(sums, "sums", Access::write);
  const SketchMap map = map_of(d, copies, seed);
  auto* out = sums_view.as<double>({any, d});
  const int64_t n_targets = sums_view.shape(0);
  by_dtype(x.dtype(), [&](auto entry) {
    using T = decltype(entry);
    const auto* data = x.as<const T>({any, any}, true);
    const int64_t n = x.shape(0), width = x.shape(1), stride = x.stride(0);
    const auto* base = base_view.as<const int64_t>({n});
    const auto* by_target = order_view.as<const int64_t>({n});
    const auto* begins = starts_view.as<const int64_t>({n_targets + 1});
    auto* partial = space.as<float>({any});
    const cuda::Stream where = stream_of(stream, {&x, &base_view, &order_view, &starts_view, &space, &sums_view});
    const int64_t need = cuda::sketch_workspace<T>(where, map, n, width);
    if (space.shape(0) < need)
      fail("workspace: expected at least " + std::to_string(need) + " entries, got " + std::to_string(space.shape(0)));
    const py::gil_scoped_release release;
    cuda::sketch_rows(where, map, data, n, width, stride, base, by_target, begins, n_targets, partial, out);
  });
}

int64_t run_matrix_workspace(int device, const std::string& dtype, int64_t d, int64_t n_rows, int64_t width) {
  map_of(d, 1, 0);
  return by_dtype(dtype, [&](auto entry) {
    return cuda::sketch_matrix_workspace<decltype(entry)>({device, nullptr}, d, n_rows, width);
  });
}

void run_matrix(int64_t d, double weight, py::handle block, py::handle row_places, py::handle column_places,
                py::handle first, py::handle order, py::handle starts, py::handle workspace, py::handle sums,
                uintptr_t stream) {
  const DeviceView x(block, "block"), down(row_places, "row_places"), across(column_places, "column_places"),
      first_view(first, "first"), order_view(order, "order"), starts_view(starts, "starts"), space(workspace, "workspace", Access::write),
      sums_view(sums, "sums", Access::write);
  map_of(d, 1, 0);
  auto* out = sums_view.as<double>({any, d});
  const int64_t n_targets = sums_view.shape(0);
  by_dtype(x.dtype(), [&](auto entry) {
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
    const cuda::Stream where =
        stream_of(stream, {&x, &down, &across, &first_view, &order_view, &starts_view, &space, &sums_view});
    const int64_t need = cuda::sketch_matrix_workspace<T>(where, d, n, width);
    if (space.shape(0) < need)
      fail("workspace: expected at least " + std::to_string(need) + " entries, got " + std::to_string(space.shape(0)));
    const py::gil_scoped_release release;
    cuda::sketch_matrix(where, d, weight, data, n, width, stride, n_columns, rows, columns, begins, by_target, bounds,
                        n_targets, partial, out);
  });
}

void run_csr(int64_t d, int copies, uint64_t seed, py::handle indptr, py::handle indices, py::handle values,
             int64_t n_columns, py::handle sums, uintptr_t stream) {
  const DeviceCsr a(indptr, indices, values, n_columns);
  const DeviceView view(sums, "sums", Access::write);
  const SketchMap map = map_of(d, copies, seed);
  auto* out = view.as<double>({a.n_rows(), d});
  const cuda::Stream where = stream_of(stream, {&a.indptr, &a.indices, &a.values, &view});
  a.visit([&](const auto& csr) { cuda::sketch_csr(where, map, csr, out); });
}

void run_finish(py::handle sums, double scale, py::handle out, py::handle bad, uintptr_t stream) {
  const DeviceView sums_view(sums, "sums"), out_view(out, "out", Access::write), bad_view(bad, "bad", Access::write);
  const auto* s = sums_view.as<const double>({any, any});
  const int64_t n = sums_view.shape(0), d = sums_view.shape(1);
  auto* o = out_view.as<float>({n, d});
  auto* b = bad_view.as<int64_t>({1});
  const cuda::Stream where = stream_of(stream, {&sums_view, &out_view, &bad_view});
  const py::gil_scoped_release release;
  cuda::sketch_finish(where, s, n, d, scale, o, b);
}

}  // namespace

void bind_cuda_sketch(py::module_& m) {
  m.def("sketch_workspace", &run_workspace, py::arg("device"), py::arg("dtype"), py::arg("d"), py::arg("copies"),
        py::arg("n_rows"), py::arg("width"), "float32 entries of sketch_rows's workspace for a block of that dtype.");
  m.def("sketch_rows", &run_rows, py::arg("d"), py::arg("copies"), py::arg("seed"), py::arg("block"), py::arg("bases"),
        py::arg("order"), py::arg("starts"), py::arg("workspace"), py::arg("sums"), py::arg("stream"),
        "sums (targets, d) float64 += the flat map's sketches of block (b, width) float32, float16 or bfloat16; int64: "
        "bases (b,), order (b,): rows by target and base, starts (targets + 1,).");
  m.def("sketch_matrix_workspace", &run_matrix_workspace, py::arg("device"), py::arg("dtype"), py::arg("d"),
        py::arg("n_rows"), py::arg("width"), "float32 entries of sketch_matrix's workspace for a block of that dtype.");
  m.def("sketch_matrix", &run_matrix, py::arg("d"), py::arg("weight"), py::arg("block"), py::arg("row_places"),
        py::arg("column_places"), py::arg("first"), py::arg("order"), py::arg("starts"), py::arg("workspace"),
        py::arg("sums"), py::arg("stream"),
        "sums (targets, d) float64 += weight times the two-sided map's sketches of block (b, rows·columns): int32 places "
        "of the matrix's rows and columns; int64 first (b,), order (b,) by target and first, starts (targets + 1,).");
  m.def("sketch_csr", &run_csr, py::arg("d"), py::arg("copies"), py::arg("seed"), py::arg("indptr"), py::arg("indices"),
        py::arg("values"), py::arg("n_columns"), py::arg("sums"), py::arg("stream"),
        "sums (R, d) float64 += the flat map's sketches of CSR rows.");
  m.def("sketch_finish", &run_finish, py::arg("sums"), py::arg("scale"), py::arg("out"), py::arg("bad"), py::arg("stream"),
        "out (n, d) float32 = scale times sums; bad (1,) int64: lowered to the first row with a non-finite value.");
}

}  // namespace npeff
