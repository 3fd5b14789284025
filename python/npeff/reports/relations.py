"""Which components are like each other: in direction, and in the examples that they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 8192


def coactivation(coefficients: Array) -> Array:
    """``(r, r)`` cosine between the components' coefficients over the examples: 1 where they go together.

    Args:
        coefficients: W, ``(n, r)`` ≥ 0.
    """
    r = coefficients.shape[1]
    products = np.zeros((r, r))
    for start in range(0, len(coefficients), BLOCK):
        part = coefficients[start : start + BLOCK]
        products += part.T @ part
    norms = np.sqrt(np.maximum(np.diag(products), 1e-30))
    return np.asarray(products / norms / norms[:, None])


def closest(similarity: Array, j: int, m: int = 6, least: float = 0.01) -> list[tuple[int, float]]:
    """The m others most similar to j, ``(component, similarity)``, those below ``least`` left out."""
    row = similarity[j].astype(np.float64)
    row[j] = -1
    order = np.argsort(-row, kind="stable")[:m]
    return [(int(i), float(min(1.0, row[i]))) for i in order if row[i] >= least]


def explained_shares(vectors: Array, coefficients: Array, loss: float, kind: str) -> Array | None:
    """Share of each example's unit-norm Fisher that the components account for, from W and G alone.

    Where ``w`` minimises ``‖F − Σ_j w_j C_j‖²`` over w ≥ 0, complementary slackness gives
    ``⟨F, Σ w_j C_j⟩ = ‖Σ w_j C_j‖²``, so the share is ``1 − ‖F − Σ‖² / ‖F‖² = wᵀ gram w`` for ‖F‖ = 1, with
    ``gram = (GGᵀ)∘²`` (low-rank) or ``HHᵀ``.

    Args:
        vectors: G or H, ``(r, n_kept)``.
        coefficients: W, ``(n, r)``.
        loss: The relative loss on record, to check with: 1 − loss is the mean share.
        kind: ``"low_rank"`` or ``"diagonal"``.

    Returns:
        ``(n,)`` in [0, 1], NaN for examples without coefficients; None where the mean is not 1 − loss: the
        coefficients are no such minimum, or the Fishers were not of unit norm.
    """
    Q = vectors @ vectors.T
    gram = np.square(Q) if kind == "low_rank" else Q
    parts = [
        np.einsum("ij,ij->i", part @ gram, part)
        for part in (coefficients[start : start + BLOCK] for start in range(0, len(coefficients), BLOCK))
    ]
    share = np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
    used = share > 0
    if not used.any() or not abs(1 - share[used].mean() - loss) <= 0.01 + 0.05 * abs(loss):
        return None
    return np.where(used, np.clip(share, 0, 1), np.nan)
