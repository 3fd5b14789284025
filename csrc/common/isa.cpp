#include "common/isa.h"

#include <cstring>

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
