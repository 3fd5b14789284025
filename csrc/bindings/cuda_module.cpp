// npeff._cuda: table of contents.
#include "cuda_bindings.h"
#include "tensor_view.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of npeff. Call them through npeff.kernels. Imports without a driver: device_count() is 0 then. "
      "Arrays are torch or CuPy arrays on one device, outputs are filled; `stream` is the address of the caller's "
      "stream. No call waits for the device or allocates.";
  npeff::register_errors();
  npeff::bind_cuda_device(m);
  npeff::bind_cuda_topk(m);
  npeff::bind_cuda_solver(m);
  npeff::bind_cuda_sparse(m);
  npeff::bind_cuda_sketch(m);
}
