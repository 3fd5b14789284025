#include "spmm/bind.h"

template void npeff::bind_spmm<npeff::Host>(npeff::py::module_&);
