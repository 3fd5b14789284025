"""The problem that a repair solves: steps along components' directions, the objective, and the search for a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.errors import ArgumentError
from npeff.models.devices import available_bytes, format_bytes
from npeff.models.forward import call_model
from npeff.perturbation.options import Forward
from npeff.perturbation.steps import FARTHEST, FIRST, find_step
from npeff.perturbation.weights import TensorsByName, Weights

Array = npt.NDArray[Any]

KL_WEIGHTS = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""λ, from small changes to large ones."""

DOUBLINGS = 24
"""Most steps along a line."""

FIRST_KL = (3e-5, 3e-4)
"""Mean KL of the other examples at the first step along a line, in nats."""

HALVINGS = 2
"""Further points between the last within the tolerance and the first beyond it."""


@dataclass(frozen=True, eq=False)
class LabelledOutputs:
    """Labelled examples, and a model's outputs on them.

    Attributes:
        model: The model, whose weights may move.
        batches: Batches of the examples.
        forward: As for :func:`mend`.
        likelihood: Likelihood of the outputs.
        labels: ``(n,)`` int64.
        logits: ``(n, C)`` at the model's own weights.
        positions: ``(n,)`` int64 positions of the examples in the data.
    """

    model: nn.Module
    batches: Sequence[Batch]
    forward: Forward | None
    likelihood: str
    labels: Tensor
    logits: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, batches: Sequence[Batch], forward: Forward | None, likelihood: str
    ) -> LabelledOutputs:
        """Collect all examples of labelled batches, with the outputs at the model's own weights."""
        labels = torch.cat([batch.labels.long() for batch in batches if batch.labels is not None])
        positions = torch.arange(len(labels), device=labels.device)
        bare = cls(model, batches, forward, likelihood, labels, labels, positions)
        return replace(bare, logits=bare.outputs())

    def only(self, which: Array) -> LabelledOutputs:
        """Keep the examples that a mask ``(n,)`` chooses; a batch that cannot be cut keeps its other examples too."""
        mask = torch.from_numpy(which).to(self.labels.device)
        batches, kept, start = [], [], 0
        for batch in self.batches:
            own = mask[start : start + batch.n_examples]
            rows = own.nonzero()[:, 0] if batch.sliceable else torch.arange(len(own), device=own.device)
            if bool(own.any()):
                batches.append(batch.take(rows) if batch.sliceable else batch)
                kept.append(start + rows)
            start += batch.n_examples
        at = torch.cat(kept)
        return replace(
            self, batches=batches, labels=self.labels[at], logits=self.logits[at], positions=self.positions[at]
        )

    def among(self, which: Array) -> Tensor:
        """Convert a mask over the data to one over these examples."""
        return torch.from_numpy(which).to(self.labels.device)[self.positions]

    def call(self, batch: Batch) -> Tensor:
        """Compute the ``(b, C)`` outputs on a batch, with a graph."""
        return call_model(self.model, self.forward, batch, self.likelihood)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """Compute the ``(n, C)`` outputs at the present weights.

        Raises:
            ArgumentError: They do not fit into memory.
        """
        found: list[Tensor] = []
        for batch in self.batches:
            found.append(self.call(batch).float())
            needed, free = 2 * len(self.labels) * found[0].shape[1] * 4, available_bytes(found[0].device)
            if len(found) == 1 and needed > free:
                raise ArgumentError(
                    f"data: {len(self.labels):,} examples have {found[0].shape[1]:,} outputs each, of which two copies "
                    f"take {format_bytes(needed)}, and {format_bytes(free)} of memory are free; pass fewer examples, "
                    "or keep a few outputs alone (answers= of npeff.language.Places)"
                )
        return torch.cat(found)

    def right(self, logits: Tensor) -> Tensor:
        """Mark the examples whose answer is the label: ``(n,)`` bool."""
        return logits.argmax(1) == self.labels


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
    parts per layer, each of unit norm, and every part has its own step; or, as published, all layers go together.

    Args:
        directions: Each component's unit direction: blocks by parameter name, on the device of the model.
        shapes: The parameters' shapes by name.
        by_layer: Whether each layer's part has a step of its own; a layer is a module with its weight and bias.
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


