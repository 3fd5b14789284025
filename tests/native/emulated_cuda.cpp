// A stand-in for npeff._cuda: the same bindings and blocks, on the processor. tests/blocks.py compiles it.
#include "emulated_blocks.h"
#include "fisher_norms/device.h"
#include "gram/device.h"
#include "nnls/device.h"
#include "segments/device.h"
#include "sketch/device.h"
#include "spmm/device.h"
#include "topk/device.h"

PYBIND11_MODULE(npeff_emulated_cuda, m) {
  using namespace npeff;
  m.doc() = "The CUDA kernels on arrays of the processor, for tests. stream: the seed of the order of threads and blocks.";
  register_errors();
  bind_device_fisher_norms<Emulated>(m);
  bind_device_gram<Emulated>(m);
  bind_device_nnls<Emulated>(m);
  bind_device_segments<Emulated>(m);
  bind_device_sketch<Emulated>(m);
  bind_device_spmm<Emulated>(m);
  bind_device_topk<Emulated>(m);
}
