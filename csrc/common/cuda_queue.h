// Launches blocks (see block.h) on a CUDA stream. Every call returns without waiting, and allocates nothing; the sequence
// of launches depends on shapes alone. A launch that fails throws std::runtime_error with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/device.h"

namespace npeff::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads) run_block(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) unsigned char shared[];
  kernel(CudaBlock<Kernel::threads>{}, *reinterpret_cast<typename Kernel::Shared*>(shared), blockIdx.x);
}

// Makes the stream's device the current one, and the former one again at the end.
class Queue {
 public:
  Queue(int device, uintptr_t stream, const char* name)
      : name_(name), stream_(reinterpret_cast<cudaStream_t>(stream)), device_(device) {
    check(cudaGetDevice(&before_), name);
    if (before_ != device_) check(cudaSetDevice(device_), name);
  }
  ~Queue() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  template <class Kernel>
  void run(int64_t blocks, const Kernel& kernel) {
    if (blocks == 0) return;  // CUDA refuses an empty launch
    if (blocks > INT32_MAX) throw std::runtime_error(std::string(name_) + ": too large for one launch");
    const auto bytes = static_cast<size_t>(kernel.shared_bytes());
    if (bytes > 48 << 10)
      check(cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name_);
    if (bytes > 16 << 10)  // let as many blocks share a processor as can
      check(cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), name_);
    run_block<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, bytes, stream_>>>(kernel);
    check(cudaGetLastError(), name_);
  }

  int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t most_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_), name_);
    return value;
  }

  const char* name_;
  cudaStream_t stream_;
  int device_, before_ = 0;
};

}  // namespace npeff::cuda

namespace npeff {

using Cuda = Device<cuda::Queue, Place::device>;

}  // namespace npeff
