"""Compressed sparse rows: their product with a dense matrix, and their transpose."""

from __future__ import annotations

from typing import Any, Generic

import numpy as np
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import A, Operand, accepts_cupy


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
    dense = _check_dense(dense, None)
    dtype = "float64" if arrays.dtype_name(dense) == "float64" else "float32"
    matrix: Csr[A] = Csr(indptr, indices, values, int(dense.shape[0]), dtype)
    return matrix.times(dense)


def _check_dense(dense: A, n_rows: int | None) -> A:
    on_device = isinstance(dense, torch.Tensor) and dispatch.cuda(dense.device) is not None
    dtypes = ("float32", "float64", "float16", "bfloat16") if on_device else ("float32", "float64")
    return arrays.check(dense, "dense", dtypes, (n_rows, None))


class Csr(Generic[A]):
    """A CSR matrix whose contents are checked once, for the many products of a solver.

    Tensors that were written to since are checked again. What numpy arrays hold is checked with every product, since
    numpy does not count writes; a tensor must not be written to through an array that shares its memory.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, each below ``n_columns``; any order within a row.
        values: ``(nnz,)`` of that dtype.
        n_columns: Columns of the matrix.
        dtype: ``"float32"`` or ``"float64"``; None: either.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range.
    """

    def __init__(self, indptr: A, indices: A, values: A, n_columns: int, dtype: str | None = None) -> None:
        given = (indptr, indices)
        dtype = dtype or arrays.dtype_name(arrays.check(values, "values", ("float32", "float64"), (None,)))
        self.indptr: A
        self.indices: A
        self.values: A
        self.indptr, self.indices, self.values = check_csr(indptr, indices, values, dtype)
        self.n_columns = n_columns
        self.device = arrays.same_device(indptr=self.indptr, indices=self.indices, values=self.values)
        self._handle: Any = None
        self._versions: tuple[int, ...] | None = None
        if dispatch.cuda(self.device):
            _check_on_device(given, arrays.as_tensor(self.indptr), arrays.as_tensor(self.indices), n_columns)
        elif not self._native_serves:
            check_structure(arrays.as_tensor(self.indptr), arrays.as_tensor(self.indices), n_columns)
        else:
            self._native()

    @property
    def _native_serves(self) -> bool:
        on_cpu = self.device.type == "cpu"
        return on_cpu and dispatch.native() is not None and arrays.dtype_name(self.values) == "float32"

    def _native(self) -> Any:
        """The native matrix, whose contents are sound."""
        versions = _versions(self.indptr, self.indices)
        if self._handle is None or versions is None or versions != self._versions:
            native = dispatch.native()
            assert native is not None
            self._handle = native.Csr(self.indptr, self.indices, self.values, self.n_columns, dispatch.num_threads())
            self._versions = versions
        return self._handle

    def times(self, dense: A) -> A:
        """``A · dense``, as :func:`spmm`.

        Args:
            dense: ``(n_columns, r)``.

        Returns:
            ``(R, r)``, of the kind of ``dense`` and the dtype of ``values``.

        Raises:
            ArgumentError: Its shape, dtype or device does not fit.
        """
        dense = _check_dense(dense, self.n_columns)
        arrays.same_device(indptr=self.indptr, dense=dense)
        tensors = [arrays.as_tensor(x) for x in (self.indptr, self.indices, self.values)]
        if dispatch.cuda(self.device):
            right = arrays.as_tensor(dense).contiguous()
            return arrays.like(dense, cuda.spmm(tensors[0], tensors[1], tensors[2], right))
        wide = "float64" in {arrays.dtype_name(dense), arrays.dtype_name(self.values)}
        if wide and arrays.dtype_name(dense) != arrays.dtype_name(self.values):
            raise ArgumentError(f"dense: expected {arrays.dtype_name(self.values)}, got {arrays.dtype_name(dense)}")
        if not self._native_serves:
            return arrays.like(dense, reference.spmm(tensors[0], tensors[1], tensors[2], arrays.as_tensor(dense)))
        out = np.empty((len(self.indptr) - 1, dense.shape[1]), np.float32)
        native = dispatch.native()
        assert native is not None
        native.spmm(self._native(), arrays.contiguous(dense), out, dispatch.num_threads())
        return arrays.like(dense, out)


