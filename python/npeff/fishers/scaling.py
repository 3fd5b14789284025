"""From stored rows to the rows that are factorised: block weights, unit Fisher norm, kept columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
from npeff.fishers.rows import GramRows, Rows
from npeff.fishers.streamed_rows import StreamedRows

Array = npt.NDArray[Any]
Normalize = Literal["stored", "dense", "none"]

SMALLEST = float(np.finfo(np.float32).tiny)
"""Rows that are smaller than this have lost their digits in float32: the example counts as zero."""

__all__ = [
    "Normalize",
    "ScaledRows",
    "block_energy",
    "fisher_norms",
    "resolve_block_weights",
    "scale",
]


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
    """``‖A_iᵀA_i‖_F = ‖A_iA_iᵀ‖_F`` per example (``‖f_i‖₂`` for the diagonal kind), ``(n,)`` float64."""
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
    """A weight per parameter name, or None when all are 1; what the Fishers were computed with included.

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
    """Share of the summed trace of the unit-norm Fishers that lies in each parameter (they sum to 1)."""
    norms = fishers.norms.astype(np.float64)
    scale_of = np.repeat(np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0), fishers.ranks)
    squares = fishers.rows.column_sums(scale_of, squared=fishers.kind == "low_rank")
    total = squares.sum() or 1.0
    return {p.name: float(squares[p.slice].sum() / total) for p in fishers.parameters}
