#include "fisher_norms/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_fisher_norms(py::module_& m) { bind_device_fisher_norms<Cuda>(m); }

}  // namespace npeff
