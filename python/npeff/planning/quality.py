"""How faithful a way of keeping Fishers is, measured on the trial's examples: the error of K = A Aᵀ.

The low-rank solver sees the rows through their inner products alone, so their error says what a compression does to it.
How small is small enough comes from ``benchmarks/results/sketch_quality.md``: sketches with an error up to
:data:`SKETCH_ERROR` and top-k rows up to :data:`TOP_K_ERROR` gave the components of the exact rows back (mean |cos|
≥ 0.99). Top-k needs the smaller one: what it leaves out is missing, and not noise about the truth.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import SparseRows

Array = npt.NDArray[Any]

ROWS = 384
"""Rows whose inner products are compared."""

SKETCH_ERROR = 0.1
TOP_K_ERROR = 0.05


def unit_gram(fishers: Fishers, k: int | None = None) -> Array:
    """Inner products of the first examples' rows, every example scaled to a Fisher of norm 1, as the solver does.

    Args:
        fishers: Low-rank ones; of no examples gives ``(0, 0)``.
        k: Only the k largest entries of each example.

    Returns:
        ``(R, R)`` float64, of as many whole examples as have at most ROWS rows together.
    """
    offsets = np.asarray(fishers.row_offsets)
    n = max(1, int(np.searchsorted(offsets, ROWS, side="right")) - 1) if len(offsets) > 1 else 0
    rows, R = fishers.rows, int(offsets[n]) if n else 0
    if k is not None and isinstance(rows, SparseRows):
        rows = largest_entries(rows.part(0, R), offsets[: n + 1], k)
    K, scale = rows.gram(0, R), np.zeros(R)
    for i in range(n):
        own = slice(int(offsets[i]), int(offsets[i + 1]))
        norm = np.linalg.norm(K[own, own])
        scale[own] = norm**-0.5 if norm > 0 else 0.0
    return np.asarray(K * scale * scale[:, None])


def gram_error(found: Array, exact: Array) -> float | None:
    """``‖K̂ − K‖ / ‖K‖``; None where the two are not of the same rows, or there are none."""
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(found - exact)) / size if found.shape == exact.shape and size > 0 else None


def largest_entries(rows: SparseRows, offsets: Array, k: int) -> SparseRows:
    """The rows with all but the k largest entries of each example, ``offsets[i] … offsets[i + 1]``, set to zero."""
    values = np.array(rows.values)
    for start, stop in itertools.pairwise(offsets):
        own = values[int(rows.indptr[start]) : int(rows.indptr[stop])]
        if k < len(own):
            own[np.argpartition(np.abs(own), len(own) - k)[: len(own) - k]] = 0
    return SparseRows(np.asarray(rows.indptr), np.asarray(rows.indices), values, rows.n_columns)
