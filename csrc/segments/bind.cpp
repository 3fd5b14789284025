#include "segments/bind.h"

template void npeff::bind_segments<npeff::Host>(npeff::py::module_&);
