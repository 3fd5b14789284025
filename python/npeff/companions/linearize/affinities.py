"""The joint probabilities P of t-SNE: Gaussian neighbourhoods of equal perplexity (van der Maaten & Hinton 2008)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError

STEPS = 100
TOLERANCE = 1e-8
"""On the entropy, in nats."""


def squared_distances(X: Tensor) -> Tensor:
    """``(n, n)`` ‖x_i − x_j‖² of rows ``(n, d)``."""
    squares = X.square().sum(1)
    return (squares[:, None] + squares - 2 * X @ X.T).clamp_min(0).fill_diagonal_(0)


def conditional_probabilities(distances: Tensor, perplexity: float) -> Tensor:
    """p_{j|i} ∝ exp(−β_i d_ij), with β_i such that the entropy of row i is log perplexity.

    All rows are searched at once, by Newton steps in β within a bracket that is bisected where they leave it.

    Args:
        distances: ``(n, n)`` float64 squared distances.
        perplexity: Effective number of neighbours, above 1 and below n − 1.

    Returns:
        ``(n, n)`` float64, rows sum to 1, zero diagonal.

    Raises:
        ArgumentError: The perplexity is out of range.
        DataError: Distances are not finite.
    """
    n = len(distances)
    if not 1 <= perplexity <= n - 1:
        raise ArgumentError(f"perplexity: expected 1 ≤ perplexity ≤ n − 1 = {n - 1}, got {perplexity}")
    if not bool(torch.isfinite(distances).all()):
        raise DataError("X: it has NaN or infinite values")
    target = math.log(perplexity)
    others = ~torch.eye(n, dtype=torch.bool, device=distances.device)
    # Distances from the nearest one: the same probabilities, and exp never underflows altogether.
    gaps = distances.masked_fill(~others, torch.inf)
    gaps = (gaps - gaps.min(1, keepdim=True).values).masked_fill(~others, 0.0)
    scale = gaps.sum(1, keepdim=True) / (n - 1)
    beta = 1 / torch.where(scale > 0, scale, 1.0)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    p = torch.empty_like(distances)
    for _ in range(STEPS):
        weights = torch.exp(-beta * gaps) * others
        total = weights.sum(1, keepdim=True)
        p = weights / total
        entropy = total.log() + beta * (p * gaps).sum(1, keepdim=True)
        if float((entropy - target).abs().max()) < TOLERANCE:
            break
        mean = (p * gaps).sum(1, keepdim=True)
        slope = -beta * ((p * gaps.square()).sum(1, keepdim=True) - mean.square())  # dH/dβ
        flat = entropy > target
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
        middle = torch.where(torch.isinf(high), 2 * beta, (low + high) / 2)
        newton = beta - (entropy - target) / slope
        inside = (newton > low) & (newton < high.clamp_max(4 * beta))
        beta = torch.where(inside, newton, middle).clamp_max(1e300)
    return p


def joint_probabilities(X: Tensor, perplexity: float) -> Tensor:
    """P of rows ``(n, d)``: (p_{j|i} + p_{i|j}) / 2n, ``(n, n)`` float64, sums to 1."""
    p = conditional_probabilities(squared_distances(X.flatten(1).double()), perplexity)
    return (p + p.T) / (2 * len(p))


def divergence(P: Tensor, Y: Tensor, degrees: float = 1.0) -> Tensor:
    """KL(P‖Q) with Q the Student-t similarities of an embedding, in nats; differentiable in Y.

    q_ij ∝ (1 + ‖y_i − y_j‖²/ν)^{−(ν+1)/2} over all pairs.

    Args:
        P: ``(n, n)``, sums to 1.
        Y: ``(n, k)``.
        degrees: ν; 1 for two dimensions.
    """
    kernel = 1 + _pair_distances(Y) / degrees
    log_q = -(degrees + 1) / 2 * kernel.log()
    total = kernel.pow(-(degrees + 1) / 2).sum() - len(Y)  # the diagonal's ones are no pairs
    entropy = torch.special.xlogy(P, P).sum()
    return entropy - (P * log_q).sum() + P.sum() * total.log()


def _pair_distances(Y: Tensor) -> Tensor:
    squares = Y.square().sum(1)
    others = 1 - torch.eye(len(Y), dtype=Y.dtype, device=Y.device)
    return (squares[:, None] + squares - 2 * Y @ Y.T).clamp_min(0) * others
