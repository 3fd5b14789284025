#include "device_view.h"

#include "dlpack.h"

namespace npeff {
namespace {

constexpr int max_ndim = 4, cuda_device = 2, cuda_managed = 13;

std::string dtype_of(const dlpack::DataType& type) {
  const char* kinds[] = {"int", "uint", "float", "handle", "bfloat"};
  if (type.code > 4 || type.lanes != 1) return "a dtype without a name";
  return kinds[type.code] + std::to_string(type.bits);
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

DeviceView::DeviceView(py::handle source, const char* name) : name_(name) {
  const std::string who(name);
  if (!py::hasattr(source, "__dlpack__"))
    fail(who + ": expected a CUDA tensor (torch or CuPy), got " + Py_TYPE(source.ptr())->tp_name);
  if (py::hasattr(source, "__dlpack_device__")) {
    const auto device = py::reinterpret_borrow<py::tuple>(source.attr("__dlpack_device__")());
    const int type = device[0].cast<int>();
    if (type != cuda_device && type != cuda_managed)
      fail(who + ": expected a CUDA tensor, got one on " +
           (py::hasattr(source, "device") ? py::str(source.attr("device")).cast<std::string>() : "another device"));
  }
  try {
    capsule_ = source.attr("__dlpack__")(py::arg("stream") = -1);  // -1: no waiting
  } catch (py::error_already_set& error) {
    fail(who + ": cannot be read (" + py::str(error.value()).cast<std::string>() + ")");
  }
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const dlpack::Tensor& tensor = managed->tensor;  // the capsule keeps it, and frees it with itself
  if (tensor.device.type != cuda_device && tensor.device.type != cuda_managed) fail(who + ": expected a CUDA tensor");
  if (tensor.ndim > max_ndim) fail(who + ": expected at most 4 dimensions, got " + std::to_string(tensor.ndim));
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  device_ = tensor.device.id;
  ndim_ = tensor.ndim;
  dtype_ = dtype_of(tensor.dtype);
  int64_t contiguous = 1;
  for (int i = ndim_ - 1; i >= 0; --i) {
    shape_[i] = tensor.shape[i];
    strides_[i] = tensor.strides ? tensor.strides[i] : contiguous;
    contiguous *= shape_[i];
  }
}

void DeviceView::check(const char* dtype, std::initializer_list<int64_t> shape, bool row_stride) const {
  const std::string who(name_);
  if (dtype_ != dtype) fail(who + ": expected " + dtype + ", got " + dtype_);
  bool fits = ndim_ == static_cast<int>(shape.size());
  for (int i = 0; fits && i < ndim_; ++i) fits = shape.begin()[i] == any || shape.begin()[i] == shape_[i];
  if (!fits)
    fail(who + ": expected shape " + shape_text(shape.begin(), static_cast<int>(shape.size())) + ", got " +
         shape_text(shape_, ndim_));
  int64_t contiguous = 1, size = 1;
  for (int i = 0; i < ndim_; ++i) size *= shape_[i];
  if (size == 0) return;
  for (int i = ndim_ - 1; i >= (row_stride ? 1 : 0); --i) {
    if (shape_[i] > 1 && strides_[i] != contiguous) fail(who + ": expected a C-contiguous tensor");
    contiguous *= shape_[i];
  }
}

cuda::Stream stream_of(uintptr_t handle, std::initializer_list<const DeviceView*> views) {
  const int device = (*views.begin())->device();
  for (const DeviceView* view : views)
    if (view->device() != device)
      fail("expected all arguments on one device, got cuda:" + std::to_string(device) + " and cuda:" +
           std::to_string(view->device()));
  return {device, reinterpret_cast<void*>(handle)};
}

}  // namespace npeff
