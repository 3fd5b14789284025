"""Sums, products and norms over the rows that belong to one example."""

from __future__ import annotations

from torch import Tensor

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Operand, accepts_cupy
from npeff.kernels.sparse import Csr, checked

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
    p, row_offsets = _check(p, row_offsets)
    kernels = dispatch.compiled(p)
    if kernels is None:
        return arrays.like(p, reference.cross(arrays.as_tensor(p), arrays.as_tensor(row_offsets)))
    out = arrays.empty((len(row_offsets) - 1, p.shape[1]), _sum_dtype(p), arrays.device_of(p))
    kernels("cross", p=p, row_offsets=row_offsets, out=out)
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
    p, row_offsets = _check(p, row_offsets)
    w = arrays.check(w, "w", (arrays.dtype_name(p),), (len(row_offsets) - 1, p.shape[1]))
    arrays.same_device(w=w, p=p)
    kernels = dispatch.compiled(p)
    if kernels is None:
        tensors = [arrays.as_tensor(x) for x in (w, p, row_offsets)]
        return arrays.like(p, reference.spread_multiply(*tensors))
    out = arrays.empty(tuple(p.shape), _sum_dtype(p), arrays.device_of(p))
    kernels("spread_multiply", w=arrays.contiguous(w), p=p, row_offsets=row_offsets, out=out)
    return arrays.like(p, out)


@accepts_cupy
def fisher_norms(indptr: A, indices: A, values: A, n_columns: int, row_offsets: A) -> A:
    """``‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F`` of every example's CSR rows, in float64.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ascending within a row, each once and below ``n_columns``.
        values: ``(nnz,)`` float32.
        n_columns: Columns of the rows.
        row_offsets: ``(n + 1,)`` int64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``.

    Returns:
        ``(n,)`` float64, of the kind of ``values``.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index or offset is out of range or out of order.
    """
    n_columns = arrays.integer(n_columns, "n_columns", 0, arrays.MOST_INDEX)
    matrix: Csr[A] = Csr(indptr, indices, values, n_columns, "float32", ascending=True)
    row_offsets = arrays.contiguous(arrays.check(row_offsets, "row_offsets", ("int64",), (None,)))
    device = arrays.same_device(indptr=matrix.indptr, row_offsets=row_offsets)
    check_offsets(arrays.as_tensor(row_offsets), len(matrix.indptr) - 1)
    kernels = dispatch.compiled(matrix.values)
    if kernels is None:
        offsets = arrays.as_tensor(row_offsets)
        return arrays.like(values, reference.fisher_norms(*matrix.tensors(), n_columns, offsets))
    out = arrays.empty((len(row_offsets) - 1,), "float64", device)
    kernels("fisher_norms", a=matrix.compiled(kernels), row_offsets=row_offsets, out=out)
    return arrays.like(values, out)


def _sum_dtype(p: Operand) -> str:
    return "float64" if arrays.dtype_name(p) == "float64" else "float32"


def _check(p: A, row_offsets: A) -> tuple[A, A]:
    kernels = dispatch.on_device(p.device) if isinstance(p, Tensor) else None
    p = arrays.check(p, "p", FLOATS if kernels is None else DEVICE_FLOATS, (None, None))
    given = row_offsets
    row_offsets = arrays.check(row_offsets, "row_offsets", ("int64",), (None,))
    arrays.same_device(p=p, row_offsets=row_offsets)
    p, row_offsets = arrays.contiguous(p), arrays.contiguous(row_offsets)
    if kernels is None or not isinstance(given, Tensor):
        check_offsets(arrays.as_tensor(row_offsets), p.shape[0])
    elif not checked.known(given, extent=p.shape[0]):  # looking again would mean waiting for the device
        check_offsets(arrays.as_tensor(row_offsets), p.shape[0])
        checked.record(given, extent=p.shape[0])
    return p, row_offsets


def check_offsets(row_offsets: Tensor, n_rows: int) -> None:
    """Refuse offsets that do not divide the rows among the examples.

    Raises:
        ArgumentError: They do not ascend from 0 to the number of rows.
    """
    if len(row_offsets) == 0 or int(row_offsets[0]) != 0 or int(row_offsets[-1]) != n_rows:
        raise ArgumentError(f"row_offsets: expected to ascend from 0 to {n_rows}, the number of rows")
    if bool((row_offsets.diff() < 0).any()):
        raise ArgumentError(f"row_offsets: expected to ascend from 0 to {n_rows}, the number of rows")
