// The kernels of topk.h: arguments from Python, and the calls. Selections live in an object on the processor, and in memory
// that the caller gives on a device.
#pragma once

#include <pybind11/stl.h>

#include <mutex>
#include <vector>

#include "common/memory.h"
#include "common/device.h"
#include "common/parallel.h"
#include "topk/blocks.h"
#include "topk/topk.h"

namespace npeff {

constexpr int64_t most_k = int64_t{1} << 40, most_index = int64_t{1} << 62;

inline void check_k(int64_t k) {
  if (k < 1 || k > most_k) fail("k: expected 1 … 2^40, got " + std::to_string(k));
}

inline std::vector<Selector> make_selectors(int64_t n_rows, int64_t k, bool keep_zeros) {
  if (n_rows < 0 || n_rows > most_index) fail("n_rows: expected ≥ 0, got " + std::to_string(n_rows));
  check_k(k);
  std::vector<Selector> selectors;
  selectors.reserve(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) selectors.emplace_back(k, keep_zeros);
  return selectors;
}

inline Nonfinite run_topk(py::handle x, py::handle indices_out, py::handle values_out, bool by_magnitude, int threads) {
  const TensorView view(x, "x"), indices_view(indices_out, "indices", write),
      values_view(values_out, "values", write);
  const auto* data = view.as<const float>({any, any}, true);
  auto* indices = indices_view.as<int64_t>({view.shape(0), any});
  const int64_t k = indices_view.shape(1);
  auto* values = values_view.as<float>({view.shape(0), k});
  Host::begin(threads, "topk", {&view, &indices_view, &values_view});
  if (k < 1 || k > view.shape(1)) fail("indices: expected 1 … " + std::to_string(view.shape(1)) + " columns, got " + std::to_string(k));
  const py::gil_scoped_release release;
  return topk_rows(data, view.shape(0), view.shape(1), view.stride(0), k, by_magnitude, indices, values, threads);
}

class Selectors {
 public:
  Selectors(int64_t n_rows, int64_t k, bool keep_zeros) : selectors_(make_selectors(n_rows, k, keep_zeros)) {}

