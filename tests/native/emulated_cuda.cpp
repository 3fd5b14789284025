// A stand-in for npeff._cuda: the same bindings and blocks, on the processor. tests/blocks.py compiles it.
#include "emulated_blocks.h"
#include "convolution/bind.h"
#include "gram/bind.h"
#include "nnls/bind.h"
#include "sketch/bind.h"
#include "spmm/bind.h"
#include "topk/bind.h"

PYBIND11_MODULE(npeff_emulated_cuda, m) {
  using namespace npeff;
  m.doc() = "The CUDA kernels on arrays of the processor, for tests. stream: the seed of the order of threads and blocks.";
  register_errors();
  bind_kernels<Emulated>(m);
}
