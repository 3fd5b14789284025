#include "common/cuda_queue.h"
#include "nnls/bind.h"

template void npeff::bind_nnls<npeff::Cuda>(npeff::py::module_&);
