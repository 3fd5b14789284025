"""Sums and products over the rows that belong to one example."""

from __future__ import annotations

import numpy as np
import torch

from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import A, accepts_cupy
from npeff.kernels.sparse import check_offsets

FLOATS = ("float32", "float64")
DEVICE_FLOATS = (*FLOATS, "float16", "bfloat16")


@accepts_cupy
def cross(p: A, row_offsets: A) -> A:
    """``cross_ij = Σ_{rows of example i} p_row,j²``: ‖A_i g_j‖² from ``P = A·Gᵀ``.

    Args:
        p: ``(R, r)`` float32 or float64; on a CUDA device also float16 or bfloat16, summed in float32.
        row_offsets: ``(n + 1,)`` int64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``.

    Returns:
        ``(n, r)``, of the kind and dtype of p (float32 for 16-bit ones).

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or the offsets do not ascend from 0 to R.
    """
    p, row_offsets, device = _check(p, row_offsets)
    native = dispatch.native()
    if isinstance(p, torch.Tensor) and isinstance(row_offsets, torch.Tensor) and dispatch.cuda(p.device):
        return cuda.cross(p, row_offsets)
    if native is None or device != "cpu" or arrays.dtype_name(p) == "float64":
        return arrays.like(p, reference.cross(arrays.as_tensor(p), arrays.as_tensor(row_offsets)))
    out = np.empty((row_offsets.shape[0] - 1, p.shape[1]), np.float32)
    native.cross(p, row_offsets, out, dispatch.num_threads())
    return arrays.like(p, out)


@accepts_cupy
def spread_multiply(w: A, p: A, row_offsets: A) -> A:
    """``S_row,j = w_example(row),j · p_row,j``: W ∘ P, a row of W for every row of its example.

    Args:
        w: ``(n, r)``, of the dtype of p.
        p: ``(R, r)`` float32 or float64; on a CUDA device also float16 or bfloat16.
        row_offsets: ``(n + 1,)`` int64.

    Returns:
        ``(R, r)``, of the kind and dtype of p (float32 for 16-bit ones).

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or the offsets do not ascend from 0 to R.
    """
    p, row_offsets, device = _check(p, row_offsets)
    w = arrays.check(w, "w", (arrays.dtype_name(p),), (row_offsets.shape[0] - 1, p.shape[1]))
    arrays.same_device(w=w, p=p)
    w = arrays.contiguous(w)
    native = dispatch.native()
    if isinstance(p, torch.Tensor) and dispatch.cuda(p.device):
        return cuda.spread_multiply(*(arrays.as_tensor(x) for x in (w, p, row_offsets)))
    if native is None or device != "cpu" or arrays.dtype_name(p) == "float64":
        tensors = [arrays.as_tensor(x) for x in (w, p, row_offsets)]
        return arrays.like(p, reference.spread_multiply(*tensors))
    out = np.empty(tuple(p.shape), np.float32)
    native.spread_multiply(w, p, row_offsets, out, dispatch.num_threads())
    return arrays.like(p, out)


def _check(p: A, row_offsets: A) -> tuple[A, A, str]:
    on_device = isinstance(p, torch.Tensor) and dispatch.cuda(p.device) is not None
    p = arrays.check(p, "p", DEVICE_FLOATS if on_device else FLOATS, (None, None))
    given = row_offsets
    row_offsets = arrays.check(row_offsets, "row_offsets", ("int64",), (None,))
    device = arrays.same_device(p=p, row_offsets=row_offsets).type
    p, row_offsets = arrays.contiguous(p), arrays.contiguous(row_offsets)
    if isinstance(given, torch.Tensor) and on_device and cuda.checked.known(given, extent=p.shape[0]):
        return p, row_offsets, device  # looking again would mean waiting for the device
    check_offsets(arrays.as_tensor(row_offsets), p.shape[0])
    if isinstance(given, torch.Tensor) and on_device:
        cuda.checked.record(given, extent=p.shape[0])
    return p, row_offsets, device
