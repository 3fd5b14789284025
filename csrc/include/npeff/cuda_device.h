// The CUDA devices of this machine.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace npeff::cuda {

struct Device {
  int index;
  std::string name;
  int major, minor;          // compute capability
  long long memory;          // bytes in all
};

// Number of devices; 0 when there is no driver, or it is too old for this build.
int device_count();

// Why device_count() is 0, in the driver's words; empty when it is not.
std::string absence();

// Version of the CUDA toolkit that this was built with.
std::pair<int, int> toolkit();

// Why the kernels of this build cannot run on that device, in CUDA's words; empty when they can.
std::string usable(int device);

// All devices. Throws std::runtime_error with the driver's message when one cannot be read.
std::vector<Device> devices();

}  // namespace npeff::cuda
