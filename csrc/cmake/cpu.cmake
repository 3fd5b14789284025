# npeff._native: the CPU kernels.
#
# The files in cpu/isa/ are compiled once per instruction set, into a namespace of that name, and meet in one
# table (cpu/isa.cpp) which is read at run time. They hold plain loops and no standard containers: an inline
# template compiled for AVX-512 must never be the copy that the linker keeps.

if(MSVC)
  message(FATAL_ERROR "npeff: the kernels use vector extensions of GCC and Clang; build with one of those")
endif()
# psabi: vectors never cross between files. maybe-uninitialized: false alarms inside GCC 12's own AVX-512 headers.
set(NPEFF_WARNINGS -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)
set(NPEFF_OPTIMISATION -O3 CACHE STRING "Optimisation of the CPU kernels; tests/sanitize.py builds with -O1")
set(NPEFF_ISA_SOURCES
  cpu/isa/table.cpp
  cpu/isa/nnls_active_set.cpp
  cpu/isa/nnls_tile.cpp
  cpu/isa/patch_sums.cpp
  cpu/isa/sketch_run.cpp
  cpu/isa/spmm_row.cpp
  cpu/isa/topk_scan.cpp)
set(NPEFF_ISAS base)
set(NPEFF_FLAGS_base "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND NPEFF_ISAS avx2 avx512)
  set(NPEFF_FLAGS_avx2 -mavx2 -mfma -mbmi -mbmi2)
  set(NPEFF_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mbmi -mbmi2 -mprefer-vector-width=512)
endif()

pybind11_add_module(_native
  bindings/module.cpp
  bindings/bind_convolution.cpp
  bindings/bind_csr.cpp
  bindings/bind_isa.cpp
  bindings/bind_nnls.cpp
  bindings/bind_fisher_norms.cpp
  bindings/bind_segments.cpp
  bindings/bind_sketch.cpp
  bindings/bind_sparse_gram.cpp
  bindings/bind_spmm.cpp
  bindings/bind_topk.cpp
  bindings/tensor_view.cpp
  cpu/isa.cpp
  cpu/convolution.cpp
  cpu/csr_check.cpp
  cpu/csr_select.cpp
  cpu/csr_transpose.cpp
  cpu/nnls.cpp
  cpu/nnls_exact.cpp
  cpu/parallel.cpp
  cpu/fisher_norms.cpp
  cpu/segments.cpp
  cpu/sketch.cpp
  cpu/sparse_gram.cpp
  cpu/spmm.cpp
  cpu/topk.cpp
  cpu/topk_guess.cpp
  cpu/topk_rows.cpp)

foreach(isa IN LISTS NPEFF_ISAS)
  add_library(npeff_${isa} OBJECT ${NPEFF_ISA_SOURCES})
  target_include_directories(npeff_${isa} PRIVATE include cpu)
  target_compile_options(npeff_${isa} PRIVATE ${NPEFF_WARNINGS} ${NPEFF_OPTIMISATION} ${NPEFF_FLAGS_${isa}})
  target_compile_definitions(npeff_${isa} PRIVATE NPEFF_ISA=${isa})
  target_link_libraries(_native PRIVATE npeff_${isa})
  target_compile_definitions(_native PRIVATE NPEFF_HAS_${isa})
endforeach()

# A sketch has the same bits on every processor: no product may melt into a sum where there are instructions for it.
set_source_files_properties(cpu/sketch.cpp PROPERTIES COMPILE_OPTIONS -ffp-contract=off)

target_include_directories(_native PRIVATE include cpu)
target_compile_options(_native PRIVATE ${NPEFF_WARNINGS} ${NPEFF_OPTIMISATION})
target_link_libraries(_native PRIVATE Threads::Threads)
install(TARGETS _native LIBRARY DESTINATION npeff)
