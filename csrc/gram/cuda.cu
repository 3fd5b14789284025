#include "common/cuda_queue.h"
#include "gram/bind.h"

template void npeff::bind_gram<npeff::Cuda>(npeff::py::module_&);
