"""The problem that a repair solves: steps along components' directions, the objective, and the search for a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.errors import ArgumentError, DataError
from npeff.models.devices import available_bytes, format_bytes
from npeff.perturbation import outputs
from npeff.perturbation.evaluate import CheckedModel, check_finite
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.steps import FARTHEST, FIRST, find_step
from npeff.perturbation.weights import TensorsByName, Weights

Array = npt.NDArray[Any]
Examples = tuple[Array, Array]
"""Masks ``(n,)`` of the examples to repair, and of the others."""

KL_WEIGHTS = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""λ, from small changes to large ones."""

LEAST_FALL = 1e-7
"""The minimiser at a λ counts as found when an iteration lowers the objective by a smaller share."""

DOUBLINGS = 24
"""Most steps along a line."""

FIRST_KL = (3e-5, 3e-4)
"""Mean KL of the other examples at the first step along a line, in nats."""

HALVINGS = 2
"""Further points between the last within the tolerance and the first beyond it."""


class LabelledExamples:
    """Labelled examples in memory, and a model's outputs on them, also after its weights have moved.

    Attributes:
        labels: ``(n,)`` int64.
        logits: ``(n, C)`` at the model's own weights.
        right: ``(n,)`` bool: whose answer is the label there.

    Raises:
        ArgumentError: The outputs do not fit into memory.
        DataError: Labels are missing or unknown, or beyond the outputs, or the outputs are not finite.
    """

    def __init__(self, checked: CheckedModel, batches: Sequence[Batch]) -> None:
        self.checked, self.likelihood = checked, checked.likelihood
        labels = [batch.labels for batch in batches if batch.labels is not None]
        if len(labels) < len(batches):
            raise DataError("labels: mending needs them; pass batches of (inputs, labels)")
        if wide := [part for part in labels if part.numel() != len(part)]:
            raise DataError(f"labels: expected one class per example, got shape {tuple(wide[0].shape)} in a batch")
        self.labels = torch.cat([part.reshape(-1) for part in labels]).long()
        if unknown := int((self.labels < 0).sum()):
            raise DataError(f"labels: mending needs all of them, and {unknown} are unknown (below 0)")
        self._slices, start = [], 0
        for batch in batches:
            stop = start + batch.n_examples
            rows = torch.arange(batch.n_examples, device=batch.device)
            self._slices.append(BatchSlice(batch, rows, np.arange(start, stop)))
            start = stop
        self.logits = self.outputs(self._slices)
        check_finite(self.logits, np.arange(start))
        width = self.logits.shape[1]
        if (n := outputs.n_classes(width, self.likelihood)) is None:
            raise DataError(f"labels: mending repairs predicted classes; {width} {self.likelihood} outputs have none")
        if int(self.labels.max()) >= n:
            raise DataError(f"labels: expected classes below {n}, the model's outputs, got {int(self.labels.max())}")
        self.right = self.answered(self.logits, np.arange(start))

    def some(self, which: Array) -> list[BatchSlice]:
        """Return the examples that a mask ``(n,)`` chooses, in order; their batches are cut where they can be."""
        chosen = (one.restricted(which) for one in self._slices)
        return [one.cut() if one.batch.sliceable else one for one in chosen if len(one.indices)]

    def call(self, one: BatchSlice) -> Tensor:
        """Compute the ``(k, C)`` outputs of a slice at the present weights, with a graph."""
        return self.checked.call(self.checked.model, one.batch)[one.rows]

    @torch.no_grad()
    def outputs(self, slices: Sequence[BatchSlice]) -> Tensor:
        """Compute the ``(k, C)`` outputs of slices at the present weights.

        Raises:
            ArgumentError: Those of all examples do not fit into memory.
        """
        found: list[Tensor] = []
        for one in slices:
            found.append(self.call(one))
            needed, free = 2 * len(self.labels) * found[0][0].nbytes, available_bytes(found[0].device)
            if len(found) == 1 and needed > free:
                raise ArgumentError(
                    f"data: {len(self.labels):,} examples have {found[0].shape[1]:,} outputs each, of which two copies "
                    f"take {format_bytes(needed)}, and {format_bytes(free)} of memory are free; pass fewer examples, "
                    "or keep a few outputs alone (answers= of npeff.language.Places)"
                )
        return torch.cat(found)

    def answered(self, logits: Tensor, indices: Array) -> Array:
        """Mark with True those of some examples whose answer is the label, ``(k,)``."""
        labels = self.labels[torch.from_numpy(indices).to(self.labels.device)]
        return outputs.correct(logits, labels, self.likelihood).cpu().numpy() > 0


