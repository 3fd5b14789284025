"""The rows of per-example factors: CSR after top-k, dense when exact or sketched; or their inner products alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Kind = Literal["low_rank", "diagonal"]
"""Which Fishers: rows A with F = AᵀA, or the diagonal."""

SQUARED_AT_ONCE = 1 << 20
"""Entries that are squared in float64 at a time."""


def index_dtype(n_columns: int) -> np.dtype[Any]:
    """The type of stored column indices: int32 where it suffices, so that it does not depend on the entries."""
    return np.dtype(np.int32 if n_columns <= np.iinfo(np.int32).max else np.int64)


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


@dataclass(frozen=True)
class DenseRows:
    """Rows kept whole.

    Attributes:
        values: ``(n_rows, n_columns)`` float32.
    """

    values: Array

    __repr__ = short_repr

    @classmethod
    def first_of_each(cls, values: Array, counts: Array) -> DenseRows:
        """Of ``(b, R, width)`` the first ``counts`` (b,) rows of each example, end to end; a view where that is all."""
        keep = np.less(np.arange(values.shape[1]), counts[:, None])
        flat = values.reshape(-1, values.shape[2])
        return cls(flat if keep.all() else flat[keep.reshape(-1)])

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def n_columns(self) -> int:
        """Width of the matrix."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(self.values.nbytes)

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``, copied."""
        return np.array(self.values[start:stop], np.float32)

    def part(self, start: int, stop: int) -> DenseRows:
        """Rows ``start … stop − 1``, a view."""
        return DenseRows(self.values[start:stop])

    def gram(self, start: int, stop: int) -> Array:
        """Inner products of rows ``start … stop − 1``, float64."""
        block = np.asarray(self.values[start:stop], np.float64)
        return np.asarray(block @ block.T)

    def take(self, rows: Array) -> DenseRows:
        """The given rows, in the given order, copied."""
        return DenseRows(np.asarray(self.values[np.asarray(rows, np.int64)]))

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        norms = [
            np.einsum("ij,ij->i", b, b, dtype=np.float64)
            for b in np.array_split(self.values, max(1, self.n_rows // 256))
        ]
        return np.concatenate(norms) if norms else np.zeros(0)


@dataclass(frozen=True)
class GramRows:
    """Rows known by their inner products alone.

    Attributes:
        values: ``(n_rows, n_rows)`` float32, K = A Aᵀ.
    """

    values: Array

    __repr__ = short_repr

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def n_columns(self) -> int:
        """Numbers that place a vector of the row space: as many as there are rows."""
        return self.n_rows

    @property
    def nbytes(self) -> int:
        """Bytes of K."""
        return int(self.values.nbytes)

    def dense(self, start: int, stop: int) -> Array:
        """There are none.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError("fishers: they keep inner products alone (GramOnly), and this needs their rows")

    def gram(self, start: int, stop: int) -> Array:
        """Inner products of rows ``start … stop − 1``, float64."""
        return np.asarray(self.values[start:stop, start:stop], np.float64)

    def take(self, rows: Array) -> GramRows:
        """The given rows, in the given order, copied."""
        rows = np.asarray(rows, np.int64)
        return GramRows(np.asarray(self.values[np.ix_(rows, rows)]))

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        return np.asarray(np.diagonal(self.values), np.float64)


Rows = SparseRows | DenseRows | GramRows
