#include "common/tensor_view.h"

#include <pybind11/stl.h>

#include <cstring>

#include "common/memory.h"

namespace npeff {
namespace {

constexpr int max_ndim = 4, most_threads = 4096;
constexpr int64_t most_bytes = int64_t{1} << 60;

// The buffer protocol's format, native byte order: one letter, perhaps after '@', '=' or its own name.
std::string dtype_of(const std::string& format, int64_t item_size) {
  const uint16_t one = 1;
  const char native = *reinterpret_cast<const uint8_t*>(&one) ? '<' : '>';  // numpy writes it for arrays from files
  const size_t at = !format.empty() && (format[0] == '@' || format[0] == '=' || format[0] == native);
  const char letter = format.size() == at + 1 ? format[at] : '?';
  for (const auto& [letters, kind] : {std::pair{"efd", "float"}, {"bhilqn", "int"}, {"BHILQN", "uint"}})
    if (std::strchr(letters, letter)) return kind + std::to_string(8 * item_size);
  return "format '" + format + "'";
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + (shape[i] == any ? "any" : std::to_string(shape[i]));
  return text + (ndim == 1 ? ",)" : ")");
}

}  // namespace

void fail(const std::string& message) {
  py::set_error(py::module_::import("npeff.errors").attr("ArgumentError"), message.c_str());
  throw py::error_already_set();
}

void TensorView::refuse(const std::string& message) const { fail(std::string(name_) + ": " + message); }

TensorView::TensorView(py::handle source, const char* name, Access access)
    : source_(py::reinterpret_borrow<py::object>(source)), name_(name), access_(access) {
  const bool on_host = access.place == Place::host;
  if (on_host ? PyObject_CheckBuffer(source.ptr()) : py::hasattr(source, "data_ptr") && !PyType_Check(source.ptr()))
    on_host ? from_buffer() : from_tensor();
  else
    refuse(std::string("expected a ") + (on_host ? "numpy array" : "CUDA tensor") + ", got " + Py_TYPE(source.ptr())->tp_name);
}

void TensorView::from_buffer() {
  try {
    buffer_ = py::reinterpret_borrow<py::buffer>(source_).request(access_.writes);
  } catch (py::error_already_set&) {
    refuse(std::string("expected a ") + (access_.writes ? "writable " : "") +
           "array in native byte order, got one that is read-only or has no buffer");
  }
  if (buffer_.itemsize < 1) refuse("expected elements of at least one byte, got elements without bytes");
  data_ = buffer_.ptr;
  item_bytes_ = buffer_.itemsize;
  dtype_ = dtype_of(buffer_.format, item_bytes_);
  std::vector<int64_t> strides;
  for (int64_t i = 0; i < buffer_.ndim; ++i) {
    if (buffer_.strides[i] % item_bytes_ != 0 && buffer_.shape[i] > 1)
      refuse("expected strides of whole elements; pass a contiguous copy");
    strides.push_back(buffer_.strides[i] / item_bytes_);
  }
  set_shape({buffer_.shape.begin(), buffer_.shape.end()}, strides);
}

void TensorView::from_tensor() {
  const std::string wanted = access_.place == Place::cuda ? "cuda" : "cpu";
  const auto ask = [&](const char* question) { return source_.attr(question)(); };
  try {
    const py::object device = source_.attr("device");
    if (device.attr("type").cast<std::string>() != wanted)
      refuse(std::string("expected a ") + (wanted == "cuda" ? "CUDA" : "CPU") + " tensor, got one on " +
             py::str(device).cast<std::string>());
    if (ask("is_neg").cast<bool>() || ask("is_conj").cast<bool>())
      refuse("expected a tensor whose values lie in memory as they are, got a view with the negative or the conjugate bit; "
             "pass x.resolve_neg().resolve_conj()");
    device_ = device.attr("index").is_none() ? 0 : device.attr("index").cast<int>();
    dtype_ = py::str(source_.attr("dtype")).attr("removeprefix")("torch.").cast<std::string>();
    item_bytes_ = ask("element_size").cast<int64_t>();
    data_ = reinterpret_cast<void*>(ask("data_ptr").cast<uintptr_t>());
    set_shape(source_.attr("shape").cast<std::vector<int64_t>>(), ask("stride").cast<std::vector<int64_t>>());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception) || error.matches(py::module_::import("npeff.errors").attr("ArgumentError"))) throw;
    refuse("cannot be read (" + py::str(error.value()).cast<std::string>() + ")");
  }
}