class RepairLoss:
    """The objective of :func:`mend` over the steps, and its gradient: one backward pass for any number of steps.

    Args:
        labelled: All examples.
        weights: Moves the model.
        steps: Along which the model moves.
        R: ``(n,)`` boolean, to repair.
        K: ``(n,)`` boolean, to keep.
    """

    def __init__(self, labelled: LabelledOutputs, weights: Weights, steps: LayerSteps, R: Array, K: Array) -> None:
        self._examples, self._weights, self._steps = labelled.only(R | K), weights, steps
        self._r, self._k = (self._examples.among(which).double() / max(1, int(which.sum())) for which in (R, K))
        named = dict(labelled.model.named_parameters(remove_duplicate=False))
        self._moving = {name: named[name] for name in steps.shapes if name in named}

    @property
    def weight_norm(self) -> float:
        """Norm of the weights that move."""
        return float(sum(tensor.detach().double().square().sum() for tensor in self._moving.values())) ** 0.5

    def solve(self, c: Array, lam: float, iterations: int) -> Array | None:
        """Find the minimiser at λ, starting from c; None where the objective is not finite."""
        from scipy.optimize import minimize

        solution = minimize(
            self.value_and_gradient, c, lam, jac=True, method="L-BFGS-B", options={"maxiter": iterations}
        )
        return np.asarray(solution.x, np.float64) if np.isfinite(solution.fun) else None

    def value_and_gradient(self, c: Array, lam: float) -> tuple[float, Array]:
        """Compute the objective and its ``(k·L,)`` gradient."""
        self._weights.move(self._steps.change(c), 1.0)
        value, gradient, start = 0.0, np.zeros(len(c)), 0
        flags = [tensor.requires_grad for tensor in self._moving.values()]
        try:
            for tensor in self._moving.values():
                tensor.requires_grad_(True)
            for batch in self._examples.batches:
                at = slice(start, start + batch.n_examples)
                start = at.stop
                with torch.enable_grad():
                    log_p = torch.log_softmax(self._examples.call(batch).double(), 1)
                    log_q = torch.log_softmax(self._examples.logits[at].double(), 1)
                    wrong = -log_p.gather(1, self._examples.labels[at, None])[:, 0]
                    moved = (log_q.exp() * (log_q - log_p)).sum(1)
                    loss = (self._r[at] * wrong + lam * self._k[at] * moved).sum()
                    slopes = torch.autograd.grad(loss, list(self._moving.values()), allow_unused=True)
                value += float(loss.detach())
                gradient += self._steps.slopes(
                    {name: slope for name, slope in zip(self._moving, slopes, strict=True) if slope is not None}
                )
        finally:
            for tensor, flag in zip(self._moving.values(), flags, strict=True):
                tensor.requires_grad_(flag)
        return value, gradient


class RepairSearch:
    """Tries steps from small to large, until accuracy on the other examples has fallen too far, and keeps the best.

    Args:
        labelled: All examples.
        weights: Moves the model.
        steps: Along which the model moves.
        R: ``(n,)`` boolean: of the examples to repair, those that decide which step is best.
        K: ``(n,)`` boolean: the others on which accuracy is watched.
        tolerance: Largest fall of that accuracy.

    Attributes:
        best: The best step so far, 0 at first.
    """

    def __init__(
        self, labelled: LabelledOutputs, weights: Weights, steps: LayerSteps, R: Array, K: Array, tolerance: float
    ) -> None:
        self._examples, self._weights, self._steps = labelled.only(R | K), weights, steps
        self._R, self._K = self._examples.among(R), self._examples.among(K)
        self.best = np.zeros(int(np.prod(steps.shape)))
        self._tolerance = tolerance
        self._right = self._examples.right(self._examples.logits)
        self._most = share_right(self._right, self._R)

    def down_the_path(self, loss: RepairLoss, iterations: int, progress: bool) -> None:
        """Try the minimisers of the objective at falling λ."""
        self._walk(KL_WEIGHTS, KL_WEIGHTS[0] * 3, lambda lam, start: loss.solve(start, lam, iterations), progress)

    def along_the_line(self, loss: RepairLoss, progress: bool) -> None:
        """Try steps of doubling length along one direction, to the side on which −log p of R falls.

        Args:
            loss: The objective of the examples to repair alone.
            progress: Show a progress bar.
        """
        _, slope = loss.value_and_gradient(np.zeros(1), 0.0)
        if slope[0] == 0 or not math.isfinite(slope[0]):
            return
        side = -np.sign(slope)
        ends = FIRST * loss.weight_norm, FARTHEST * loss.weight_norm
        first = find_step(lambda step: self._kl(step * side), FIRST_KL, *ends).magnitude
        lengths = [first * 2.0**i for i in range(DOUBLINGS)]
        self._walk(lengths, first / 2, lambda length, _: length * side, progress)

    def within(self, c: Array) -> bool:
        """Say whether the others' accuracy falls by no more than the tolerance, one standard error included.

        With l answers that were right and are wrong, and g the other way, of n, the fall is (l − g)/n and its standard
        error √(l + g)/n. If c is within the tolerance and repairs more than all steps before, c becomes the best.
        """
        right = self._examples.right(self._moved(c))
        lost, gained = int((self._right & ~right & self._K).sum()), int((~self._right & right & self._K).sum())
        within = lost - gained + math.sqrt(lost + gained) <= self._tolerance * int(self._K.sum()) + 1e-9
        repaired = share_right(right, self._R)
        if within and repaired > self._most:
            self._most, self.best = repaired, c
        return within

    def _kl(self, c: Array) -> float:
        """Mean KL of the other examples from the original outputs; of R where there are no others."""
        which = self._K if bool(self._K.any()) else self._R
        before, after = (torch.log_softmax(z[which].double(), 1) for z in (self._examples.logits, self._moved(c)))
        return float((before.exp() * (before - after)).sum(1).mean())

    def _moved(self, c: Array) -> Tensor:
        self._weights.move(self._steps.change(c), 1.0)
        return self._examples.outputs()

    def _walk(
        self, values: Sequence[float], before: float, solve: Callable[[float, Array], Array | None], progress: bool
    ) -> None:
        """Try points until two in a row are beyond the tolerance, then between the last two that differ.

        Args:
            values: Positive; each gives one point, from small changes to large ones.
            before: The value that stands for no step at all.
            solve: The next point from a value and the last point; None where there is none.
            progress: Show a progress bar.
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


def share_right(right: Tensor, which: Tensor | Array) -> float:
    """Compute the share of right answers among some examples; 0 if there are none."""
    chosen = right[torch.as_tensor(which, device=right.device)]
    return float(chosen.double().mean()) if len(chosen) else 0.0
