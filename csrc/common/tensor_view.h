// Arrays from Python without copies: numpy (and anything with a buffer) by the buffer protocol, torch and CuPy by DLPack.
// All checks of an argument are made here, for both modules, and name the argument: its device, dtype, shape, size,
// strides, alignment, writability, and whether it shares memory with another one.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "common/half_types.h"

namespace npeff {

namespace py = pybind11;
using namespace pybind11::literals;  // "name"_a

// Raises npeff.errors.ArgumentError.
[[noreturn]] void fail(const std::string& message);

// Where an array must lie, and whether it is written to.
enum class Place { host, device };
struct Access {
  bool writes;
  Place place;
};
constexpr Access read{false, Place::host}, write{true, Place::host};

template <class T> constexpr const char* dtype_name = nullptr;
template <> constexpr const char* dtype_name<float> = "float32";
template <> constexpr const char* dtype_name<double> = "float64";
template <> constexpr const char* dtype_name<Half> = "float16";
template <> constexpr const char* dtype_name<Bfloat16> = "bfloat16";
template <> constexpr const char* dtype_name<int32_t> = "int32";
template <> constexpr const char* dtype_name<int64_t> = "int64";
template <> constexpr const char* dtype_name<uint8_t> = "uint8";

// body(T{}) for the type of that name, or for the last of the types, whose as() then refuses.
template <class T, class... Others, class Body>
auto by_dtype(const std::string& dtype, const Body& body) {
  if constexpr (sizeof...(Others) == 0) return body(T{});
  else return dtype == dtype_name<T> ? body(T{}) : by_dtype<Others...>(dtype, body);
}

constexpr int64_t any = -1;  // a dimension of any length

// An array held alive, and its buffer locked, for as long as this object lives (with the GIL for its end).
class TensorView {
 public:
  TensorView(py::handle source, const char* name, Access access = read);
  ~TensorView();
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;

  const char* name() const { return name_; }
  py::handle source() const { return source_; }  // as it came
  const std::string& dtype() const { return dtype_; }  // "float32", "bfloat16", "int64", …
  int device() const { return device_; }               // number of a CUDA device
  int ndim() const { return ndim_; }
  int64_t shape(int axis) const { return shape_[axis]; }
  int64_t stride(int axis) const { return strides_[axis]; }  // in elements

  // The data, after checks: dtype T, the given shape (`any` matches), alignment, C-contiguous (row_stride: up to axis 0).
  template <class T>
  T* as(std::initializer_list<int64_t> shape, bool row_stride = false) const {
    check(dtype_name<std::remove_const_t<T>>, alignof(T), !std::is_const_v<T>, shape, row_stride);
    return static_cast<T*>(data_);
  }

  // Whether any byte lies in both; whether they are the same array.
  bool overlaps(const TensorView& other) const;
  bool same(const TensorView& other) const;
  bool written() const { return access_.writes; }

 private:
  void check(const char* dtype, size_t alignment, bool write, std::initializer_list<int64_t> shape, bool row_stride) const;
  void from_buffer(py::handle source);
  void from_dlpack(py::handle source);
  void set_shape(int ndim, const int64_t* shape, const int64_t* strides);  // strides in elements; null: C-contiguous
  [[noreturn]] void refuse(const std::string& message) const;              // fail(), after the argument's name

  const py::handle source_;
  const char* name_;
  const Access access_;
  std::string dtype_;
  void* data_ = nullptr;
  int ndim_ = 0, device_ = 0;
  int64_t item_bytes_ = 0;
  int64_t shape_[4] = {}, strides_[4] = {};
  uintptr_t begin_ = 0, end_ = 0;  // the bytes that its elements span
  Py_buffer buffer_{};
  py::object capsule_;
};

// Refuses an output that shares memory with another of these arguments.
void check_apart(std::initializer_list<const TensorView*> views);

// The same for an output and an input that may be one array, but must not overlap otherwise.
void check_same_or_apart(const TensorView& output, const TensorView& input);

// Sizes that do not fit become Python's MemoryError, once per module.
void register_errors();

// A number of threads that can be had.
void check_threads(int threads);

// Refuses row offsets (n + 1,) that do not ascend from 0 to n_rows.
void check_offsets(const char* name, const int64_t* offsets, int64_t n, int64_t n_rows);

}  // namespace npeff
