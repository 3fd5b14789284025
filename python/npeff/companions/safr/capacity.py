"""Measure and draw how tokens share units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from npeff.errors import ArgumentError, check_integer
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]


def superposition_score(vectors: Tensor | Array, importance: Tensor | Array | None = None) -> float:
    """Measure superposition by npeff's own formula: 0 for orthogonal features, near 1 where many share a direction.

    ``score = Σ_i w_i (1 − D_i) / Σ_i w_i``, ``D_i = 1 / Σ_j cos²(x_i, x_j)``: D is the feature dimensionality of
    Elhage et al. 2022 (arXiv 2209.10652) for unit vectors, w the importance. The score of the SAFR paper has no public
    formula; this is not it, and numbers cannot be compared. V random features in d units score about V/(V + d).

    Args:
        vectors: ``(V, d)``, one row per feature, such as the embeddings of different tokens; none zero.
        importance: ``(V,)`` ≥ 0; equal by default.

    Raises:
        ArgumentError: Wrong shapes, a zero or non-finite vector, or no importance.
    """
    x, w = _features(vectors, importance)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    squares = ((units @ (units.T @ units)) * units).sum(1)  # Σ_j cos² without a V × V matrix
    dimensionality = 1 / squares
    return float((w * (1 - dimensionality)).sum() / w.sum())


@dataclass(frozen=True, eq=False)
class CapacityMap:
    """A map of the units that carry each token.

    Attributes:
        tokens: Names, those of one unit together.
        units: ``(u,)`` int64 indices of the units shown, those of the most important share first.
        shares: ``(tokens, u)`` float64: the share ``x_iu² / ‖x_i‖²`` of token i's squared length in each unit.
        importance: ``(tokens,)``.
    """

    tokens: list[str]
    units: Array
    shares: Array
    importance: Array

    __repr__ = short_repr

    def figure(self) -> Figure:
        """Draw tokens down and units across, dark where a unit carries much of a token; ``savefig`` writes it."""
        n, u = self.shares.shape
        figure = Figure((2.2 + 0.22 * u, 1.2 + 0.22 * n), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.shares, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
        axes.set_yticks(
            range(n), [f"{t}  {w:.2f}" for t, w in zip(self.tokens, self.importance, strict=True)], fontsize=7
        )
        axes.set_xticks(range(u), [str(unit) for unit in self.units], fontsize=7, rotation=90)
        axes.set_xlabel("unit")
        axes.set_ylabel("token and its importance")
        figure.colorbar(image, ax=axes, label="share of the token's squared length", shrink=0.8)
        return figure


def capacity_map(
    vectors: Tensor | Array,
    tokens: Sequence[str],
    importance: Tensor | Array | None = None,
    *,
    n_tokens: int = 40,
    n_units: int = 32,
) -> CapacityMap:
    """Find the units that carry the most important tokens.

    Args:
        vectors: ``(V, d)`` embeddings, one row per token; none zero.
        tokens: V names.
        importance: ``(V,)`` ≥ 0, such as :meth:`VMask.importance` times how often a token occurs; equal by default.
        n_tokens: Show so many, the most important ones.
        n_units: Show so many, those with the largest share of these tokens, weighted by importance.

    Raises:
        ArgumentError: Wrong shapes, a zero or non-finite vector, or no importance.
    """
    x, w = _features(vectors, importance)
    if len(tokens) != len(x):
        raise ArgumentError(f"tokens: expected {len(x)} names, one per vector, got {len(tokens)}")
    check_integer("n_tokens", n_tokens)
    check_integer("n_units", n_units)
    chosen = np.argsort(-w, kind="stable")[:n_tokens]
    shares = np.square(x[chosen])
    shares /= shares.sum(1, keepdims=True)
    units = np.argsort(-(w[chosen] @ shares), kind="stable")[:n_units]
    shares = shares[:, units]
    order = np.lexsort((-w[chosen], shares.argmax(1)))
    return CapacityMap([str(tokens[i]) for i in chosen[order]], units, shares[order], w[chosen[order]])


def _features(vectors: Tensor | Array, importance: Tensor | Array | None) -> tuple[Array, Array]:
    x = _array(vectors)
    if x.ndim != 2 or not len(x):
        raise ArgumentError(f"vectors: expected (V, d) with V ≥ 1, got shape {x.shape}")
    norms = np.linalg.norm(x, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        bad = int(np.flatnonzero(~np.isfinite(norms) | (norms == 0))[0])
        raise ArgumentError(f"vectors: row {bad} is zero or not finite; leave padding out")
    w = np.ones(len(x)) if importance is None else _array(importance)
    if w.shape != (len(x),) or not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ArgumentError(f"importance: expected {len(x)} numbers ≥ 0, not all 0, got shape {w.shape}")
    return x, w


def _array(value: Tensor | Array) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, np.float64)
