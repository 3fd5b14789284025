#include "topk/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_topk(py::module_& m) { bind_device_topk<Cuda>(m); }

}  // namespace npeff
