"""Train to an optimum, train again without some examples, and unlearn examples by gradient steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.companions.influence.objective import (
    Array,
    Loss,
    RepeatableData,
    TrainingObjective,
    check_loss,
    loss_values,
)
from npeff.errors import ArgumentError, check_choice, check_integer, check_number
from npeff.gradients.selection import placed, select_parameters
from npeff.short_repr import short_repr

NEWTON_PARAMETERS = 3000
"""Up to so many parameters Newton's steps finish what L-BFGS began."""

Measure = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        value: J there.
        gradient_norm: ``‖∇J‖`` there.
        steps: Newton-like steps after L-BFGS.
    """

    value: float
    gradient_norm: float
    steps: int

    __repr__ = short_repr


def minimise(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    *,
    weight_decay: float = 0.0,
    parameters: str | Sequence[str] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 2000,
) -> Minimum:
    """Train on all of the data at once until the gradient vanishes: L-BFGS, then Newton's steps for small models.

    Minimises ``(1/n) Σ ℓ(z_i) + (w/2)‖θ‖²``; use ``model.double()`` for small tolerances.

    Args:
        model: Changed in place: trained.
        loss: Per-example loss.
        data: Batches.
        weight_decay: w.
        parameters: Name patterns; the others stay fixed.
        tolerance: ``‖∇J‖`` to reach.
        max_iterations: Most L-BFGS iterations.

    Returns:
        Where it ended; look at ``gradient_norm``.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: A loss is not finite or has another shape.
        ModelError: The loss fails.
    """
    check_loss(loss, "loss")
    check_number("tolerance", tolerance)
    with placed(model, None) as device:
        objective = _objective(model, loss, data, ("loss", "data"), device, parameters, weight_decay)
        small = objective.m <= NEWTON_PARAMETERS
        _lbfgs(objective, max(tolerance, 1e-5) if small else tolerance, max_iterations)
        return _newton(objective, tolerance, None, 60 if small else 0)


@dataclass(frozen=True, eq=False)
class Retrained:
    """How the test losses changed.

    Attributes:
        changes: ``(r, n_test)`` float64, L_test after minus before, one row per retraining.
        gradient_norms: ``(r,)`` float64 ``‖∇J‖`` of each retraining's own objective where it ended.
        before: ``(n_test,)`` float64 L_test of the model as given.
    """

    changes: Array
    gradient_norms: Array
    before: Array

    __repr__ = short_repr


def leave_out(
    model: nn.Module,
    train_loss: Loss,
    train: Iterable[Any],
    groups: Iterable[int | Sequence[int]],
    test_loss: Loss,
    test: Iterable[Any],
    *,
    weight_decay: float = 0.0,
    parameters: str | Sequence[str] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 500,
    progress: bool = True,
) -> Retrained:
    """Train again without some examples, with the same loss, and measure what changed.

    Each retraining minimises ``(1/n) Σ_{i not left out} ℓ(z_i) + (w/2)‖θ‖²`` — the weights of the others stay 1/n, as
    in the derivation of influence — from the given optimum to a new one, with a new optimiser each time. Up to 3000
    parameters the steps are Newton's, with the Hessian of the full data as long as it serves; L-BFGS beyond that.

    Args:
        model: At an optimum of the full objective; restored afterwards.
        train_loss: The loss that was trained.
        train: Batches.
        groups: Examples, or lists of examples, to leave out; one retraining each.
        test_loss: As for :class:`CrossLossInfluence`.
        test: Batches.
        weight_decay: w.
        parameters: Name patterns; the others stay fixed.
        tolerance: ``‖∇J‖`` to reach.
        max_iterations: Most L-BFGS iterations per retraining, where L-BFGS is used.
        progress: Show a progress bar on stderr.

    Returns:
        Changes and gradient norms.

    Raises:
        ArgumentError: A group names no training example.
        DataError: A loss is not finite or has another shape.
        ModelError: A loss fails.
    """
    check_loss(train_loss, "train_loss")
    check_loss(test_loss, "test_loss")
    check_number("tolerance", tolerance)
    with placed(model, None) as device:
        objective = _objective(model, train_loss, train, ("train_loss", "train"), device, parameters, weight_decay)
        test_batches = list(RepeatableData(test, "test", device))
        small = objective.m <= NEWTON_PARAMETERS
        start, before = objective.theta(), loss_values(model, test_loss, test_batches)
        factor = _positive_factor(objective) if small else None
        changes, norms = [], []
        try:
            for group in tqdm(list(groups), desc="Retraining", unit="run", disable=not progress):
                objective.weights.fill_(1.0)
                objective.weights[_positions(group, objective.n)] = 0.0
                objective.set_theta(start)
                if not small:
                    _lbfgs(objective, tolerance, max_iterations)
                norms.append(_newton(objective, tolerance, factor, 60 if small else 0).gradient_norm)
                changes.append(loss_values(model, test_loss, test_batches) - before)
        finally:
            objective.set_theta(start)
    return Retrained(np.array(changes).reshape(-1, len(before)), np.array(norms), before)


def _objective(
    model: nn.Module,
    loss: Loss,
    data: Iterable[Any],
    names: tuple[str, str],
    device: torch.device,
    parameters: str | Sequence[str] | None,
    weight_decay: float = 0.0,
) -> TrainingObjective:
    """Make the objective of data that is read once and held in memory; the names are those of loss and data."""
    check_number("weight_decay", weight_decay, zero=True)
    held = RepeatableData(list(RepeatableData(data, names[1], device)), names[1], device)
    return TrainingObjective(model, loss, held, select_parameters(model, parameters), weight_decay, name=names[0])


def _positions(group: int | Sequence[int], n: int) -> Tensor:
    chosen = np.atleast_1d(np.asarray(group, np.int64))
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < n):
        raise ArgumentError(f"groups: expected training examples 0 … {n - 1}, got {group!r}")
    return torch.from_numpy(chosen)


def _lbfgs(objective: TrainingObjective, tolerance: float, max_iterations: int) -> None:
    """Minimise by a new L-BFGS with a strong Wolfe search over the whole vector."""
    vector = objective.theta().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [vector],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=30,
        tolerance_grad=tolerance / max(1.0, vector.numel() ** 0.5),
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        objective.set_theta(vector.detach())
        value, gradient = objective.value_and_gradient()
        vector.grad = gradient.to(vector.dtype)
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    objective.set_theta(vector.detach())


def _positive_factor(objective: TrainingObjective) -> Tensor:
    """Compute the Cholesky factor of |H|, the Hessian here with the absolute values of its eigenvalues."""
    sizes, vectors = torch.linalg.eigh(objective.hessian())
    floor = 1e-7 * sizes.abs().max().clamp_min(1e-12)
    return torch.linalg.cholesky((vectors * sizes.abs().clamp_min(floor)) @ vectors.T)


def _newton(objective: TrainingObjective, tolerance: float, factor: Tensor | None, max_steps: int) -> Minimum:
    """Take Newton's steps with a line search until ``‖∇J‖ ≤ tolerance``.

    The steps are ``−|H|⁻¹∇J``. The same |H| serves as long as a step makes the gradient much smaller; otherwise it is
    computed again, at the present parameters.

    Args:
        objective: Its model is trained.
        tolerance: ``‖∇J‖`` to reach.
        factor: Cholesky factor of an |H| near here, or None.
        max_steps: Most steps.
    """
    value, gradient = objective.value_and_gradient()
    steps = 0
    while float(gradient.norm()) > tolerance and steps < max_steps:
        renewed = factor is None
        if factor is None:
            factor = _positive_factor(objective)
        direction = -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        found = _line_search(objective, value, gradient, direction)
        if found is None and renewed:
            break  # rounding allows no further step
        if found is None or float(found[1].norm()) > 0.3 * float(gradient.norm()):
            factor = None
        if found is not None:
            value, gradient = found
            steps += 1
    return Minimum(value, float(gradient.norm()), steps)


def _line_search(
    objective: TrainingObjective, value: float, gradient: Tensor, direction: Tensor
) -> tuple[float, Tensor] | None:
    """Halve the step until the gradient or the value is smaller; None, and no step, if neither ever is."""
    origin, length = objective.theta(), 1.0
    while length > 1e-6:
        objective.set_theta(origin + (length * direction).to(origin.dtype))
        found = objective.value_and_gradient()
        lower = found[0] < value + 1e-4 * length * float(gradient @ direction)
        if lower or float(found[1].norm()) < 0.9 * float(gradient.norm()):
            return found
        length /= 2
    objective.set_theta(origin)
    return None


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
    check_loss(loss, "loss")
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
            name: _objective(changed, loss, data, (name, name), device, parameters)
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