@dataclass(frozen=True, eq=False)
class DirectionBlock:
    """One parameter's block of a direction, a matrix: ``left (n, k)`` itself, or ``left (n, r) @ right (r, k)``.

    A block that is known as factors is never multiplied out: factors of a large model take a hundredth of its memory.
    """

    left: Tensor
    right: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def add_to(self, total: Tensor, weight: float) -> None:
        """Add ``weight`` times the block to a matrix, in place."""
        if self.right is None:
            total.add_(self.left, alpha=weight)
        else:
            total.addmm_(self.left, self.right, alpha=weight)

    def product(self, other: Tensor) -> float:
        """Compute the inner product with a tensor of as many elements."""
        other = other.reshape(self.size).to(self.left)
        if self.right is None:
            return float((self.left * other).sum(dtype=torch.float64))
        return float(((self.left.mT @ other) * self.right).sum(dtype=torch.float64))

    def squared_norm(self) -> float:
        """Compute the squared Frobenius norm."""
        if self.right is None:
            return float(self.left.double().square().sum())
        left, right = self.left.double(), self.right.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum())


class LayerSteps:
    """Steps along components' directions, cut into layers or whole: ``(k·L,)`` steps make a change of the weights.

    A component's direction g_j spans all layers in fixed proportion, as they carry its Fisher. The repair may need
    other proportions: to ignore a patch in the first filters, the last layer need not change. So g_j is cut into its
    parts per layer, a module with its weight and bias, each of unit norm, and every part has its own step; or, as
    published, all layers go together. A direction is given as blocks by parameter name, on the device of the model.
    """

    def __init__(
        self, directions: Sequence[Mapping[str, DirectionBlock]], shapes: Mapping[str, tuple[int, ...]], by_layer: bool
    ) -> None:
        layers = {name: name.rpartition(".")[0] if by_layer else "" for name in shapes}
        self.layers = tuple(dict.fromkeys(layers.values()))
        self.shapes = dict(shapes)
        self._layer_of = {name: self.layers.index(layer) for name, layer in layers.items()}
        self._directions = directions
        squares = np.zeros((len(directions), len(self.layers)))
        for own, direction in zip(squares, directions, strict=True):
            for name, block in direction.items():
                own[self._layer_of[name]] += block.squared_norm()
        self._scales = np.where(squares > 1e-24, 1 / np.sqrt(np.maximum(squares, 1e-24)), 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """Components, layers."""
        return self._scales.shape[0], self._scales.shape[1]

    def coefficients(self, c: Array) -> Array:
        """Convert the steps to multiples of the layers' parts of g_j: ``(k, L)``."""
        return np.asarray(c, np.float64).reshape(self.shape) * self._scales

    def change(self, c: Array) -> dict[str, Tensor]:
        """Compute the change of the weights, parameter-shaped."""
        changes, weights = {}, self.coefficients(c)
        for name, shape in self.shapes.items():
            blocks = [direction[name] for direction in self._directions]
            change = torch.zeros(blocks[0].size, dtype=blocks[0].left.dtype, device=blocks[0].left.device)
            for block, weight in zip(blocks, weights[:, self._layer_of[name]].tolist(), strict=True):
                block.add_to(change, weight)
            changes[name] = change.reshape(shape)
        return changes

    def slopes(self, gradient: TensorsByName) -> Array:
        """Compute the slopes of a function of the weights along the steps, ``(k·L,)``, from its gradient."""
        slopes = np.zeros(self.shape)
        for own, direction in zip(slopes, self._directions, strict=True):
            for name, slope in gradient.items():
                own[self._layer_of[name]] += direction[name].product(slope)
        return (slopes * self._scales).ravel()


class Repair:
    """The objective of :func:`npeff.mend` over the steps, and the search for the step that repairs most.

    The objective is of the examples ``fitted``. Those to repair in ``watched`` decide which step is best; on the others
    there, accuracy falls by no more than ``tolerance``.

    Attributes:
        best: The best step so far, 0 at first.
    """

    def __init__(
        self,
        examples: LabelledExamples,
        weights: Weights,
        steps: LayerSteps,
        fitted: Examples,
        watched: Examples,
        tolerance: float,
    ) -> None:
        self._examples, self._weights, self._steps, self._tolerance = examples, weights, steps, tolerance
        self._fitted, self._watched = (examples.some(R | K) for R, K in (fitted, watched))
        self._shares = [
            torch.from_numpy(which / max(1, which.sum())).to(examples.labels.device, torch.float64) for which in fitted
        ]
        named = dict(examples.checked.model.named_parameters(remove_duplicate=False))
        self._moving = {name: named[name] for name in steps.shapes}
        self._at = np.flatnonzero(watched[0] | watched[1])
        self._R, self._K = (which[self._at] for which in watched)
        self._right = examples.right[self._at]
        self._most = share(self._right[self._R])
        self.best = np.zeros(int(np.prod(steps.shape)))

    def value_and_gradient(self, c: Array, lam: float) -> tuple[float, Array]:
        """Compute the objective and its ``(k·L,)`` gradient: one backward pass for any number of steps."""
        self._weights.move(self._steps.change(c), 1.0)
        value, examples = 0.0, self._examples
        total: dict[str, Tensor] = {}
        flags = [tensor.requires_grad for tensor in self._moving.values()]
        try:
            for tensor in self._moving.values():
                tensor.requires_grad_(True)
            for one in self._fitted:
                at = torch.from_numpy(one.indices).to(examples.labels.device)
                r, k = (shares[at] for shares in self._shares)
                with torch.enable_grad():
                    logits = examples.call(one)
                    wrong = -outputs.log_probability(logits, examples.labels[at], examples.likelihood)
                    moved = outputs.divergence(examples.logits[at], logits, examples.likelihood)
                    loss = (r * wrong + lam * k * moved).sum()
                    gradients = torch.autograd.grad(loss, list(self._moving.values()), allow_unused=True)
                value += float(loss.detach())
                for name, gradient in zip(self._moving, gradients, strict=True):
                    if gradient is not None:
                        total[name] = total[name].add_(gradient) if name in total else gradient
        finally:
            for tensor, flag in zip(self._moving.values(), flags, strict=True):
                tensor.requires_grad_(flag)
        return value, self._steps.slopes(total)

    def down_the_path(self, iterations: int, progress: bool) -> None:
        """Try the minimisers of the objective at falling λ, each found from the one before."""
        from scipy.optimize import minimize

        def solve(lam: float, start: Array) -> Array | None:
            options = {"maxiter": iterations, "ftol": LEAST_FALL}
            found = minimize(self.value_and_gradient, start, lam, jac=True, method="L-BFGS-B", options=options)
            return np.asarray(found.x, np.float64) if np.isfinite(found.fun) else None

        self._walk(KL_WEIGHTS, KL_WEIGHTS[0] * 3, solve, progress)

    def along_the_line(self, progress: bool) -> None:
        """Try steps of doubling length along one direction, to the side on which the objective at λ = 0 falls."""
        _, slope = self.value_and_gradient(np.zeros(1), 0.0)
        if slope[0] == 0 or not math.isfinite(slope[0]):
            return
        side = -np.sign(slope)
        which = self._K if self._K.any() else self._R

        def kl(step: float) -> float:
            """Mean KL of the others from the original outputs; of R where there are no others."""
            moved, own = self._moved(step * side)[which], self._examples.logits[self._at[which]]
            return float(outputs.divergence(own, moved, self._examples.likelihood).mean())

        norm = float(sum(tensor.detach().double().square().sum() for tensor in self._moving.values())) ** 0.5
        first = find_step(kl, FIRST_KL, FIRST * norm, FARTHEST * norm).magnitude
        lengths = [first * 2.0**i for i in range(DOUBLINGS)]
        self._walk(lengths, first / 2, lambda length, _: length * side, progress)

    def within(self, c: Array) -> bool:
        """Say whether the others' accuracy falls by no more than the tolerance, one standard error included.

        With l answers that were right and are wrong, and g the other way, of n, the fall is (l − g)/n and its standard
        error √(l + g)/n. If c is within the tolerance and repairs more than all steps before, c becomes the best.
        """
        right = self._examples.answered(self._moved(c), self._at)
        lost, gained = int((self._right & ~right & self._K).sum()), int((~self._right & right & self._K).sum())
        within = lost - gained + math.sqrt(lost + gained) <= self._tolerance * int(self._K.sum()) + 1e-9
        repaired = share(right[self._R])
        if within and repaired > self._most:
            self._most, self.best = repaired, c
        return within

    def _moved(self, c: Array) -> Tensor:
        """Outputs of the watched examples after a step."""
        self._weights.move(self._steps.change(c), 1.0)
        return self._examples.outputs(self._watched)

    def _walk(
        self, values: Sequence[float], before: float, solve: Callable[[float, Array], Array | None], progress: bool
    ) -> None:
        """Try points until two in a row are beyond the tolerance, then between the last two that differ.

        Each of the positive values gives one point, from small changes to large ones; ``before`` stands for no step at
        all. ``solve`` finds the next point from a value and the last point; None where there is none.
        """

        def attempt(value: float, start: Array) -> tuple[Array, bool]:
            solution = solve(value, start)
            return (start, False) if solution is None else (solution, self.within(solution))

        zero = self.best
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


def share(right: Array) -> float:
    """Compute the share of right answers; nan if there are none."""
    return float(right.mean()) if len(right) else math.nan
