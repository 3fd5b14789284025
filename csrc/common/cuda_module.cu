// npeff._cuda: the CUDA kernels, and what the CUDA runtime says of this machine's devices.
#include "common/cuda_queue.h"

namespace npeff {
namespace {

// CUDA's words for an error, which is sticky in the runtime and cleared here; empty where there is none.
std::string words(cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

__global__ void nothing() {}

// Why the kernels of this build cannot run on that device, in CUDA's words; empty when they can.
std::string usable(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, nothing);  // fails where the build has no code for the device
    cudaSetDevice(before);
  }
  return words(status);
}

int device_count() {
  int n = 0;
  return words(cudaGetDeviceCount(&n)).empty() ? n : 0;
}

std::string absence() {
  int n = 0;
  const std::string error = words(cudaGetDeviceCount(&n));
  return error.empty() && n == 0 ? "no CUDA device" : error;
}

}  // namespace
}  // namespace npeff

PYBIND11_MODULE(_cuda, m) {
  using namespace npeff;
  m.doc() =
      "CUDA kernels of npeff. Call them through npeff.kernels. Imports without a driver: device_count() is 0 then. "
      "Arrays are torch tensors on one device, outputs are filled; `stream` is the address of the caller's current stream. "
      "No call waits for the device.";
  register_errors();
  m.def("device_count", &device_count, "Number of CUDA devices; 0 without a driver, or with one too old for this build.");
  m.def("absence", &absence, "Why device_count() is 0; empty when it is not.");
  m.def("toolkit", [] { return py::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10); },
        "Version (major, minor) of the CUDA toolkit that the module was built with.");
  m.def("usable", &usable, "device"_a, "Why the kernels cannot run on the device; empty when they can.");
  bind_kernels<Cuda>(m);
}
