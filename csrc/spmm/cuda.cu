#include "spmm/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_spmm(py::module_& m) { bind_device_spmm<Cuda>(m); }

}  // namespace npeff
