"""Prepare a perturbation, and search how far to move along its directions until the outputs change as wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.perturbation.diagonal import diagonal_directions
from npeff.perturbation.directions import ComponentDirections, Direction, Target, target_of
from npeff.perturbation.effect import SignResult
from npeff.perturbation.evaluate import Evaluator, checked_model
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.options import PerturbOptions

Array = npt.NDArray[Any]

FARTHEST = 1e3
"""The search ends at this many times ‖θ‖."""
FIRST = 1e-3
"""The search starts at this many times ‖θ‖."""


@dataclass(frozen=True)
class StepSearch:
    """The result of a search: the step, the mean KL there, and whether this KL is in the wanted range."""

    magnitude: float
    kl: float
    reached: bool


@dataclass(frozen=True, eq=False)
class DirectionSteps:
    """A direction, and what is known of each sign: what the search found, and later what was measured."""

    direction: Direction
    results: dict[int, SignResult]

    @property
    def effort(self) -> tuple[bool, float]:
        """Whether a sign missed the wanted KL, and the mean change of the weights: the least is the best."""
        found = self.results.values()
        return not all(s.reached for s in found), float(np.mean([s.magnitude for s in found]))


@contextmanager
def experiment(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    which: Iterable[Any],
    options: PerturbOptions,
    with_baseline: bool = True,
) -> Iterator[tuple[Evaluator, list[Target]]]:
    """Find the components or groups to perturb, recover their vectors, and yield them with an evaluator.

    With ``with_baseline`` the baseline is measured beside the top examples.

    Raises:
        ArgumentError: There is no such component, a vector cannot be recovered, or the components do not know the
            positions of their examples.
    """
    targets = [target_of(components, j) for j in which]
    needed = range(components.n_components) if options.reject else [j for target in targets for j in target.members]
    how = {name: getattr(options, name) for name in ("forward", "device", "progress")}
    components.ensure_vectors(needed, model, data, **how)
    rows = [options.baseline_rows(len(components.coefficients)), *(options.top_rows(t.coefficient) for t in targets)]
    needed_rows = np.concatenate(rows if with_baseline else rows[1:])
    if components.ids[needed_rows].min() < 0:
        raise ArgumentError("components: their ids are not positions in data; examples cannot be found")
    with checked_model(model, data, components, vars(options)) as checked:
        yield Evaluator(checked, data, components, needed_rows, options), targets


def search_steps(
    evaluator: Evaluator,
    known: ComponentDirections,
    target: Target,
    options: PerturbOptions,
    slices: Sequence[BatchSlice],
    baseline: Array,
) -> list[DirectionSteps]:
    """Find the directions of a target, and for each sign the magnitude given, or the first that has the wanted KL.

    ``slices`` are the top examples; ``baseline`` are the indices of those whose mean Fisher a diagonal target is merged
    with.

    Returns:
        The directions of a low-rank target, along each of which the weights move; or one direction per λ of a diagonal
        target, of which the one that changes the weights least is used, the first.

    Raises:
        ArgumentError: There is no direction.
    """
    if known.components.kind == "diagonal":
        directions = diagonal_directions(evaluator, known.components, target, options, slices, baseline)
    else:
        directions = known.of_target(target, options.combine, options.reject, options.max_sim)
    ends = FIRST * evaluator.weight_norm, FARTHEST * evaluator.weight_norm
    found = []
    for direction in directions:
        kl_at = partial(evaluator.kl, slices, evaluator.tensors(direction))
        results = {}
        for sign in options.signs:
            step = StepSearch(float(options.magnitude or 0), math.nan, True)
            if options.magnitude is None:
                step = find_step(kl_at, options.target_range, *ends, sign=sign)
            delta = None if direction.scale is None else step.magnitude / direction.scale
            results[sign] = SignResult(
                direction.component, sign, step.magnitude, step.reached, step.kl, lam=direction.lam, step=delta
            )
        found.append(DirectionSteps(direction, results))
    if known.components.kind == "diagonal":
        best = min(found, key=lambda one: one.effort)
        return [best, *(one for one in found if one is not best)]
    return found


def find_step(
    kl_at: Callable[[float], Any], wanted: tuple[float, float], start: float, limit: float, *, sign: int = 1
) -> StepSearch:
    """Find the first step at which the mean KL lies in a range.

    The search starts with a small step. The next step is chosen as if KL grew with the square of the step, but at
    most four times as large, so that the first crossing is not missed. Once two steps enclose the range, Brent's
    method finds a step in it, between logarithms. KL need not be monotone, nor ever reach the range: then the step
    whose KL comes nearest (in the logarithm) is the result.

    ``kl_at`` gives the KL at ``sign`` times a step > 0, a number or an array whose mean counts; it need not be finite.
    Steps begin with ``start`` and end with ``limit``.
    """
    from scipy.optimize import brentq

    low, high = wanted
    aim = math.log(math.sqrt(low * high))
    tried: dict[float, float] = {}

    def at(u: float) -> float:
        """Mean KL at the step exp(u)."""
        if u not in tried:
            y = float(np.mean(kl_at(sign * math.exp(u))))
            tried[u] = y if math.isfinite(y) else math.inf
        return tried[u]

    def distance(u: float) -> float:
        """Logarithm of the KL over the middle of the range, from −50 to 50; 0 in the range."""
        y = at(u)
        if low <= y <= high:
            return 0.0
        return min(math.log(y) - aim, 50.0) if y > math.exp(aim - 50) else -50.0

    u = before = math.log(start)
    while at(u) > high and u > math.log(start) - 27:
        u -= math.log(8)
    while at(u) < low:
        growth = math.sqrt(math.exp(aim) / at(u)) if at(u) > 1e-14 else 4.0
        before, u = u, u + math.log(min(4.0, max(1.15, growth)))
        if u > math.log(limit):
            break
    else:
        if distance(before) < 0 < distance(u):
            brentq(distance, before, u, xtol=1e-9, disp=False)
    nearest = min(tried, key=lambda u: abs(distance(u)) if 0 < tried[u] < math.inf else math.inf)
    return StepSearch(math.exp(nearest), tried[nearest], low <= tried[nearest] <= high)
