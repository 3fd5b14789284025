"""The rows of per-example factors in any form; rows kept whole, and inner products in place of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from npeff.errors import ArgumentError
from npeff.kernels.streams import to_device
from npeff.short_repr import short_repr
from npeff.storage.files import forget

Array = npt.NDArray[Any]

ROWS_AT_ONCE = 4096
"""Dense rows that are multiplied at a time."""

PART_BYTES = 64 << 20
"""Bytes of stored rows taken at a time, unless fewer are asked for."""


def entries_of(items: Array, offsets: Array) -> tuple[Array, Array]:
    """Find the entries of some items, item by item, where item i owns entries ``offsets[i]:offsets[i+1]``.

    Returns:
        The numbers of the entries, and the offsets of the chosen items among them, int64.
    """
    counts = np.diff(offsets)[items]
    found = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return np.arange(found[-1]) + np.repeat(np.asarray(offsets)[items] - found[:-1], counts), found


@dataclass(frozen=True)
class Matrix:
    """Rows A on a device, for repeated products.

    Attributes:
        project: ``A Gᵀ`` for G ``(r, n_columns)``.
        combine: ``Sᵀ A`` for S ``(n_rows, r)``.
    """

    project: Callable[[Tensor], Tensor]
    combine: Callable[[Tensor], Tensor]


class Rows:
    """Rows ``A (n_rows, n_columns)`` of all examples end to end, whatever form they have.

    A form overrides what it does in its own way. Whatever else is asked of it goes to a part in memory; a form without
    rows refuses to give one, with an ``ArgumentError``.

    Attributes:
        form: The form in a file.
        products_only: The rows were not kept, only their inner products.
    """

    form: ClassVar[str]
    products_only: ClassVar[bool] = False

    if TYPE_CHECKING:  # properties here would be taken for the defaults of a form's dataclass fields

        @property
        def n_rows(self) -> int:
            """Number of rows."""

        @property
        def n_columns(self) -> int:
            """Width of the matrix."""

        @property
        def values(self) -> Array:
            """The stored numbers, float32."""

    @property
    def by_columns(self) -> bool:
        """Whether some columns of all rows can be read without the others."""
        return False

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by the names of their datasets in a file."""
        raise NotImplementedError

    def gram(self, start: int, stop: int) -> Array:
        """Compute the inner products of rows ``start … stop − 1``, float64."""
        return self.part(start, stop).gram(0, stop - start)

    def squared_norms(self) -> Array:
        """Sum the squared entries of each row, ``(n_rows,)`` float64."""
        raise NotImplementedError

    def take(self, rows: Array) -> Rows:
        """Copy the given rows, in the given order."""
        return self.whole().take(rows)

    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute ``K = A Aᵀ``, ``(n_rows, n_rows)``."""
        return self.whole().row_gram(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    def deciding(self) -> list[Array]:
        """Return all arrays that determine the numbers, for a digest."""
        return list(self.arrays().values())

    def fisher_norms(self, row_offsets: Array) -> Array:
        """Compute ``‖A_i A_iᵀ‖_F`` per example, ``(n,)`` float64; A_i are rows ``row_offsets[i]:row_offsets[i+1]``."""
        return np.array([math.sqrt(np.square(self.gram(int(i), int(j))).sum()) for i, j in pairwise(row_offsets)])

    def starts(self, rows: Array) -> Array:
        """Return where the given rows begin among the stored numbers, in rows or in entries; ``n_rows`` is the end."""
        return np.asarray(rows, np.int64)

    def byte_offsets(self, rows: Array) -> Array:
        """Return where the given rows begin in the bytes of all rows; ``n_rows`` is the end."""
        return self.starts(rows) * max(1, 4 * self.n_columns)

    def scaled(self, row_factors: Array | None, column_factors: Array | None) -> Rows:
        """Multiply the rows in memory by a factor for each column, and one for each row; None stands for 1."""
        raise NotImplementedError

    def numbering(self, columns: Array) -> Array:
        """Return what :meth:`renumbered` takes for ``columns``: the same, or each column's number among them."""
        return columns

    def renumbered(self, numbering: Array, n_columns: int) -> Rows:
        """Return the rows in memory on the ``n_columns`` columns of a :meth:`numbering`, from 0 on."""
        raise NotImplementedError

    def column_counts(self, part_bytes: int = PART_BYTES) -> Array | None:
        """Count the entries per column, int64, up to the last column with any; None where every column has all rows."""
        return None

    def parts(self, within: Array | None = None) -> Iterator[tuple[int, int, Rows]]:
        """Yield the first row, the row after the last, and the rows, part by part; rows in memory are one part.

        Args:
            within: Ascending row numbers from 0 to n_rows, at which alone parts begin and end; None: anywhere.
        """
        yield 0, self.n_rows, self

    def whole(self) -> Rows:
        """Return all rows, in memory."""
        return self.part(0, self.n_rows)

    def part(self, start: int, stop: int) -> Rows:
        """Return rows ``start … stop − 1``, in memory; as views where possible."""
        raise NotImplementedError

    def dense(self, start: int, stop: int) -> Array:
        """Copy rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``; absent entries are 0."""
        return self.part(start, stop).dense(0, stop - start)

    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Return row (counted from ``start``), column and value of the nonzero entries of rows ``start … stop − 1``."""
        return self.part(start, stop).nonzero(0, stop - start)

    def on_columns(self, columns: Array) -> Rows:
        """Return the rows on ``columns`` alone, renumbered 0 … len(columns) − 1."""
        rows = self.whole()
        return rows.renumbered(rows.numbering(columns), len(columns))

    def column_sums(self, weights: Array, squared: bool) -> Array:
        """Compute ``Σ_i weights_i a_ij``, or the sum of the squared entries, per column: ``(n_columns,)`` float64."""
        return self.whole().column_sums(weights, squared)

    def project(self, vectors: Tensor) -> Tensor:
        """Compute ``A Gᵀ`` for G ``(r, n_columns)``: ``(n_rows, r)`` in G's dtype, on its device."""
        return self.whole().project(vectors)

    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute ``Sᵀ A`` for S ``(n_rows, r)``: ``(r, n_columns)`` of S's dtype and device, plus ``out`` if given."""
        return self.whole().combine(S, out)

    def add_gram(self, K: Tensor, room: int) -> None:
        """Add the lower triangle of ``A Aᵀ`` to K, on its device, with at most ``room`` bytes there beside the rows."""
        self.whole().add_gram(K, room)

    def on(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        """Move the rows to a device, for repeated products."""
        return self.whole().on(dtype, device)

    def read_columns(self, first: int, last: int) -> Array:
        """Read columns ``first … last − 1`` of all rows, float32; only where :attr:`by_columns` is true."""
        return self.whole().read_columns(first, last)

    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, Rows]]:
        """Yield the first column, the one after the last, and the rows on them, within ``room`` bytes on a device."""
        width = max(1, room // (16 * self.n_rows + per_column + 1))  # as stored, float64, and a copy that is under way
        for first in range(0, self.n_columns, width):
            last = min(first + width, self.n_columns)
            yield first, last, DenseRows(np.ascontiguousarray(self.read_columns(first, last), np.float32))


@dataclass(frozen=True)
class DenseRows(Rows):
    """Rows kept whole.

    Attributes:
        values: ``(n_rows, n_columns)`` float32.
    """

    values: Array

    form: ClassVar[str] = "dense"
    __repr__ = short_repr

    @property
    def by_columns(self) -> bool:
        """True: columns lie in the array."""
        return True

    @classmethod
    def first_of_each(cls, values: Array, counts: Array) -> DenseRows:
        """Take the first ``counts`` (b,) rows of each example of ``(b, R, width)``, end to end; all as a view."""
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

    @override
    def arrays(self) -> dict[str, Array]:
        return {"rows/values": self.values}

    @override
    def dense(self, start: int, stop: int) -> Array:
        return np.array(self.values[start:stop], np.float32)

    @override
    def part(self, start: int, stop: int) -> DenseRows:
        return DenseRows(self.values[start:stop])

    @override
    def gram(self, start: int, stop: int) -> Array:
        block = np.asarray(self.values[start:stop], np.float64)
        return np.asarray(block @ block.T)

    @override
    def take(self, rows: Array) -> DenseRows:
        return DenseRows(np.asarray(self.values[np.asarray(rows, np.int64)]))

    @override
    def squared_norms(self) -> Array:
        blocks = np.array_split(self.values, max(1, self.n_rows // 256))
        return np.concatenate([np.einsum("ij,ij->i", b, b, dtype=np.float64) for b in blocks])

    @override
    def column_sums(self, weights: Array, squared: bool) -> Array:
        sums = np.zeros(self.n_columns)
        for start in range(0, self.n_rows, 256):
            block = np.asarray(self.values[start : start + 256], np.float64)
            forget(self.values)
            sums += weights[start : start + 256] @ (block**2 if squared else block)
        return sums

    @override
    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        block = self.values[start:stop]
        row, index = np.nonzero(block)
        return row, index, block[row, index]

    @override
    def scaled(self, row_factors: Array | None, column_factors: Array | None) -> DenseRows:
        values = self.values if column_factors is None else self.values * column_factors
        return DenseRows(values if row_factors is None else values * row_factors[:, None])

    @override
    def renumbered(self, numbering: Array, n_columns: int) -> DenseRows:
        return DenseRows(self.values[:, numbering])

    def tensor(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """Return the rows as a torch tensor, in shared memory where dtype and device allow it."""
        return to_device(self.values, torch.device(device), dtype)

    @override
    def project(self, vectors: Tensor) -> Tensor:
        parts = [part.tensor(vectors.dtype, vectors.device) @ vectors.T for _, _, part in self._blocks()]
        return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))

    @override
    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        out = S.new_zeros(S.shape[1], self.n_columns) if out is None else out
        for start, stop, part in self._blocks():
            out.addmm_(S[start:stop].T, part.tensor(S.dtype, S.device))
        return out

    def _blocks(self) -> Iterator[tuple[int, int, DenseRows]]:
        for start in range(0, self.n_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, self.n_rows)
            yield start, stop, DenseRows(np.asarray(self.values[start:stop], np.float32))

    @override
    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        K = torch.empty(self.n_rows, self.n_rows, dtype=dtype)
        A = torch.from_numpy(np.ascontiguousarray(self.values))
        edges = range(0, self.n_rows, max(512, -(-self.n_rows // 8)))
        for i in edges:  # only one triangle is computed
            block = A[i : i + edges.step].to(dtype)
            below = A[i:].to(dtype) @ block.T
            K[i:, i : i + edges.step] = below
            K[i : i + edges.step, i:] = below.T
        return K

    @override
    def add_gram(self, K: Tensor, room: int) -> None:
        A, step = self.tensor(K.dtype, K.device), max(512, -(-len(K) // 8))
        for top in range(0, len(K), step):
            bottom = min(top + step, len(K))
            K[top:bottom, :bottom].addmm_(A[top:bottom], A[:bottom].T)

    @override
    def on(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        A = self.tensor(dtype, device)
        return Matrix(lambda vectors: A @ vectors.T, lambda S: S.T @ A)

    @override
    def read_columns(self, first: int, last: int) -> Array:
        return self.values[:, first:last]


@dataclass(frozen=True)
class GramRows(Rows):
    """Rows known by their inner products alone; vectors of the row space have as many coordinates as there are rows.

    Attributes:
        values: ``(n_rows, n_rows)`` float32, K = A Aᵀ.
    """

    values: Array

    form: ClassVar[str] = "gram"
    products_only: ClassVar[bool] = True
    __repr__ = short_repr

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def n_columns(self) -> int:
        """Coordinates of a vector of the row space."""
        return self.n_rows

    @override
    def arrays(self) -> dict[str, Array]:
        return {"rows/gram": self.values}

    @override
    def part(self, start: int, stop: int) -> NoReturn:
        raise ArgumentError("fishers: they keep inner products alone (GramOnly), and this needs their rows")

    @override
    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.array(self.values)).to(dtype)

    @override
    def gram(self, start: int, stop: int) -> Array:
        return np.asarray(self.values[start:stop, start:stop], np.float64)

    @override
    def take(self, rows: Array) -> GramRows:
        rows = np.asarray(rows, np.int64)
        return GramRows(np.asarray(self.values[np.ix_(rows, rows)]))

    @override
    def squared_norms(self) -> Array:
        return np.asarray(np.diagonal(self.values), np.float64)
