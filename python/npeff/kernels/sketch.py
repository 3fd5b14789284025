"""Random projections: long rows to d numbers whose inner products are, up to noise, those of the rows.

A sparse Johnson–Lindenstrauss transform (Charikar, Chen & Farach-Colton 2002; Nelson & Nguyễn 2013) without state:
the seed and a parameter's flat index alone decide its bucket and its sign. With ``nonzeros`` = s every parameter has
one bucket in each of s stretches of d/s buckets, with weight ±1/√s. Over seeds the inner product of two sketches has
the mean ⟨x, y⟩ and a variance of at most ``(‖x‖²‖y‖² + ⟨x, y⟩²) / d``, whatever s is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import A, accepts_cupy
from npeff.kernels.cuda_sketch import DeviceSketch
from npeff.kernels.sparse import check_csr, check_structure
from npeff.kernels.streaming_sketch import NONZEROS, StreamingSketch, check_map, finished
from npeff.kernels.topk import NonFiniteError, matrix_of

__all__ = ["NONZEROS", "StreamingSketch", "check_map", "sketch", "sketch_csr"]


@accepts_cupy
def sketch(x: A, d: int, seed: int = 0, base: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """The sketches of the rows of a matrix.

    Args:
        x: ``(rows, cols)`` or ``(cols,)``; float32, or another float, rounded to float32. Any strides.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        base: Flat index of the first column: the sketch of a row is the sum of the sketches of its parts.
        nonzeros: Buckets per parameter.

    Returns:
        ``(rows, d)`` (or ``(d,)``) float32, of the kind and device of x. The same bits on any processor and for any
        number of threads; those of a CUDA device differ from them by rounding in float32.

    Raises:
        ArgumentError: x is no float matrix, or d, seed, base or nonzeros is out of range.
        NonFiniteError: x holds NaN or infinite values.
    """
    base = arrays.integer(base, "base", 0, arrays.MOST_INDEX)
    matrix = matrix_of(x)
    stream = StreamingSketch(int(matrix.shape[0]), d, seed, nonzeros=nonzeros)
    stream.push(matrix, base)
    try:
        out = stream.finish_there()
    except NonFiniteError:
        bad = torch.nonzero(~torch.isfinite(arrays.as_tensor(matrix)))
        if len(bad):
            raise NonFiniteError(int(bad[0, 0]), base + int(bad[0, 1])) from None
        raise
    result: Any = out.reshape(*x.shape[:-1], d)
    if isinstance(x, torch.Tensor):
        result = arrays.as_tensor(result).to(x.device)
    return result


@accepts_cupy
def sketch_csr(indptr: A, indices: A, values: A, d: int, seed: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """The sketches of compressed sparse rows; the bits of :func:`sketch` where indices ascend within rows.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ≥ 0.
        values: ``(nnz,)`` float32.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.

    Returns:
        ``(R, d)`` float32, of the kind of ``values``.

    Raises:
        ArgumentError: Shapes or dtypes do not fit, or d, seed or nonzeros is out of range.
        NonFiniteError: A value is NaN or infinite; the index is its place in ``values``.
    """
    check_map(d, seed, nonzeros)
    d, seed, nonzeros = int(d), int(seed), int(nonzeros)
    indptr, indices, values = check_csr(indptr, indices, values)
    device = arrays.same_device(indptr=indptr, indices=indices, values=values)
    n_columns = arrays.MOST_INDEX
    if isinstance(values, torch.Tensor) and dispatch.cuda(device):
        starts, columns = arrays.as_tensor(indptr), arrays.as_tensor(indices)
        check_structure(starts, columns, n_columns)
        there = DeviceSketch(len(starts) - 1, d, seed, nonzeros, device)
        there.push_csr(starts, columns, values, n_columns)
        sketches, first = there.finish()
        if (row := int(first)) != cuda.ALL_FINITE:
            raise NonFiniteError(row, int((~torch.isfinite(values)).to(torch.uint8).argmax()))
        return arrays.like(values, sketches)
    native = dispatch.native()
    sums = np.zeros((indptr.shape[0] - 1, d), np.float64)
    if native is None or device.type != "cpu":
        starts, columns, entries = (arrays.as_tensor(x).cpu() for x in (indptr, indices, values))
        check_structure(starts, columns, n_columns)
        rows = torch.repeat_interleave(torch.arange(len(sums)), starts.diff()).numpy()
        reference.add_to_sketch(sums, rows, columns.numpy(), entries.numpy(), seed, nonzeros)
    else:
        csr = native.Csr(indptr, indices, values, n_columns, dispatch.num_threads())
        native.sketch_csr(csr, seed, nonzeros, sums, dispatch.num_threads())
    out, bad = finished(sums, nonzeros)
    if bad >= 0:
        at = int(np.argmin(np.isfinite(np.asarray(arrays.as_tensor(values).cpu()))))
        raise NonFiniteError(bad, at)
    return arrays.like(values, out)
