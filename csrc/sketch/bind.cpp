#include "common/csr_view.h"
#include "sketch/sketch.h"
#include "common/tensor_view.h"

namespace npeff {
namespace {

SketchMap map_of(const TensorView& sums, int copies, uint64_t seed) {
  if (sums.ndim() != 2) fail("sums: expected a matrix");
  const int64_t d = sums.shape(1);
  if (copies < 1 || copies > 64 || d < 1 || d % (16 * copies) != 0 || d > int64_t{1} << 30)
    fail("sums: expected a multiple of 16·copies columns, 1 … 64 copies, got " + std::to_string(d) + " columns, " +
         std::to_string(copies) + " copies");
  return {d, copies, seed};
}

// Two-sided maps: a power of two.
int64_t width_of(const TensorView& sums) {
  if (sums.ndim() < 2) fail("sums: expected a matrix");
  const int64_t d = sums.shape(sums.ndim() - 1);
  if (d < 16 || (d & (d - 1)) != 0 || d > int64_t{1} << 30)
    fail("sums: expected a power of two ≥ 16 as the number of columns, got " + std::to_string(d));
  return d;
}

const uint32_t* places_in(const TensorView& view, int64_t n, int64_t d) {
  const auto* places = reinterpret_cast<const uint32_t*>(view.as<const int32_t>({n}));
  for (int64_t i = 0; i < view.shape(0); ++i)
    if (int64_t{places[i] >> 1} >= d) fail(std::string(view.name()) + ": expected buckets below " + std::to_string(d));
  return places;
}

const int64_t* numbers_in(const TensorView& view, int64_t n, int64_t end) {
  const auto* numbers = view.as<const int64_t>({n});
  for (int64_t i = 0; i < n; ++i)
    if (numbers[i] < 0 || numbers[i] >= end)
      fail(std::string(view.name()) + ": expected numbers from 0 to " + std::to_string(end - 1) + ", got " +
           std::to_string(numbers[i]));
  return numbers;
}

void run_rows(py::handle block, py::handle bases, py::handle rows, uint64_t seed, int copies, py::handle sums_out,
              int threads) {
  const TensorView x(block, "block"), base(bases, "base"), out(sums_out, "sums", write);
  const SketchMap map = map_of(out, copies, seed);
  const auto* data = x.as<const float>({any, any}, true);
  const int64_t n = x.shape(0), width = x.shape(1), stride = x.stride(0);
  const auto* base_of = numbers_in(base, n, (int64_t{1} << 62) - width);
  const TensorView targets(rows, "rows");
  const auto* target = numbers_in(targets, n, out.shape(0));
  auto* sums = out.as<double>({any, any});
  check_threads(threads);
  check_apart({&x, &base, &targets, &out});
  const py::gil_scoped_release release;
  sketch_rows(map, data, n, width, stride, target, base_of, sums, threads);
}

void run_csr(const CsrView& a, uint64_t seed, int copies, py::handle sums_out, int threads) {
  const TensorView out(sums_out, "sums", write);
  const SketchMap map = map_of(out, copies, seed);
  auto* sums = out.as<double>({a.n_rows(), any});
  check_threads(threads);
  a.check_outputs({&out});
  a.visit([=](const auto& csr) { sketch_csr(map, csr, sums, threads); });
}

int64_t run_finish(py::handle sums_in, double scale, py::handle result, int threads) {
  const TensorView sums_view(sums_in, "sums"), out(result, "out", write);
  const auto* sums = sums_view.as<const double>({any, any});
  const int64_t n = sums_view.shape(0), d = sums_view.shape(1);
  auto* values = out.as<float>({n, d});
  check_threads(threads);
  check_apart({&sums_view, &out});
  const py::gil_scoped_release release;
  return sketch_finish(sums, n, d, scale, values, threads);
}

void run_places(uint64_t seed, int64_t offset, int side, int64_t d, py::handle places_out) {
  const TensorView out(places_out, "places", write);
  auto* places = reinterpret_cast<uint32_t*>(out.as<int32_t>({any}));
  if (side != 0 && side != 1) fail("side: expected 0 (rows) or 1 (columns), got " + std::to_string(side));
  if (d < 1 || (d & (d - 1)) != 0 || d > int64_t{1} << 30) fail("d: expected a power of two, got " + std::to_string(d));
  const py::gil_scoped_release release;
  sketch_places(seed, offset, side, d, out.shape(0), places);
}

void run_matrix(py::handle block, int64_t columns, py::handle row_places, py::handle column_places, py::handle rows,
                py::handle first, double weight, py::handle sums_out, int threads) {
  const TensorView x(block, "block"), row_view(row_places, "row_places"),
      column_view(column_places, "column_places"), targets(rows, "rows"),
      firsts(first, "first"), out(sums_out, "sums", write);
  const int64_t d = width_of(out);
  const auto* data = x.as<const float>({any, any}, true);
  const int64_t n = x.shape(0), stride = x.stride(0);
  if (columns < 1 || x.shape(1) % columns != 0)
    fail("block: expected whole rows of " + std::to_string(columns) + " columns, got width " + std::to_string(x.shape(1)));
  const int64_t p = x.shape(1) / columns;
  const auto* by_row = places_in(row_view, any, d);
  const auto* by_column = places_in(column_view, columns, d);
  const auto* target = numbers_in(targets, n, out.shape(0));
  const auto* first_row = numbers_in(firsts, n, row_view.shape(0) - p + 1);
  auto* sums = out.as<double>({any, any});
  check_threads(threads);
  check_apart({&x, &row_view, &column_view, &targets, &firsts, &out});
  const py::gil_scoped_release release;
  sketch_matrix(d, weight, data, n, p, columns, stride, by_row, by_column, target, first_row, sums, threads);
}

void run_outer(py::handle delta, py::handle input, py::handle delta_places, py::handle input_places, double weight,
               py::handle sums_out, int threads) {
  const TensorView g(delta, "delta"), a(input, "input"),
      g_places(delta_places, "delta_places"), a_places(input_places, "input_places"),
      out(sums_out, "sums", write);
  const auto* left = g.as<const float>({any, any, any, any});
  const int64_t b = g.shape(0), t = g.shape(1), columns = g.shape(2);
  const auto* right = a.as<const float>({b, t, any});
  auto* sums = out.as<double>({b, columns, any});
  const int64_t d = width_of(out);
  const auto* by_delta = places_in(g_places, g.shape(3), d);
  const auto* by_input = places_in(a_places, a.shape(2), d);
  const int64_t n_delta = g.shape(3), n_input = a.shape(2);
  check_threads(threads);
  check_apart({&g, &a, &g_places, &a_places, &out});
  const py::gil_scoped_release release;
  sketch_outer(d, weight, left, right, b, t, columns, n_delta, n_input, by_delta, by_input, sums, threads);
}

}  // namespace

void bind_sketch(py::module_& m) {
  m.def("sketch_rows", &run_rows, "block"_a, "base"_a, "rows"_a, "seed"_a, "copies"_a, "sums"_a, "threads"_a,
        "sums (n, d) float64 += the sketches of block (b, width) float32.");
  m.def("sketch_csr", &run_csr, "a"_a, "seed"_a, "copies"_a, "sums"_a, "threads"_a,
        "sums (R, d) float64 += the sketches of CSR rows.");
  m.def("sketch_finish", &run_finish, "sums"_a, "scale"_a, "out"_a, "threads"_a,
        "out (n, d) float32 = scale · sums; the first row that is not finite, or −1.");
  m.def("sketch_places", &run_places, "seed"_a, "offset"_a, "side"_a, "d"_a, "places"_a,
        "Fills places (n,) int32 of one side of the matrix at offset.");
  m.def("sketch_matrix", &run_matrix, "block"_a, "columns"_a, "row_places"_a, "column_places"_a, "rows"_a, "first"_a,
        "weight"_a, "sums"_a, "threads"_a,
        "sums (n, d) float64 += weight · the two-sided sketches of rows of a matrix.");
  m.def("sketch_outer", &run_outer, "delta"_a, "input"_a, "delta_places"_a, "input_places"_a, "weight"_a, "sums"_a,
        "threads"_a,
        "sums (b, R, d) float64 += weight · the two-sided sketches of Σ_t delta[b, t, R] ⊗ input[b, t].");
}

}  // namespace npeff
