"""The published algorithms, step for step, to compare with.

Low-rank (Matena & Raffel 2023): first steps on G alone, then joint steps; each joint step is one multiplicative update
of W followed by one fixed-rate gradient step on G. The loss may rise. Diagonal: multiplicative updates (Lee & Seung
2001).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from npeff.decomposition.checkpoint import SearchState
from npeff.decomposition.diagonal import Diagonal
from npeff.decomposition.low_rank import LowRank, unit
from npeff.decomposition.objective import State
from npeff.decomposition.options import Progress, PublishedOptions
from npeff.decomposition.problem import Problem
from npeff.decomposition.search import progress_bar
from npeff.decomposition.spaces import RowSpace
from npeff.errors import ArgumentError

DIVERGED = 1e3
"""Relative loss above which the fixed-rate steps are given up."""

MU_EPS = 1e-9
"""Added to the denominators of multiplicative updates."""


class DivergedError(ArgumentError):
    """The fixed rate was too large: the loss went up without end."""


def run_published(problem: Problem) -> SearchState:
    """Solve a problem by the published algorithm of its kind.

    Raises:
        DivergedError: The loss went up without end.
    """
    options = problem.options
    published = options.published or PublishedOptions()
    began, generator = time.perf_counter(), torch.Generator().manual_seed(options.seed)
    with progress_bar(options) as bar:

        def report(iteration: int, loss: float) -> Any:
            bar.n = iteration
            bar.set_postfix(loss=f"{loss:.5f}")
            seconds = time.perf_counter() - began
            progress = Progress("published", 0, iteration, loss, loss, seconds)
            return options.callback is not None and options.callback(progress)

        if isinstance(problem.objective, Diagonal):
            state, curve = diagonal(problem.objective, options.n_components, published, generator, report)
        else:
            state, curve = low_rank(problem.objective, options.n_components, published, generator, report)
    steps = published.g_only + published.joint
    return SearchState(iteration=steps, best=state, curve=curve, seconds=time.perf_counter() - began)


def low_rank(
    objective: LowRank,
    r: int,
    options: PublishedOptions,
    generator: torch.Generator,
    callback: Callable[[int, float], Any] | None = None,
) -> tuple[State, list[float]]:
    """Run the published low-rank algorithm.

    Returns:
        The last state with unit-norm vectors, and the relative losses every ``log_every`` iterations.

    Raises:
        ArgumentError: The objective is not over the rows.
        DivergedError: The loss went up without end.
    """
    space = objective.space
    if not isinstance(space, RowSpace):
        raise ArgumentError("space: the published algorithm works on the rows; use space='rows'")
    W = torch.rand(objective.n_examples, r, generator=generator).to(space.device, space.dtype)
    coords = space.embed(torch.randn(r, space.n_columns, generator=generator) / (r * space.n_columns / 2) ** 0.5)
    curve: list[float] = []
    for iteration in range(1, options.g_only + options.joint + 1):
        P, Q = space.project(coords), coords @ coords.T
        if iteration > options.g_only:
            W = W * objective.cross(P) / (W @ (Q * Q) + MU_EPS)
        gradient = ((W.T @ W) * Q) @ coords - space.combine(objective.spread(W, P))
        coords = coords - 4 * options.learning_rate * gradient
        if iteration % options.log_every == 0:
            P, Q = space.project(coords), coords @ coords.T
            curve.append(objective.relative_loss(W, objective.cross(P), Q))
            if callback is not None and callback(iteration, curve[-1]):
                break
            if not curve[-1] < DIVERGED:
                raise DivergedError(
                    f"published: the loss is {curve[-1]:.3g} after {iteration} iterations with learning_rate="
                    f"{options.learning_rate:g}: it diverged. Choose a smaller rate"
                )
    P = space.project(coords)
    state = unit(State(W, coords, P, coords @ coords.T))
    return replace(state, loss=objective.relative_loss(state.W, objective.cross(state.P), state.Q)), curve


def diagonal(
    objective: Diagonal,
    r: int,
    options: PublishedOptions,
    generator: torch.Generator,
    callback: Callable[[int, float], Any] | None = None,
) -> tuple[State, list[float]]:
    """Multiplicative updates from a uniform start; returns as :func:`low_rank`."""
    space = objective.space
    assert isinstance(space, RowSpace)
    W = torch.rand(objective.n_examples, r, generator=generator).to(space.device, space.dtype)
    H = space.embed(torch.rand(r, space.n_columns, generator=generator))
    curve: list[float] = []
    for iteration in range(1, options.g_only + options.joint + 1):
        if iteration > options.g_only:
            W = W * space.project(H) / (W @ (H @ H.T) + MU_EPS)
        H = H * space.combine(W) / ((W.T @ W) @ H + MU_EPS)
        if iteration % options.log_every == 0:
            curve.append(objective.relative_loss(W, space.project(H), H @ H.T))
            if callback is not None and callback(iteration, curve[-1]):
                break
    state = objective.from_vectors(H.contiguous(), W)
    return state, curve
