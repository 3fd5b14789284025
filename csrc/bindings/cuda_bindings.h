// One function per category of bindings; cuda_module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace npeff {

void bind_cuda_device(pybind11::module_& m);
void bind_cuda_topk(pybind11::module_& m);
void bind_cuda_solver(pybind11::module_& m);
void bind_cuda_sparse(pybind11::module_& m);
void bind_cuda_sketch(pybind11::module_& m);

}  // namespace npeff
