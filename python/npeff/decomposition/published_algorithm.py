"""The published algorithms, step for step: the yardstick for ours.

Low-rank (Matena & Raffel 2023): first steps on G alone, then joint steps; each joint step is one multiplicative update
of W followed by one fixed-rate gradient step on G. Nothing keeps the loss from rising. Diagonal: multiplicative
updates (Lee & Seung 2001).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from npeff.decomposition.diagonal import Diagonal
from npeff.decomposition.forms import State
from npeff.decomposition.low_rank import LowRank, unit
from npeff.decomposition.spaces import SparseSpace
from npeff.errors import ArgumentError

DIVERGED = 1e3
"""Relative loss above which the fixed-rate steps are given up."""

MU_EPS = 1e-9
"""Added to the denominators of multiplicative updates."""


class DivergedError(ArgumentError):
    """The fixed rate was too large: the loss went up without end."""


@dataclass(frozen=True)
class PublishedOptions:
    """Options of the published algorithm.

    Attributes:
        learning_rate: Fixed rate of the gradient steps on G.
        g_only: Steps on G before W moves.
        joint: Steps on both.
        log_every: Iterations between losses in the curve.
    """

    learning_rate: float = 1e-3
    g_only: int = 50
    joint: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ArgumentError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name, least in (("g_only", 0), ("joint", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def low_rank(
    form: LowRank,
    r: int,
    options: PublishedOptions,
    generator: torch.Generator,
    callback: Callable[[int, float], Any] | None = None,
) -> tuple[State, list[float]]:
    """Run the published low-rank algorithm.

    Returns:
        The last state with unit-norm vectors, and the relative losses every ``log_every`` iterations.

    Raises:
        ArgumentError: The form is not over the rows.
        DivergedError: The loss went up without end.
    """
    space = form.space
    if not isinstance(space, SparseSpace):
        raise ArgumentError("space: the published algorithm works on the rows; use space='sparse'")
    W = torch.rand(form.n_examples, r, generator=generator).to(space.device, space.dtype)
    coords = space.embed(torch.randn(r, space.n_columns, generator=generator) / (r * space.n_columns / 2) ** 0.5)
    curve: list[float] = []
    for iteration in range(1, options.g_only + options.joint + 1):
        P, Q = space.project(coords), coords @ coords.T
        if iteration > options.g_only:
            W = W * form.cross(P) / (W @ (Q * Q) + MU_EPS)
        gradient = ((W.T @ W) * Q) @ coords - space.combine(form.spread(W, P))
        coords = coords - 4 * options.learning_rate * gradient
        if iteration % options.log_every == 0:
            P, Q = space.project(coords), coords @ coords.T
            curve.append(form.objective(W, form.cross(P), Q))
            if callback is not None and callback(iteration, curve[-1]):
                break
            if not curve[-1] < DIVERGED:
                raise DivergedError(
                    f"published: the loss is {curve[-1]:.3g} after {iteration} iterations with learning_rate="
                    f"{options.learning_rate:g}: it diverged. Choose a smaller rate"
                )
    P = space.project(coords)
    state = unit(State(W, coords, P, coords @ coords.T))
    return replace(state, loss=form.objective(state.W, form.cross(state.P), state.Q)), curve


def diagonal(
    form: Diagonal,
    r: int,
    options: PublishedOptions,
    generator: torch.Generator,
    callback: Callable[[int, float], Any] | None = None,
) -> tuple[State, list[float]]:
    """Multiplicative updates from a uniform start; returns as :func:`low_rank`."""
    space = form.space
    W = torch.rand(form.n_examples, r, generator=generator).to(space.device, space.dtype)
    H = space.embed(torch.rand(r, space.n_columns, generator=generator))
    curve: list[float] = []
    for iteration in range(1, options.g_only + options.joint + 1):
        if iteration > options.g_only:
            W = W * space.project(H) / (W @ (H @ H.T) + MU_EPS)
        H = H * space.combine(W) / ((W.T @ W) @ H + MU_EPS)
        if iteration % options.log_every == 0:
            curve.append(form.objective(W, space.project(H), H @ H.T))
            if callback is not None and callback(iteration, curve[-1]):
                break
    state = form.from_vectors(H.contiguous(), W)
    return state, curve
