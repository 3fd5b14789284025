"""Sparse rows (CSR) from top-k selections, and rows of any form put together from parts.

All forms derive from :class:`~npeff.fishers.dense_rows.Rows`; :mod:`npeff.fishers.scaling` reads rows part by
part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from npeff import kernels
from npeff.fishers.dense_rows import PART_BYTES, Array, DenseRows, GramRows, Matrix, Rows, entries_of
from npeff.kernels.sparse import DEVICE_DENSE_BYTES, Csr, add_gram_, check_structure, checked
from npeff.kernels.streams import to_device
from npeff.models import devices
from npeff.short_repr import short_repr
from npeff.storage.files import forget

__all__ = [
    "Array",
    "DenseRows",
    "GramRows",
    "GrowingRows",
    "Kind",
    "Rows",
    "SparseRows",
    "concatenate",
    "entries_of",
    "index_dtype",
    "rows_from",
]

Kind = Literal["low_rank", "diagonal"]
"""Which Fishers: rows A with F = AᵀA, or the diagonal."""

SQUARED_AT_ONCE = 1 << 20
"""Entries that are squared in float64 at a time."""

ENTRY_BYTES = 64
"""Device memory that a sparse entry takes while in use: itself, its row, its place in a transpose."""


def index_dtype(n_columns: int) -> np.dtype[Any]:
    """Return the dtype of stored column indices: int32 where it suffices, whatever the entries."""
    return np.dtype(np.int32 if n_columns <= np.iinfo(np.int32).max else np.int64)


def rows_from(arrays: dict[str, Array], n_columns: int) -> SparseRows | DenseRows | GramRows:
    """Make rows of arrays by the names of their datasets; see :meth:`Rows.arrays`."""
    if "rows/gram" in arrays:
        return GramRows(arrays["rows/gram"])
    if "rows/indptr" in arrays:
        return SparseRows(arrays["rows/indptr"], arrays["rows/indices"], arrays["rows/values"], n_columns)
    return DenseRows(arrays["rows/values"])


@dataclass(frozen=True)
class SparseRows(Rows):
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
    __repr__ = short_repr

    @classmethod
    def of_entries(cls, row: Array, index: Array, value: Array, n_rows: int, n_columns: int) -> SparseRows:
        """Make rows of entries, row by row: their row, column and value, ``(nnz,)`` each."""
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_rows))]).astype(np.int64)
        return cls(indptr, index, value, n_columns)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @override
    def dense(self, start: int, stop: int) -> Array:
        out = np.zeros((stop - start, self.n_columns), np.float32)
        lo, hi = self.indptr[start], self.indptr[stop]
        row = np.repeat(np.arange(stop - start), np.diff(self.indptr[start : stop + 1]))
        out[row, self.indices[lo:hi]] = self.values[lo:hi]
        return out

    @override
    def take(self, rows: Array) -> SparseRows:
        positions, indptr = entries_of(np.asarray(rows, np.int64), self.indptr)
        return SparseRows(indptr, self.indices[positions], self.values[positions], self.n_columns)

    @override
    def part(self, start: int, stop: int) -> SparseRows:
        lo, hi = int(self.indptr[start]), int(self.indptr[stop])
        indptr = np.asarray(self.indptr[start : stop + 1]) - lo
        return SparseRows(indptr, self.indices[lo:hi], self.values[lo:hi], self.n_columns)

    @override
    def gram(self, start: int, stop: int) -> Array:
        part = self.part(start, stop)
        present, places = np.unique(part.indices, return_inverse=True)
        block = np.zeros((stop - start, len(present)))
        block[np.repeat(np.arange(stop - start), np.diff(part.indptr)), places] = part.values
        return np.asarray(block @ block.T)

    @override
    def squared_norms(self) -> Array:
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

    @override
    def fisher_norms(self, row_offsets: Array) -> Array:
        return kernels.fisher_norms(self.indptr, self.indices, self.values, self.n_columns, row_offsets)

    @override
    def byte_offsets(self, rows: Array) -> Array:
        return self.starts(rows) * (self.values.itemsize + self.indices.itemsize) + 8 * rows

    @override
    def starts(self, rows: Array) -> Array:
        return np.asarray(self.indptr)[rows].astype(np.int64)

    @override
    def arrays(self) -> dict[str, Array]:
        return {"rows/indptr": self.indptr, "rows/indices": self.indices, "rows/values": self.values}

    @override
    def column_counts(self, part_bytes: int = PART_BYTES) -> Array:
        counts: Array = np.zeros(0, np.int64)
        step = max(1, part_bytes // (2 * self.indices.itemsize))
        for start in range(0, len(self.indices), step):
            found = np.bincount(self.indices[start : start + step])
            forget(self.indices)
            if len(found) > len(counts):
                counts, found = found, counts
            counts[: len(found)] += found
        return counts

    @override
    def column_sums(self, weights: Array, squared: bool) -> Array:
        entries = np.asarray(self.values, np.float64)
        entries = (entries**2 if squared else entries) * np.repeat(weights, np.diff(self.indptr))
        return np.bincount(self.indices, entries, minlength=self.n_columns)

    @override
    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        part = self.part(start, stop)
        keep, row = part.values != 0, np.repeat(np.arange(stop - start), np.diff(part.indptr))
        return row[keep], part.indices[keep], part.values[keep]

    @override
    def numbering(self, columns: Array) -> Array:  # (n_columns,) int32; -1 of columns that are left out
        numbers = np.full(self.n_columns, -1, np.int32)
        numbers[columns] = np.arange(len(columns), dtype=np.int32)
        return numbers

    @override
    def renumbered(self, numbering: Array, n_columns: int) -> SparseRows:
        indices = numbering[self.indices]
        if (kept := indices >= 0).all():
            return SparseRows(self.indptr, indices, self.values, n_columns)
        indptr = np.concatenate([[0], np.cumsum(kept)])[self.indptr].astype(np.int64)
        return SparseRows(indptr, indices[kept], self.values[kept], n_columns)

    @override
    def scaled(self, row_factors: Array | None, column_factors: Array | None) -> SparseRows:
        values = self.values if column_factors is None else self.values * column_factors[self.indices]
        if row_factors is not None:
            values = values * np.repeat(row_factors, np.diff(self.indptr))
        return SparseRows(self.indptr, self.indices, values, self.n_columns)

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(indptr, indices, values)`` as torch tensors; those on a CUDA device have been checked.

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

    @override
    def project(self, vectors: Tensor) -> Tensor:
        return kernels.spmm(*self.tensors(vectors.dtype, vectors.device), vectors.T.contiguous())

    @override
    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        turned = kernels.csr_transpose(*self.tensors(S.dtype, S.device), self.n_columns)
        product = kernels.spmm(*turned, S.contiguous()).T
        return product.contiguous() if out is None else out.add_(product)

    @override
    def on(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        csr = self.tensors(dtype, device)
        rows, turned = Csr(*csr, self.n_columns), Csr(*kernels.csr_transpose(*csr, self.n_columns), self.n_rows)
        return Matrix(lambda vectors: rows.times(vectors.T.contiguous()), lambda S: turned.times(S.contiguous()).T)

    @override
    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.float32:
            return kernels.sparse_gram(*self.tensors(), self.n_columns)
        return DenseRows(self.dense(0, self.n_rows)).row_gram(dtype)

    @override
    def add_gram(self, K: Tensor, room: int) -> None:
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

    @override
    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, SparseRows]]:
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


class GrowingArray:
    """An array to whose end others are added.

    It has room to spare, an eighth at most, so that its memory is seldom enlarged; then, where the system can, by
    remapping pages. In place of a list of parts and their concatenation, fresh memory is touched once and not twice.
    """

    def __init__(self) -> None:
        self._array: Array | None = None
        self._size, self._own = 0, False

    def add(self, part: Array) -> None:
        """Add the part, along the first axis; the very first is kept as it is until another one comes."""
        if self._array is None:
            self._array, self._size = part, len(part)
            return
        end = self._size + len(part)
        dtype = np.result_type(self._array, part)
        if not self._own or dtype != self._array.dtype:
            self._array, self._own = np.array(self._array[: self._size], dtype, order="C"), True
        if end > len(self._array):
            # No view is given away before the end, so that the array may move in memory.
            self._array.resize((max(end, len(self._array) * 9 // 8), *part.shape[1:]), refcheck=False)
        self._array[self._size : end] = part
        self._size = end

    def finish(self) -> Array:
        """Return the whole array without room to spare; nothing can be added afterwards."""
        assert self._array is not None, "something is added first"
        if self._own and self._size < len(self._array):
            self._array.resize((self._size, *self._array.shape[1:]), refcheck=False)
        return self._array


class GrowingRows:
    """Rows of one form and one width, from batch after batch."""

    def __init__(self) -> None:
        self._arrays: dict[str, GrowingArray] = {}
        self._n_columns = 0

    def add(self, rows: Rows) -> None:
        """Add rows, of the form of those before; they are not held any longer than the first ones must be."""
        self._n_columns = rows.n_columns
        for name, array in rows.arrays().items():
            own = np.diff(array) if name == "rows/indptr" else array
            self._arrays.setdefault(name, GrowingArray()).add(own)

    def finish(self) -> Rows:
        """Return all rows, in order."""
        arrays = {name: array.finish() for name, array in self._arrays.items()}
        if "rows/indptr" in arrays:
            arrays["rows/indptr"] = np.concatenate([[0], np.cumsum(arrays["rows/indptr"])]).astype(np.int64)
        return rows_from(arrays, self._n_columns)


def concatenate(parts: list[Rows]) -> Rows:
    """Stack at least one part, of one type and one width; the list is emptied, so that parts are freed early."""
    whole = GrowingRows()
    parts.reverse()
    while parts:
        whole.add(parts.pop())
    return whole.finish()
