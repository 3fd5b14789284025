// The blocks of the CUDA kernels, run on the processor: a module for tests, which tests/blocks.py compiles.
#include "blocks.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "npeff/sketch_matrix_blocks.h"
#include "npeff/topk_blocks.h"

namespace npeff {
namespace {

// Rows by target (in order), and where each target's begin.
struct ByTarget {
  std::vector<int64_t> order, starts;

  template <class Before>
  ByTarget(const int64_t* targets, int64_t n_rows, int64_t n_targets, Before before) : order(n_rows), starts(n_targets + 1) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return targets[a] != targets[b] ? targets[a] < targets[b] : before(a, b);
    });
    for (int64_t i = 0; i < n_rows; ++i) ++starts[targets[i] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
  }
};

class BlockSelectors {
 public:
  BlockSelectors(int64_t n, int64_t k, bool keep_zeros, uint64_t seed)
      : memory_(bytes(n, k) / 8 + 1), selectors_(memory_.data(), n, k, keep_zeros), queue_(seed) {
    topk_reset(queue_, selectors_);
  }

  void push(py::handle block, py::handle bases, py::handle targets) {
    const TensorView x(block, "block", Access::read), base(bases, "bases", Access::read), target(targets, "targets", Access::read);
    Push push{};
    if (x.dtype() == "float16") fill<Half>(push, x);
    else if (x.dtype() == "bfloat16") fill<Bfloat16>(push, x);
    else fill<float>(push, x);
    push.targets = target.as<const int64_t>({push.n_rows});
    push.bases = base.as<const int64_t>({push.n_rows});
    const ByTarget rows(push.targets, push.n_rows, selectors_.n, [](int64_t, int64_t) { return false; });
    std::vector<int64_t> bad(push.n_rows);
    push.order = rows.order.data();
    push.starts = rows.starts.data();
    push.bad = bad.data();
    topk_push(queue_, selectors_, push);
  }

  void finish(py::handle counts, py::handle indices, py::handle values) {
    const TensorView c(counts, "counts", Access::write), i(indices, "indices", Access::write), v(values, "values", Access::write);
    const int64_t n = selectors_.n, k = selectors_.k;
    topk_finish(queue_, selectors_, c.as<int64_t>({n}), i.as<int64_t>({n, k}), v.as<float>({n, k}));
  }

  py::tuple status() const { return py::make_tuple(selectors_.status[0], selectors_.status[1]); }
  int64_t held(int64_t selector) const { return selectors_.states[selector].size; }

 private:
  static int64_t bytes(int64_t n, int64_t k) {
    if (n < 0 || n > 1 << 20) fail("n: expected 0 … 2^20, got " + std::to_string(n));
    if (k < 1 || k > 1 << 20) fail("k: expected 1 … 2^20, got " + std::to_string(k));
    return Selectors::bytes(n, k);
  }

  template <class T>
  static void fill(Push& push, const TensorView& x) {
    push.type = PushTypeOf<T>::type;
    push.x = x.as<const T>({any, any}, true);
    push.n_rows = x.shape(0);
    push.width = x.shape(1);
    push.stride = x.stride(0);
  }

  std::vector<uint64_t> memory_;
  Selectors selectors_;
  HostQueue queue_;
};

template <class T>
void sketch_rows_of(const SketchKeys& map, const TensorView& x, py::handle bases, py::handle targets, py::handle sums, uint64_t seed) {
  const TensorView base(bases, "bases", Access::read), target(targets, "targets", Access::read), out(sums, "sums", Access::write);
  const auto* data = x.as<const T>({any, any}, true);
  const int64_t n = x.shape(0), width = x.shape(1);
  auto* total = out.as<double>({any, map.d});
  const auto* base_of = base.as<const int64_t>({n});
  const ByTarget rows(target.as<const int64_t>({n}), n, out.shape(0), [=](int64_t a, int64_t b) { return base_of[a] < base_of[b]; });
  HostQueue queue(seed);
  std::vector<float> workspace(sketch_plan<HostQueue, T>(queue, map, n, width).workspace, std::numeric_limits<float>::quiet_NaN());
  sketch_rows_by_blocks(queue, map, data, n, width, x.stride(0), base_of, rows.order.data(), rows.starts.data(),
                        out.shape(0), workspace.data(), total);
}

void run_sketch_rows(int64_t d, int copies, uint64_t map_seed, py::handle block, py::handle bases, py::handle targets,
                     py::handle sums, uint64_t seed) {
  const TensorView x(block, "block", Access::read);
  const SketchKeys map(SketchMap{d, copies, map_seed});
  if (x.dtype() == "float16") sketch_rows_of<Half>(map, x, bases, targets, sums, seed);
  else if (x.dtype() == "bfloat16") sketch_rows_of<Bfloat16>(map, x, bases, targets, sums, seed);
  else sketch_rows_of<float>(map, x, bases, targets, sums, seed);
}

