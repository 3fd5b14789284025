#include "fisher_norms/bind.h"

template void npeff::bind_fisher_norms<npeff::Host>(npeff::py::module_&);
