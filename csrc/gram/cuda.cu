#include "gram/device.h"

#include "common/cuda_queue.h"

namespace npeff {

void bind_cuda_gram(py::module_& m) { bind_device_gram<Cuda>(m); }

}  // namespace npeff
