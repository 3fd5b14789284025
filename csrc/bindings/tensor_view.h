// Arrays from Python without copies: numpy (and anything with a buffer) by the buffer protocol, torch by DLPack.
// All checks of dtype, shape, device and writability are made here, and name the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>

namespace npeff {

namespace py = pybind11;

// Raises npeff.errors.ArgumentError.
[[noreturn]] void fail(const std::string& message);

enum class Access { read, write };

constexpr int64_t any = -1;  // a dimension of any length

// An array held alive, and its buffer locked, for as long as this object lives (with the GIL for its end).
class TensorView {
 public:
  TensorView(py::handle source, const char* name, Access access);
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  const char* name() const { return name_; }
  const std::string& dtype() const { return dtype_; }  // "float32", "int64", …
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
  void from_buffer(py::handle source, Access access);
  void from_dlpack(py::handle source);

  const char* name_;
  std::string dtype_;
  void* data_ = nullptr;
  int ndim_ = 0;
  int64_t shape_[4] = {}, strides_[4] = {};
  Py_buffer buffer_{};
  py::object capsule_;
};

template <> inline const char* TensorView::dtype_name<float>() { return "float32"; }
template <> inline const char* TensorView::dtype_name<double>() { return "float64"; }
template <> inline const char* TensorView::dtype_name<int32_t>() { return "int32"; }
template <> inline const char* TensorView::dtype_name<int64_t>() { return "int64"; }

}  // namespace npeff
