// npeff._native: the CPU kernels.
#include "common/device.h"
#include "common/isa.h"

PYBIND11_MODULE(_native, m) {
  using namespace npeff;
  m.doc() = "CPU kernels of npeff. Call them through npeff.kernels.";
  register_errors();
  m.def("isa", [] { return isa_names[isa_in_use]; }, "The instruction set in use: base, avx2 or avx512.");
  m.def("has_isa", [](const std::string& name) { return find_isa(name.c_str()) >= 0; }, "name"_a,
        "Whether this build and this processor have it.");
  const auto use = [](const std::string& name) {
    const int isa = find_isa(name.c_str());
    if (isa >= 0) isa_in_use = isa;
    return isa >= 0;
  };
  m.def("use_isa", use, "name"_a, "Use it from now on; False when it is not there.");
  bind_kernels<Host>(m);
}
