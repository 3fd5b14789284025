"""Which step to take: from careful to bold, until accuracy on the other examples has fallen too far.

With several unknowns the points are the objective's minimisers at falling λ. With one, the line along ±g_j, they are
steps of doubling length to the side on which the examples to repair improve: the same points, without solving for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.fishers.computation import Forward
from npeff.models.forward import call_model
from npeff.perturbation.magnitude import FARTHEST, find_magnitude
from npeff.perturbation.mending.objective import Directions, Objective, needed
from npeff.perturbation.weights import Weights

Array = npt.NDArray[Any]

PATH = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""λ, from careful to bold."""

DOUBLINGS = 24
"""Most steps along a line."""

CAREFUL = (3e-5, 3e-4)
"""Mean KL of the other examples at the first step along a line, in nats."""

HALVINGS = 2
"""Further points between the last within the tolerance and the first beyond it."""


class Judge:
    """What a step does to the examples that are watched, and the best step so far.

    Args:
        model: The model, whose weights move.
        forward: As for :func:`npeff.mend`.
        batches: All of them.
        labels: ``(n,)``.
        logits: ``(n, C)`` before any change.
        weights: Of the model.
        directions: Along which to move.
        R: ``(n,)`` boolean: of the examples to repair, those that decide which step is best.
        K: ``(n,)`` boolean: the others on which accuracy is watched.
        tolerance: Largest fall of that accuracy.
        likelihood: What the outputs mean.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, batches: Sequence[Batch], labels: Tensor, logits: Tensor,
        weights: Weights, directions: Directions, R: Array, K: Array, tolerance: float, likelihood: str = "categorical",
    ) -> None:  # fmt: skip
        self._likelihood = likelihood
        self.model, self.forward, self.weights, self.directions = model, forward, weights, directions
        kept = list(needed(batches, R | K, labels.device))
        self._batches = [batch for batch, _ in kept]
        at = torch.cat([positions for _, positions in kept])
        self._labels, self._logits = labels[at], logits[at]
        self._R, self._K = (torch.from_numpy(which).to(labels.device)[at] for which in (R, K))
        self.best = np.zeros(int(np.prod(directions.shape)))
        self._tolerance = tolerance
        self._right = self._answers(self._logits)
        self._most = self._share(self._right, self._R)

    def within(self, c: Array) -> bool:
        """Whether the others' accuracy falls by no more than the tolerance, with one standard error to spare.

        With l answers that were right and are wrong, and g the other way, of n, the fall is (l − g)/n and its standard
        error √(l + g)/n. If more is repaired than ever, c is the best.
        """
        right = self._answers(self._moved(c))
        lost, gained = int((self._right & ~right & self._K).sum()), int((~self._right & right & self._K).sum())
        within = lost - gained + math.sqrt(lost + gained) <= self._tolerance * int(self._K.sum()) + 1e-9
        repaired = self._share(right, self._R)
        if within and repaired > self._most:
            self._most, self.best = repaired, c
        return within

    def kl(self, c: Array) -> float:
        """Mean KL of the other examples from what they were; of those to repair where there are no others."""
        which = self._K if bool(self._K.any()) else self._R
        before, after = (torch.log_softmax(z[which].double(), 1) for z in (self._logits, self._moved(c)))
        return float((before.exp() * (before - after)).sum(1).mean())

    @torch.no_grad()
    def _moved(self, c: Array) -> Tensor:
        self.weights.move(self.directions.change(c), 1.0)
        return torch.cat(
            [call_model(self.model, self.forward, batch, self._likelihood).float() for batch in self._batches]
        )

    def _answers(self, logits: Tensor) -> Tensor:
        return logits.argmax(1) == self._labels

    @staticmethod
    def _share(right: Tensor, which: Tensor) -> float:
        return float(right[which].double().mean()) if bool(which.any()) else 0.0


def down_the_path(judge: Judge, objective: Objective, iterations: int, progress: bool) -> None:
    """Minimisers of the objective at falling λ."""

    def solve(strength: float, start: Array) -> Array | None:
        return objective.solve(judge.weights, start, strength, iterations)

    _walk(judge, PATH, PATH[0] * 3, solve, progress)


def along_the_line(judge: Judge, repairing: Objective, progress: bool) -> None:
    """Steps of doubling length, to the side on which −log p of the examples to repair falls.

    Args:
        judge: Of steps along one direction.
        repairing: The objective of the examples to repair alone.
        progress: Show a progress bar.
    """
    _, slope = repairing.value_and_gradient(judge.weights, np.zeros(1), 0.0)
    if slope[0] == 0 or not math.isfinite(slope[0]):
        return
    side = -np.sign(slope)
    size = judge.directions.size_of_weights(judge.model)
    start = find_magnitude(lambda step: judge.kl(step * side), CAREFUL, 1e-3 * size, FARTHEST * size).magnitude
    steps = [start * 2.0**i for i in range(DOUBLINGS)]
    _walk(judge, steps, start / 2, lambda step, _: step * side, progress)


def _walk(
    judge: Judge, values: Sequence[float], before: float, solve: Callable[[float, Array], Array | None], progress: bool
) -> None:
    """From careful to bold until two points in a row are beyond the tolerance, then between the last two that differ.

    Args:
        judge: Keeps the best.
        values: Positive, by each of which one point is found.
        before: The value that stands for no step at all.
        solve: From a value and the last point to the next; None where there is none.
        progress: Show a progress bar.
    """

    def attempt(value: float, start: Array) -> tuple[Array, bool]:
        solution = solve(value, start)
        return (start, False) if solution is None else (solution, judge.within(solution))

    zero = judge.best
    c, last_within, beyond = zero, (before, zero), list[float]()
    for value in tqdm(values, "mending", disable=not progress):
        c, within = attempt(value, c)
        if within:
            last_within, beyond = (value, c), []
        else:
            beyond.append(value)
        if len(beyond) == 2:
            break
    for _ in range(HALVINGS if beyond else 0):
        middle = float(np.sqrt(last_within[0] * beyond[0]))
        c, within = attempt(middle, last_within[1])
        if within:
            last_within = (middle, c)
        else:
            beyond[0] = middle
