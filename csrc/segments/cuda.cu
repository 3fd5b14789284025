#include "common/cuda_queue.h"
#include "segments/bind.h"

template void npeff::bind_segments<npeff::Cuda>(npeff::py::module_&);
