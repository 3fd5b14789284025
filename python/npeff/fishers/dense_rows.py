"""The protocol of rows of per-example factors; rows kept whole, and inner products in place of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.kernels.transfers import to_device
from npeff.short_repr import short_repr
from npeff.storage.files import forget

Array = npt.NDArray[Any]

ROWS_AT_ONCE = 4096
"""Dense rows that are multiplied at a time."""

PART_BYTES = 64 << 20
"""Bytes of stored rows taken at a time, unless fewer are asked for."""


class Matrix(Protocol):
    """Rows A on a device."""

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ`` for G ``(r, n_columns)``."""

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A`` for S ``(n_rows, r)``."""


class Rows(Protocol):
    """Rows ``A (n_rows, n_columns)`` of all examples end to end, whatever form they have.

    Attributes:
        form: The form in a file.
        products_only: The rows were not kept, only their inner products.
    """

    form: ClassVar[str]
    products_only: ClassVar[bool]

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    @property
    def n_columns(self) -> int:
        """Width of the matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""

    @property
    def values(self) -> Array:
        """The stored numbers, float32."""

    def arrays(self) -> dict[str, Array]:
        """The arrays by the names of their datasets in a file."""

    def deciding(self) -> list[Array]:
        """All arrays that decide the numbers, for a digest."""

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start … stop − 1``; views where that can be."""

    def take(self, rows: Array) -> Rows:
        """The given rows, in the given order, copied."""

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``, copied."""

    def gram(self, start: int, stop: int) -> Array:
        """Inner products of rows ``start … stop − 1``, float64."""

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""

    def fisher_norms(self, row_offsets: Array) -> Array:
        """``‖A_i A_iᵀ‖_F`` per example, ``(n,)`` float64; example i owns rows ``row_offsets[i]:row_offsets[i+1]``."""

    def starts(self, rows: Array) -> Array:
        """Where the given rows begin among the stored numbers, in rows or in entries; ``n_rows`` is the end."""

    def column_counts(self, part_bytes: int = PART_BYTES) -> Array | None:
        """Entries per column, int64, up to the last column that has any; None where every column has all rows."""

    def column_sums(self, weights: Array, squared: bool) -> Array:
        """``Σ_i weights_i a_ij``, or of the squares of the entries, per column: ``(n_columns,)`` float64."""

    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Row, counted from ``start``, column and value of the entries of rows ``start … stop − 1`` that are not 0."""

    def on_columns(self, columns: Array) -> Rows:
        """The rows on ``columns`` alone, renumbered 0 … len(columns) − 1."""

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ`` for G ``(r, n_columns)``: ``(n_rows, r)`` in G's dtype."""

    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        """``Sᵀ A`` for S ``(n_rows, r)``: ``(r, n_columns)`` in S's dtype, added to ``out`` where that is given."""

    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``K = A Aᵀ``, ``(n_rows, n_rows)``."""

    def add_gram(self, K: Tensor, room: int) -> None:
        """Add the lower triangle of ``A Aᵀ`` to K, on its device, with at most ``room`` bytes there beside the rows."""

    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, Rows]]:
        """First column, column after the last, and the rows on them, which take at most ``room`` bytes on a device."""

    def on(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        """The rows on a device, for products again and again."""


@dataclass(frozen=True)
class DenseMatrix:
    """Rows A on a device, for products again and again."""

    A: Tensor

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ``."""
        return self.A @ vectors.T

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``."""
        return S.T @ self.A


@dataclass(frozen=True)
class DenseRows:
    """Rows kept whole.

    Attributes:
        values: ``(n_rows, n_columns)`` float32.
    """

    values: Array

    form: ClassVar[str] = "dense"
    products_only: ClassVar[bool] = False
    by_columns: ClassVar[bool] = True
    """Whether some columns of all rows can be read without the others."""
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

    def fisher_norms(self, row_offsets: Array) -> Array:
        """``‖A_i A_iᵀ‖_F`` per example, ``(n,)`` float64."""
        return _norms_of_blocks(self, row_offsets)

    def byte_offsets(self, rows: Array) -> Array:
        """Where the given rows begin in the bytes of all; ``n_rows`` is the end."""
        return self.starts(rows) * max(1, 4 * self.n_columns)

    def starts(self, rows: Array) -> Array:
        """Where the given rows begin among the rows."""
        return np.asarray(rows, np.int64)

    def arrays(self) -> dict[str, Array]:
        """The arrays by the names of their datasets in a file."""
        return {"rows/values": self.values}

    def deciding(self) -> list[Array]:
        """All arrays that decide the numbers, for a digest."""
        return list(self.arrays().values())

    def column_counts(self, part_bytes: int = PART_BYTES) -> None:
        """None: every column has all rows."""

    def column_sums(self, weights: Array, squared: bool) -> Array:
        """``Σ_i weights_i a_ij``, or of the squares of the entries, per column: ``(n_columns,)`` float64."""
        sums = np.zeros(self.n_columns)
        for start in range(0, self.n_rows, 256):
            block = np.asarray(self.values[start : start + 256], np.float64)
            forget(self.values)
            sums += weights[start : start + 256] @ (block**2 if squared else block)
        return sums

    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Row, counted from ``start``, column and value of the entries of rows ``start … stop − 1`` that are not 0."""
        block = self.values[start:stop]
        row, index = np.nonzero(block)
        return row, index, block[row, index]

    def on_columns(self, columns: Array) -> DenseRows:
        """The rows on ``columns`` alone."""
        return DenseRows(self.values[:, columns])

    def numbering(self, columns: Array) -> Array:
        """The columns."""
        return columns

    def scaled(
        self,
        start: int,
        stop: int,
        row_factors: Array | None,
        column_factors: Array | None,
        columns: Array | None,
        n_columns: int,
    ) -> DenseRows:
        """Rows ``start … stop − 1`` times their factors, on the given columns; see :class:`StreamedRows`."""
        values = self.values[start:stop]
        if column_factors is not None:
            values = values * column_factors
        if row_factors is not None:
            values = values * row_factors[start:stop, None]
        forget(self.values)
        return DenseRows(values if columns is None else values[:, columns])

    def tensor(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """The rows as a torch tensor; shared memory where dtype and device allow it."""
        return to_device(self.values, torch.device(device), dtype)

    def project(self, vectors: Tensor) -> Tensor:
        """``A Gᵀ`` for G ``(r, n_columns)``: ``(n_rows, r)`` in G's dtype, on its device."""
        parts = [part.tensor(vectors.dtype, vectors.device) @ vectors.T for _, _, part in self._parts()]
        return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))

    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        """``Sᵀ A`` for S ``(n_rows, r)``: ``(r, n_columns)`` in S's dtype, on its device, added to ``out`` if given."""
        out = S.new_zeros(S.shape[1], self.n_columns) if out is None else out
        for start, stop, part in self._parts():
            out.addmm_(S[start:stop].T, part.tensor(S.dtype, S.device))
        return out

    def _parts(self) -> Iterator[tuple[int, int, DenseRows]]:
        for start in range(0, self.n_rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, self.n_rows)
            yield start, stop, DenseRows(np.asarray(self.values[start:stop], np.float32))

    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``K = A Aᵀ``, ``(n_rows, n_rows)``; only one triangle is computed."""
        K = torch.empty(self.n_rows, self.n_rows, dtype=dtype)
        A = torch.from_numpy(np.ascontiguousarray(self.values))
        edges = range(0, self.n_rows, max(512, -(-self.n_rows // 8)))
        for i in edges:
            block = A[i : i + edges.step].to(dtype)
            below = A[i:].to(dtype) @ block.T
            K[i:, i : i + edges.step] = below
            K[i : i + edges.step, i:] = below.T
        return K

    def add_gram(self, K: Tensor, room: int) -> None:
        """Add the lower triangle of ``A Aᵀ`` to K, on its device, by eight strips."""
        A, step = self.tensor(K.dtype, K.device), max(512, -(-len(K) // 8))
        for top in range(0, len(K), step):
            bottom = min(top + step, len(K))
            K[top:bottom, :bottom].addmm_(A[top:bottom], A[:bottom].T)

    def on(self, dtype: torch.dtype, device: torch.device) -> DenseMatrix:
        """The rows on a device, for products again and again."""
        return DenseMatrix(self.tensor(dtype, device))

    def read_columns(self, first: int, last: int) -> Array:
        """Columns ``first … last − 1`` of all rows, float32."""
        return self.values[:, first:last]

    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, DenseRows]]:
        """First column, column after the last, and the rows on them, which take at most ``room`` bytes on a device."""
        return dense_stretches(self, room, per_column)


@dataclass(frozen=True)
class GramRows:
    """Rows known by their inner products alone.

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
        """Coordinates of a vector of the row space: as many as there are rows."""
        return self.n_rows

    @property
    def nbytes(self) -> int:
        """Bytes of K."""
        return int(self.values.nbytes)

    def arrays(self) -> dict[str, Array]:
        """The arrays by the names of their datasets in a file."""
        return {"rows/gram": self.values}

    def part(self, start: int, stop: int) -> Rows:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def dense(self, start: int, stop: int) -> Array:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def nonzero(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def on_columns(self, columns: Array) -> Rows:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def column_sums(self, weights: Array, squared: bool) -> Array:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def project(self, vectors: Tensor) -> Tensor:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def add_gram(self, K: Tensor, room: int) -> None:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, Rows]]:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def on(self, dtype: torch.dtype, device: torch.device) -> Matrix:
        """Refuse: there are no rows.

        Raises:
            ArgumentError: Always.
        """
        raise ArgumentError(_NO_ROWS)

    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """K, copied."""
        return torch.from_numpy(np.array(self.values)).to(dtype)

    def fisher_norms(self, row_offsets: Array) -> Array:
        """``‖A_i A_iᵀ‖_F`` per example, ``(n,)`` float64."""
        return _norms_of_blocks(self, row_offsets)

    def starts(self, rows: Array) -> Array:
        """Where the given rows begin among the rows."""
        return np.asarray(rows, np.int64)

    def deciding(self) -> list[Array]:
        """All arrays that decide the numbers, for a digest."""
        return list(self.arrays().values())

    def column_counts(self, part_bytes: int = PART_BYTES) -> None:
        """None: every column has all rows."""

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


_NO_ROWS = "fishers: they keep inner products alone (GramOnly), and this needs their rows"


def _norms_of_blocks(rows: DenseRows | GramRows, row_offsets: Array) -> Array:
    return np.array([math.sqrt(np.square(rows.gram(int(i), int(j))).sum()) for i, j in pairwise(row_offsets)])


class _Columns(Protocol):
    @property
    def n_rows(self) -> int: ...

    @property
    def n_columns(self) -> int: ...

    def read_columns(self, first: int, last: int) -> Array: ...


def dense_stretches(rows: _Columns, room: int, per_column: int) -> Iterator[tuple[int, int, DenseRows]]:
    """First column, column after the last, and the rows on them, which take at most ``room`` bytes on a device."""
    width = max(1, room // (16 * rows.n_rows + per_column + 1))  # as stored, float64, and a copy that is under way
    for first in range(0, rows.n_columns, width):
        last = min(first + width, rows.n_columns)
        yield first, last, DenseRows(np.ascontiguousarray(rows.read_columns(first, last), np.float32))
