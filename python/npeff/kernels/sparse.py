"""Compressed sparse rows: products, transpose, inner products; sums and norms over the rows of one example."""

from __future__ import annotations

import weakref
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Operand, accepts_cupy

DENSE_BYTES = 1 << 26
"""Bytes of a dense block of columns."""
DENSE_ROWS = 512
"""Rows of K that one dense product computes: products above the diagonal are saved between such strips."""
MIRROR_ROWS = 128
"""Rows of K that are mirrored at a time: few enough that a strip of their columns stays in the cache."""
DEVICE_DENSE_ABOVE = 1 / 8
"""Share of the rows above which a column joins the dense product on a CUDA device, where panels were designed for an
eighth of a dense product's rate (not measured)."""
DEVICE_DENSE_BYTES = 1 << 30
"""Bytes of a dense block of columns on a CUDA device."""
RENAME_ABOVE = 16
"""Columns per entry above which columns are renamed before inner products."""
FLOATS = ("float32", "float64")
DEVICE_FLOATS = (*FLOATS, "float16", "bfloat16")


@accepts_cupy
def spmm(indptr: A, indices: A, values: A, dense: A) -> A:
    """Compute ``A · dense`` for CSR rows ``A``.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, each below ``n_columns``; any order within a row.
        values: ``(nnz,)`` float32 or float64.
        dense: ``(n_columns, r)``, same dtype; on a CUDA device also float16 or bfloat16 where values are float32.

    Returns:
        ``(R, r)``, of the kind of ``dense`` and the dtype of ``values``. The same bits for any number of threads.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range.
    """
    dense = _floats(dense, "dense", None)
    dtype = "float64" if arrays.dtype_name(dense) == "float64" else "float32"
    matrix: Csr[A] = Csr(indptr, indices, values, int(dense.shape[0]), dtype)
    return matrix.times(dense)


def _floats(x: A, name: str, n_rows: int | None, n_columns: int | None = None) -> A:
    """A matrix of floats; those of 16 bits are taken on a device that npeff's kernels serve, as float32."""
    there = isinstance(x, Tensor) and dispatch.cuda(x.device) is not None
    x = arrays.check(x, name, DEVICE_FLOATS if there else FLOATS, (n_rows, n_columns))
    return x.float() if isinstance(x, Tensor) and x.element_size() == 2 else x


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
        ascending: Whether indices must ascend within a row, each once.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range.
    """

    def __init__(
        self, indptr: A, indices: A, values: A, n_columns: int, dtype: str | None = None, *, ascending: bool = False
    ) -> None:
        given: tuple[Any, Any] = (indptr, indices)
        dtype = dtype or arrays.dtype_name(arrays.check(values, "values", ("float32", "float64"), (None,)))
        self.indptr: A
        self.indices: A
        self.values: A
        self.indptr, self.indices, self.values = check_csr(indptr, indices, values, dtype)
        self.n_columns: int = n_columns
        self._handle: Any = None
        self._made: tuple[Any, ...] | None = None
        kernels = dispatch.compiled(self.values)
        if kernels is not None and not kernels.on_device:
            handle = self.compiled(kernels)  # looks at the contents
            if ascending:
                handle.require_ascending()
        elif ascending or kernels is None or not checked.known(*given, extent=n_columns):
            check_structure(*self.tensors()[:2], n_columns, ascending=ascending)
            if kernels is not None:
                checked.record(*given, extent=n_columns)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three arrays as tensors, in shared memory where that can be."""
        return arrays.as_tensor(self.indptr), arrays.as_tensor(self.indices), arrays.as_tensor(self.values)

    def compiled(self, kernels: dispatch.Compiled) -> Any:
        """Return the matrix as the kernels take it; its contents are known to be sound."""
        versions = _versions(self.indptr, self.indices)
        if self._handle is None or versions is None or (kernels.module, versions) != self._made:
            parts = {"indptr": self.indptr, "indices": self.indices, "values": self.values}
            self._handle = kernels("Csr", **parts, n_columns=self.n_columns)
            self._made = (kernels.module, versions)
        return self._handle

    def times(self, dense: A) -> A:
        """Compute ``A · dense``, as :func:`spmm`.

        Args:
            dense: ``(n_columns, r)``.

        Returns:
            ``(R, r)``, of the kind of ``dense`` and the dtype of ``values``.

        Raises:
            ArgumentError: Its shape, dtype or device does not fit.
        """
        dense = _floats(dense, "dense", self.n_columns)
        device = arrays.same_device(indptr=self.indptr, dense=dense)
        kernels = dispatch.compiled(self.values)
        sums = arrays.dtype_name(self.values)
        if (kernels is None or not kernels.on_device) and arrays.dtype_name(dense) != sums:
            raise ArgumentError(f"dense: expected {sums}, got {arrays.dtype_name(dense)}")
        if kernels is None:
            return arrays.like(dense, reference.spmm(*self.tensors(), arrays.as_tensor(dense)))
        out = arrays.empty((len(self.indptr) - 1, dense.shape[1]), sums, device)
        kernels("spmm", a=self.compiled(kernels), dense=arrays.contiguous(dense), out=out)
        return arrays.like(dense, out)


