#include "segments/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_segments(py::module_& m) { bind_device_segments<Cuda>(m); }

}  // namespace npeff
