"""The kernels: native code for the CPU and for CUDA, each with a plain torch version as oracle and fallback.

Tensors and numpy arrays go in without copies, and the same kind comes out. CUDA tensors are served
on their own device. :func:`report` says which implementation serves each kernel, and why not a faster one.
"""

from npeff.kernels.convolution import convolution_gradients, outer_gram
from npeff.kernels.dispatch import (
    KernelInfo,
    available,
    implementation,
    num_threads,
    report,
    set_num_threads,
    use,
)
from npeff.kernels.nnls import NnlsResult, nnls
from npeff.kernels.sketch import StreamingSketch, sketch, sketch_csr
from npeff.kernels.sparse import cross, csr_transpose, fisher_norms, sparse_gram, spmm, spread_multiply
from npeff.kernels.streams import NonFiniteError
from npeff.kernels.topk import StreamingTopK, topk

__all__ = [
    "KernelInfo",
    "NnlsResult",
    "NonFiniteError",
    "StreamingSketch",
    "StreamingTopK",
    "available",
    "convolution_gradients",
    "cross",
    "csr_transpose",
    "fisher_norms",
    "implementation",
    "nnls",
    "num_threads",
    "outer_gram",
    "report",
    "set_num_threads",
    "sketch",
    "sketch_csr",
    "sparse_gram",
    "spmm",
    "spread_multiply",
    "topk",
    "use",
]
