#include "cuda_bindings.h"
#include "device_view.h"
#include "npeff/checked.h"
#include "npeff/topk_blocks.h"

namespace npeff {
namespace {

constexpr int64_t most_k = int64_t{1} << 28;

void check_sizes(int64_t n, int64_t k) {
  if (n < 0) fail("n: expected ≥ 0, got " + std::to_string(n));
  if (k < 1 || k > most_k) fail("k: expected 1 … 2^28, got " + std::to_string(k));
}

int64_t bytes(int64_t n, int64_t k) {
  check_sizes(n, k);
  checked_product({n, checked_sum({int64_t{sizeof(SelectorState)}, checked_product({12, Selectors::capacity_for(k)})})});
  return Selectors::bytes(n, k);
}

Selectors selectors_in(const DeviceView& memory, int64_t n, int64_t k, bool keep_zeros) {
  auto* data = memory.as<uint8_t>({bytes(n, k)});
  if (reinterpret_cast<uintptr_t>(data) % 16) fail("memory: expected an address that is a multiple of 16");
  return Selectors(data, n, k, keep_zeros);
}

void reset(py::handle memory, int64_t n, int64_t k, bool keep_zeros, uintptr_t stream) {
  const DeviceView view(memory, "memory", Access::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  const cuda::Stream where = stream_of(stream, {&view});
  const py::gil_scoped_release release;
  cuda::topk_reset(where, selectors);
}

template <class T>
void fill(Push& push, const DeviceView& x) {
  push.type = PushTypeOf<T>::type;
  push.x = x.as<const T>({any, any}, true);
  push.n_rows = x.shape(0);
  push.width = x.shape(1);
  push.stride = x.stride(0);
}

void push(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle block, py::handle targets, py::handle bases,
          py::handle order, py::handle starts, py::handle bad, uintptr_t stream) {
  const DeviceView view(memory, "memory", Access::write), x(block, "block"), target_view(targets, "targets"), base_view(bases, "bases"),
      order_view(order, "order"), starts_view(starts, "starts"), bad_view(bad, "bad", Access::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  Push push{};
  if (x.dtype() == "float16") fill<Half>(push, x);
  else if (x.dtype() == "bfloat16") fill<Bfloat16>(push, x);
  else fill<float>(push, x);
  push.targets = target_view.as<const int64_t>({push.n_rows});
  push.bases = base_view.as<const int64_t>({push.n_rows});
  push.order = order_view.as<const int64_t>({push.n_rows});
  push.starts = starts_view.as<const int64_t>({n + 1});
  push.bad = bad_view.as<int64_t>({push.n_rows});
  const cuda::Stream where = stream_of(stream, {&view, &x, &target_view, &base_view, &order_view, &starts_view, &bad_view});
  const py::gil_scoped_release release;
  cuda::topk_push(where, selectors, push);
}

void finish(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle counts, py::handle indices,
            py::handle values, uintptr_t stream) {
  const DeviceView view(memory, "memory", Access::write), counts_view(counts, "counts", Access::write),
      indices_view(indices, "indices", Access::write), values_view(values, "values", Access::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  auto* c = counts_view.as<int64_t>({n});
  auto* i = indices_view.as<int64_t>({n, k});
  auto* v = values_view.as<float>({n, k});
  const cuda::Stream where = stream_of(stream, {&view, &counts_view, &indices_view, &values_view});
  const py::gil_scoped_release release;
  cuda::topk_finish(where, selectors, c, i, v);
}

}  // namespace

void bind_cuda_topk(py::module_& m) {
  m.def("topk_bytes", &bytes, py::arg("n"), py::arg("k"), "Bytes of the memory of n selectors of the k largest.");
  m.def("topk_reset", &reset, py::arg("memory"), py::arg("n"), py::arg("k"), py::arg("keep_zeros"), py::arg("stream"),
        "Empties the selectors in memory (topk_bytes,) uint8, whose first two int64 are the status: row and flat index "
        "of the first non-finite value, or row -1.");
  m.def("topk_push", &push, py::arg("memory"), py::arg("n"), py::arg("k"), py::arg("keep_zeros"), py::arg("block"),
        py::arg("targets"), py::arg("bases"), py::arg("order"), py::arg("starts"), py::arg("bad"), py::arg("stream"),
        "block (b, width) float32, float16 or bfloat16; int64: targets (b,) in [0, n), bases (b,), order (b,): rows by "
        "target, starts (n + 1,): where each target's begin in order, bad (b,): scratch.");
  m.def("topk_finish", &finish, py::arg("memory"), py::arg("n"), py::arg("k"), py::arg("keep_zeros"), py::arg("counts"),
        py::arg("indices"), py::arg("values"), py::arg("stream"),
        "counts (n,) int64, indices (n, k) int64 and values (n, k) float32 by index, -1 and 0 behind a row's last. Empties "
        "the selectors; the status stays.");
}

}  // namespace npeff