def _versions(*operands: Operand) -> tuple[int, ...] | None:
    """How often each tensor was written to; None where that is not counted."""
    if not all(isinstance(x, Tensor) and not x.is_inference() for x in operands):
        return None
    return tuple(x._version for x in operands if isinstance(x, Tensor))


@accepts_cupy
def csr_transpose(indptr: A, indices: A, values: A, n_columns: int) -> tuple[A, A, A]:
    """Transpose a CSR matrix; the indices of the result ascend within a row.

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
    matrix: Csr[A] = Csr(indptr, indices, values, n_columns)
    kernels = dispatch.compiled(matrix.values)
    if kernels is None or kernels.on_device:
        made = reference.csr_transpose(*matrix.tensors(), n_columns)
        if kernels is not None:
            checked.record(*made[:2], extent=len(matrix.indptr) - 1)
        return arrays.like(values, made[0]), arrays.like(values, made[1]), arrays.like(values, made[2])
    nnz = len(matrix.indices)
    starts, turned = np.empty(n_columns + 1, np.int64), np.empty(nnz, np.float32)
    rows = np.empty(nnz, arrays.dtype_name(matrix.indices))
    kernels("csr_transpose", a=matrix.compiled(kernels), indptr_out=starts, indices_out=rows, values_out=turned)
    return arrays.like(values, starts), arrays.like(values, rows), arrays.like(values, turned)


@accepts_cupy
def sparse_gram(indptr: A, indices: A, values: A, n_columns: int) -> A:
    """Compute ``K = A · Aᵀ`` of CSR rows, dense.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, each below ``n_columns``, ascending within a row, each once.
        values: ``(nnz,)`` float32.
        n_columns: Columns of the matrix.

    Returns:
        ``(R, R)`` float32, exactly symmetric, of the kind of ``values``.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index is out of range or out of order.
    """
    n_columns = arrays.integer(n_columns, "n_columns", 0, arrays.MOST_COLUMNS)
    matrix: Csr[A] = Csr(indptr, indices, values, n_columns, "float32", ascending=True)
    kernels = dispatch.compiled(matrix.values)
    if kernels is None:
        return arrays.like(values, reference.sparse_gram(*matrix.tensors(), n_columns))
    n_rows = len(matrix.indptr) - 1
    k = torch.zeros(n_rows, n_rows, device=arrays.device_of(matrix.values))
    if kernels.on_device:
        add_gram_(k, *matrix.tensors(), n_columns)
    else:
        _add_gram_here(k, matrix, kernels)
    return arrays.like(values, mirror_(k))


def _add_gram_here(k: Tensor, matrix: Csr[Any], kernels: dispatch.Compiled) -> None:
    """The lower triangle of ``k += A·Aᵀ``: natively, but for dense products of the columns that many rows share."""
    if matrix.n_columns > RENAME_ABOVE * (1 + len(matrix.indices)):  # memory for the columns that are there
        columns, indices = np.unique(arrays.on_host(matrix.indices), return_inverse=True)
        matrix = Csr(matrix.indptr, indices.astype(np.int64), matrix.values, len(columns))
    a, names = matrix.compiled(kernels), np.empty(matrix.n_columns, np.int32)
    n_dense = kernels("sparse_gram", a=a, names=names, k=k)
    width = max(64, DENSE_BYTES // (4 * max(1, len(k))))
    for start in range(0, n_dense, width):
        block = torch.empty(len(k), min(width, n_dense - start))
        kernels("to_dense", a=a, names=names, first=start, out=block)
        _add_products(k, block, DENSE_ROWS)


def _add_products(k: Tensor, block: Tensor, strip: int) -> None:
    """The lower triangle of ``k += block·blockᵀ``, and some of the upper one, by strips of rows."""
    for top in range(0, len(k), strip):
        bottom = min(top + strip, len(k))
        k[top:bottom, :bottom].addmm_(block[top:bottom], block[:bottom].T)


def add_gram_(
    k: Tensor, indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int, dense_bytes: int = DEVICE_DENSE_BYTES
) -> None:
    """Add ``A·Aᵀ`` to the lower triangle of ``k`` on a device, for CSR rows known to be sound.

    Use panels, and dense products for the columns that many rows share; use dense products alone where npeff's CUDA
    kernels do not serve the device.
    """
    kernels = dispatch.on_device(k.device)
    if kernels is None:
        k += reference.sparse_gram(indptr, indices, values, n_columns)
        return
    n_rows = len(k)
    columns = indices.long()
    dense = torch.bincount(columns, minlength=n_columns) > DEVICE_DENSE_ABOVE * n_rows
    in_dense = dense[columns]
    kept = torch.cat([indptr.new_zeros(1), (~in_dense).cumsum(0)])[indptr]
    panel = {"indptr": kept, "indices": indices[~in_dense], "values": values[~in_dense]}
    kernels("gram_panel", a=kernels("Csr", **panel, n_columns=n_columns), k=k)
    chosen = torch.nonzero(dense)[:, 0]
    rows = torch.repeat_interleave(torch.arange(n_rows, device=indptr.device), indptr.diff())[in_dense]
    columns, entries = columns[in_dense], values[in_dense]
    width = max(64, dense_bytes // (4 * max(1, n_rows)))
    for start in range(0, len(chosen), width):
        here = chosen[start : start + width]
        place = torch.full((n_columns,), -1, device=indptr.device)
        place[here] = torch.arange(len(here), device=indptr.device)
        at = place[columns]
        inside = at >= 0
        block = values.new_zeros(n_rows, len(here))
        block[rows[inside], at[inside]] = entries[inside]
        _add_products(k, block, max(DENSE_ROWS, -(-n_rows // 8)))


def mirror_(k: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix to the upper one, in place; return the matrix."""
    for top in range(0, len(k), MIRROR_ROWS):
        bottom = min(top + MIRROR_ROWS, len(k))
        k[:top, top:bottom] = k[top:bottom, :top].T
        square = k[top:bottom, top:bottom]
        square.copy_(square.tril() + square.tril(-1).T)
    return k


