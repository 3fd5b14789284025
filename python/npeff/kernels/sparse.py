"""Compressed sparse rows: their product with a dense matrix, and their transpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import A
from npeff.kernels.interop import accepts_cupy


@accepts_cupy
def spmm(indptr: A, indices: A, values: A, dense: A) -> A:
    """``A · dense`` for CSR rows ``A``.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, each below ``n_columns``; any order within a row.
        values: ``(nnz,)`` float32 or float64.
        dense: ``(n_columns, r)``, same dtype; on a CUDA device also float16 or bfloat16, with values and sums float32.

    Returns:
        ``(R, r)``, of the kind of ``dense`` and the dtype of ``values``. The same bits for any number of threads.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range.
    """
    on_device = isinstance(dense, torch.Tensor) and dispatch.cuda(dense.device) is not None
    dtypes = ("float32", "float64", "float16", "bfloat16") if on_device else ("float32", "float64")
    dense = arrays.check(dense, "dense", dtypes, (None, None))
    dtype = "float64" if arrays.dtype_name(dense) == "float64" else "float32"
    given = (indptr, indices)
    indptr, indices, values = check_csr(indptr, indices, values, dtype)
    device = arrays.same_device(indptr=indptr, indices=indices, values=values, dense=dense)
    native = dispatch.native()
    if on_device:
        starts, columns, entries, right = (arrays.as_tensor(x) for x in (indptr, indices, values, dense))
        _check_on_device(given, starts, columns, int(dense.shape[0]))
        return arrays.like(dense, cuda.spmm(starts, columns, entries, right.contiguous()))
    if native is None or device.type != "cpu" or dtype == "float64":
        starts, columns, entries = (arrays.as_tensor(x) for x in (indptr, indices, values))
        check_structure(starts, columns, int(dense.shape[0]))
        return arrays.like(dense, reference.spmm(starts, columns, entries, arrays.as_tensor(dense)))
    out = np.empty((indptr.shape[0] - 1, dense.shape[1]), np.float32)
    native.spmm(indptr, indices, values, arrays.contiguous(dense), out, dispatch.num_threads())
    return arrays.like(dense, out)


@accepts_cupy
def csr_transpose(indptr: A, indices: A, values: A, n_columns: int) -> tuple[A, A, A]:
    """CSR of the transposed matrix, its indices ascending within a row.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, each below ``n_columns``.
        values: ``(nnz,)`` float32 or float64.
        n_columns: Columns of the matrix: rows of the result.

    Returns:
        indptr ``(n_columns + 1,)`` int64, indices ``(nnz,)`` of the dtype of ``indices``, values ``(nnz,)``.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range.
    """
    dtype = "float64" if arrays.dtype_name(values) == "float64" else "float32"
    given = (indptr, indices)
    indptr, indices, values = check_csr(indptr, indices, values, dtype)
    device = arrays.same_device(indptr=indptr, indices=indices, values=values)
    native = dispatch.native()
    if dispatch.cuda(device):
        tensors = [arrays.as_tensor(x) for x in (indptr, indices, values)]
        _check_on_device(given, tensors[0], tensors[1], n_columns)
        result = reference.csr_transpose(tensors[0], tensors[1], tensors[2], n_columns)
        cuda.checked.record(*result[:2], extent=len(tensors[0]) - 1)
        return arrays.like(values, result[0]), arrays.like(values, result[1]), arrays.like(values, result[2])
    if native is None or device.type != "cpu" or dtype == "float64":
        tensors = [arrays.as_tensor(x) for x in (indptr, indices, values)]
        check_structure(tensors[0], tensors[1], n_columns)
        result = reference.csr_transpose(tensors[0], tensors[1], tensors[2], n_columns)
        return arrays.like(values, result[0]), arrays.like(values, result[1]), arrays.like(values, result[2])
    starts = np.empty(n_columns + 1, np.int64)
    rows = np.empty(indices.shape[0], arrays.dtype_name(indices))
    turned = np.empty(values.shape[0], np.float32)
    native.csr_transpose(indptr, indices, values, starts, rows, turned, dispatch.num_threads())
    return arrays.like(values, starts), arrays.like(values, rows), arrays.like(values, turned)


@accepts_cupy
def fisher_norms(indptr: A, indices: A, values: A, n_columns: int, row_offsets: A) -> A:
    """``‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F`` of every example's CSR rows, in float64.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ascending within a row, each below ``n_columns``.
        values: ``(nnz,)`` float32.
        n_columns: Columns of the rows.
        row_offsets: ``(n + 1,)`` int64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``.

    Returns:
        ``(n,)`` float64, of the kind of ``values``.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index or offset is out of range.
    """
    indptr, indices, values = check_csr(indptr, indices, values)
    row_offsets = arrays.contiguous(arrays.check(row_offsets, "row_offsets", ("int64",), (None,)))
    device = arrays.same_device(indptr=indptr, indices=indices, values=values, row_offsets=row_offsets)
    native = dispatch.native()
    if native is None or device.type != "cpu":
        tensors = [arrays.as_tensor(x) for x in (indptr, indices, values)]
        check_structure(tensors[0], tensors[1], n_columns)
        offsets = arrays.as_tensor(row_offsets)
        if dispatch.cuda(device):
            check_offsets(offsets, len(tensors[0]) - 1)
            return arrays.like(values, cuda.fisher_norms(tensors[0], tensors[1], tensors[2], n_columns, offsets))
        result = reference.fisher_norms(tensors[0], tensors[1], tensors[2], n_columns, offsets)
        return arrays.like(values, result)
    out = np.empty(row_offsets.shape[0] - 1, np.float64)
    native.fisher_norms(indptr, indices, values, n_columns, row_offsets, out, dispatch.num_threads())
    return arrays.like(values, out)


def check_csr(indptr: A, indices: A, values: A, dtype: str = "float32") -> tuple[A, A, A]:
    """The three arrays, C-contiguous, once their dtypes and lengths fit.

    Raises:
        ArgumentError: They do not.
    """
    indptr = arrays.contiguous(arrays.check(indptr, "indptr", ("int64",), (None,)))
    indices = arrays.contiguous(arrays.check(indices, "indices", ("int32", "int64"), (None,)))
    values = arrays.contiguous(arrays.check(values, "values", (dtype,), (indices.shape[0],)))
    if indptr.shape[0] == 0:
        raise ArgumentError("indptr: expected at least one entry, got none")
    return indptr, indices, values


def check_structure(indptr: torch.Tensor, indices: torch.Tensor, n_columns: int) -> None:
    """What the native kernels check by themselves: indptr ascends, and indices are in range.

    Raises:
        ArgumentError: They are not.
    """
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
        raise ArgumentError(f"indptr: expected to ascend from 0 to {len(indices)}, the number of indices")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_columns:
        raise ArgumentError(f"indices: expected 0 … {n_columns - 1}, got {int(indices.min())} … {int(indices.max())}")


def check_offsets(row_offsets: torch.Tensor, n_rows: int) -> None:
    """Refuse offsets that do not divide the rows among the examples.

    Raises:
        ArgumentError: They do not ascend from 0 to the number of rows.
    """
    if len(row_offsets) == 0 or int(row_offsets[0]) != 0 or int(row_offsets[-1]) != n_rows:
        raise ArgumentError(f"row_offsets: expected to ascend from 0 to {n_rows}, the number of rows")
    if bool((row_offsets.diff() < 0).any()):
        raise ArgumentError(f"row_offsets: expected to ascend from 0 to {n_rows}, the number of rows")


def _check_on_device(given: tuple[Any, Any], indptr: torch.Tensor, indices: torch.Tensor, n_columns: int) -> None:
    """As check_structure, once per matrix: looking again would mean waiting for the device."""
    if cuda.checked.known(*given, extent=n_columns):
        return
    check_structure(indptr, indices, n_columns)
    cuda.checked.record(*given, extent=n_columns)
