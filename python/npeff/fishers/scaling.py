"""Scale stored rows for the factorisation: block weights, unit Fisher norm, kept columns.

Rows of a file are scaled piece by piece while they are read, and never copied as a whole (:class:`StreamedRows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from npeff.errors import ArgumentError
from npeff.fishers.block_weights import (
    BlockWeights,
    balanced_weights,
    check_block_weights,
    column_factors,
    given_weights,
)
from npeff.fishers.dense_rows import PART_BYTES
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import Array, GramRows, Rows
from npeff.kernels.sparse import mirror_
from npeff.kernels.streams import to_device
from npeff.storage.files import forget

T = TypeVar("T")
Normalize = Literal["stored", "dense", "none"]

DEVICE_PART_BYTES = 1 << 30
"""Bytes of a CUDA device's memory that rows take there at a time, unless fewer are asked for."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""Rows that are smaller than this have lost their digits in float32: the example counts as zero."""


@dataclass(frozen=True)
class ScaledRows:
    """Rows ready to be factorised: ``A_i D / √‖A_i D² A_iᵀ‖_F`` on the kept columns, D = √(block weight).

    Attributes:
        rows: All examples' rows end to end, ``(Σ rank, n_kept)`` float32; or their inner products.
        row_offsets: ``(n + 1,)`` int64.
        columns: ``(n_kept,)`` int64 parameter index of each kept column, or None for all of them.
        fisher_norms: ``(n,)`` float64 Fisher norm of each example's scaled rows: 1, or 0 for a zero Fisher.
        block_weights: Weight per parameter name that was applied; None when all are 1.
        row_factors: ``(Σ rank,)`` float32 what each stored row was multiplied by, block weights apart.
    """

    rows: Rows
    row_offsets: Array
    columns: Array | None
    fisher_norms: Array
    block_weights: dict[str, float] | None
    row_factors: Array = field(default_factory=lambda: np.ones(0, np.float32))

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.row_offsets) - 1


def fisher_norms(rows: Rows, row_offsets: Array, kind: str) -> Array:
    """Compute ``‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F`` per example (``‖f_i‖₂`` for the diagonal kind), ``(n,)`` float64."""
    if kind == "diagonal":
        return np.asarray(np.sqrt(rows.squared_norms()))
    return rows.fisher_norms(row_offsets)


def scale(
    fishers: Fishers,
    block_weights: BlockWeights = "energy",
    normalize: Normalize = "stored",
    columns: Array | None = None,
    min_nonzero_per_column: int = 1,
    *,
    stream: bool = False,
    part_bytes: int = PART_BYTES,
) -> ScaledRows:
    """Weigh parameter blocks, drop unused columns, and give every example unit Fisher norm.

    Args:
        fishers: The Fishers to factorise or to encode.
        block_weights: ``"energy"`` leaves the Fishers as they are, weighted or not; ``"balanced"`` gives every layer
            the same share of the total trace; a mapping from name patterns to weights scales the
            Fisher's blocks by them (parameters that no pattern matches keep weight 1; 0 removes a block).
        normalize: ``"stored"`` divides by the Fisher norm of the rows as stored; ``"dense"`` by the norm of the
            uncompressed Fisher (without regard to weights); ``"none"`` leaves the scale.
        columns: Keep exactly these parameter indices (those of components that already exist).
        min_nonzero_per_column: Drop columns with fewer non-zero entries than this (sparse rows only).
        stream: Leave the rows where they are, to be scaled whenever they are read.
        part_bytes: Bytes of stored rows taken at a time.

    Returns:
        The scaled rows. Columns without any entry are always dropped from sparse rows.

    Raises:
        ArgumentError: An option has an unknown value, or a weight is negative or matches nothing.
    """
    fishers.verify()
    weights = resolve_block_weights(fishers, block_weights)
    if normalize not in ("stored", "dense", "none"):
        raise ArgumentError(f"normalize: expected 'stored', 'dense' or 'none', got {normalize!r}")
    factors = _missing_factors(fishers, weights)
    rows = fishers.rows
    weighted = rows if rows.products_only else StreamedRows(rows, None, factors, None, part_bytes)
    stored = fisher_norms(weighted, fishers.row_offsets, fishers.kind)
    norms = {"stored": stored, "dense": fishers.norms.astype(np.float64), "none": np.ones(len(fishers))}[normalize]
    least = SMALLEST if fishers.kind == "diagonal" or rows.products_only else SMALLEST**2
    divisor = np.where(norms > least, norms, 1.0)
    per_example = 1 / divisor if fishers.kind == "diagonal" else 1 / np.sqrt(divisor)
    per_example[stored <= least] = 0
    per_row = np.repeat(per_example, fishers.ranks).astype(np.float32)
    ours = np.where(stored > least, stored, 0) / divisor
    if rows.products_only:
        K = GramRows(rows.values * per_row * per_row[:, None])
        return ScaledRows(K, fishers.row_offsets, None, ours, weights, per_row)
    if columns is None and (counts := rows.column_counts(part_bytes)) is not None:
        columns = np.flatnonzero(counts >= max(1, min_nonzero_per_column))
    scaled = StreamedRows(rows, per_row, factors, columns, part_bytes)
    return ScaledRows(scaled if stream else scaled.whole(), fishers.row_offsets, columns, ours, weights, per_row)


