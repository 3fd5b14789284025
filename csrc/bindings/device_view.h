// Arrays on a CUDA device. Nothing is waited for: the caller gives the stream on which the arrays are ready.
#pragma once

#include "npeff/cuda_kernels.h"
#include "tensor_view.h"

namespace npeff {

class DeviceView : public TensorView {
 public:
  DeviceView(py::handle source, const char* name, Access access = Access::read)
      : TensorView(source, name, access, Place::device) {}
};

// The caller's stream (its address, 0 for the default one) on the one device of all views; outputs share memory with
// none of the others.
inline cuda::Stream stream_of(uintptr_t handle, std::initializer_list<const TensorView*> views) {
  const int device = (*views.begin())->device();
  for (const TensorView* view : views)
    if (view->device() != device)
      fail("expected all arguments on one device, got cuda:" + std::to_string(device) + " and cuda:" +
           std::to_string(view->device()));
  check_apart(views);
  return {device, reinterpret_cast<void*>(handle)};
}

// The three arrays of a CSR matrix. What they hold was checked by the caller: looking at it would mean waiting.
class DeviceCsr {
 public:
  DeviceCsr(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns)
      : indptr(indptr, "indptr"), indices(indices, "indices"), values(values, "values"), n_columns_(n_columns) {
    if (this->indptr.ndim() != 1 || this->indptr.shape(0) < 1) fail("indptr: expected shape (rows + 1,)");
    if (this->indices.ndim() != 1) fail("indices: expected shape (nnz,)");
  }
  int64_t n_rows() const { return indptr.shape(0) - 1; }
  int64_t nnz() const { return indices.shape(0); }

  template <class Index>
  Csr<Index> as() const {
    return {n_rows(), n_columns_, indptr.as<const int64_t>({any}), indices.as<const Index>({any}),
            values.as<const float>({nnz()})};
  }

  // body(Csr), without the GIL, for either index type.
  template <class Body>
  void visit(Body body) const {
    const auto run = [&](const auto& csr) {
      const py::gil_scoped_release release;
      body(csr);
    };
    if (indices.dtype() == "int32") run(as<int32_t>());
    else run(as<int64_t>());
  }

  const DeviceView indptr, indices, values;

 private:
  int64_t n_columns_;
};

}  // namespace npeff
