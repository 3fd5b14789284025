#include "isa.h"

#include <atomic>
#include <cstring>

namespace npeff {

namespace base { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }

namespace {

struct Entry {
  const Kernels* table;
  bool (*usable)();
};

const Entry entries[] = {  // fastest first
#ifdef NPEFF_HAS_avx512
    {&avx512::table, [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }},
#endif
#ifdef NPEFF_HAS_avx2
    {&avx2::table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("bmi2"); }},
#endif
    {&base::table, [] { return true; }},
};

const Kernels* fastest() {
  for (const Entry& entry : entries)
    if (entry.usable()) return entry.table;
  return &base::table;
}

std::atomic<const Kernels*> current{fastest()};

const Kernels* find(const char* name) {
  for (const Entry& entry : entries)
    if (std::strcmp(entry.table->name, name) == 0 && entry.usable()) return entry.table;
  return nullptr;
}

}  // namespace

const Kernels& kernels() { return *current.load(std::memory_order_acquire); }

bool has_isa(const char* name) { return find(name) != nullptr; }

bool use_isa(const char* name) {
  const Kernels* table = find(name);
  if (table) current.store(table, std::memory_order_release);
  return table != nullptr;
}

}  // namespace npeff
