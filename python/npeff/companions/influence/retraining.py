"""The truth that influence predicts: training again without some examples, to the new optimum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.companions.influence.losses import Examples, Loss, call_loss, check_loss
from npeff.companions.influence.minimising import Weighted
from npeff.companions.influence.solvers.base import check_positive
from npeff.gradients.selection import placed
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Retrained:
    """What happened to the test losses.

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
    in the derivation of influence — from the given optimum and to a new one, with an optimiser that remembers nothing
    of the one before. Up to 3000 parameters its steps are Newton's, with the Hessian of the full data until progress
    slows and the present one then, by conjugate gradients that the former preconditions; L-BFGS beyond that.

    Args:
        model: At an optimum of the full objective; restored afterwards.
        train_loss: What was trained.
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
    check_positive("tolerance", tolerance)
    with placed(model, None) as device:
        work = Weighted(model, train_loss, Examples(train, "train", device), parameters, weight_decay)
        test_batches = list(Examples(test, "test", device))
        start = work.theta()
        before = _values(model, test_loss, test_batches)
        factor = work.factor() if work.newtonian else None
        changes, norms = [], []
        try:
            for group in tqdm(list(groups), desc="Retraining", unit="run", disable=not progress):
                work.leave_out(group)
                work.move(start)
                if not work.newtonian:
                    work.lbfgs(tolerance, max_iterations)
                norms.append(work.newton(tolerance, factor).gradient_norm)
                changes.append(_values(model, test_loss, test_batches) - before)
        finally:
            work.move(start)
    return Retrained(np.array(changes).reshape(-1, len(before)), np.array(norms), before)


def _values(model: nn.Module, loss: Loss, batches: list[Batch]) -> Array:
    with torch.enable_grad() if getattr(loss, "one_by_one", False) else torch.no_grad():
        found = [call_loss(model, loss, batch, "test_loss", whole=True).detach().reshape(-1) for batch in batches]
    return np.asarray(torch.cat(found).double().cpu().numpy())