void TensorView::set_shape(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  if (shape.size() > max_ndim) refuse("expected at most 4 dimensions, got " + std::to_string(shape.size()));
  ndim_ = static_cast<int>(shape.size());
  // Empty dimensions count as one: what is computed from the other lengths must not overflow either.
  int64_t bytes = item_bytes_, low = 0, high = 0;
  bool empty = false, fits = true;
  for (int i = 0; i < ndim_ && fits; ++i) {
    shape_[i] = shape[i];
    strides_[i] = strides[i];
    empty |= shape[i] == 0;
    const int64_t length = shape[i] > 1 ? shape[i] : 1;
    int64_t reach;
    fits = shape[i] >= 0 && !__builtin_mul_overflow(bytes, length, &bytes) && bytes <= most_bytes &&
           !__builtin_mul_overflow(length - 1, strides_[i], &reach) &&
           !__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high);
  }
  int64_t first, last;
  fits = fits && !__builtin_mul_overflow(low, item_bytes_, &first) && !__builtin_mul_overflow(high, item_bytes_, &last) &&
         first > -most_bytes && last < most_bytes;
  if (!fits) refuse("expected an array of at most 2^60 bytes, got shape " + shape_text(shape.data(), ndim_));
  if (empty) return;
  if (!data_) refuse("expected an array with memory, got one without (a fake tensor, or a subclass that holds none)");
  begin_ = reinterpret_cast<uintptr_t>(data_) + static_cast<uintptr_t>(first);
  end_ = reinterpret_cast<uintptr_t>(data_) + static_cast<uintptr_t>(last + item_bytes_);
}

void TensorView::check(const char* dtype, size_t alignment, bool write, std::initializer_list<int64_t> shape,
                       bool row_stride) const {
  if (write && !access_.writes) refuse("is written to, but was taken for reading");
  if (dtype_ != dtype) refuse(std::string("expected ") + dtype + ", got " + dtype_);
  bool fits = ndim_ == static_cast<int>(shape.size());
  for (int i = 0; fits && i < ndim_; ++i) fits = shape.begin()[i] == any || shape.begin()[i] == shape_[i];
  if (!fits)
    refuse("expected shape " + shape_text(shape.begin(), static_cast<int>(shape.size())) + ", got " +
           shape_text(shape_, ndim_));
  if (begin_ == end_) return;
  if (reinterpret_cast<uintptr_t>(data_) % alignment)
    refuse("expected an address that is a multiple of " + std::to_string(alignment) + "; pass a copy");
  int64_t contiguous = 1;
  for (int i = ndim_ - 1; i >= (row_stride ? 1 : 0); --i) {
    if (shape_[i] > 1 && strides_[i] != contiguous) refuse(std::string("expected a C-contiguous ") + (access_.place == Place::host ? "array" : "tensor"));
    contiguous *= shape_[i];
  }
}

void check_apart(std::initializer_list<const TensorView*> views) {
  for (const TensorView* output : views)
    for (const TensorView* other : views)
      if (output != other && output->written() && output->overlaps(*other))
        fail(std::string(output->name()) + ": must not be the same memory as " + other->name() + ", nor overlap it; use a copy");
}

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::length_error& size) {  // SizeError, and the containers' own
      py::set_error(PyExc_MemoryError, size.what());
    }
  });
}

void check_threads(int threads) {
  if (threads < 1 || threads > most_threads)
    fail("threads: expected 1 … " + std::to_string(most_threads) + ", got " + std::to_string(threads));
}

}  // namespace npeff
