#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "common/parallel.h"
#include "topk/topk.h"
#include "common/tensor_view.h"

namespace npeff {
namespace {

constexpr int64_t most_k = int64_t{1} << 40, most_index = int64_t{1} << 62;

void check_k(int64_t k) {
  if (k < 1 || k > most_k) fail("k: expected 1 … 2^40, got " + std::to_string(k));
}

std::vector<Selector> make(int64_t n_rows, int64_t k, bool keep_zeros) {
  if (n_rows < 0 || n_rows > most_index) fail("n_rows: expected ≥ 0, got " + std::to_string(n_rows));
  check_k(k);
  std::vector<Selector> selectors;
  selectors.reserve(n_rows);
  for (int64_t i = 0; i < n_rows; ++i) selectors.emplace_back(k, keep_zeros);
  return selectors;
}

py::object to_object(const Nonfinite& bad) {
  if (bad.row < 0) return py::none();
  return py::make_tuple(bad.row, bad.index);
}

py::object topk(py::handle x, py::handle indices_out, py::handle values_out, bool by_magnitude, int threads) {
  const TensorView view(x, "x"), indices_view(indices_out, "indices", write),
      values_view(values_out, "values", write);
  const auto* data = view.as<const float>({any, any}, true);
  auto* indices = indices_view.as<int64_t>({view.shape(0), any});
  const int64_t k = indices_view.shape(1);
  auto* values = values_view.as<float>({view.shape(0), k});
  check_threads(threads);
  check_apart({&view, &indices_view, &values_view});
  if (k < 1 || k > view.shape(1)) fail("indices: expected 1 … " + std::to_string(view.shape(1)) + " columns, got " + std::to_string(k));
  Nonfinite bad;
  {
    const py::gil_scoped_release release;
    bad = topk_rows(data, view.shape(0), view.shape(1), view.stride(0), k, by_magnitude, indices, values, threads);
  }
  return to_object(bad);
}

class Selectors {
 public:
  Selectors(int64_t n_rows, int64_t k, bool keep_zeros) : selectors_(make(n_rows, k, keep_zeros)) {}

  // Held during a call: others come without the GIL. Not waited for, since the holder may be waiting for the GIL.
  std::unique_lock<std::mutex> turn() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) fail("selectors: expected one caller at a time, got a second one on another thread");
    return lock;
  }

  py::object push(py::handle block, py::handle bases, py::handle rows, int threads) {
    const auto lock = turn();
    check_threads(threads);
    const TensorView x(block, "block"), base(bases, "base");
    const auto* data = x.as<const float>({any, any}, true);
    const int64_t n = x.shape(0);
    const auto* base_of = base.as<const int64_t>({n});
    const int64_t* target = nullptr;
    std::unique_ptr<TensorView> targets;
    if (!rows.is_none()) {
      targets = std::make_unique<TensorView>(rows, "rows");
      target = targets->as<const int64_t>({n});
    }
    const auto n_selectors = static_cast<int64_t>(selectors_.size());
    if (!target && n > n_selectors)
      fail("block: expected at most " + std::to_string(n_selectors) + " rows, one per selector, got " + std::to_string(n));
    for (int64_t i = 0; target && i < n; ++i)
      if (target[i] < 0 || target[i] >= n_selectors)
        fail("rows: expected numbers from 0 to " + std::to_string(n_selectors - 1) + ", got " + std::to_string(target[i]));
    for (int64_t i = 0; i < n; ++i)
      if (base_of[i] < 0 || base_of[i] > most_index - x.shape(1))
        fail("base: expected flat indices from 0 to 2^62, got " + std::to_string(base_of[i]));
    Nonfinite bad;
    {
      const py::gil_scoped_release release;
      bad = push_rows(selectors_, data, n, x.shape(1), x.stride(0), target, base_of, threads);
    }
    return to_object(bad);
  }

  py::object push_outer(py::handle delta, py::handle inputs, int64_t first, int64_t base, int64_t column_stride,
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
    Nonfinite bad;
    {
      const py::gil_scoped_release release;
      bad = push_outers(selectors_, outers, threads);
    }
    return to_object(bad);
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

}  // namespace

void bind_topk(py::module_& m) {
  m.def("topk", &topk, "x"_a, "indices"_a, "values"_a, "by_magnitude"_a, "threads"_a,
        "x (rows, cols) float32; fills indices (rows, k) int64 and values (rows, k) float32. None, or (row, index) of "
        "the first non-finite value.");
  py::class_<Selectors>(m, "Selectors", "n_rows running selections of the k largest |values|. One caller at a time.")
      .def(py::init<int64_t, int64_t, bool>(), "n_rows"_a, "k"_a, "keep_zeros"_a)
      .def("push", &Selectors::push, "block"_a, "base"_a, "rows"_a, "threads"_a,
           "block (b, width) float32 into selectors rows (b,); None, or (row of the block, flat index) of the first "
           "non-finite value.")
      .def("push_outer", &Selectors::push_outer, "delta"_a, "inputs"_a, "first"_a, "base"_a, "column_stride"_a,
           "turned"_a, "threads"_a,
           "Outer products of delta (b, columns, n) and inputs (b, k), both float32, into selectors first … first + b − 1; "
           "None, or (example, flat index) of the first non-finite product.")
      .def("thresholds", &Selectors::thresholds, "thresholds"_a,
           "Fill thresholds (n_rows,) float32: entries below are not among the k largest.")
      .def("finish", &Selectors::finish, "counts"_a, "threads"_a, "Narrow; fill counts (n_rows,) int64.")
      .def("take", &Selectors::take, "indices"_a, "values"_a, "by_magnitude"_a, "threads"_a,
           "After finish: fill indices int64 and values float32, rows end to end; then empty the selectors.")
      .def("reset", &Selectors::reset, "Empty the selectors.");
}

}  // namespace npeff
