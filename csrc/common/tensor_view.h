// Arrays from Python without copies: those of the processor by the buffer protocol, torch's tensors on a device by their
// methods.
// All checks of an argument are made here, for both modules, and name the argument: its device, dtype, shape, size,
// strides, alignment, writability, and whether it shares memory with another one.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "common/csr.h"

namespace npeff {

namespace py = pybind11;
using namespace pybind11::literals;  // "name"_a

// Raises npeff.errors.ArgumentError.
[[noreturn]] void fail(const std::string& message);

// What an array must be: one of the processor, or a tensor on a CUDA device or (in tests) on an emulated one, the processor;
// and whether it is written to.
enum class Place { host, cuda, emulated };
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

  bool overlaps(const TensorView& other) const { return begin_ < other.end_ && other.begin_ < end_; }  // in any byte
  bool written() const { return access_.writes; }

 private:
  void check(const char* dtype, size_t alignment, bool write, std::initializer_list<int64_t> shape, bool row_stride) const;
  void from_buffer();
  void from_tensor();
  void set_shape(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);  // strides in elements
  [[noreturn]] void refuse(const std::string& message) const;              // fail(), after the argument's name

  const py::object source_;
  const char* name_;
  const Access access_;
  std::string dtype_;
  void* data_ = nullptr;
  int ndim_ = 0, device_ = 0;
  int64_t item_bytes_ = 0;
  int64_t shape_[4] = {}, strides_[4] = {};
  uintptr_t begin_ = 0, end_ = 0;  // the bytes that its elements span
  py::buffer_info buffer_;
};

// Refuses an output that shares memory with another of these arguments.
void check_apart(std::initializer_list<const TensorView*> views);

// Sizes that do not fit become Python's MemoryError, once per module.
void register_errors();

// A number of threads that can be had.
void check_threads(int threads);

// A CSR matrix: its three arrays, held. What the arrays of the processor hold is checked once; arrays on a device are
// checked by the caller, because looking at them means waiting.
class CsrView {
 public:
  CsrView(py::handle indptr, py::handle indices, py::handle values, int64_t n_columns, Access access = read)
      : indptr(indptr, "indptr", access), indices(indices, "indices", access), values(values, "values", access),
        n_columns_(n_columns) {
    if (n_columns < 0 || n_columns > int64_t{1} << 62)
      fail("n_columns: expected 0 … 2^62, got " + std::to_string(n_columns));
    if (this->indptr.ndim() != 1 || this->indptr.shape(0) < 1) fail("indptr: expected shape (rows + 1,)");
    if (this->indices.ndim() != 1) fail("indices: expected shape (nnz,)");
  }

  // Refuses a matrix whose structure is broken.
  void check_structure(int threads) {
    check_threads(threads);
    visit([&](const auto& csr) { check_ = csr_check(csr, threads); });
    checked_ = true;
    if (check_.bad_row >= 0)
      fail("indptr, indices: row " + std::to_string(check_.bad_row) + " is broken: expected indptr to ascend from 0 to " +
           std::to_string(nnz()) + ", and indices within 0 … " + std::to_string(n_columns_ - 1));
  }

  int64_t n_rows() const { return indptr.shape(0) - 1; }
  int64_t n_columns() const { return n_columns_; }
  int64_t nnz() const { return indices.shape(0); }

  // Refuses a matrix whose columns do not ascend within its rows, or come twice in one.
  void require_ascending() const {
    if (check_.unsorted_row >= 0)
      fail("indices: expected columns that ascend within a row, each once, but row " + std::to_string(check_.unsorted_row) +
           " differs; sort them and add up what has the same place (scipy: sum_duplicates)");
  }

  template <class Index, class Value = float>
  Csr<Index, Value> as() const {
    return {n_rows(), n_columns_, nnz(), indptr.as<const int64_t>({any}), indices.as<const Index>({any}),
            values.as<const Value>({nnz()}), checked_ && check_.unsorted_row < 0};
  }

  // body(csr), without the GIL, for either index type.
  template <class Value = float, class Body>
  void visit(Body body) const {
    by_dtype<int32_t, int64_t>(indices.dtype(), [&](auto index) {
      const auto csr = as<decltype(index), Value>();
      const py::gil_scoped_release release;
      body(csr);
    });
  }

  const TensorView indptr, indices, values;

 private:
  const int64_t n_columns_;
  CsrCheck check_{-1, -1};
  bool checked_ = false;
};

}  // namespace npeff
