// What the two files of the module share. 16-bit floats come as numpy's float16, or as torch's bfloat16.
#pragma once

#include "csr_view.h"

namespace npeff {

void bind_solver_blocks(py::module_& blocks);

}  // namespace npeff
