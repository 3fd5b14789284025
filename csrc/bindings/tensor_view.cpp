#include "tensor_view.h"

#include <cstring>

#include "dlpack.h"

namespace npeff {
namespace {

constexpr int max_ndim = 4;

std::string dtype_of(char kind, int bits) {
  switch (kind) {
    case 'f': return "float" + std::to_string(bits);
    case 'i': return "int" + std::to_string(bits);
    case 'u': return "uint" + std::to_string(bits);
    default: return std::string("kind '") + kind + "' of " + std::to_string(bits) + " bits";
  }
}

// The buffer protocol's format, native byte order: one letter, perhaps after '@', '=' or its own name.
std::string dtype_of(const char* format, int64_t item_size) {
  if (!format) return dtype_of('u', 8);
  const uint16_t one = 1;
  const char native = *reinterpret_cast<const uint8_t*>(&one) ? '<' : '>';  // numpy writes it for arrays from files
  if (*format == '@' || *format == '=' || *format == native) ++format;
  const int bits = static_cast<int>(8 * item_size);
  if (std::strlen(format) != 1) return std::string("format '") + format + "'";
  if (std::strchr("efd", *format)) return dtype_of('f', bits);
  if (std::strchr("bhilqn", *format)) return dtype_of('i', bits);
  if (std::strchr("BHILQN", *format)) return dtype_of('u', bits);
  return std::string("format '") + format + "'";
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

TensorView::TensorView(py::handle source, const char* name, Access access) : name_(name) {
  if (PyObject_CheckBuffer(source.ptr()))
    from_buffer(source, access);
  else if (py::hasattr(source, "__dlpack__"))
    from_dlpack(source);
  else
    fail(std::string(name) + ": expected a torch CPU tensor or a numpy array, got " +
         Py_TYPE(source.ptr())->tp_name);
}

TensorView::~TensorView() {
  if (buffer_.obj) PyBuffer_Release(&buffer_);
}

void TensorView::from_buffer(py::handle source, Access access) {
  const int flags = PyBUF_FORMAT | PyBUF_STRIDES | (access == Access::write ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(source.ptr(), &buffer_, flags) != 0) {
    PyErr_Clear();
    buffer_.obj = nullptr;
    fail(std::string(name_) + ": expected a " + (access == Access::write ? "writable " : "") +
         "array in native byte order, got one that is read-only or has no buffer");
  }
  if (buffer_.ndim > max_ndim) fail(std::string(name_) + ": expected at most 4 dimensions, got " + std::to_string(buffer_.ndim));
  data_ = buffer_.buf;
  ndim_ = buffer_.ndim;
  dtype_ = dtype_of(buffer_.format, buffer_.itemsize);
  for (int i = 0; i < ndim_; ++i) {
    shape_[i] = buffer_.shape[i];
    if (buffer_.strides[i] % buffer_.itemsize != 0 && shape_[i] > 1)
      fail(std::string(name_) + ": expected strides of whole elements; pass a contiguous copy");
    strides_[i] = buffer_.strides[i] / buffer_.itemsize;
  }
}

void TensorView::from_dlpack(py::handle source) {
  try {
    capsule_ = source.attr("__dlpack__")();
  } catch (py::error_already_set& error) {
    const std::string device = py::hasattr(source, "device") ? py::str(source.attr("device")) : py::str("cpu");
    if (device != "cpu") fail(std::string(name_) + ": expected a CPU tensor, got one on " + device);
    fail(std::string(name_) + ": cannot be read (" + py::str(error.value()).cast<std::string>() + ")");
  }
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const dlpack::Tensor& tensor = managed->tensor;  // the capsule keeps it, and frees it with itself
  if (tensor.device.type != 1) fail(std::string(name_) + ": expected a CPU tensor");
  if (tensor.ndim > max_ndim) fail(std::string(name_) + ": expected at most 4 dimensions, got " + std::to_string(tensor.ndim));
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  ndim_ = tensor.ndim;
  dtype_ = dtype_of(tensor.dtype.code < 3 ? "iuf"[tensor.dtype.code] : 'x', tensor.dtype.bits);
  int64_t contiguous = 1;
  for (int i = ndim_ - 1; i >= 0; --i) {
    shape_[i] = tensor.shape[i];
    strides_[i] = tensor.strides ? tensor.strides[i] : contiguous;
    contiguous *= shape_[i];
  }
}

void TensorView::check(const char* dtype, std::initializer_list<int64_t> shape, bool row_stride) const {
  if (dtype_ != dtype) fail(std::string(name_) + ": expected " + dtype + ", got " + dtype_);
  bool fits = ndim_ == static_cast<int>(shape.size());
  for (int i = 0; fits && i < ndim_; ++i) fits = shape.begin()[i] == any || shape.begin()[i] == shape_[i];
  if (!fits)
    fail(std::string(name_) + ": expected shape " + shape_text(shape.begin(), static_cast<int>(shape.size())) +
         ", got " + shape_text(shape_, ndim_));
  int64_t contiguous = 1, size = 1;
  for (int i = 0; i < ndim_; ++i) size *= shape_[i];
  if (size == 0) return;
  for (int i = ndim_ - 1; i >= (row_stride ? 1 : 0); --i) {
    if (shape_[i] > 1 && strides_[i] != contiguous) fail(std::string(name_) + ": expected a C-contiguous array");
    contiguous *= shape_[i];
  }
}

}  // namespace npeff
