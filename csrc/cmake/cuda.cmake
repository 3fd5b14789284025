# npeff._cuda: the CUDA kernels, built when a CUDA compiler is there (or asked for).

if(NPEFF_CUDA STREQUAL "OFF")
  message(STATUS "npeff._cuda: not built (NPEFF_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NPEFF_CUDA STREQUAL "ON")
    message(FATAL_ERROR "NPEFF_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH, or set CUDACXX")
  endif()
  message(STATUS "npeff._cuda: not built (no CUDA compiler found)")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  # For the devices that are there. Where there is none: code that a driver compiles for its own device at first use.
  # Releases name theirs in CUDAARCHS.
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed OR NOT found MATCHES "^[0-9]+\\.[0-9]+(\n[0-9]+\\.[0-9]+)*$")
    set(CMAKE_CUDA_ARCHITECTURES 75-virtual)
  else()
    string(REPLACE "." "" found "${found}-real")
    string(REPLACE "\n" "-real;" CMAKE_CUDA_ARCHITECTURES "${found}")
    list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
  endif()
  message(STATUS "npeff._cuda: for ${CMAKE_CUDA_ARCHITECTURES}")
endif()
enable_language(CUDA)

npeff_bindings(NPEFF_CUDA_BINDINGS Cuda common/cuda_queue.h cu)
pybind11_add_module(_cuda common/tensor_view.cpp common/cuda_module.cu ${NPEFF_CUDA_BINDINGS})
set_target_properties(_cuda PROPERTIES CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
target_link_libraries(_cuda PRIVATE Threads::Threads)
install(TARGETS _cuda LIBRARY DESTINATION npeff)
