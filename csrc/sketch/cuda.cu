#include "sketch/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_sketch(py::module_& m) { bind_device_sketch<Cuda>(m); }

}  // namespace npeff
