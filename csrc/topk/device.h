// The kernels of topk.h on a device: arguments from Python, and the launches. Arrays lie on one device; `stream` is the
// address of the caller's stream.
#pragma once

#include "common/checked.h"
#include "common/device.h"
#include "topk/blocks.h"

namespace npeff {

inline int64_t selector_bytes(int64_t n, int64_t k) {
  if (n < 0) fail("n: expected ≥ 0, got " + std::to_string(n));
  if (k < 1 || k > int64_t{1} << 28) fail("k: expected 1 … 2^28, got " + std::to_string(k));
  checked_product({n, checked_sum({int64_t{sizeof(SelectorState)}, checked_product({12, Selectors::capacity_for(k)})})});
  return Selectors::bytes(n, k);
}

inline Selectors selectors_in(const TensorView& memory, int64_t n, int64_t k, bool keep_zeros) {
  auto* data = memory.as<uint8_t>({selector_bytes(n, k)});
  if (reinterpret_cast<uintptr_t>(data) % 16) fail("memory: expected an address that is a multiple of 16");
  return Selectors(data, n, k, keep_zeros);
}

template <class D>
void topk_reset_on(py::handle memory, int64_t n, int64_t k, bool keep_zeros, uintptr_t stream) {
  const TensorView view(memory, "memory", D::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  auto queue = D::queue(stream, "topk_reset", {&view});
  const py::gil_scoped_release release;
  topk_reset(queue, selectors);
}

template <class D>
void topk_push_on(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle block, py::handle targets,
                  py::handle bases, py::handle order, py::handle starts, py::handle bad, uintptr_t stream) {
  const TensorView view(memory, "memory", D::write), x(block, "block", D::read), target_view(targets, "targets", D::read),
      base_view(bases, "bases", D::read), order_view(order, "order", D::read), starts_view(starts, "starts", D::read),
      bad_view(bad, "bad", D::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  Push push{};
  by_dtype<Half, Bfloat16, float>(x.dtype(), [&](auto entry) {
    push.type = PushTypeOf<decltype(entry)>::type;
    push.x = x.as<const decltype(entry)>({any, any}, true);
  });
  push.n_rows = x.shape(0);
  push.width = x.shape(1);
  push.stride = x.stride(0);
  push.targets = target_view.as<const int64_t>({push.n_rows});
  push.bases = base_view.as<const int64_t>({push.n_rows});
  push.order = order_view.as<const int64_t>({push.n_rows});
  push.starts = starts_view.as<const int64_t>({n + 1});
  push.bad = bad_view.as<int64_t>({push.n_rows});
  auto queue = D::queue(stream, "topk_push", {&view, &x, &target_view, &base_view, &order_view, &starts_view, &bad_view});
  const py::gil_scoped_release release;
  topk_push(queue, selectors, push);
}

template <class D>
void topk_finish_on(py::handle memory, int64_t n, int64_t k, bool keep_zeros, py::handle counts, py::handle indices,
                    py::handle values, uintptr_t stream) {
  const TensorView view(memory, "memory", D::write), counts_view(counts, "counts", D::write),
      indices_view(indices, "indices", D::write), values_view(values, "values", D::write);
  const Selectors selectors = selectors_in(view, n, k, keep_zeros);
  auto* c = counts_view.as<int64_t>({n});
  auto* i = indices_view.as<int64_t>({n, k});
  auto* v = values_view.as<float>({n, k});
  auto queue = D::queue(stream, "topk_finish", {&view, &counts_view, &indices_view, &values_view});
  const py::gil_scoped_release release;
  topk_finish(queue, selectors, c, i, v);
}

template <class D>
void bind_device_topk(py::module_& m) {
  m.def("topk_bytes", &selector_bytes, "n"_a, "k"_a, "Bytes of the memory of n selectors of the k largest.");
  m.def("topk_reset", &topk_reset_on<D>, "memory"_a, "n"_a, "k"_a, "keep_zeros"_a, "stream"_a,
        "Empties the selectors in memory (topk_bytes,) uint8, whose first two int64 are the status: row and flat index "
        "of the first non-finite value, or row -1.");
  m.def("topk_push", &topk_push_on<D>, "memory"_a, "n"_a, "k"_a, "keep_zeros"_a, "block"_a, "targets"_a, "bases"_a, "order"_a,
        "starts"_a, "bad"_a, "stream"_a,
        "block (b, width) float32, float16 or bfloat16; int64: targets (b,) in [0, n), bases (b,), order (b,): rows by "
        "target, starts (n + 1,): where each target's begin in order, bad (b,): scratch.");
  m.def("topk_finish", &topk_finish_on<D>, "memory"_a, "n"_a, "k"_a, "keep_zeros"_a, "counts"_a, "indices"_a, "values"_a,
        "stream"_a,
        "counts (n,) int64, indices (n, k) int64 and values (n, k) float32 by index, -1 and 0 behind a row's last. Empties "
        "the selectors; the status stays.");
}

}  // namespace npeff
