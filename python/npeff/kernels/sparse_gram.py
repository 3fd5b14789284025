"""``K = A·Aᵀ`` of compressed sparse rows.

A column that ``count`` of the R rows share costs ``count²/2`` multiply-adds when its entries are multiplied one
by one, each a scattered access; ``count·R/2`` in vectors, against a dense panel of rows in cache; ``R²/2`` at
the full rate of a dense matrix product. Top-k rows have columns of all sorts, so each column goes the way
that is cheapest for it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import A, Array, accepts_cupy
from npeff.kernels.sparse import check_csr, check_structure

# Rates measured on one core (AVX-512): 0.45 scattered, 13 panel, 55 dense multiply-adds a nanosecond.
SCATTER_BELOW = 1 / 30
"""Share of the rows below which a column's entries are multiplied one by one."""
DENSE_ABOVE = 1 / 3
"""Share of the rows above which a column joins the dense product."""
DENSE_BYTES = 1 << 26
"""Bytes of a dense block of columns."""
DEVICE_DENSE_ABOVE = 1 / 8
"""The same share on a CUDA device: panels were designed for an eighth of a dense product's rate (not measured)."""
DEVICE_DENSE_BYTES = 1 << 30
"""Bytes of a dense block of columns on a CUDA device."""
RENAME_ABOVE = 16
"""Columns per entry above which columns are renamed first."""
DENSE_ROWS = 512
"""Rows of K that one dense product computes: products above the diagonal are saved between such strips."""