template <class T>
void sketch_matrix_of(int64_t d, double weight, const TensorView& x, py::handle row_places, py::handle column_places,
                      py::handle first, py::handle targets, py::handle sums, uint64_t seed) {
  const TensorView down(row_places, "row_places", Access::read), across(column_places, "column_places", Access::read),
      begin(first, "first", Access::read), target(targets, "targets", Access::read), out(sums, "sums", Access::write);
  const auto* data = x.as<const T>({any, any}, true);
  const int64_t n = x.shape(0), width = x.shape(1);
  auto* total = out.as<double>({any, d});
  const auto* rows = reinterpret_cast<const uint32_t*>(down.as<const int32_t>({any}));
  const auto* columns = reinterpret_cast<const uint32_t*>(across.as<const int32_t>({any}));
  const auto* begins = begin.as<const int64_t>({n});
  const ByTarget by(target.as<const int64_t>({n}), n, out.shape(0), [=](int64_t a, int64_t b) { return begins[a] < begins[b]; });
  HostQueue queue(seed);
  std::vector<float> workspace(sketch_matrix_plan<HostQueue, T>(queue, d, n, width).workspace, std::numeric_limits<float>::quiet_NaN());
  sketch_matrix_by_blocks(queue, d, weight, data, n, width, x.stride(0), across.shape(0), rows, columns, begins,
                          by.order.data(), by.starts.data(), out.shape(0), workspace.data(), total);
}

void run_sketch_matrix(int64_t d, double weight, py::handle block, py::handle row_places, py::handle column_places,
                       py::handle first, py::handle targets, py::handle sums, uint64_t seed) {
  const TensorView x(block, "block", Access::read);
  if (x.dtype() == "float16") sketch_matrix_of<Half>(d, weight, x, row_places, column_places, first, targets, sums, seed);
  else if (x.dtype() == "bfloat16") sketch_matrix_of<Bfloat16>(d, weight, x, row_places, column_places, first, targets, sums, seed);
  else sketch_matrix_of<float>(d, weight, x, row_places, column_places, first, targets, sums, seed);
}

void run_sketch_csr(int64_t d, int copies, uint64_t map_seed, py::handle indptr, py::handle indices, py::handle values,
                    int64_t n_columns, py::handle sums, uint64_t seed) {
  const CsrView a(indptr, indices, values, n_columns, 1);
  const TensorView out(sums, "sums", Access::write);
  auto* total = out.as<double>({a.n_rows(), d});
  const SketchKeys map(SketchMap{d, copies, map_seed});
  HostQueue queue(seed);
  if (a.narrow()) sketch_csr_by_blocks(queue, map, a.as<int32_t>(), total);
  else sketch_csr_by_blocks(queue, map, a.as<int64_t>(), total);
}

int64_t run_sketch_finish(py::handle sums, double scale, py::handle out, uint64_t seed) {
  const TensorView s(sums, "sums", Access::read), o(out, "out", Access::write);
  const auto* from = s.as<const double>({any, any});
  auto* to = o.as<float>({s.shape(0), s.shape(1)});
  HostQueue queue(seed);
  int64_t bad = std::numeric_limits<int64_t>::max();
  sketch_finish_by_blocks(queue, from, s.shape(0), s.shape(1), scale, to, &bad);
  return bad == std::numeric_limits<int64_t>::max() ? -1 : bad;
}

}  // namespace

}  // namespace npeff

PYBIND11_MODULE(npeff_test_blocks, blocks) {
  using namespace npeff;
  blocks.doc() = "The blocks of the CUDA kernels, run on the processor; for tests. seed: the order of threads and blocks.";
  register_errors();
  py::class_<BlockSelectors>(blocks, "Selectors")
      .def(py::init<int64_t, int64_t, bool, uint64_t>(), py::arg("n"), py::arg("k"), py::arg("keep_zeros"), py::arg("seed"))
      .def("push", &BlockSelectors::push, py::arg("block"), py::arg("bases"), py::arg("targets"))
      .def("finish", &BlockSelectors::finish, py::arg("counts"), py::arg("indices"), py::arg("values"))
      .def("status", &BlockSelectors::status)
      .def("held", &BlockSelectors::held, py::arg("selector"));
  blocks.def("sketch_rows", &run_sketch_rows, py::arg("d"), py::arg("copies"), py::arg("map_seed"), py::arg("block"),
             py::arg("bases"), py::arg("targets"), py::arg("sums"), py::arg("seed"));
  blocks.def("sketch_matrix", &run_sketch_matrix, py::arg("d"), py::arg("weight"), py::arg("block"), py::arg("row_places"),
             py::arg("column_places"), py::arg("first"), py::arg("targets"), py::arg("sums"), py::arg("seed"));
  blocks.def("sketch_csr", &run_sketch_csr, py::arg("d"), py::arg("copies"), py::arg("map_seed"), py::arg("indptr"),
             py::arg("indices"), py::arg("values"), py::arg("n_columns"), py::arg("sums"), py::arg("seed"));
  blocks.def("sketch_finish", &run_sketch_finish, py::arg("sums"), py::arg("scale"), py::arg("out"), py::arg("seed"));
  bind_solver_blocks(blocks);
}
