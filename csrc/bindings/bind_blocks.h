// What the two files of npeff._native._blocks share. 16-bit floats come as numpy's float16, or as uint16 for bfloat16.
#pragma once

#include "csr_view.h"
#include "npeff/half_types.h"
#include "tensor_view.h"

namespace npeff {

template <> inline const char* TensorView::dtype_name<Half>() { return "float16"; }
template <> inline const char* TensorView::dtype_name<Bfloat16>() { return "uint16"; }

void bind_solver_blocks(py::module_& blocks);

}  // namespace npeff
