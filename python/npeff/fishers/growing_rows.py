"""Rows that are added to: what is added is copied once, into memory that stays where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.fishers.rows import DenseRows, Rows, SparseRows

Array = npt.NDArray[Any]


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
            # The array may move: no view of it exists before the end.
            self._array.resize((max(end, len(self._array) * 9 // 8), *part.shape[1:]), refcheck=False)
        self._array[self._size : end] = part
        self._size = end

    def finish(self) -> Array:
        """The whole, without the room to spare; nothing can be added any more."""
        assert self._array is not None, "something is added first"
        if self._own and self._size < len(self._array):
            self._array.resize((self._size, *self._array.shape[1:]), refcheck=False)
        return self._array


class GrowingRows:
    """Rows of one type and one width, from batch after batch."""

    def __init__(self) -> None:
        self._lengths: list[Array] = []
        self._indices, self._values = GrowingArray(), GrowingArray()
        self._n_columns: int | None = None

    def add(self, rows: Rows) -> None:
        """Add rows, sparse or dense as those before; they are not held any longer than the first ones must be."""
        if isinstance(rows, SparseRows):
            self._n_columns = rows.n_columns
            self._lengths.append(np.diff(rows.indptr))
            self._indices.add(rows.indices)
        assert isinstance(rows, SparseRows | DenseRows)
        self._values.add(rows.values)

    def finish(self) -> Rows:
        """All rows, in order."""
        if self._n_columns is None:
            return DenseRows(self._values.finish())
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))]).astype(np.int64)
        return SparseRows(indptr, self._indices.finish(), self._values.finish(), self._n_columns)


def concatenate(parts: list[Rows]) -> Rows:
    """Stack rows of one type and one width; no part is held for longer than it takes to copy it.

    Args:
        parts: At least one; all sparse or all dense. The list is emptied.

    Returns:
        Rows of the same type, all parts' rows in order.
    """
    whole = GrowingRows()
    parts.reverse()
    while parts:
        whole.add(parts.pop())
    return whole.finish()
