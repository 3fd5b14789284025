"""Acting on influence: up the loss of harmful examples, down that of helpful ones, and measure again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.companions.influence.losses import Examples, Loss, call_loss, check_loss
from npeff.companions.influence.solvers.base import check_count, check_positive
from npeff.errors import ArgumentError
from npeff.gradients.engine import PerExampleGradients
from npeff.gradients.selection import placed, select_parameters
from npeff.short_repr import short_repr

Measure = Callable[[nn.Module], float]


@dataclass(frozen=True, eq=False)
class Unlearned:
    """A model after unlearning.

    Attributes:
        model: A changed copy; the model given is as it was.
        before: The measure of the model given.
        after: The measure of ``model``.
        history: The measure after every step, ``before`` first.
        harmful_loss: Mean loss of the harmful examples, before and after.
        helpful_loss: Mean loss of the helpful examples, before and after.
    """

    model: nn.Module
    before: float
    after: float
    history: tuple[float, ...]
    harmful_loss: tuple[float, float]
    helpful_loss: tuple[float, float]

    __repr__ = short_repr


def unlearn(
    model: nn.Module,
    loss: Loss,
    harmful: Iterable[Any] | None,
    helpful: Iterable[Any] | None,
    measure: Measure,
    *,
    learning_rate: float,
    steps: int = 10,
    target: float | None = None,
    goal: Literal["lower", "higher"] = "lower",
    parameters: str | Sequence[str] | None = None,
) -> Unlearned:
    """Gradient ascent on harmful and descent on helpful examples, and what that does to a measure.

    Each step is ``θ ← θ + η (∇ mean L(harmful) − ∇ mean L(helpful))``, plain gradient steps as in Silva, Chopra &
    Gombolay 2022. Ascent has no bound of its own: few small steps, and look at ``history`` and the losses.

    Args:
        model: Not changed; the steps are made on a copy.
        loss: The training loss, per example.
        harmful: Batches to climb on; None for none.
        helpful: Batches to descend on; None for none.
        measure: ``measure(model) -> float``, such as a WEAT score.
        learning_rate: η.
        steps: Most steps.
        target: Stop once the measure has reached it.
        goal: Whether reaching means ≤ (``"lower"``) or ≥ (``"higher"``).
        parameters: Name patterns of what may change.

    Returns:
        The changed copy and the measure's history.

    Raises:
        ArgumentError: Neither harmful nor helpful examples, or an option has another value.
        DataError: A loss is not finite or has another shape.
        ModelError: The loss or the model fails.
    """
    check_loss(loss, "loss")
    check_positive("learning_rate", learning_rate)
    check_count("steps", steps)
    if harmful is None and helpful is None:
        raise ArgumentError("harmful: neither harmful nor helpful examples were given; pass batches of at least one")
    if not callable(measure):
        raise ArgumentError(f"measure: expected callable(model) -> float, got {measure!r}")
    if goal not in ("lower", "higher"):
        raise ArgumentError(f"goal: expected 'lower' or 'higher', got {goal!r}")
    changed = copy.deepcopy(model)
    with placed(changed, None) as device:
        chosen = select_parameters(changed, parameters)
        sides = [
            (sign, _Side(changed, loss, [] if data is None else list(Examples(data, name, device)), name))
            for sign, name, data in ((1.0, "harmful", harmful), (-1.0, "helpful", helpful))
        ]
        engine = PerExampleGradients(changed, chosen, lambda _, batch: call_loss(changed, loss, batch, "loss")[:, None])
        tensors = list(engine.tensors.values())
        history = [float(measure(changed))]
        before = [side.mean() for _, side in sides]
        for _ in range(steps):
            if target is not None and (history[-1] <= target if goal == "lower" else history[-1] >= target):
                break
            with engine.recording():
                moves = [
                    [learning_rate * sign * part for part in side.gradient(tensors)] for sign, side in sides if side.n
                ]
            with torch.no_grad():
                for move in moves:
                    for tensor, part in zip(tensors, move, strict=True):
                        tensor += part
            history.append(float(measure(changed)))
        after = [side.mean() for _, side in sides]
    return Unlearned(changed, history[0], history[-1], tuple(history), (before[0], after[0]), (before[1], after[1]))


class _Side:
    """Examples that are climbed or descended on together."""

    def __init__(self, model: nn.Module, loss: Loss, batches: list[Batch], name: str) -> None:
        self._model, self._loss, self._batches, self._name = model, loss, batches, name
        self.n = sum(batch.n_examples for batch in batches)

    def gradient(self, tensors: list[Tensor]) -> list[Tensor]:
        """Of the mean loss."""
        total = [torch.zeros_like(tensor) for tensor in tensors]
        for batch in self._batches:
            losses = call_loss(self._model, self._loss, batch, self._name)
            parts = torch.autograd.grad(losses.sum() / self.n, tensors, allow_unused=True, materialize_grads=True)
            for sum_, part in zip(total, parts, strict=True):
                sum_ += part
        return total

    @torch.no_grad()
    def mean(self) -> float:
        """Mean loss; NaN without examples."""
        losses = [call_loss(self._model, self._loss, batch, self._name).double().sum() for batch in self._batches]
        return float(torch.stack(losses).sum()) / self.n if losses else float("nan")