def _versions(*operands: Operand) -> tuple[int, ...] | None:
    """How often each tensor was written to; None where that is not counted."""
    if not all(isinstance(x, torch.Tensor) and not x.is_inference() for x in operands):
        return None
    return tuple(x._version for x in operands if isinstance(x, torch.Tensor))


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
    n_columns = arrays.integer(n_columns, "n_columns", 0, arrays.MOST_COLUMNS)
    given = (indptr, indices)
    values = arrays.check(values, "values", ("float32", "float64"), (None,))
    dtype = arrays.dtype_name(values)
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
    csr = native.Csr(indptr, indices, values, n_columns, dispatch.num_threads())
    starts = np.empty(n_columns + 1, np.int64)
    rows = np.empty(indices.shape[0], arrays.dtype_name(indices))
    turned = np.empty(values.shape[0], np.float32)
    native.csr_transpose(csr, starts, rows, turned, dispatch.num_threads())
    return arrays.like(values, starts), arrays.like(values, rows), arrays.like(values, turned)


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
    indptr, indices, values = check_csr(indptr, indices, values)
    row_offsets = arrays.check(row_offsets, "row_offsets", ("int64",), (None,))
    device = arrays.same_device(indptr=indptr, indices=indices, values=values, row_offsets=row_offsets)
    row_offsets = arrays.contiguous(row_offsets)
    if row_offsets.shape[0] == 0:
        raise ArgumentError("row_offsets: expected at least one entry, got none")
    native = dispatch.native()
    if native is None or device.type != "cpu":
        tensors = [arrays.as_tensor(x) for x in (indptr, indices, values)]
        check_structure(tensors[0], tensors[1], n_columns, ascending=True)
        offsets = arrays.as_tensor(row_offsets)
        check_offsets(offsets, len(tensors[0]) - 1)
        if dispatch.cuda(device):
            return arrays.like(values, cuda.fisher_norms(tensors[0], tensors[1], tensors[2], n_columns, offsets))
        result = reference.fisher_norms(tensors[0], tensors[1], tensors[2], n_columns, offsets)
        return arrays.like(values, result)
    out = np.empty(row_offsets.shape[0] - 1, np.float64)
    csr = native.Csr(indptr, indices, values, n_columns, dispatch.num_threads())
    native.fisher_norms(csr, row_offsets, out, dispatch.num_threads())
    return arrays.like(values, out)


def check_csr(indptr: A, indices: A, values: A, dtype: str = "float32") -> tuple[A, A, A]:
    """The three arrays, C-contiguous, once their dtypes and lengths fit.

    Raises:
        ArgumentError: They do not.
    """
    indptr = arrays.check(indptr, "indptr", ("int64",), (None,))
    indices = arrays.check(indices, "indices", ("int32", "int64"), (None,))
    values = arrays.check(values, "values", (dtype,), (indices.shape[0],))
    arrays.same_device(indptr=indptr, indices=indices, values=values)
    if indptr.shape[0] == 0:
        raise ArgumentError("indptr: expected at least one entry, got none")
    return arrays.contiguous(indptr), arrays.contiguous(indices), arrays.contiguous(values)


def check_structure(indptr: torch.Tensor, indices: torch.Tensor, n_columns: int, *, ascending: bool = False) -> None:
    """What the native kernels check by themselves: indptr ascends, and indices are in range.

    Args:
        indptr: ``(R + 1,)``.
        indices: ``(nnz,)``.
        n_columns: Columns of the matrix.
        ascending: Whether indices must ascend within a row, each once.

    Raises:
        ArgumentError: They are not.
    """
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(indices) or bool((indptr.diff() < 0).any()):
        raise ArgumentError(f"indptr: expected to ascend from 0 to {len(indices)}, the number of indices")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_columns:
        raise ArgumentError(f"indices: expected 0 … {n_columns - 1}, got {int(indices.min())} … {int(indices.max())}")
    if ascending and len(indices) > 1:
        falls = indices[1:] <= indices[:-1]
        begins = indptr[1:-1]
        falls[begins[(begins > 0) & (begins < len(indices))] - 1] = False  # from one row to the next
        if bool(falls.any()):
            row = int(torch.searchsorted(indptr, int(falls.to(torch.uint8).argmax()) + 1, right=True)) - 1
            raise ArgumentError(
                f"indices: expected columns that ascend within a row, each once, but row {row} differs; sort them and "
                "add up what has the same place (scipy: sum_duplicates)"
            )


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
