"""Unlearn examples by gradient steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from npeff.companions.influence.objective import Loss, TrainingObjective
from npeff.errors import ArgumentError, check_choice, check_integer, check_number
from npeff.gradients.eligibility import placed
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
    """Climb the loss of harmful examples and descend that of helpful ones, and measure the model after every step.

    Each step is ``θ ← θ + η (∇ mean L(harmful) − ∇ mean L(helpful))``, plain gradient steps as in Silva, Chopra &
    Gombolay 2022. Ascent has no bound of its own: take few small steps, and look at ``history`` and the losses.

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
        parameters: Name patterns of the parameters that may change.

    Returns:
        The changed copy and the measure's history.

    Raises:
        ArgumentError: Neither harmful nor helpful examples, or an option has another value.
        DataError: A loss is not finite or has another shape.
        ModelError: The loss or the model fails.
    """
    check_number("learning_rate", learning_rate)
    check_integer("steps", steps)
    if harmful is None and helpful is None:
        raise ArgumentError("harmful: neither harmful nor helpful examples were given; pass batches of at least one")
    if not callable(measure):
        raise ArgumentError(f"measure: expected callable(model) -> float, got {measure!r}")
    check_choice("goal", goal, ("lower", "higher"))
    changed = copy.deepcopy(model)
    with placed(changed, None) as device:
        sides = {
            name: TrainingObjective.in_memory(changed, loss, data, device, parameters, names=("loss", name))
            for name, data in (("harmful", harmful), ("helpful", helpful))
            if data is not None
        }
        history = [float(measure(changed))]
        before = {name: side.value_and_gradient()[0] for name, side in sides.items()}
        for _ in range(steps):
            if target is not None and (history[-1] <= target if goal == "lower" else history[-1] >= target):
                break
            gradients = {name: side.value_and_gradient()[1] for name, side in sides.items()}
            for name, side in sides.items():
                step = (1.0 if name == "harmful" else -1.0) * learning_rate * gradients[name]
                side.set_theta(side.theta() + step.to(side.dtype))
            history.append(float(measure(changed)))
        losses = {
            name: (before[name], sides[name].value_and_gradient()[0]) if name in sides else (float("nan"),) * 2
            for name in ("harmful", "helpful")
        }
    return Unlearned(changed, history[0], history[-1], tuple(history), losses["harmful"], losses["helpful"])