def _missing_factors(fishers: Fishers, weights: dict[str, float] | None) -> Array | None:
    """Factors of the columns by which stored rows still differ from weighted ones; None where they do not."""
    before = fishers.block_weights or {}
    if weights is None or weights == before:
        return None
    left = {name: weight / (before.get(name, 1.0) or 1.0) for name, weight in weights.items()}
    return column_factors(fishers.parameters, left, fishers.kind)


def resolve_block_weights(fishers: Fishers, choice: BlockWeights) -> dict[str, float] | None:
    """Return a weight per parameter name, with what the Fishers were computed with included; None when all are 1.

    Raises:
        ArgumentError: See :func:`scale`.
    """
    check_block_weights(choice)
    names, own = fishers.parameters.names, fishers.block_weights
    if choice == "energy":
        return own
    before = own or dict.fromkeys(names, 1.0)
    if isinstance(choice, Mapping):
        weights = given_weights(names, choice)
        if all(math.isclose(weights[name], before[name], rel_tol=1e-6) for name in names):
            return own
    if not fishers.in_parameter_space:
        what = "sketches" if fishers.sketch is not None else "inner products"
        raise ArgumentError(
            f"block_weights: {what} mix all parameters, so that none can be weighted afterwards; use "
            "block_weights='energy' (the default). Otherwise compute the Fishers again, with "
            "block_weights='balanced' there (npeff fishers --block-weights balanced), or the weights wanted; with "
            "parameters=[…] (npeff fishers --parameters PATTERN) for the blocks that should count, the others left "
            "out; or with TopK(k) (--top-k N), which keeps k numbers per example however large the model is, and can "
            "be weighted afterwards"
        )
    if not isinstance(choice, Mapping):
        weights = {name: weight * before[name] for name, weight in balanced_weights(block_energy(fishers)).items()}
    if lost := [name for name in names if weights[name] and not before[name]]:
        raise ArgumentError(
            f"block_weights: {lost[0]} had weight 0 when the Fishers were computed, so nothing of it is left; compute "
            "them again with another weight"
        )
    return weights


def block_energy(fishers: Fishers) -> dict[str, float]:
    """Compute the share of each parameter in the summed trace of the unit-norm Fishers (shares sum to 1)."""
    norms = fishers.norms.astype(np.float64)
    scale_of = np.repeat(np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0), fishers.ranks)
    squares = fishers.rows.column_sums(scale_of, squared=fishers.kind == "low_rank")
    total = squares.sum() or 1.0
    return {p.name: float(squares[p.slice].sum() / total) for p in fishers.parameters}


# ---- rows that are read part by part --------------------------------------------------------------------------------


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
        part, rows = self.stored.part(start, stop), self.row_factors
        part = part.scaled(None if rows is None else rows[start:stop], self.column_factors)
        if self._numbering is not None:
            part = part.renumbered(self._numbering, self.n_columns)
        forget(*self.stored.arrays().values())
        return part

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
        """Choose the rows where parts of about ``part_bytes`` begin and end.

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
    """Yield the items; a thread makes each one while the one before it is in use."""
    made = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: next(made, None))
        while (item := following.result()) is not None:
            following = pool.submit(lambda: next(made, None))
            yield item


def device_gram(rows: Rows, dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
    """Compute ``K = A Aᵀ`` on the device, ``(n_rows, n_rows)``, of rows that lie on the host.

    ``A = [A_1 A_2 …]`` by columns, so ``A Aᵀ = Σ A_s A_sᵀ``; while the device works on one stretch of columns, a thread
    makes the next, in ``room`` bytes beside K. :func:`device_project` and :func:`device_combine` go by the same
    stretches.
    """
    K = torch.zeros(rows.n_rows, rows.n_rows, dtype=dtype, device=device)
    for _, _, part in ahead(rows.stretches(room, 0)):
        part.add_gram(K, room)
    return mirror_(K)


def device_project(rows: Rows, vectors: Tensor, device: torch.device, room: int) -> Tensor:
    """Compute ``A Gᵀ = Σ A_s G_sᵀ`` on the device for G ``(r, n_columns)`` on the host: ``(n_rows, r)``, G's dtype."""
    out = torch.zeros(rows.n_rows, len(vectors), dtype=vectors.dtype, device=device)
    for first, last, part in ahead(rows.stretches(room, 2 * len(vectors) * vectors.element_size())):
        out += part.project(to_device(vectors[:, first:last].numpy(), device))
    return out


def device_combine(rows: Rows, S: Tensor, room: int) -> Tensor:
    """Compute ``Sᵀ A = [Sᵀ A_1 Sᵀ A_2 …]`` on the host, ``(r, n_columns)``, for S ``(n_rows, r)`` on the device."""
    out = torch.empty(S.shape[1], rows.n_columns, dtype=S.dtype)
    S = S.contiguous()
    for first, last, part in ahead(rows.stretches(room, 2 * S.shape[1] * S.element_size())):
        out[:, first:last] = part.combine(S).cpu()
    return out
