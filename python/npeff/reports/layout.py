"""Where components stand on the map: two dimensions in which neighbours by cosine are near."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STEPS = 350
EXAGGERATED = 100
LARGEST = 2500  # beyond, r² numbers a step take too long: classical scaling alone


def positions(distances: Array) -> Array:
    """Lay points out in the unit square.

    Classical scaling (Torgerson 1952), from which t-SNE (van der Maaten & Hinton 2008) starts: exact, with a perplexity
    of a tenth of the points (3 to 30). The same distances give the same map.

    Args:
        distances: ``(r, r)`` ≥ 0, symmetric.

    Returns:
        ``(r, 2)`` float64 in [0, 1], its longer side filling that range.
    """
    r = len(distances)
    if r == 1:
        return np.full((1, 2), 0.5)
    Y = classical(distances)
    if 6 <= r <= LARGEST:
        Y = tsne(distances, Y, min(30.0, max(3.0, r / 10), (r - 1) / 3))
    low, high = Y.min(0), Y.max(0)
    side = float((high - low).max()) or 1.0
    return np.asarray((Y - (low + high) / 2) / side + 0.5)


def classical(distances: Array) -> Array:
    """The two leading coordinates of ``−½ J D² J``, ``(r, 2)``."""
    from scipy.linalg import eigh

    r = len(distances)
    squared = np.square(distances)
    centred = -0.5 * (squared - squared.mean(0) - squared.mean(1)[:, None] + squared.mean())
    values, vectors = eigh(centred, subset_by_index=(max(0, r - 2), r - 1))
    Y = np.zeros((r, 2))
    Y[:, : len(values)] = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1]
    signs = np.sign(Y[np.abs(Y).argmax(0), range(2)])
    return np.asarray(Y * np.where(signs == 0, 1, signs))


def tsne(distances: Array, start: Array, perplexity: float) -> Array:
    """Exact t-SNE from given coordinates.

    Args:
        distances: ``(r, r)``.
        start: ``(r, 2)``; scaled down first.
        perplexity: Effective number of neighbours.

    Returns:
        ``(r, 2)``.
    """
    r = len(distances)
    P = affinities(np.square(distances), perplexity)
    P = np.maximum((P + P.T) / (2 * r), 1e-12)
    Y = start / max(float(start.std()), 1e-12) * 1e-2
    # Points that coincide would never part.
    Y = Y + np.random.default_rng(0).normal(scale=1e-4, size=Y.shape)
    velocity, gains = np.zeros_like(Y), np.ones_like(Y)
    rate = max(r / 12, 10.0)
    for step in range(STEPS):
        scale, momentum = (12.0, 0.5) if step < EXAGGERATED else (1.0, 0.8)
        norms = np.square(Y).sum(1)
        kernel = 1 / (1 + np.maximum(norms[:, None] + norms - 2 * Y @ Y.T, 0))
        np.fill_diagonal(kernel, 0)
        weights = (scale * P - kernel / kernel.sum()) * kernel
        gradient = 4 * (weights.sum(1)[:, None] * Y - weights @ Y)
        gains = np.clip(np.where(np.sign(gradient) != np.sign(velocity), gains + 0.2, gains * 0.8), 0.01, None)
        velocity = momentum * velocity - rate * gains * gradient
        Y = Y + velocity
        Y -= Y.mean(0)
    return np.asarray(Y)


def affinities(squared: Array, perplexity: float) -> Array:
    """``(r, r)`` rows ``p_k|j ∝ exp(−β_j d²_jk)`` with β_j such that each row's entropy is log(perplexity)."""
    r = len(squared)
    other = ~np.eye(r, dtype=bool)
    shifted = np.where(other, squared - np.where(other, squared, np.inf).min(1)[:, None], 0)
    low, high = np.zeros(r), np.full(r, np.inf)
    beta = np.full(r, 1 / max(float(np.median(shifted[other])), 1e-12))
    for _ in range(60):
        p = np.where(other, np.exp(-np.minimum(shifted * beta[:, None], 700)), 0)
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
        beta = np.minimum(beta, 1e12)
    return np.asarray(p)
