#include "common/isa.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace npeff {
namespace {

constexpr const char* names[] = {"base", "avx2", "avx512"};

bool usable(Isa isa) {
#ifdef NPEFF_HAS_avx512
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return isa == Isa::base;
}

std::atomic<Isa> current{usable(Isa::avx512) ? Isa::avx512 : usable(Isa::avx2) ? Isa::avx2 : Isa::base};

// Whether there is a usable one of that name.
bool find(const char* name, Isa* found) {
  for (const Isa isa : {Isa::base, Isa::avx2, Isa::avx512})
    if (std::strcmp(names[static_cast<int>(isa)], name) == 0) {
      *found = isa;
      return usable(isa);
    }
  return false;
}

}  // namespace

Isa isa_in_use() { return current.load(std::memory_order_acquire); }

const char* isa_name() { return names[static_cast<int>(isa_in_use())]; }

bool has_isa(const char* name) {
  Isa isa;
  return find(name, &isa);
}

bool use_isa(const char* name) {
  Isa isa;
  if (!find(name, &isa)) return false;
  current.store(isa, std::memory_order_release);
  return true;
}

}  // namespace npeff
