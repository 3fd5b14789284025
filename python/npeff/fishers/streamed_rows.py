"""Stored rows as they are factorised, scaled piece by piece while they are read: never copied as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.fishers.rows import DenseRows, SparseRows
from npeff.storage.files import forget

Array = npt.NDArray[Any]

PART_BYTES = 64 << 20
"""Bytes of stored rows taken at a time where nobody asks for less."""

DEVICE_PART_BYTES = 1 << 30
"""Bytes of a CUDA device's memory that rows take there at a time where nobody asks for less."""


@dataclass(frozen=True)
class StreamedRows:
    """``A_stored · diag(column factors)[:, columns] · row factors``, made part by part.

    Attributes:
        stored: The rows as stored, usually mapped from a file.
        row_factors: ``(n_rows,)`` float32, or None for 1.
        column_factors: ``(stored columns,)`` float32, or None for 1.
        columns: ``(n_columns,)`` int64 stored columns that are kept, ascending; None: all.
        part_bytes: Bytes of stored rows that a pass takes at a time.
    """

    stored: SparseRows | DenseRows
    row_factors: Array | None = None
    column_factors: Array | None = None
    columns: Array | None = None
    part_bytes: int = PART_BYTES

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.stored.n_rows

    @property
    def n_columns(self) -> int:
        """Width of the matrix."""
        return self.stored.n_columns if self.columns is None else len(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        return self.stored.nbytes

    @property
    def values(self) -> Array:
        """The stored values, unscaled."""
        return self.stored.values

    @cached_property
    def _places(self) -> Array:
        """``(stored columns,)`` int32: where each column went, −1 where it was dropped."""
        assert self.columns is not None
        places = np.full(self.stored.n_columns, -1, np.int32)
        places[self.columns] = np.arange(len(self.columns), dtype=np.int32)
        return places

    def part(self, start: int, stop: int) -> SparseRows | DenseRows:
        """Rows ``start … stop − 1``, scaled, in memory."""
        factors = None if self.row_factors is None else self.row_factors[start:stop]
        if isinstance(self.stored, DenseRows):
            values = self.stored.values[start:stop]
            if self.column_factors is not None:
                values = values * self.column_factors
            if factors is not None:
                values = values * factors[:, None]
            forget(self.stored.values)
            return DenseRows(values if self.columns is None else values[:, self.columns])
        part = self.stored.part(start, stop)
        values = part.values if self.column_factors is None else part.values * self.column_factors[part.indices]
        if factors is not None:
            values = values * np.repeat(factors, np.diff(part.indptr))
        scaled = SparseRows(part.indptr, part.indices, values, part.n_columns)
        if self.columns is not None:
            scaled = _renamed(scaled, self._places, len(self.columns))
        forget(self.stored.values, self.stored.indices)
        return scaled

    def stretch(self, first: int, last: int) -> Array:
        """Columns ``first … last − 1`` of all rows, scaled, float32; dense rows only."""
        assert isinstance(self.stored, DenseRows)
        wanted: Any = slice(first, last) if self.columns is None else self.columns[first:last]
        values = np.array(self.stored.values[:, wanted], np.float32)
        forget(self.stored.values)
        if self.column_factors is not None:
            values *= self.column_factors[wanted]
        if self.row_factors is not None:
            values *= self.row_factors[:, None]
        return values

    def whole(self) -> SparseRows | DenseRows:
        """All rows, in memory."""
        return self.part(0, self.n_rows)

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``."""
        return self.part(start, stop).dense(0, stop - start)

    def gram(self, start: int, stop: int) -> Array:
        """Inner products of rows ``start … stop − 1``, float64."""
        return self.part(start, stop).gram(0, stop - start)

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        norms = [part.squared_norms() for _, _, part in self.parts()]
        return np.concatenate(norms) if norms else np.zeros(0)

    def edges(self, within: Array | None = None) -> Array:
        """Where parts of about ``part_bytes`` begin and end.

        Args:
            within: Ascending row numbers from 0 to n_rows of which edges are chosen; None: any row may be one.
        """
        if within is None and isinstance(self.stored, DenseRows):
            step = max(1, self.part_bytes // max(1, 4 * self.stored.n_columns))
            return np.append(np.arange(0, self.n_rows, step), self.n_rows)
        rows = np.arange(self.n_rows + 1) if within is None else np.asarray(within)
        if isinstance(self.stored, DenseRows):
            at = rows.astype(np.int64) * max(1, 4 * self.stored.n_columns)
        else:
            entry = self.stored.values.itemsize + self.stored.indices.itemsize
            at = np.asarray(self.stored.indptr)[rows].astype(np.int64) * entry + 8 * rows
        chosen = [0]
        while chosen[-1] < len(rows) - 1:
            last = chosen[-1]
            beyond = int(np.searchsorted(at, at[last] + self.part_bytes, "right")) - 1
            chosen.append(min(len(rows) - 1, max(last + 1, beyond)))
        return rows[chosen]

    def parts(self, within: Array | None = None) -> Iterator[tuple[int, int, SparseRows | DenseRows]]:
        """First row, row after the last, and the rows, part by part; see :meth:`edges`."""
        edges = self.edges(within)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if stop > start:
                yield start, stop, self.part(start, stop)


def column_counts(rows: SparseRows, part_bytes: int = PART_BYTES) -> Array:
    """Entries per column ``(≤ n_columns,)`` int64, up to the last column that has any, part by part."""
    counts: Array = np.zeros(0, np.int64)
    step = max(1, part_bytes // (2 * rows.indices.itemsize))
    for start in range(0, len(rows.indices), step):
        found = np.bincount(rows.indices[start : start + step])
        forget(rows.indices)
        if len(found) > len(counts):
            counts, found = found, counts
        counts[: len(found)] += found
    return counts


def keep_columns(rows: SparseRows, columns: Array) -> SparseRows:
    """The rows on ``columns`` alone, renumbered 0 … len(columns) − 1."""
    places = np.full(rows.n_columns, -1, np.int32)
    places[columns] = np.arange(len(columns), dtype=np.int32)
    return _renamed(rows, places, len(columns))


def _renamed(rows: SparseRows, places: Array, n_columns: int) -> SparseRows:
    indices = places[rows.indices]
    if (kept := indices >= 0).all():
        return SparseRows(rows.indptr, indices, rows.values, n_columns)
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr].astype(np.int64)
    return SparseRows(indptr, indices[kept], rows.values[kept], n_columns)
