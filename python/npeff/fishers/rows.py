"""The rows of per-example factors: sparse (CSR) after top-k, dense when exact or sketched, or inner products alone.

All forms follow one protocol, :class:`~npeff.fishers.dense_rows.Rows`; :mod:`npeff.fishers.streamed_rows` reads rows
part by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff import kernels
from npeff.fishers.dense_rows import PART_BYTES, DenseRows, GramRows, Rows
from npeff.kernels.sparse import DEVICE_DENSE_BYTES, Csr, add_gram_, check_structure, checked
from npeff.kernels.transfers import to_device
from npeff.models import devices
from npeff.short_repr import short_repr
from npeff.storage.files import forget

__all__ = ["DenseRows", "GramRows", "Kind", "Rows", "SparseRows", "index_dtype", "rows_from"]

Array = npt.NDArray[Any]
Kind = Literal["low_rank", "diagonal"]
"""Which Fishers: rows A with F = AᵀA, or the diagonal."""

SQUARED_AT_ONCE = 1 << 20
"""Entries that are squared in float64 at a time."""

ENTRY_BYTES = 64
"""Device memory that a sparse entry takes while in use: itself, its row, its place in a transpose."""


def index_dtype(n_columns: int) -> np.dtype[Any]:
    """The type of stored column indices: int32 where it suffices, so that it does not depend on the entries."""
    return np.dtype(np.int32 if n_columns <= np.iinfo(np.int32).max else np.int64)


def rows_from(arrays: dict[str, Array], n_columns: int) -> SparseRows | DenseRows | GramRows:
    """The rows that arrays by the names of their datasets make; see :meth:`Rows.arrays`."""
    if "rows/gram" in arrays:
        return GramRows(arrays["rows/gram"])
    if "rows/indptr" in arrays:
        return SparseRows(arrays["rows/indptr"], arrays["rows/indices"], arrays["rows/values"], n_columns)
    return DenseRows(arrays["rows/values"])


@dataclass(frozen=True)
class SparseMatrix:
    """Rows A and their transpose on a device, for products again and again."""

    csr: Csr[Tensor]
    transposed: Csr[Tensor]

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ``."""
        return self.csr.times(vectors.T.contiguous())

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``."""
        return self.transposed.times(S.contiguous()).T


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows.

    Attributes:
        indptr: ``(n_rows + 1,)`` int64; row i holds entries ``indptr[i]:indptr[i+1]``.
        indices: ``(nnz,)`` int32 or int64 column of each entry, ascending within a row.
        values: ``(nnz,)`` float32.
        n_columns: Width of the matrix.
    """

    indptr: Array
    indices: Array
    values: Array
    n_columns: int

    form: ClassVar[str] = "sparse"
    products_only: ClassVar[bool] = False
    by_columns: ClassVar[bool] = False
    """Whether some columns of all rows can be read without the others."""
    __repr__ = short_repr

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.values.nbytes)

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``, absent entries 0."""
        out = np.zeros((stop - start, self.n_columns), np.float32)
        lo, hi = self.indptr[start], self.indptr[stop]
        row = np.repeat(np.arange(stop - start), np.diff(self.indptr[start : stop + 1]))
        out[row, self.indices[lo:hi]] = self.values[lo:hi]
        return out

    def entries(self, rows: Array) -> tuple[Array, Array]:
        """Positions of the entries of ``rows`` in ``values``, and the new ``indptr``."""
        counts = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], counts)
        return positions, indptr

    def take(self, rows: Array) -> SparseRows:
        """The given rows, in the given order, copied."""
        positions, indptr = self.entries(np.asarray(rows, np.int64))
        return SparseRows(indptr, self.indices[positions], self.values[positions], self.n_columns)

    def part(self, start: int, stop: int) -> SparseRows:
        """Rows ``start … stop − 1``; the entries are views."""
        lo, hi = int(self.indptr[start]), int(self.indptr[stop])
        indptr = np.asarray(self.indptr[start : stop + 1]) - lo
        return SparseRows(indptr, self.indices[lo:hi], self.values[lo:hi], self.n_columns)

    def gram(self, start: int, stop: int) -> Array:
        """Inner products of rows ``start … stop − 1``, float64."""
        part = self.part(start, stop)
        present, places = np.unique(part.indices, return_inverse=True)
        block = np.zeros((stop - start, len(present)))
        block[np.repeat(np.arange(stop - start), np.diff(part.indptr)), places] = part.values
        return np.asarray(block @ block.T)

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        out = np.zeros(self.n_rows)
        indptr = np.asarray(self.indptr)
        filled = np.flatnonzero(np.diff(indptr))
        # Row by row: differences of a running total would drown small rows in large ones; and not all rows at once,
        # since squares take twice the bytes of the values.
        cuts = np.searchsorted(indptr[filled], np.arange(0, len(self.values), SQUARED_AT_ONCE))
        for part in np.split(filled, cuts[1:]):
            if len(part):
                start, stop = indptr[part[0]], indptr[part[-1] + 1]
                squares = np.square(self.values[start:stop], dtype=np.float64)
                out[part] = np.add.reduceat(squares, indptr[part] - start)
        return out

    def fisher_norms(self, row_offsets: Array) -> Array:
        """``‖A_i A_iᵀ‖_F`` per example, ``(n,)`` float64."""
        return kernels.fisher_norms(self.indptr, self.indices, self.values, self.n_columns, row_offsets)

    def byte_offsets(self, rows: Array) -> Array:
        """Where the given rows begin in the bytes of all; ``n_rows`` is the end."""
        return self.starts(rows) * (self.values.itemsize + self.indices.itemsize) + 8 * rows

    def starts(self, rows: Array) -> Array:
        """Where the given rows begin among the entries."""
        return np.asarray(self.indptr)[rows].astype(np.int64)

    def arrays(self) -> dict[str, Array]:
        """The arrays by the names of their datasets in a file."""
        return {"rows/indptr": self.indptr, "rows/indices": self.indices, "rows/values": self.values}

    def deciding(self) -> list[Array]:
        """All arrays that decide the numbers, for a digest."""
        return list(self.arrays().values())

    def column_counts(self, part_bytes: int = PART_BYTES) -> Array:
        """Entries per column ``(≤ n_columns,)`` int64, up to the last column that has any; read part by part."""
        counts: Array = np.zeros(0, np.int64)
        step = max(1, part_bytes // (2 * self.indices.itemsize))
        for start in range(0, len(self.indices), step):
            found = np.bincount(self.indices[start : start + step])
            forget(self.indices)
            if len(found) > len(counts):
                counts, found = found, counts
            counts[: len(found)] += found
        return counts

    def column_sums(self, weights: Array, squared: bool) -> Array:
        """``Σ_i weights_i a_ij``, or of the squares of the entries, per column: ``(n_columns,)`` float64."""
        entries = np.asarray(self.values, np.float64)
        entries = (entries**2 if squared else entries) * np.repeat(weights, np.diff(self.indptr))
        return np.bincount(self.indices, entries, minlength=self.n_columns)

    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Row, counted from ``start``, column and value of the entries of rows ``start … stop − 1`` that are not 0."""
        part = self.part(start, stop)
        keep, row = part.values != 0, np.repeat(np.arange(stop - start), np.diff(part.indptr))
        return row[keep], part.indices[keep], part.values[keep]

    def on_columns(self, columns: Array) -> SparseRows:
        """The rows on ``columns`` alone, renumbered 0 … len(columns) − 1."""
        return self.renumbered(self.numbering(columns), len(columns))

    def numbering(self, columns: Array) -> Array:
        """``(n_columns,)`` int32 number of each of ``columns`` among them, −1 of all others."""
        numbers = np.full(self.n_columns, -1, np.int32)
        numbers[columns] = np.arange(len(columns), dtype=np.int32)
        return numbers

    def renumbered(self, numbers: Array, n_columns: int) -> SparseRows:
        """The rows with column c at ``numbers[c]``; columns at −1 are left out."""
        indices = numbers[self.indices]
        if (kept := indices >= 0).all():
            return SparseRows(self.indptr, indices, self.values, n_columns)
        indptr = np.concatenate([[0], np.cumsum(kept)])[self.indptr].astype(np.int64)
        return SparseRows(indptr, indices[kept], self.values[kept], n_columns)

    def scaled(
        self,
        start: int,
        stop: int,
        row_factors: Array | None,
        column_factors: Array | None,
        numbers: Array | None,
        n_columns: int,
    ) -> SparseRows:
        """Rows ``start … stop − 1`` times their factors, on the numbered columns; see :class:`StreamedRows`."""
        part = self.part(start, stop)
        values = part.values if column_factors is None else part.values * column_factors[part.indices]
        if row_factors is not None:
            values = values * np.repeat(row_factors[start:stop], np.diff(part.indptr))
        scaled = SparseRows(part.indptr, part.indices, values, part.n_columns)
        if numbers is not None:
            scaled = scaled.renumbered(numbers, n_columns)
        forget(self.values, self.indices)
        return scaled

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(indptr, indices, values)`` as torch tensors; those on a CUDA device have been checked.

        Raises:
            ArgumentError: An index is out of range.
        """
        device = torch.device(device)
        there = devices.has_own_memory(device)
        if there:
            here = torch.device("cpu")
            check_structure(to_device(self.indptr, here), to_device(self.indices, here), self.n_columns, ascending=True)
        indptr, indices = (to_device(a, device) for a in (self.indptr, self.indices))
        if there:
            checked.record(indptr, indices, extent=self.n_columns)
        return indptr, indices, to_device(self.values, device, dtype)

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ`` for G ``(r, n_columns)``: ``(n_rows, r)`` in G's dtype, on its device."""
        return kernels.spmm(*self.tensors(vectors.dtype, vectors.device), vectors.T.contiguous())

    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        """``Sᵀ A`` for S ``(n_rows, r)``: ``(r, n_columns)`` in S's dtype, on its device, added to ``out`` if given."""
        turned = kernels.csr_transpose(*self.tensors(S.dtype, S.device), self.n_columns)
        product = kernels.spmm(*turned, S.contiguous()).T
        return product.contiguous() if out is None else out.add_(product)

    def on(self, dtype: torch.dtype, device: torch.device) -> SparseMatrix:
        """The rows and their transpose on a device, for products again and again."""
        csr = self.tensors(dtype, device)
        turned = Csr(*kernels.csr_transpose(*csr, self.n_columns), self.n_rows)
        return SparseMatrix(Csr(*csr, self.n_columns), turned)

    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``K = A Aᵀ``, ``(n_rows, n_rows)``."""
        if dtype == torch.float32:
            return kernels.sparse_gram(*self.tensors(), self.n_columns)
        return DenseRows(self.dense(0, self.n_rows)).row_gram(dtype)

    def add_gram(self, K: Tensor, room: int) -> None:
        """Add the lower triangle of ``A Aᵀ`` to K, on its device, with at most ``room`` bytes there beside the rows."""
        if K.dtype == torch.float32:
            add_gram_(K, *self.tensors(K.dtype, K.device), self.n_columns, min(DEVICE_DENSE_BYTES, room))
            return
        present, positions = np.unique(self.indices, return_inverse=True)
        row = np.repeat(np.arange(self.n_rows), np.diff(self.indptr))
        width = max(1, room // (16 * self.n_rows + 1))
        for first in range(0, len(present), width):
            here = (positions >= first) & (positions < first + width)
            block = np.zeros((self.n_rows, min(width, len(present) - first)), np.float32)
            block[row[here], positions[here] - first] = self.values[here]
            DenseRows(block).add_gram(K, room)

    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, SparseRows]]:
        """First column, column after the last, and the rows on them, which take at most ``room`` bytes on a device."""
        counts: Array = np.zeros(self.n_columns, np.int64)
        found = self.column_counts()
        counts[: len(found)] = found
        edges = _edges(ENTRY_BYTES * counts + per_column + 8, room)
        if len(edges) <= 2:
            yield 0, self.n_columns, self
            return
        # Indices ascend within a row: where each stretch begins in it.
        bounds: Array = np.zeros((self.n_rows, len(edges)), np.int64)
        for i, (low, high) in enumerate(pairwise(np.asarray(self.indptr).tolist())):
            bounds[i] = low + np.searchsorted(self.indices[low:high], edges)
        for s, (first, last) in enumerate(pairwise(edges.tolist())):
            lows, highs = bounds[:, s].tolist(), bounds[:, s + 1].tolist()
            indptr = np.concatenate([[0], np.cumsum(bounds[:, s + 1] - bounds[:, s])]).astype(np.int64)
            indices, values = np.empty(indptr[-1], self.indices.dtype), np.empty(indptr[-1], self.values.dtype)
            for at, low, high in zip(indptr.tolist(), lows, highs, strict=False):
                np.subtract(self.indices[low:high], first, out=indices[at : at + high - low], casting="same_kind")
                values[at : at + high - low] = self.values[low:high]
            yield first, last, SparseRows(indptr, indices, values, last - first)


def _edges(costs: Array, room: int) -> Array:
    """Where stretches begin and end that cost at most ``room`` each, or are a single column."""
    total = np.cumsum(costs)
    chosen = [0]
    while chosen[-1] < len(costs):
        before = total[chosen[-1] - 1] if chosen[-1] else 0
        chosen.append(max(chosen[-1] + 1, int(np.searchsorted(total, before + room, "right"))))
    return np.array(chosen)
