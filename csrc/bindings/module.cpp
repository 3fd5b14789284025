// npeff._native: table of contents.
#include "bindings.h"
#include "tensor_view.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of npeff. Call them through npeff.kernels.";
  npeff::register_errors();
  npeff::bind_isa(m);
  npeff::bind_csr(m);
  npeff::bind_topk(m);
  npeff::bind_nnls(m);
  npeff::bind_spmm(m);
  npeff::bind_sparse_gram(m);
  npeff::bind_segments(m);
  npeff::bind_fisher_norms(m);
  npeff::bind_convolution(m);
  npeff::bind_sketch(m);
}
