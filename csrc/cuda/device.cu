#include "npeff/cuda_device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace npeff::cuda {
namespace {

// The count, or the error that stands for "none". The error is sticky in the runtime: it is cleared here.
cudaError_t count(int* n) {
  *n = 0;
  const cudaError_t status = cudaGetDeviceCount(n);
  if (status != cudaSuccess) {
    *n = 0;
    cudaGetLastError();
  }
  return status;
}

__global__ void nothing() {}

}  // namespace

std::pair<int, int> toolkit() { return {CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10}; }

std::string usable(int device) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, nothing);  // fails where the build has no code for the device
    cudaSetDevice(before);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(status);
}

int device_count() {
  int n;
  count(&n);
  return n;
}

std::string absence() {
  int n;
  const cudaError_t status = count(&n);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return n == 0 ? "no CUDA device" : "";
}

std::vector<Device> devices() {
  std::vector<Device> all(device_count());
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    cudaDeviceProp properties;
    const cudaError_t status = cudaGetDeviceProperties(&properties, i);
    if (status != cudaSuccess) {
      cudaGetLastError();
      throw std::runtime_error("CUDA device " + std::to_string(i) + ": " + cudaGetErrorString(status));
    }
    all[i] = {i, properties.name, properties.major, properties.minor, static_cast<long long>(properties.totalGlobalMem)};
  }
  return all;
}

}  // namespace npeff::cuda