def check_csr(indptr: A, indices: A, values: A, dtype: str = "float32") -> tuple[A, A, A]:
    """Check the dtypes and lengths of the three arrays, and return the arrays C-contiguous.

    Raises:
        ArgumentError: A dtype or a length does not fit.
    """
    indptr = arrays.check(indptr, "indptr", ("int64",), (None,))
    indices = arrays.check(indices, "indices", ("int32", "int64"), (None,))
    values = arrays.check(values, "values", (dtype,), (indices.shape[0],))
    arrays.same_device(indptr=indptr, indices=indices, values=values)
    if indptr.shape[0] == 0:
        raise ArgumentError("indptr: expected at least one entry, got none")
    return arrays.contiguous(indptr), arrays.contiguous(indices), arrays.contiguous(values)


def check_structure(indptr: Tensor, indices: Tensor, n_columns: int, *, ascending: bool = False) -> None:
    """Check what the native kernels check by themselves: indptr ascends, and indices are in range.

    Args:
        indptr: ``(R + 1,)``.
        indices: ``(nnz,)``.
        n_columns: Columns of the matrix.
        ascending: Whether indices must ascend within a row, each once.

    Raises:
        ArgumentError: indptr does not ascend, or an index is out of range or out of order.
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


class Checked:
    """Remembers which tensors were found sound, so that a matrix used a thousand times is looked at once.

    A tensor counts as the same while it lives and nothing was written to it (torch counts the writes).
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[tuple[weakref.ref[Tensor], int], ...]] = {}

    def known(self, *tensors: Tensor, extent: int) -> bool:
        """Say whether just these tensors were recorded with this extent, and are as they were."""
        found = self._seen.get((extent, *map(id, tensors)))
        return found is not None and all(
            ref() is tensor and version == tensor._version
            for (ref, version), tensor in zip(found, tensors, strict=True)
        )

    def record(self, *tensors: Tensor, extent: int) -> None:
        """Record that the tensors are sound for this extent."""
        self._seen = {key: entry for key, entry in self._seen.items() if all(ref() is not None for ref, _ in entry)}
        key = (extent, *map(id, tensors))
        self._seen[key] = tuple((weakref.ref(t), t._version) for t in tensors)


