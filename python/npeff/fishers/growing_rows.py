"""Rows that are added to: what is added is copied once, into memory that stays where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.fishers.rows import Rows, rows_from

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
            # No view is given away before the end, so that the array may move in memory.
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
        """All rows, in order."""
        arrays = {name: array.finish() for name, array in self._arrays.items()}
        if "rows/indptr" in arrays:
            arrays["rows/indptr"] = np.concatenate([[0], np.cumsum(arrays["rows/indptr"])]).astype(np.int64)
        return rows_from(arrays, self._n_columns)


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
