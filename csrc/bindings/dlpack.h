// The part of the DLPack ABI that is read here (https://dmlc.github.io/dlpack, unversioned DLManagedTensor).
#pragma once

#include <cstdint>

namespace dlpack {

constexpr int32_t cpu = 1, cuda = 2, cuda_managed = 13;  // device types

struct Device { int32_t type; int32_t id; };
struct DataType { uint8_t code; uint8_t bits; uint16_t lanes; };  // code 0: int, 1: uint, 2: float, 4: bfloat

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when C-contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack
