// Where a kernel runs: the template argument D of its bindings (bind.h of its folder), which read the same for all.
//
//   Host    on threads of the processor
//   Device  in blocks (see block.h) that are queued: Cuda (cuda_queue.h), or in tests the processor as an emulated device
//
// D::begin() checks what all kernels check, and gives the kernel's last argument: the number of threads, or the queue.
// The processor looks at the numbers that it is given; looking at those of a device would mean waiting.
#pragma once

#include "common/block.h"
#include "common/tensor_view.h"

namespace npeff {

struct Host {
  using Run = int;
  static constexpr const char* run = "threads";
  static constexpr bool on_host = true;
  static constexpr Access read{false, Place::host}, write{true, Place::host};

  static int begin(int threads, const char*, std::initializer_list<const TensorView*> views) {
    check_threads(threads);
    check_apart(views);
    return threads;
  }

  // body(T{}) for the type of the entries, which may be wide or of 16 bits on a device.
  template <class Body>
  static void by_wide(const TensorView&, const Body& body) { body(float{}); }
  template <class Body>
  static void by_half(const TensorView&, const Body& body) { body(float{}); }
};

template <class Blocks, Place place>
struct Device {
  using Run = uintptr_t;  // address of the caller's stream
  using Queue = Blocks;   // made from a tensor on the device, the device's number, the stream, and the kernel's name
  static constexpr const char* run = "stream";
  static constexpr bool on_host = false;
  static constexpr Access read{false, place}, write{true, place};

  // On the one device of all views. Outputs must share memory with none of the others.
  static Queue begin(uintptr_t stream, const char* name, std::initializer_list<const TensorView*> views) {
    const TensorView& first = **views.begin();
    for (const TensorView* view : views)
      if (view->device() != first.device())
        fail("expected all arguments on one device, got cuda:" + std::to_string(first.device()) + " and cuda:" +
             std::to_string(view->device()));
    check_apart(views);
    return Queue(first.source(), first.device(), stream, name);
  }

  template <class Body>
  static void by_wide(const TensorView& view, const Body& body) { by_dtype<double, float>(view.dtype(), body); }
  template <class Body>
  static void by_half(const TensorView& view, const Body& body) { by_dtype<Half, Bfloat16, float>(view.dtype(), body); }
};

// Row offsets (n + 1,), which ascend from 0 to n_rows.
template <class D>
const int64_t* offsets_in(const TensorView& view, int64_t n, int64_t n_rows) {
  const auto* offsets = view.as<const int64_t>({n + 1});
  if constexpr (D::on_host) {
    bool ascend = offsets[0] == 0 && offsets[n] == n_rows;
    for (int64_t i = 0; ascend && i < n; ++i) ascend = offsets[i] <= offsets[i + 1];
    if (!ascend) fail(std::string(view.name()) + ": expected to ascend from 0 to " + std::to_string(n_rows) + ", the number of rows");
  }
  return offsets;
}

// Numbers (n,) from 0 to end − 1.
template <class D>
const int64_t* numbers_in(const TensorView& view, int64_t n, int64_t end) {
  const auto* numbers = view.as<const int64_t>({n});
  for (int64_t i = 0; D::on_host && i < n; ++i)
    if (numbers[i] < 0 || numbers[i] >= end)
      fail(std::string(view.name()) + ": expected numbers from 0 to " + std::to_string(end - 1) + ", got " +
           std::to_string(numbers[i]));
  return numbers;
}

template <class D>
RowOrder row_order_in(const TensorView& order, const TensorView& starts, int64_t n_rows, int64_t n_targets) {
  return {numbers_in<D>(order, n_rows, n_rows), offsets_in<D>(starts, n_targets, n_rows), n_targets};
}

// Each kernel's bindings, which its bind.h defines. CMake compiles them for the processor and for CUDA.
template <class D> void bind_convolution(py::module_& m);
template <class D> void bind_gram(py::module_& m);
template <class D> void bind_nnls(py::module_& m);
template <class D> void bind_sketch(py::module_& m);
template <class D> void bind_spmm(py::module_& m);
template <class D> void bind_topk(py::module_& m);

// All of them, and the matrix that some take.
template <class D>
void bind_kernels(py::module_& m) {
  const auto make = [](py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, typename D::Run run) {
    auto matrix = std::make_unique<CsrView>(indptr, indices, values, n_columns, D::read);
    if constexpr (D::on_host) matrix->check_structure(run);
    else (void)run;
    return matrix;
  };
  py::class_<CsrView>(m, "Csr", py::module_local(),
                      "A CSR matrix: indptr (R + 1,) int64, indices (nnz,) int32 or int64, values (nnz,); shared. On the "
                      "processor float32 and checked, once: the arrays must not be written to as long as it is in use. On "
                      "a device the structure must be sound: indices are not looked at before use.")
      .def(py::init(make), py::kw_only(), "indptr"_a, "indices"_a, "values"_a, "n_columns"_a, py::arg(D::run))
      .def("require_ascending", &CsrView::require_ascending,
           "Refuses columns that do not ascend within their row, or come twice in one, where they were checked.");
  for (const auto bind : {bind_convolution<D>, bind_gram<D>, bind_nnls<D>, bind_sketch<D>, bind_spmm<D>, bind_topk<D>})
    bind(m);
}

}  // namespace npeff
