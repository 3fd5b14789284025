#include "sketch/bind.h"

template void npeff::bind_sketch<npeff::Host>(npeff::py::module_&);
