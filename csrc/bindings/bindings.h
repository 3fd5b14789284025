// One function per category of bindings; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace npeff {

void bind_csr(pybind11::module_& m);
void bind_convolution(pybind11::module_& m);
void bind_fisher_norms(pybind11::module_& m);
void bind_isa(pybind11::module_& m);
void bind_topk(pybind11::module_& m);
void bind_nnls(pybind11::module_& m);
void bind_segments(pybind11::module_& m);
void bind_sketch(pybind11::module_& m);
void bind_sparse_gram(pybind11::module_& m);
void bind_spmm(pybind11::module_& m);

}  // namespace npeff
