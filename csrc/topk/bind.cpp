#include "topk/bind.h"

template void npeff::bind_topk<npeff::Host>(npeff::py::module_&);
