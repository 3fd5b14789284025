#include "common/cuda_queue.h"
#include "fisher_norms/bind.h"

template void npeff::bind_fisher_norms<npeff::Cuda>(npeff::py::module_&);
