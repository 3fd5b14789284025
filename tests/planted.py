"""Fishers with known components, for the tests of the solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npeff import Fishers
from npeff.fishers.rows import DenseRows, Rows, SparseRows
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]


def fishers_of(rows: Rows, row_offsets: Array, kind: str = "low_rank", n_classes: int = 4) -> Fishers:
    """Fishers around given rows, their other fields made up."""
    n, m = len(row_offsets) - 1, rows.n_columns
    rng = np.random.default_rng(0)
    norms = np.ones(n)
    for i in range(n):
        block = rows.dense(int(row_offsets[i]), int(row_offsets[i + 1])).astype(np.float64)
        norms[i] = np.linalg.norm(block if kind == "diagonal" else block @ block.T)
    logits = rng.normal(size=(n, n_classes)).astype(np.float32)
    half = m // 2
    return Fishers(
        kind=kind,  # type: ignore[arg-type]
        rows=rows,
        row_offsets=np.asarray(row_offsets, np.int64),
        norms=norms.astype(np.float32),
        logits=logits,
        labels=logits.argmax(1).astype(np.int64),
        ids=np.arange(n),
        parameters=Parameters.of([("a.weight", (half,)), ("b.weight", (m - half,))]),
    )


def sparse(values: Array) -> SparseRows:
    """CSR of a dense matrix."""
    filled = values != 0
    indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
    return SparseRows(
        indptr, np.nonzero(filled)[1].astype(np.int32), values[filled].astype(np.float32), values.shape[1]
    )


def planted(n: int, r: int, m: int, noise: float, seed: int) -> tuple[Fishers, Array, Array]:
    """Examples whose Fisher is one to three known components, and noise rows.

    Returns:
        The Fishers (4 dense rows each), the unit vectors ``(r, m)``, the coefficients ``(n, r)``.
    """
    rng = np.random.default_rng(seed)
    G = rng.normal(size=(r, m))
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    W = np.zeros((n, r))
    rows = np.zeros((4 * n, m), np.float32)
    for i in range(n):
        chosen = rng.choice(r, rng.integers(1, 4), replace=False)
        W[i, chosen] = rng.uniform(0.5, 1.5, len(chosen))
        own = np.sqrt(W[i, chosen])[:, None] * G[chosen]
        rows[4 * i : 4 * i + len(chosen)] = own
        rows[4 * i : 4 * i + 4] += noise * rng.normal(size=(4, m)) / np.sqrt(m)
    return fishers_of(DenseRows(rows), np.arange(n + 1) * 4), G, W


def random_rows(
    n: int, rank: int, m: int, density: float, seed: int, ranks: Array | None = None
) -> tuple[Array, Array]:
    """Random rows ``(Σ rank, m)`` with some structure, and their offsets."""
    rng = np.random.default_rng(seed)
    ranks = np.full(n, rank) if ranks is None else ranks
    offsets = np.concatenate([[0], np.cumsum(ranks)])
    basis = rng.normal(size=(8, m))
    rows = rng.gamma(0.5, size=(offsets[-1], 8)) * rng.choice([-1, 1], (offsets[-1], 8)) @ basis + 0.3 * rng.normal(
        size=(offsets[-1], m)
    )
    rows *= rng.random(rows.shape) < density
    return rows.astype(np.float32), offsets


def best_cosines(found: Array, wanted: Array) -> Array:
    """For each wanted vector, |cos| with its partner under the best one-to-one matching."""
    from scipy.optimize import linear_sum_assignment

    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (wanted, found)]
    cosines = np.abs(unit[0] @ unit[1].T)
    row, column = linear_sum_assignment(-cosines)
    return cosines[row, column]
