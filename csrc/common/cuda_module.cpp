// npeff._cuda: the CUDA kernels.
#include "common/tensor_view.h"

namespace npeff {

void bind_cuda_devices(py::module_& m);
void bind_cuda_fisher_norms(py::module_& m);
void bind_cuda_gram(py::module_& m);
void bind_cuda_nnls(py::module_& m);
void bind_cuda_segments(py::module_& m);
void bind_cuda_sketch(py::module_& m);
void bind_cuda_spmm(py::module_& m);
void bind_cuda_topk(py::module_& m);

}  // namespace npeff

PYBIND11_MODULE(_cuda, m) {
  using namespace npeff;
  m.doc() =
      "CUDA kernels of npeff. Call them through npeff.kernels. Imports without a driver: device_count() is 0 then. "
      "Arrays are torch or CuPy arrays on one device, outputs are filled; `stream` is the address of the caller's "
      "stream. No call waits for the device or allocates.";
  register_errors();
  for (const auto bind : {bind_cuda_devices, bind_cuda_fisher_norms, bind_cuda_gram, bind_cuda_nnls, bind_cuda_segments,
                          bind_cuda_sketch, bind_cuda_spmm, bind_cuda_topk})
    bind(m);
}
