// The instruction sets that inner loops are compiled for, and the choice among them at run time.
//
// A kernel's simd.h declares a struct of function pointers, and NPEFF_SIMD of it; its simd.cpp is compiled once per
// instruction set into a namespace of that name, where it defines the struct's value.
#pragma once

#include <atomic>
#include <cstdint>

namespace npeff {

constexpr const char* isa_names[] = {"base", "avx2", "avx512"};

// The number of that instruction set, or (null) of the fastest; −1 when this build or this processor lacks it.
int find_isa(const char* name);

// The number of the one in use; at first the fastest.
extern std::atomic<int> isa_in_use;

}  // namespace npeff

// name(): the value of the struct Table for the instruction set in use.
#define NPEFF_SIMD_DECLARED(Table, name)            \
  namespace base { extern const Table name; }       \
  namespace avx2 { extern const Table name; }       \
  namespace avx512 { extern const Table name; }
#if defined(NPEFF_ISA)
#define NPEFF_SIMD(Table, name) NPEFF_SIMD_DECLARED(Table, name)
#elif defined(NPEFF_HAS_avx512)
#define NPEFF_SIMD(Table, name)                                               \
  NPEFF_SIMD_DECLARED(Table, name)                                            \
  inline const Table& name() {                                                \
    const Table* const tables[] = {&base::name, &avx2::name, &avx512::name};  \
    return *tables[isa_in_use];                                               \
  }
#else
#define NPEFF_SIMD(Table, name)      \
  NPEFF_SIMD_DECLARED(Table, name)   \
  inline const Table& name() { return base::name; }
#endif