@accepts_cupy
def sparse_gram(indptr: A, indices: A, values: A, n_columns: int) -> A:
    """``K = A · Aᵀ`` of CSR rows, dense.

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
    indptr, indices, values = check_csr(indptr, indices, values)
    n_columns = arrays.integer(n_columns, "n_columns", 0, arrays.MOST_COLUMNS)
    device = arrays.same_device(indptr=indptr, indices=indices, values=values)
    native = dispatch.native()
    if native is None or device.type != "cpu":
        tensors = [arrays.as_tensor(x) for x in (indptr, indices, values)]
        check_structure(tensors[0], tensors[1], n_columns, ascending=True)
        if dispatch.cuda(device):
            k = tensors[2].new_zeros(len(tensors[0]) - 1, len(tensors[0]) - 1)
            add_gram_(k, tensors[0], tensors[1], tensors[2], n_columns)
            return arrays.like(values, mirror_(k))
        return arrays.like(values, reference.sparse_gram(tensors[0], tensors[1], tensors[2], n_columns))
    return arrays.like(values, _Gram(native, indptr, indices, values, n_columns).compute())


def add_gram_(
    k: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    n_columns: int,
    dense_bytes: int = DEVICE_DENSE_BYTES,
) -> None:
    """The lower triangle of ``k += A·Aᵀ`` on a device, for CSR rows known to be sound.

    By panels, and by dense products for the columns that many rows share; by dense products alone where npeff's CUDA
    kernels do not serve the device.
    """
    if not dispatch.cuda(k.device):
        k += reference.sparse_gram(indptr, indices, values, n_columns)
        return
    n_rows = len(k)
    columns = indices.long()
    dense = torch.bincount(columns, minlength=n_columns) > DEVICE_DENSE_ABOVE * n_rows
    in_dense = dense[columns]
    kept = torch.cat([indptr.new_zeros(1), (~in_dense).cumsum(0)])[indptr]
    cuda.gram_panel_(kept, indices[~in_dense], values[~in_dense], n_columns, k)
    chosen = torch.nonzero(dense)[:, 0]
    rows = torch.repeat_interleave(torch.arange(n_rows, device=indptr.device), indptr.diff())[in_dense]
    columns, entries = columns[in_dense], values[in_dense]
    width = max(64, dense_bytes // (4 * max(1, n_rows)))
    strip = max(DENSE_ROWS, -(-n_rows // 8))
    for start in range(0, len(chosen), width):
        here = chosen[start : start + width]
        place = torch.full((n_columns,), -1, device=indptr.device)
        place[here] = torch.arange(len(here), device=indptr.device)
        at = place[columns]
        inside = at >= 0
        block = values.new_zeros(n_rows, len(here))
        block[rows[inside], at[inside]] = entries[inside]
        for top in range(0, n_rows, strip):
            bottom = min(top + strip, n_rows)
            k[top:bottom, :bottom].addmm_(block[top:bottom], block[:bottom].T)


def mirror_(k: torch.Tensor) -> torch.Tensor:
    """Copies the lower triangle of a square matrix on a device to the upper one; returns it."""
    if k.dtype == torch.float32 and dispatch.cuda(k.device):
        cuda.mirror_(k)
        return k
    return k.tril_() + k.tril(-1).T


class _Gram:
    """One computation: the rows, and the sums so far (lower triangle)."""

    def __init__(self, native: ModuleType, indptr: Any, indices: Any, values: Any, n_columns: int) -> None:
        self.native = native
        self.threads = dispatch.num_threads()
        self.rows = native.Csr(indptr, indices, values, n_columns, self.threads)
        self.rows.require_ascending()
        if n_columns > RENAME_ABOVE * (1 + len(indices)):  # memory for the columns that are there
            names, indices = np.unique(arrays.on_host(indices), return_inverse=True)
            n_columns = len(names)
            self.rows = native.Csr(indptr, indices.astype(np.int64), values, n_columns, self.threads)
        self.n_rows = int(indptr.shape[0]) - 1
        self.n_columns = n_columns
        self.k = np.zeros((self.n_rows, self.n_rows), np.float32)

    def compute(self) -> Array:
        """K, both triangles."""
        counts = np.empty(self.n_columns, np.int64)
        self.native.column_counts(self.rows, counts, self.threads)
        scatter = (counts > 0) & (counts < 1 + SCATTER_BELOW * self.n_rows)
        dense = (counts > DENSE_ABOVE * self.n_rows) & ~scatter
        panel = (counts > 0) & ~scatter & ~dense
        for chosen, add in ((scatter, self.native.gram_scatter), (panel, self.native.gram_panel)):
            if chosen.any():
                add(self.select(chosen), self.k, self.threads)
        self.add_dense(np.flatnonzero(dense))
        self.native.mirror(self.k, self.threads)
        return self.k

    def select(self, chosen: Array) -> Any:
        """The CSR matrix of the chosen columns ``(n_columns,)`` bool, renamed 0, 1, … in order."""
        names = np.where(chosen, np.cumsum(chosen) - 1, -1).astype(np.int32)
        indptr = np.empty(self.n_rows + 1, np.int64)
        self.native.select_columns_indptr(self.rows, names, indptr, self.threads)
        indices, values = np.empty(int(indptr[-1]), np.int32), np.empty(int(indptr[-1]), np.float32)
        self.native.select_columns(self.rows, names, indptr, indices, values, self.threads)
        return self.native.Csr(indptr, indices, values, int(chosen.sum()), self.threads)

    def add_dense(self, columns: Array) -> None:
        """The given columns, by blocks, as dense matrix products over strips of K."""
        width = max(64, DENSE_BYTES // (4 * max(1, self.n_rows)))
        k = torch.from_numpy(self.k)
        for start in range(0, len(columns), width):
            chosen = np.zeros(self.n_columns, bool)
            chosen[columns[start : start + width]] = True
            block = np.empty((self.n_rows, int(chosen.sum())), np.float32)
            self.native.to_dense(self.select(chosen), block, self.threads)
            rows = torch.from_numpy(block)
            for top in range(0, self.n_rows, DENSE_ROWS):
                bottom = min(top + DENSE_ROWS, self.n_rows)
                k[top:bottom, :bottom].addmm_(rows[top:bottom], rows[:bottom].T)
