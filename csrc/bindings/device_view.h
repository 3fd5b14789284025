// Arrays on a CUDA device from Python, without copies, by DLPack: torch tensors, CuPy arrays and their kin. Nothing is
// waited for: the caller gives the stream on which the arrays are ready.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "npeff/cuda_kernels.h"

namespace npeff {

namespace py = pybind11;

// Raises npeff.errors.ArgumentError.
[[noreturn]] void fail(const std::string& message);

constexpr int64_t any = -1;  // a dimension of any length

// An array held alive for as long as this object lives (with the GIL for its end).
class DeviceView {
 public:
  DeviceView(py::handle source, const char* name);

  const std::string& dtype() const { return dtype_; }  // "float32", "bfloat16", "int64", …
  int device() const { return device_; }
  int ndim() const { return ndim_; }
  int64_t shape(int axis) const { return shape_[axis]; }
  int64_t stride(int axis) const { return strides_[axis]; }  // in elements

  // The data, after checks: dtype T, the given shape (`any` matches), C-contiguous (row_stride: up to axis 0).
  template <class T>
  T* as(std::initializer_list<int64_t> shape, bool row_stride = false) const {
    check(dtype_name<std::remove_const_t<T>>(), shape, row_stride);
    return static_cast<T*>(data_);
  }

 private:
  template <class T> static const char* dtype_name();
  void check(const char* dtype, std::initializer_list<int64_t> shape, bool row_stride) const;

  const char* name_;
  std::string dtype_;
  void* data_ = nullptr;
  int ndim_ = 0, device_ = 0;
  int64_t shape_[4] = {}, strides_[4] = {};
  py::object capsule_;
};

template <> inline const char* DeviceView::dtype_name<float>() { return "float32"; }
template <> inline const char* DeviceView::dtype_name<double>() { return "float64"; }
template <> inline const char* DeviceView::dtype_name<Half>() { return "float16"; }
template <> inline const char* DeviceView::dtype_name<Bfloat16>() { return "bfloat16"; }
template <> inline const char* DeviceView::dtype_name<int32_t>() { return "int32"; }
template <> inline const char* DeviceView::dtype_name<int64_t>() { return "int64"; }
template <> inline const char* DeviceView::dtype_name<uint8_t>() { return "uint8"; }

// The caller's stream (its address, 0 for the default one) on the one device of all views.
cuda::Stream stream_of(uintptr_t handle, std::initializer_list<const DeviceView*> views);

// The three arrays of a CSR matrix. What they hold was checked by the caller: looking at it would mean waiting.
class DeviceCsr {
 public:
  DeviceCsr(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns)
      : indptr(indptr, "indptr"), indices(indices, "indices"), values(values, "values"), n_columns_(n_columns) {
    if (this->indptr.ndim() != 1 || this->indptr.shape(0) < 1) fail("indptr: expected shape (rows + 1,)");
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
