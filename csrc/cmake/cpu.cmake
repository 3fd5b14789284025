# npeff._native: the CPU kernels.
#
# Files named simd.cpp are compiled once per instruction set, into a namespace of that name; common/isa.h
# chooses at run time. They hold plain loops and no standard containers: an inline template compiled for AVX-512 must never
# be the copy that the linker keeps.

if(MSVC)
  message(FATAL_ERROR "npeff: the kernels use vector extensions of GCC and Clang; build with one of those")
endif()
# psabi: vectors never cross between files. maybe-uninitialized: false alarms inside GCC 12's own AVX-512 headers.
set(NPEFF_WARNINGS -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)
set(NPEFF_OPTIMISATION -O3 CACHE STRING "Optimisation of the CPU kernels; tests/sanitize.py builds with -O1")
file(GLOB NPEFF_SIMD_SOURCES CONFIGURE_DEPENDS */simd.cpp)
file(GLOB NPEFF_CPU_SOURCES CONFIGURE_DEPENDS */*.cpp)
list(REMOVE_ITEM NPEFF_CPU_SOURCES ${NPEFF_SIMD_SOURCES})
set(NPEFF_ISAS base)
set(NPEFF_FLAGS_base "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND NPEFF_ISAS avx2 avx512)
  set(NPEFF_FLAGS_avx2 -mavx2 -mfma -mbmi -mbmi2)
  set(NPEFF_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mbmi -mbmi2 -mprefer-vector-width=512)
endif()

npeff_bindings(NPEFF_CPU_BINDINGS Host common/device.h cpp)
pybind11_add_module(_native ${NPEFF_CPU_SOURCES} ${NPEFF_CPU_BINDINGS})

foreach(isa IN LISTS NPEFF_ISAS)
  add_library(npeff_${isa} OBJECT ${NPEFF_SIMD_SOURCES})
  target_include_directories(npeff_${isa} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_compile_options(npeff_${isa} PRIVATE ${NPEFF_WARNINGS} ${NPEFF_OPTIMISATION} ${NPEFF_FLAGS_${isa}})
  target_compile_definitions(npeff_${isa} PRIVATE NPEFF_ISA=${isa})
  target_link_libraries(_native PRIVATE npeff_${isa})
  target_compile_definitions(_native PRIVATE NPEFF_HAS_${isa})
endforeach()

# A sketch has the same bits on every processor: no product may be fused with a sum.
set_source_files_properties(sketch/sketch.cpp PROPERTIES COMPILE_OPTIONS -ffp-contract=off)

target_include_directories(_native PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_options(_native PRIVATE ${NPEFF_WARNINGS} ${NPEFF_OPTIMISATION})
target_link_libraries(_native PRIVATE Threads::Threads)
install(TARGETS _native LIBRARY DESTINATION npeff)
