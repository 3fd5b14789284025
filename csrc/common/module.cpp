// npeff._native: the CPU kernels, and the choice of their instruction set.
#include <cstring>

#include "common/device.h"
#include "common/isa.h"

namespace npeff {
namespace {

bool usable(int isa) {
#ifdef NPEFF_HAS_avx512
  if (isa == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return isa == 0;
}

}  // namespace

int find_isa(const char* name) {
  for (int isa = 2; isa >= 0; --isa)
    if ((!name || std::strcmp(isa_names[isa], name) == 0) && usable(isa)) return isa;
  return -1;
}

std::atomic<int> isa_in_use{find_isa(nullptr)};

}  // namespace npeff

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
