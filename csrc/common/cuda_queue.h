// Launches blocks (see block.h) on a CUDA stream. Every call returns without waiting; the sequence of launches depends on
// shapes alone. A launch that fails throws std::runtime_error with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/memory.h"
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

// Lets a kernel take all the shared memory of the current device, and as many of its blocks share a processor as can.
// Asked for once per kernel and device (of the first 64).
template <class Kernel>
void allow_shared(int device, int most_bytes, const char* name) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t own = device < 64 ? uint64_t{1} << device : 0;
  if (allowed & own) return;
  check(cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes), name);
  check(cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), name);
  allowed |= own;
}

// Makes the stream's device the current one, and the former one again at the end.
class Queue {
 public:
  Queue(py::handle beside, int device, uintptr_t stream, const char* name)
      : beside_(beside), name_(name), stream_(reinterpret_cast<cudaStream_t>(stream)), device_(device) {
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
    const auto bytes = static_cast<size_t>(shared_bytes_of(kernel, 0));
    if (bytes > 16 << 10) allow_shared<Kernel>(device_, static_cast<int>(most_shared_bytes()), name_);
    run_block<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, bytes, stream_>>>(kernel);
    check(cudaGetLastError(), name_);
  }

  // n uninitialised numbers from torch's allocator, for launches of this queue.
  template <class T>
  T* scratch(int64_t n) {
    const py::gil_scoped_acquire gil;
    const auto bytes = py::module_::import("torch").attr("uint8");
    scratch_.push_back(beside_.attr("new_empty")(checked_product({n, sizeof(T)}), "dtype"_a = bytes));
    return reinterpret_cast<T*>(scratch_.back().attr("data_ptr")().template cast<uintptr_t>());
  }

  int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t most_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_), name_);
    return value;
  }

  const py::handle beside_;  // a tensor on the device
  const char* name_;
  cudaStream_t stream_;
  int device_, before_ = 0;
  std::vector<py::object> scratch_;
};

}  // namespace npeff::cuda

namespace npeff {

using Cuda = Device<cuda::Queue, Place::cuda>;

}  // namespace npeff
