#include "common/cuda_queue.h"
#include "topk/bind.h"

template void npeff::bind_topk<npeff::Cuda>(npeff::py::module_&);
