"""Stored rows as they are factorised: scaled piece by piece while they are read, never copied as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from npeff.fishers.dense_rows import PART_BYTES, Rows
from npeff.kernels.sparse import mirror_
from npeff.kernels.transfers import to_device
from npeff.storage.files import forget

Array = npt.NDArray[Any]
T = TypeVar("T")

DEVICE_PART_BYTES = 1 << 30
"""Bytes of a CUDA device's memory that rows take there at a time, unless fewer are asked for."""


@dataclass(frozen=True)
class StreamedRows(Rows):
    """``A_stored · diag(column factors)[:, columns] · row factors``, made part by part.

    Attributes:
        stored: The rows as stored, usually mapped from a file.
        row_factors: ``(n_rows,)`` float32, or None for 1.
        column_factors: ``(stored columns,)`` float32, or None for 1.
        columns: ``(n_columns,)`` int64 stored columns that are kept, ascending; None: all.
        part_bytes: Bytes of stored rows that a pass takes at a time.
    """

    form: ClassVar[str] = "streamed"

    stored: Rows
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
    def values(self) -> Array:
        """The stored values, unscaled."""
        return self.stored.values

    @property
    def by_columns(self) -> bool:
        """Whether the stored rows can be read by columns."""
        return self.stored.by_columns

    @override
    def arrays(self) -> dict[str, Array]:  # unscaled
        return self.stored.arrays()

    @override
    def part(self, start: int, stop: int) -> Rows:
        factors = (self.row_factors, self.column_factors)
        return self.stored.scaled(start, stop, *factors, self._numbering, self.n_columns)

    @cached_property
    def _numbering(self) -> Array | None:
        return None if self.columns is None else self.stored.numbering(self.columns)

    @override
    def read_columns(self, first: int, last: int) -> Array:
        wanted: Any = slice(first, last) if self.columns is None else self.columns[first:last]
        values = np.array(self.stored.values[:, wanted], np.float32)
        forget(self.stored.values)
        if self.column_factors is not None:
            values *= self.column_factors[wanted]
        if self.row_factors is not None:
            values *= self.row_factors[:, None]
        return values

    @override
    def squared_norms(self) -> Array:
        norms = [part.squared_norms() for _, _, part in self.parts()]
        return np.concatenate(norms) if norms else np.zeros(0)

    @override
    def fisher_norms(self, row_offsets: Array) -> Array:
        out = np.zeros(len(row_offsets) - 1)
        for start, stop, part in self.parts(row_offsets):
            examples = slice(*np.searchsorted(row_offsets, (start, stop), "left"))
            if examples.stop < len(out) and stop == self.n_rows:
                examples = slice(examples.start, len(out))  # examples without rows at the end
            out[examples] = part.fisher_norms(np.asarray(row_offsets[examples.start : examples.stop + 1]) - start)
        return out

    @override
    def starts(self, rows: Array) -> Array:
        return self.stored.starts(rows)

    @override
    def deciding(self) -> list[Array]:
        factors = (self.row_factors, self.column_factors, self.columns)
        return [*self.stored.deciding(), *(array for array in factors if array is not None)]

    @override
    def column_counts(self, part_bytes: int = PART_BYTES) -> Array | None:  # of stored columns
        return self.stored.column_counts(part_bytes)

    @override
    def project(self, vectors: Tensor) -> Tensor:
        parts = [part.project(vectors) for _, _, part in self.parts()]
        return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))

    @override
    def combine(self, S: Tensor, out: Tensor | None = None) -> Tensor:
        out = S.new_zeros(S.shape[1], self.n_columns) if out is None else out
        for start, stop, part in self.parts():
            part.combine(S[start:stop], out)
        return out

    @override
    def row_gram(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.by_columns:
            return self.whole().row_gram(dtype)
        K = torch.zeros(self.n_rows, self.n_rows, dtype=dtype)  # by stretches of columns: every number is read once
        width = max(64, self.part_bytes // max(1, 4 * self.n_rows))
        edges = range(0, self.n_rows, max(512, -(-self.n_rows // 8)))
        for start in range(0, self.n_columns, width):
            A = torch.from_numpy(self.read_columns(start, min(start + width, self.n_columns))).to(dtype)
            for i in edges:
                K[i:, i : i + edges.step] += A[i:] @ A[i : i + edges.step].T
        for i in edges:
            K[i : i + edges.step, i + edges.step :] = K[i + edges.step :, i : i + edges.step].T
        return K

    @override
    def stretches(self, room: int, per_column: int) -> Iterator[tuple[int, int, Rows]]:
        return super().stretches(room, per_column) if self.by_columns else self.whole().stretches(room, per_column)

    def edges(self, within: Array | None = None) -> Array:
        """Where parts of about ``part_bytes`` begin and end.

        Args:
            within: Ascending row numbers from 0 to n_rows of which edges are chosen; None: any row may be one.
        """
        rows = np.arange(self.n_rows + 1) if within is None else np.asarray(within)
        at = self.stored.byte_offsets(rows)
        chosen = [0]
        while chosen[-1] < len(rows) - 1:
            last = chosen[-1]
            beyond = int(np.searchsorted(at, at[last] + self.part_bytes, "right")) - 1
            chosen.append(min(len(rows) - 1, max(last + 1, beyond)))
        return rows[chosen]

    @override
    def parts(self, within: Array | None = None) -> Iterator[tuple[int, int, Rows]]:
        edges = self.edges(within)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if stop > start:
                yield start, stop, self.part(start, stop)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread while the one before it is in use."""
    made = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: next(made, None))
        while (item := following.result()) is not None:
            following = pool.submit(lambda: next(made, None))
            yield item


def device_gram(rows: Rows, dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
    """``K = A Aᵀ`` on the device, ``(n_rows, n_rows)``, of rows that lie on the host.

    ``A = [A_1 A_2 …]`` by columns, so ``A Aᵀ = Σ A_s A_sᵀ``; while the device works on one stretch of columns, a thread
    makes the next. :func:`device_project` and :func:`device_combine` go by the same stretches.

    Args:
        rows: The rows.
        dtype: float32 or float64.
        device: Where K is to be.
        room: Bytes there for a stretch of the rows, beside K.
    """
    K = torch.zeros(rows.n_rows, rows.n_rows, dtype=dtype, device=device)
    for _, _, part in ahead(rows.stretches(room, 0)):
        part.add_gram(K, room)
    return mirror_(K)


def device_project(rows: Rows, vectors: Tensor, device: torch.device, room: int) -> Tensor:
    """``A Gᵀ = Σ A_s G_sᵀ`` on the device for G ``(r, n_columns)`` on the host: ``(n_rows, r)`` in G's dtype."""
    out = torch.zeros(rows.n_rows, len(vectors), dtype=vectors.dtype, device=device)
    for first, last, part in ahead(rows.stretches(room, 2 * len(vectors) * vectors.element_size())):
        out += part.project(to_device(vectors[:, first:last].numpy(), device))
    return out


def device_combine(rows: Rows, S: Tensor, room: int) -> Tensor:
    """``Sᵀ A = [Sᵀ A_1 Sᵀ A_2 …]`` on the host, ``(r, n_columns)``, for S ``(n_rows, r)`` on the device."""
    out = torch.empty(S.shape[1], rows.n_columns, dtype=S.dtype)
    S = S.contiguous()
    for first, last, part in ahead(rows.stretches(room, 2 * S.shape[1] * S.element_size())):
        out[:, first:last] = part.combine(S).cpu()
    return out
