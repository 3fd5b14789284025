#include <string>

#include "bindings.h"
#include "isa.h"

namespace npeff {

namespace py = pybind11;

void bind_isa(py::module_& m) {
  m.def("isa", [] { return kernels().name; }, "The instruction set in use: base, avx2 or avx512.");
  m.def("has_isa", [](const std::string& name) { return has_isa(name.c_str()); }, py::arg("name"), "Whether this build and this processor have it.");
  m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); }, py::arg("name"), "Use it from now on; False when it is not there.");
}

}  // namespace npeff
