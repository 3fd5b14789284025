// npeff._native: the CPU kernels.
#include "common/device.h"
#include "common/isa.h"

PYBIND11_MODULE(_native, m) {
  using namespace npeff;
  m.doc() = "CPU kernels of npeff. Call them through npeff.kernels.";
  register_errors();
  m.def("isa", &isa_name, "The instruction set in use: base, avx2 or avx512.");
  m.def("has_isa", [](const std::string& name) { return has_isa(name.c_str()); }, "name"_a,
        "Whether this build and this processor have it.");
  m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); }, "name"_a,
        "Use it from now on; False when it is not there.");
  bind_kernels<Host>(m);
  bind_convolution<Host>(m);
}
