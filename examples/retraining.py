"""Train to an optimum, and train again without some examples: the truth that influence predicts.

``benchmarks/influence.py``, other examples and the tests share this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.companions.influence.losses import Array, Loss, RepeatableData, check_loss, loss_values
from npeff.companions.influence.objective import TrainingObjective
from npeff.errors import ArgumentError, check_number
from npeff.gradients.eligibility import placed
from npeff.short_repr import short_repr

NEWTON_PARAMETERS = 3000
"""Up to so many parameters Newton's steps finish what L-BFGS began."""


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
    check_number("tolerance", tolerance)
    with placed(model, None) as device:
        objective = TrainingObjective.in_memory(
            model, loss, data, device, parameters, weight_decay, names=("loss", "data")
        )
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
    check_loss(test_loss, "test_loss")
    check_number("tolerance", tolerance)
    with placed(model, None) as device:
        names = ("train_loss", "train")
        objective = TrainingObjective.in_memory(model, train_loss, train, device, parameters, weight_decay, names=names)
        test_batches = list(RepeatableData(test, "test", device))
        small = objective.m <= NEWTON_PARAMETERS
        start, before = objective.theta(), loss_values(model, test_loss, test_batches)
        factor = _positive_factor(objective) if small else None
        changes, norms = [], []
        try:
            for group in tqdm(list(groups), desc="Retraining", unit="run", disable=not progress):
                others = _without(objective, group)
                share = others.n / objective.n
                objective.set_theta(start)
                if not small:
                    _lbfgs(others, tolerance / share, max_iterations)
                norms.append(share * _newton(others, tolerance / share, factor, 60 if small else 0).gradient_norm)
                changes.append(loss_values(model, test_loss, test_batches) - before)
        finally:
            objective.set_theta(start)
    return Retrained(np.array(changes).reshape(-1, len(before)), np.array(norms), before)


def _without(objective: TrainingObjective, group: int | Sequence[int]) -> TrainingObjective:
    """The objective without some examples, times n/(n − k) for k of them: it has the same minimum.

    Raises:
        ArgumentError: There is no such example, or no other.
    """
    chosen = np.unique(np.atleast_1d(np.asarray(group, np.int64)))
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < objective.n):
        raise ArgumentError(f"groups: expected training examples 0 … {objective.n - 1}, got {group!r}")
    if len(chosen) == objective.n:
        raise ArgumentError("groups: one of them holds all training examples; leave some in")
    kept, start = [], 0
    for batch in objective.data:
        here = np.setdiff1d(np.arange(batch.n_examples), chosen - start)
        start += batch.n_examples
        if len(here):
            kept.append(batch if len(here) == batch.n_examples else batch.take(torch.from_numpy(here)))
    data = RepeatableData(kept, "train", objective.device)
    decay = objective.weight_decay * objective.n / (objective.n - len(chosen))
    return TrainingObjective(objective.model, objective.loss, data, objective.parameters, decay, name=objective.name)


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
