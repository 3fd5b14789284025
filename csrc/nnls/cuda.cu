#include "nnls/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_nnls(py::module_& m) { bind_device_nnls<Cuda>(m); }

}  // namespace npeff
