"""What every example moved: one vector per example and touched row, added up step by step, in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from npeff.short_repr import short_repr
from npeff.storage.files import explain, reserve
from npeff.storage.hdf5 import CHUNK_BYTES, Data

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Moves:
    """The recorded moves of one table's rows: γ[d, w], as rows sorted by example.

    Attributes:
        offsets: ``(n + 1,)`` int64; example d owns entries ``offsets[d]:offsets[d + 1]``.
        rows: ``(R,)`` int64 row of the table, ascending within an example.
        values: ``(R, width)`` float32, γ.
    """

    offsets: Array
    rows: Array
    values: Array

    __repr__ = short_repr

    def of(self, examples: Array) -> tuple[Array, Array, Array]:
        """The entries of some examples.

        Args:
            examples: ``(c,)`` int64.

        Returns:
            For each entry the position in ``examples`` that it belongs to, its row, and γ: ``(e,)``, ``(e,)``,
            ``(e, width)``.
        """
        starts, counts = self.offsets[examples], self.offsets[examples + 1] - self.offsets[examples]
        owner = np.repeat(np.arange(len(examples)), counts)
        firsts = np.cumsum(counts) - counts
        entries = np.arange(len(owner)) - firsts[owner] + starts[owner]
        return owner, self.rows[entries], self.values[entries]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.offsets.nbytes + self.rows.nbytes + self.values.nbytes)


class Accumulator:
    """Adds moves up while a model is trained.

    Args:
        n_examples: Number of training examples.
        n_rows: Rows of the table.
        width: Elements per row.
        folder: Keep the sums in a temporary file there, mapped; by default in memory.
    """

    def __init__(self, n_examples: int, n_rows: int, width: int, folder: Path | None = None) -> None:
        self._n_examples, self._n_rows, self._width = n_examples, n_rows, width
        self._slots: dict[int, int] = {}
        self._folder = folder or Path()
        self._file: IO[bytes] | None = None
        if folder is not None:  # closed by close(): it outlives this function
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".npeff-moves-")  # noqa: SIM115
        self._values = self._allocate(max(64, n_examples))

    def _allocate(self, slots: int) -> Array:
        if self._file is None:
            grown = np.zeros((slots, self._width), np.float32)
            if self._slots:
                grown[: len(self._values)] = self._values
            return grown
        size = 4 * slots * self._width
        try:
            reserve(self._file, size)
        except OSError as error:
            failure = explain(self._folder / "moves", error, "No record was written.")
            raise failure from error
        return np.memmap(self._file, np.float32, "r+", shape=(slots, self._width))

    def _slot(self, key: int) -> int:
        slot = self._slots.setdefault(key, len(self._slots))
        if slot >= len(self._values):
            self._values = self._allocate(2 * len(self._values))
        return slot

    def add(self, example: int, row: int, move: Array) -> None:
        """γ[example, row] += move.

        Args:
            example: d.
            row: w.
            move: ``(width,)``.
        """
        slot = self._slot(example * self._n_rows + row)
        self._values[slot] += move

    def add_rows(self, example: int, rows: Sequence[int], moves: Array) -> None:
        """The same for several different rows: moves ``(len(rows), width)``."""
        first = example * self._n_rows
        slots = [self._slot(first + row) for row in rows]
        self._values[slots] += moves

    def _order(self) -> tuple[Array, Array]:
        keys = np.fromiter(self._slots, np.int64, len(self._slots))
        order = np.argsort(keys)  # the slot of a key is its place in the dictionary
        return keys[order], order

    def finish(self) -> Moves:
        """The sums, in memory."""
        keys, order = self._order()
        offsets = np.searchsorted(keys, np.arange(self._n_examples + 1) * self._n_rows)
        return Moves(offsets.astype(np.int64), keys % self._n_rows, np.asarray(self._values[order]))

    def streams(self, name: str) -> dict[str, Data]:
        """The sums as datasets ``name/offsets``, ``name/rows``, ``name/values``, the last one in pieces."""
        keys, order = self._order()
        offsets = np.searchsorted(keys, np.arange(self._n_examples + 1) * self._n_rows)
        step = max(1, CHUNK_BYTES // (4 * self._width))

        def chunks() -> Iterator[Array]:
            for start in range(0, len(order), step):
                yield np.asarray(self._values[order[start : start + step]])

        shape = (len(order), self._width)
        return {
            f"{name}/offsets": Data.of(f"{name}/offsets", offsets.astype(np.int64)),
            f"{name}/rows": Data.of(f"{name}/rows", keys % self._n_rows),
            f"{name}/values": Data(f"{name}/values", shape, np.dtype("<f4"), chunks),
        }

    def close(self) -> None:
        """Let go of the temporary file."""
        self._values = np.zeros((0, self._width), np.float32)
        if self._file is not None:
            self._file.close()