checked = Checked()
"""The CSR structures and row offsets on devices that were found sound."""


@accepts_cupy
def cross(p: A, row_offsets: A) -> A:
    """Compute ``cross_ij = Σ_{rows of example i} p_row,j²``: ‖A_i g_j‖² from ``P = A·Gᵀ``.

    Args:
        p: ``(R, r)`` float32 or float64; on a CUDA device also float16 or bfloat16, taken as float32.
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
    out = arrays.empty((len(row_offsets) - 1, p.shape[1]), arrays.dtype_name(p), arrays.device_of(p))
    kernels("cross", p=p, row_offsets=row_offsets, out=out)
    return arrays.like(p, out)


@accepts_cupy
def spread_multiply(w: A, p: A, row_offsets: A) -> A:
    """Compute ``S_row,j = w_example(row),j · p_row,j``: W ∘ P, a row of W for every row of its example.

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
    w = _floats(w, "w", len(row_offsets) - 1, int(p.shape[1]))
    if arrays.dtype_name(w) != arrays.dtype_name(p):
        raise ArgumentError(f"w: expected {arrays.dtype_name(p)}, got {arrays.dtype_name(w)}")
    arrays.same_device(w=w, p=p)
    weights, rows, counts = arrays.as_tensor(w), arrays.as_tensor(p), arrays.as_tensor(row_offsets).diff()
    if len(w) and rows.device.type == "cpu" and bool((counts == counts[0]).all()):  # the processor is not waited for
        return arrays.like(p, (weights[:, None] * rows.view(len(w), int(counts[0]), rows.shape[1])).view(rows.shape))
    out = weights.repeat_interleave(counts, dim=0, output_size=len(rows))
    return arrays.like(p, out.mul_(rows))


@accepts_cupy
def fisher_norms(indptr: A, indices: A, values: A, n_columns: int, row_offsets: A) -> A:
    """Compute ``‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F`` of every example's CSR rows, in float64.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ascending within a row, each once and below ``n_columns``.
        values: ``(nnz,)`` float32.
        n_columns: Columns of the rows.
        row_offsets: ``(n + 1,)`` int64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``.

    Returns:
        ``(n,)`` float64, of the kind and device of ``values``; always computed on the processor.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit, or an index or offset is out of range or out of order.
    """
    n_columns = arrays.integer(n_columns, "n_columns", 0, arrays.MOST_INDEX)
    matrix: Csr[A] = Csr(indptr, indices, values, n_columns, "float32", ascending=True)
    row_offsets = arrays.contiguous(arrays.check(row_offsets, "row_offsets", ("int64",), (None,)))
    device = arrays.same_device(indptr=matrix.indptr, row_offsets=row_offsets)
    check_offsets(arrays.as_tensor(row_offsets), len(matrix.indptr) - 1)
    kernels = dispatch.on_host()
    if kernels is None:
        offsets = arrays.as_tensor(row_offsets)
        return arrays.like(values, reference.fisher_norms(*matrix.tensors(), n_columns, offsets))
    here: Csr[Any] = matrix
    if device.type != "cpu":
        starts, columns, entries = (arrays.on_host(x) for x in (matrix.indptr, matrix.indices, matrix.values))
        here = Csr(starts, columns, entries, n_columns)
    out: Any = np.empty(len(row_offsets) - 1)
    kernels("fisher_norms", a=here.compiled(kernels), row_offsets=arrays.on_host(row_offsets), out=out)
    return torch.from_numpy(out).to(device) if isinstance(values, Tensor) else out


def _check(p: A, row_offsets: A) -> tuple[A, A]:
    p, given = _floats(p, "p", None), row_offsets
    row_offsets = arrays.check(row_offsets, "row_offsets", ("int64",), (None,))
    arrays.same_device(p=p, row_offsets=row_offsets)
    p, row_offsets = arrays.contiguous(p), arrays.contiguous(row_offsets)
    if not isinstance(given, Tensor) or dispatch.cuda(given.device) is None:
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
