"""The leading eigenpairs of ``diag p − ppᵀ``, for outputs with too many classes for a dense eigendecomposition.

A diagonal matrix less a rank-one matrix has the eigenvectors ``v_i ∝ p_i / (p_i − λ)``, and because Σp = 1 its
non-zero eigenvalues solve the secular equation ``g(λ) = Σ_i p_i / (p_i − λ) = 0`` (Golub 1973; Bunch, Nielsen &
Sorensen 1978). g rises from −∞ to ∞ between neighbouring values of p, so the j-th largest eigenvalue lies between the
j-th and the (j+1)-th largest probability, alone. Work is O(C) per eigenvalue and bisection.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT = 2.0**-46
"""Equal probabilities are told apart by this share of them, so that every eigenvalue has an interval of its own."""

BISECTIONS = 66
"""Up to 11 find the exponent, 53 the digits."""

SMALLEST = 1e-280
"""Eigenvalues below count as zero."""

CHUNK = 1 << 19
"""Numbers in a table of ``p_i − λ``: examples × eigenvalues × classes."""


def needed(log_p: Tensor, trace: Tensor, energy: float) -> int:
    """How many leading eigenvalues certainly hold a share of the trace, in every example.

    As λ_j is at least the (j+1)-th largest probability, the sum of these is enough.

    Args:
        log_p: ``(n, C)`` float64.
        trace: ``(n,)`` Σ p (1 − p).
        energy: The share.
    """
    at_least = torch.sort(log_p, dim=1, descending=True).values[:, 1:].exp().cumsum(dim=1)
    counts = (at_least < energy * trace[:, None]).sum(dim=1) + 1
    return int(counts.max()) if len(counts) else 1


def leading_eigenpairs(log_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of ``diag p − ppᵀ``, and their unit eigenvectors.

    Args:
        log_p: ``(n, C)`` float64 log-probabilities.
        width: How many, at most C − 1.

    Returns:
        ``(n, width)`` values, descending, and ``(n, C, width)`` vectors; both zero below ``SMALLEST``.
    """
    n, n_outputs = log_p.shape
    some = max(1, min(width, CHUNK // max(1, n_outputs)))
    step = max(1, CHUNK // max(1, some * n_outputs))
    values, vectors = log_p.new_zeros(n, width), log_p.new_zeros(n, width, n_outputs)
    for start in range(0, n, step):
        ordered, order = torch.sort(log_p[start : start + step], dim=1, descending=True, stable=True)
        p = ordered.exp() * (1 - SPLIT * torch.arange(n_outputs, device=log_p.device, dtype=log_p.dtype))
        for first in range(0, width, some):
            which = slice(first, min(first + some, width))
            found = _leading(p, order, which)
            values[start : start + step, which], vectors[start : start + step, which] = found
    return values, vectors.mT


def _leading(p: Tensor, order: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    """The eigenvalues of some places in the order, ``(n, k)``, and their vectors ``(n, k, C)``."""
    upper, lower = p[:, which], p[:, which.start + 1 : which.stop + 1]
    gap = upper - lower
    there = (lower > 0) & (upper > SMALLEST)

    def distances(origin: Tensor, delta: Tensor) -> Tensor:
        """``p_i − λ`` for λ = origin + delta, ``(n, width, C)``, exact near the origin."""
        return (p[:, None, :] - origin[:, :, None]) - delta[:, :, None]

    def g(origin: Tensor, delta: Tensor) -> Tensor:
        return (p[:, None, :] / distances(origin, delta)).sum(dim=2)

    # From the nearer end of the interval the distance to λ is known to its last digit.
    below = g(lower, gap / 2) > 0
    origin, sign = torch.where(below, lower, upper), torch.where(below, 1.0, -1.0)
    # A root nearer than p·gap/2 would need Σ p_i > 1.
    low, high = (origin * gap / 2).clamp_min(SMALLEST * SPLIT / 4), gap / 2
    for _ in range(BISECTIONS):
        middle = low.sqrt() * high.sqrt()
        further = (g(origin, sign * middle) < 0) == below
        low, high = torch.where(further, middle, low), torch.where(further, high, middle)
    delta = sign * low.sqrt() * high.sqrt()
    vectors = p[:, None, :] / distances(origin, delta)
    vectors = torch.where(there[:, :, None], vectors, 0.0)
    vectors = vectors / vectors.norm(dim=2, keepdim=True).clamp_min(1e-300)
    place = order[:, None, :].expand(-1, vectors.shape[1], -1)
    return torch.where(there, origin + delta, 0.0), torch.zeros_like(vectors).scatter(2, place, vectors)
