#include "common/cuda_queue.h"
#include "spmm/bind.h"

template void npeff::bind_spmm<npeff::Cuda>(npeff::py::module_&);
