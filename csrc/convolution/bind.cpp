#include "convolution/bind.h"

template void npeff::bind_convolution<npeff::Host>(npeff::py::module_&);
