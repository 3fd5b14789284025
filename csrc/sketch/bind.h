// The kernels of sketch.h: arguments from Python, and the calls.
#pragma once

#include "common/device.h"
#include "sketch/blocks.h"

namespace npeff {

inline SketchMap sketch_map_of(const TensorView& sums, int copies, uint64_t seed) {
  if (sums.ndim() != 2) fail("sums: expected a matrix");
  const int64_t d = sums.shape(1);
  if (copies < 1 || copies > SketchMap::most_copies || d < 1 || d % (sketch_lanes * copies) != 0 || d > int64_t{1} << 30)
    fail("sums: expected a multiple of 16·copies columns, 1 … 64 copies, got " + std::to_string(d) + " columns, " +
         std::to_string(copies) + " copies");
  return {d, copies, seed};
}

// Two-sided maps: a power of two.
inline void check_width(const char* name, int64_t d) {
  if (d < 16 || (d & (d - 1)) != 0 || d > int64_t{1} << 30)
    fail(std::string(name) + ": expected a power of two from 16 to 2^30 as the number of buckets, got " + std::to_string(d));
}

template <class D>
const uint32_t* places_in(const TensorView& view, int64_t n, int64_t d) {
  const auto* places = reinterpret_cast<const uint32_t*>(view.as<const int32_t>({n}));
  for (int64_t i = 0; D::on_host && i < view.shape(0); ++i)
    if (int64_t{places[i] >> 1} >= d) fail(std::string(view.name()) + ": expected buckets below " + std::to_string(d));
  return places;
}

template <class D>
void run_sketch_rows(py::handle block, py::handle bases, py::handle order, py::handle starts, uint64_t seed, int copies,
                     py::handle sums, typename D::Run run) {
  const TensorView x(block, "block", D::read), base_view(bases, "bases", D::read), order_view(order, "order", D::read),
      starts_view(starts, "starts", D::read), out(sums, "sums", D::write);
  const SketchMap map = sketch_map_of(out, copies, seed);
  auto* sketches = out.as<double>({any, any});
  const RowOrder rows = row_order_in<D>(order_view, starts_view, x.shape(0), out.shape(0));
  const auto* base = numbers_in<D>(base_view, x.shape(0), (int64_t{1} << 62) - x.shape(1));
  auto where = D::begin(run, "sketch_rows", {&x, &base_view, &order_view, &starts_view, &out});
  D::by_half(x, [&](auto entry) {
    const auto* data = x.as<const decltype(entry)>({any, any}, true);
    const py::gil_scoped_release release;
    sketch_rows(map, data, x.shape(0), x.shape(1), x.stride(0), base, rows, sketches, where);
  });
}

template <class D>
void run_sketch_matrix(py::handle block, py::handle row_places, py::handle column_places, py::handle first, py::handle order,
                       py::handle starts, double weight, py::handle sums, typename D::Run run) {
  const TensorView x(block, "block", D::read), down(row_places, "row_places", D::read),
      across(column_places, "column_places", D::read), first_view(first, "first", D::read),
      order_view(order, "order", D::read), starts_view(starts, "starts", D::read), out(sums, "sums", D::write);
  auto* sketches = out.as<double>({any, any});
  const int64_t d = out.shape(1), columns = across.shape(0);
  check_width("sums", d);
  const auto* by_row = places_in<D>(down, any, d);
  const auto* by_column = places_in<D>(across, any, d);
  if (x.ndim() != 2 || columns < 1 || x.shape(1) % columns != 0)
    fail("block: expected whole rows of " + std::to_string(columns) + " columns, got width " + std::to_string(x.shape(1)));
  const RowOrder rows = row_order_in<D>(order_view, starts_view, x.shape(0), out.shape(0));
  const auto* begins = numbers_in<D>(first_view, x.shape(0), down.shape(0) - x.shape(1) / columns + 1);
  auto where = D::begin(run, "sketch_matrix", {&x, &down, &across, &first_view, &order_view, &starts_view, &out});
  D::by_half(x, [&](auto entry) {
    const auto* data = x.as<const decltype(entry)>({any, any}, true);
    const py::gil_scoped_release release;
    sketch_matrix(d, weight, data, x.shape(0), x.shape(1), columns, x.stride(0), by_row, by_column, begins, rows, sketches,
                  where);
  });
}

inline void run_sketch_outer(py::handle delta, py::handle input, py::handle delta_places, py::handle input_places,
                             double weight, py::handle sums, int threads) {
  const TensorView g(delta, "delta"), a(input, "input"), g_places(delta_places, "delta_places"),
      a_places(input_places, "input_places"), out(sums, "sums", write);
  const auto* left = g.as<const float>({any, any, any, any});
  const int64_t b = g.shape(0), t = g.shape(1), columns = g.shape(2);
  const auto* right = a.as<const float>({b, t, any});
  auto* sketches = out.as<double>({b, columns, any});
  const int64_t d = out.shape(2), n_delta = g.shape(3), n_input = a.shape(2);
  check_width("sums", d);
  const auto* by_delta = places_in<Host>(g_places, n_delta, d);
  const auto* by_input = places_in<Host>(a_places, n_input, d);
  Host::begin(threads, "sketch_outer", {&g, &a, &g_places, &a_places, &out});
  const py::gil_scoped_release release;
  sketch_outer(d, weight, left, right, b, t, columns, n_delta, n_input, by_delta, by_input, sketches, threads);
}

template <class D>
void bind_sketch(py::module_& m) {
  m.def("sketch_rows", &run_sketch_rows<D>, py::kw_only(), "block"_a, "bases"_a, "order"_a, "starts"_a, "seed"_a, "copies"_a,
        "sums"_a, py::arg(D::run),
        "sums (targets, d) float64 += the flat map's sketches of block (b, width) float32 (on a device float16 or bfloat16, "
        "too); int64: bases (b,), order (b,): rows by target and base, starts (targets + 1,).");
  m.def("sketch_matrix", &run_sketch_matrix<D>, py::kw_only(), "block"_a, "row_places"_a, "column_places"_a, "first"_a,
        "order"_a, "starts"_a, "weight"_a, "sums"_a, py::arg(D::run),
        "sums (targets, d) float64 += weight times the two-sided map's sketches of block (b, rows·columns): int32 places "
        "of the matrix's rows and columns; int64 first (b,), order (b,) by target and first, starts (targets + 1,).");
  if constexpr (D::on_host) {
    m.def("sketch_outer", &run_sketch_outer, py::kw_only(), "delta"_a, "input"_a, "delta_places"_a, "input_places"_a,
          "weight"_a, "sums"_a, "threads"_a,
          "sums (b, R, d) float64 += weight · the two-sided sketches of Σ_t delta[b, t, R] ⊗ input[b, t].");
  }
}

}  // namespace npeff
