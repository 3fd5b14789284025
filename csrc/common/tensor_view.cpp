#include "common/tensor_view.h"

#include <cstring>

#include "common/checked.h"

namespace npeff {
namespace {

// The part of the DLPack ABI that is read here (https://dmlc.github.io/dlpack, unversioned DLManagedTensor).
namespace dlpack {

constexpr int32_t cpu = 1, cuda = 2, cuda_managed = 13;  // device types

struct Device { int32_t type; int32_t id; };
struct DataType { uint8_t code; uint8_t bits; uint16_t lanes; };  // code 0: int, 1: uint, 2: float, 4: bfloat

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when C-contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack

constexpr int max_ndim = 4, most_threads = 4096;
constexpr int64_t most_bytes = int64_t{1} << 60;

std::string dtype_of(char kind, int64_t bits) {
  switch (kind) {
    case 'f': return "float" + std::to_string(bits);
    case 'i': return "int" + std::to_string(bits);
    case 'u': return "uint" + std::to_string(bits);
    default: return std::string("kind '") + kind + "' of " + std::to_string(bits) + " bits";
  }
}

// The buffer protocol's format, native byte order: one letter, perhaps after '@', '=' or its own name.
std::string dtype_of(const char* format, int64_t item_size) {
  if (!format) return dtype_of('u', 8 * item_size);
  const uint16_t one = 1;
  const char native = *reinterpret_cast<const uint8_t*>(&one) ? '<' : '>';  // numpy writes it for arrays from files
  if (*format == '@' || *format == '=' || *format == native) ++format;
  if (std::strlen(format) != 1) return std::string("format '") + format + "'";
  if (std::strchr("efd", *format)) return dtype_of('f', 8 * item_size);
  if (std::strchr("bhilqn", *format)) return dtype_of('i', 8 * item_size);
  if (std::strchr("BHILQN", *format)) return dtype_of('u', 8 * item_size);
  return std::string("format '") + format + "'";
}

std::string dtype_of(const dlpack::DataType& type) {
  const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  if (type.code > 6 || type.lanes != 1) return "a dtype without a name";
  return kinds[type.code] + std::to_string(type.bits);
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + (shape[i] == any ? "any" : std::to_string(shape[i]));
  return text + (ndim == 1 ? ",)" : ")");
}

bool says_yes(py::handle source, const char* question) {
  if (!py::hasattr(source, question)) return false;
  const int answer = PyObject_IsTrue(source.attr(question)().ptr());
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

std::string device_name(py::handle source, const char* otherwise) {
  return py::hasattr(source, "device") ? py::str(source.attr("device")).cast<std::string>() : otherwise;
}

}  // namespace

void fail(const std::string& message) {
  py::set_error(py::module_::import("npeff.errors").attr("ArgumentError"), message.c_str());
  throw py::error_already_set();
}

void TensorView::refuse(const std::string& message) const { fail(std::string(name_) + ": " + message); }

TensorView::TensorView(py::handle source, const char* name, Access access) : source_(source), name_(name), access_(access) {
  if (access.place == Place::host && PyObject_CheckBuffer(source.ptr()))
    from_buffer(source);
  else if (py::hasattr(source, "__dlpack__") && !PyType_Check(source.ptr()))
    from_dlpack(source);
  else
    refuse(std::string("expected a ") + (access.place == Place::host ? "torch CPU tensor or a numpy array" : "CUDA tensor (torch or CuPy)") +
           ", got " + Py_TYPE(source.ptr())->tp_name);
}

TensorView::~TensorView() {
  if (buffer_.obj) PyBuffer_Release(&buffer_);
}

void TensorView::from_buffer(py::handle source) {
  const int flags = PyBUF_FORMAT | PyBUF_STRIDES | (access_.writes ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(source.ptr(), &buffer_, flags) != 0) {
    PyErr_Clear();
    buffer_.obj = nullptr;
    refuse(std::string("expected a ") + (access_.writes ? "writable " : "") +
           "array in native byte order, got one that is read-only or has no buffer");
  }
  struct Release {  // refused in the constructor: the destructor will not run
    Py_buffer* buffer;
    ~Release() { if (buffer) PyBuffer_Release(buffer); }
  } release{&buffer_};
  if (buffer_.itemsize < 1) refuse("expected elements of at least one byte, got elements without bytes");
  if (buffer_.ndim > max_ndim) refuse("expected at most 4 dimensions, got " + std::to_string(buffer_.ndim));
  data_ = buffer_.buf;
  item_bytes_ = buffer_.itemsize;
  dtype_ = dtype_of(buffer_.format, buffer_.itemsize);
  int64_t shape[max_ndim] = {}, strides[max_ndim] = {};
  for (int i = 0; i < buffer_.ndim; ++i) {
    shape[i] = buffer_.shape ? buffer_.shape[i] : buffer_.len / buffer_.itemsize;  // without shapes: one dimension
    if (!buffer_.strides) continue;                                                // ctypes gives none
    if (buffer_.strides[i] % buffer_.itemsize != 0 && shape[i] > 1)
      refuse("expected strides of whole elements; pass a contiguous copy");
    strides[i] = buffer_.strides[i] / buffer_.itemsize;
  }
  set_shape(buffer_.ndim, shape, buffer_.strides ? strides : nullptr);
  release.buffer = nullptr;
}

void TensorView::from_dlpack(py::handle source) {
  const bool host = access_.place == Place::host;
  const std::string wanted = host ? "expected a CPU tensor" : "expected a CUDA tensor";
  try {
    if (!host && py::hasattr(source, "__dlpack_device__")) {
      const auto device = py::reinterpret_borrow<py::tuple>(source.attr("__dlpack_device__")());
      const int type = device[0].cast<int>();
      if (type != dlpack::cuda && type != dlpack::cuda_managed)
        refuse(wanted + ", got one on " + device_name(source, "another device"));
    }
    if (says_yes(source, "is_neg") || says_yes(source, "is_conj"))
      refuse("expected a tensor whose values lie in memory as they are, got a view with the negative or the conjugate bit; "
             "pass x.resolve_neg().resolve_conj()");
    capsule_ = host ? source.attr("__dlpack__")() : source.attr("__dlpack__")(py::arg("stream") = -1);  // -1: no waiting
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    if (error.matches(py::module_::import("npeff.errors").attr("ArgumentError"))) throw;
    const std::string device = device_name(source, "cpu");
    if (host && device != "cpu") refuse(wanted + ", got one on " + device);
    refuse("cannot be read (" + py::str(error.value()).cast<std::string>() + ")");
  }
  if (!PyCapsule_IsValid(capsule_.ptr(), "dltensor")) refuse("cannot be read (__dlpack__ gave no tensor)");
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  const dlpack::Tensor& tensor = managed->tensor;  // the capsule keeps it, and frees it with itself
  const int type = tensor.device.type;
  if (host ? type != dlpack::cpu : type != dlpack::cuda && type != dlpack::cuda_managed)
    refuse(wanted + ", got one on " + device_name(source, "another device"));
  if (tensor.ndim < 0 || tensor.ndim > max_ndim)
    refuse("expected at most 4 dimensions, got " + std::to_string(tensor.ndim));
  device_ = tensor.device.id;
  item_bytes_ = (tensor.dtype.bits * int64_t{tensor.dtype.lanes} + 7) / 8;
  if (item_bytes_ < 1) refuse("expected elements of at least one byte, got elements without bytes");
  dtype_ = dtype_of(tensor.dtype);
  data_ = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
  set_shape(tensor.ndim, tensor.shape, tensor.strides);
}

void TensorView::set_shape(int ndim, const int64_t* shape, const int64_t* strides) {
  ndim_ = ndim;
  // Empty dimensions count as one: what is computed from the other lengths must not overflow either.
  int64_t bytes = item_bytes_, contiguous = 1, low = 0, high = 0;
  bool empty = false, fits = true;
  for (int i = ndim - 1; i >= 0 && fits; --i) {
    shape_[i] = shape[i];
    strides_[i] = strides ? strides[i] : contiguous;
    empty |= shape[i] == 0;
    const int64_t length = shape[i] > 1 ? shape[i] : 1;
    int64_t reach;
    fits = shape[i] >= 0 && !__builtin_mul_overflow(bytes, length, &bytes) && bytes <= most_bytes &&
           !__builtin_mul_overflow(length - 1, strides_[i], &reach) &&
           !__builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high);
    if (fits) contiguous *= length;
  }
  int64_t first, last;
  fits = fits && !__builtin_mul_overflow(low, item_bytes_, &first) && !__builtin_mul_overflow(high, item_bytes_, &last) &&
         first > -most_bytes && last < most_bytes;
  if (!fits) refuse("expected an array of at most 2^60 bytes, got shape " + shape_text(shape, ndim));
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

bool TensorView::overlaps(const TensorView& other) const { return begin_ < other.end_ && other.begin_ < end_; }

bool TensorView::same(const TensorView& other) const {
  if (begin_ != other.begin_ || end_ != other.end_ || dtype_ != other.dtype_ || ndim_ != other.ndim_) return false;
  for (int i = 0; i < ndim_; ++i)
    if (shape_[i] != other.shape_[i]) return false;
  return true;
}

void check_apart(std::initializer_list<const TensorView*> views) {
  for (const TensorView* output : views)
    for (const TensorView* other : views)
      if (output != other && output->written() && output->overlaps(*other))
        fail(std::string(output->name()) + ": must not be the same memory as " + other->name() + ", nor overlap it; use a copy");
}

void check_same_or_apart(const TensorView& output, const TensorView& input) {
  if (!output.same(input)) check_apart({&output, &input});
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

void check_offsets(const char* name, const int64_t* offsets, int64_t n, int64_t n_rows) {
  bool ascend = offsets[0] == 0 && offsets[n] == n_rows;
  for (int64_t i = 0; ascend && i < n; ++i) ascend = offsets[i] <= offsets[i + 1];
  if (!ascend)
    fail(std::string(name) + ": expected to ascend from 0 to " + std::to_string(n_rows) + ", the number of rows");
}

}  // namespace npeff