  // Held during a call: others come without the GIL. Not waited for, since the holder may be waiting for the GIL.
  std::unique_lock<std::mutex> turn() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) fail("selectors: expected one caller at a time, got a second one on another thread");
    return lock;
  }

  Nonfinite push(py::handle block, py::handle bases, py::handle order, py::handle starts, int threads) {
    const auto lock = turn();
    const TensorView x(block, "block"), base_view(bases, "bases"), order_view(order, "order"), starts_view(starts, "starts");
    const auto* data = x.as<const float>({any, any}, true);
    const RowOrder rows = row_order_in<Host>(order_view, starts_view, x.shape(0), static_cast<int64_t>(selectors_.size()));
    const auto* base = numbers_in<Host>(base_view, x.shape(0), most_index - x.shape(1) + 1);
    check_threads(threads);
    const py::gil_scoped_release release;
    return push_rows(selectors_, data, x.shape(0), x.shape(1), x.stride(0), base, rows, threads);
  }

  Nonfinite push_outer(py::handle delta, py::handle inputs, int64_t first, int64_t base, int64_t column_stride,
                        bool turned, int threads) {
    const auto lock = turn();
    check_threads(threads);
    const TensorView d(delta, "delta"), a(inputs, "inputs");
    const auto* d_data = d.as<const float>({any, any, any});
    const auto* a_data = a.as<const float>({d.shape(0), any});
    const int64_t b = d.shape(0);
    const auto n_selectors = static_cast<int64_t>(selectors_.size());
    if (first < 0 || b > n_selectors || first > n_selectors - b)
      fail("first: expected examples within " + std::to_string(n_selectors) + " selectors, got " + std::to_string(b) +
           " from " + std::to_string(first));
    using Wide = __int128;
    const Wide end = base + Wide{d.shape(1)} * column_stride + Wide{d.shape(2)} * a.shape(1);
    if (base < 0 || column_stride < 0 || end > most_index)
      fail("base, column_stride: expected flat indices from 0 to 2^62, got those from " + std::to_string(base) + " on, columns " +
           std::to_string(column_stride) + " apart");
    const Outers outers{d_data, a_data, b, d.shape(1), d.shape(2), a.shape(1), first, base, column_stride, turned};
    const py::gil_scoped_release release;
    return push_outers(selectors_, outers, threads);
  }

  void thresholds(py::handle thresholds_out) {
    const auto lock = turn();
    const TensorView out(thresholds_out, "thresholds", write);
    auto* values = out.as<float>({static_cast<int64_t>(selectors_.size())});
    for (size_t i = 0; i < selectors_.size(); ++i) values[i] = selectors_[i].threshold();
  }

  void finish(py::handle counts_out, int threads) {
    const auto lock = turn();
    check_threads(threads);
    const TensorView out(counts_out, "counts", write);
    auto* counts = out.as<int64_t>({static_cast<int64_t>(selectors_.size())});
    const py::gil_scoped_release release;
    parallel_for(static_cast<int64_t>(selectors_.size()), threads, [&](int64_t i) {
      selectors_[i].finish();
      counts[i] = selectors_[i].count();
    });
  }

  void take(py::handle indices_out, py::handle values_out, bool by_magnitude, int threads) {
    const auto lock = turn();
    check_threads(threads);
    std::vector<int64_t> start(selectors_.size() + 1);
    for (size_t i = 0; i < selectors_.size(); ++i) start[i + 1] = start[i] + selectors_[i].count();
    const TensorView indices_view(indices_out, "indices", write), values_view(values_out, "values", write);
    auto* indices = indices_view.as<int64_t>({start.back()});
    auto* values = values_view.as<float>({start.back()});
    check_apart({&indices_view, &values_view});
    const py::gil_scoped_release release;
    parallel_for(static_cast<int64_t>(selectors_.size()), threads, [&](int64_t i) {
      selectors_[i].copy_to(indices + start[i], values + start[i], by_magnitude);
      selectors_[i].reset();
    });
  }

  void reset() {
    const auto lock = turn();
    for (Selector& selector : selectors_) selector.reset();
  }

 private:
  std::mutex mutex_;
  std::vector<Selector> selectors_;
};

// ---- on a device

inline int64_t selector_bytes(int64_t n, int64_t k) {
  if (n < 0) fail("n: expected ≥ 0, got " + std::to_string(n));
  if (k < 1 || k > int64_t{1} << 28) fail("k: expected 1 … 2^28, got " + std::to_string(k));
  return checked_product({n, checked_sum({int64_t{sizeof(SelectorState)}, checked_product({12, DeviceSelectors::capacity_for(k)})})});
}

inline DeviceSelectors selectors_in(const TensorView& memory, int64_t n, int64_t k, bool keep_zeros) {
  auto* data = memory.as<uint8_t>({selector_bytes(n, k)});
  if (reinterpret_cast<uintptr_t>(data) % 16) fail("memory: expected an address that is a multiple of 16");
  return DeviceSelectors(data, n, k, keep_zeros);
}

template <class D>
void topk_push_on(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle block, py::handle targets,
                  py::handle bases, py::handle order, py::handle starts, typename D::Run stream) {
  const TensorView view(memory, "memory", D::write), x(block, "block", D::read), target_view(targets, "targets", D::read),
      base_view(bases, "bases", D::read), order_view(order, "order", D::read), starts_view(starts, "starts", D::read);
  const DeviceSelectors selectors = selectors_in(view, n, k, keep_zeros);
  const int64_t n_rows = x.shape(0);
  const auto* target = numbers_in<D>(target_view, n_rows, n);
  const auto* base = numbers_in<D>(base_view, n_rows, most_index);
  const RowOrder rows = row_order_in<D>(order_view, starts_view, n_rows, n);
  auto queue = D::begin(stream, "topk_push", {&view, &x, &target_view, &base_view, &order_view, &starts_view});
  D::by_half(x, [&](auto entry) {
    using T = decltype(entry);
    const Push<T> push{x.as<const T>({any, any}, true), n_rows, x.shape(1), x.stride(0), target, base, rows};
    const py::gil_scoped_release release;
    topk_push(selectors, push, queue);
  });
}

