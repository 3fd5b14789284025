#include "common/cuda_queue.h"
#include "sketch/bind.h"

template void npeff::bind_sketch<npeff::Cuda>(npeff::py::module_&);
