#include "gram/bind.h"

template void npeff::bind_gram<npeff::Host>(npeff::py::module_&);