template <class D>
void topk_finish_on(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle counts, py::handle indices,
                    py::handle values, typename D::Run stream) {
  const TensorView view(memory, "memory", D::write), counts_view(counts, "counts", D::write),
      indices_view(indices, "indices", D::write), values_view(values, "values", D::write);
  const DeviceSelectors selectors = selectors_in(view, n, k, keep_zeros);
  auto* c = counts_view.as<int64_t>({n});
  auto* i = indices_view.as<int64_t>({n, k});
  auto* v = values_view.as<float>({n, k});
  auto queue = D::begin(stream, "topk_finish", {&view, &counts_view, &indices_view, &values_view});
  const py::gil_scoped_release release;
  topk_finish(selectors, c, i, v, queue);
}

template <class D>
void bind_topk(py::module_& m) {
  if constexpr (D::on_host) {
    m.def("topk", &run_topk, py::kw_only(), "x"_a, "indices"_a, "values"_a, "by_magnitude"_a, "threads"_a,
          "x (rows, cols) float32; fills indices (rows, k) int64 and values (rows, k) float32. None, or (row, index) of "
          "the first non-finite value.");
    py::class_<Selectors>(m, "Selectors", "n_rows running selections of the k largest |values|. One caller at a time.")
        .def(py::init<int64_t, int64_t, bool>(), py::kw_only(), "n_rows"_a, "k"_a, "keep_zeros"_a)
        .def("push", &Selectors::push, py::kw_only(), "block"_a, "bases"_a, "order"_a, "starts"_a, "threads"_a,
             "block (b, width) float32; int64: bases (b,), order (b,): rows by selector, starts (n_rows + 1,): where those of "
             "each begin in order. None, or (row of the block, flat index) of the first non-finite value.")
        .def("push_outer", &Selectors::push_outer, py::kw_only(), "delta"_a, "inputs"_a, "first"_a, "base"_a,
             "column_stride"_a, "turned"_a, "threads"_a,
             "Outer products of delta (b, columns, n) and inputs (b, k), both float32, into selectors first … first + b − 1; "
             "None, or (example, flat index) of the first non-finite product.")
        .def("thresholds", &Selectors::thresholds, py::kw_only(), "thresholds"_a,
             "Fill thresholds (n_rows,) float32: entries below are not among the k largest.")
        .def("finish", &Selectors::finish, py::kw_only(), "counts"_a, "threads"_a, "Narrow; fill counts (n_rows,) int64.")
        .def("take", &Selectors::take, py::kw_only(), "indices"_a, "values"_a, "by_magnitude"_a, "threads"_a,
             "After finish: fill indices int64 and values float32, rows end to end; then empty the selectors.")
        .def("reset", &Selectors::reset, "Empty the selectors.");
  } else {
    m.def("topk_bytes", &selector_bytes, py::kw_only(), "n"_a, "k"_a, "Bytes of the memory of n selectors of the k "
          "largest; zeros are selectors that hold nothing.");
    m.def("topk_push", &topk_push_on<D>, py::kw_only(), "memory"_a, "n"_a, "k"_a, "keep_zeros"_a, "block"_a, "targets"_a,
          "bases"_a, "order"_a, "starts"_a, py::arg(D::run),
          "memory (topk_bytes,) uint8; block (b, width) float32, float16 or bfloat16; int64: targets (b,) in [0, n), bases (b,), order (b,): rows by "
          "target, starts (n + 1,): where each target's begin in order.");
    m.def("topk_finish", &topk_finish_on<D>, py::kw_only(), "memory"_a, "n"_a, "k"_a, "keep_zeros"_a, "counts"_a,
          "indices"_a, "values"_a, py::arg(D::run),
          "counts (n,) int64, indices (n, k) int64 and values (n, k) float32 by index, -1 and 0 behind a row's last; what is not "
          "finite is among them. Empties the selectors.");
  }
}

}  // namespace npeff
