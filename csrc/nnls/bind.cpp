#include "nnls/bind.h"

template void npeff::bind_nnls<npeff::Host>(npeff::py::module_&);
