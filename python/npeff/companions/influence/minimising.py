"""Training to an optimum: L-BFGS over all of the data, then Newton's steps for small models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npeff.companions.influence.losses import Examples, Loss, call_loss, check_loss
from npeff.companions.influence.objective import Objective, check_finite
from npeff.companions.influence.solvers.base import check_positive
from npeff.companions.influence.solvers.exact import dense_hessian
from npeff.errors import ArgumentError
from npeff.gradients.selection import placed, select_parameters
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
    check_loss(loss, "loss")
    check_positive("tolerance", tolerance)
    with placed(model, None) as device:
        work = Weighted(model, loss, Examples(data, "data", device), parameters, weight_decay)
        work.lbfgs(max(tolerance, 1e-5) if work.newtonian else tolerance, max_iterations)
        return work.newton(tolerance, None)


class Weighted:
    """A weighted objective and the model's parameters as a vector."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Examples,
        parameters: str | Sequence[str] | None,
        weight_decay: float,
    ) -> None:
        check_positive("weight_decay", weight_decay, zero=True)
        self._objective = Objective(model, self._weighted, data, select_parameters(model, parameters), weight_decay)
        self._model, self._loss, self._weight_decay = model, loss, weight_decay
        self._batches = list(data)
        self._n = self._objective.n
        self._weights = torch.ones(self._n, dtype=torch.float64, device=data.device)
        self._place = 0
        self.newtonian = self._objective.m <= NEWTON_PARAMETERS

    def _weighted(self, model: nn.Module, content: Any) -> Tensor:
        losses = self._loss(model, content)
        start = self._place % self._n
        self._place += len(losses)
        return losses * self._weights[start : start + len(losses)].to(losses.dtype)

    def leave_out(self, group: int | Sequence[int]) -> None:
        """Give some examples the weight 0 and all others 1.

        Raises:
            ArgumentError: They are no examples.
        """
        self._weights.fill_(1.0)
        chosen = np.atleast_1d(np.asarray(group, np.int64))
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self._n):
            raise ArgumentError(f"groups: expected training examples 0 … {self._n - 1}, got {group!r}")
        self._weights[torch.from_numpy(chosen)] = 0.0

    def theta(self) -> Tensor:
        """The parameters as one vector ``(m,)``, a copy."""
        return self._objective.theta()

    def move(self, theta: Tensor) -> None:
        """Set the parameters, from ``(m,)``."""
        with torch.no_grad():
            for place, tensor in zip(self._objective.parameters, self._objective.tensors, strict=True):
                tensor.copy_(theta[place.slice].view_as(tensor))

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """J and ``∇J``, ``(m,)``."""
        self._place = 0
        tensors = self._objective.tensors
        total = 0.0
        gradient = torch.zeros(self._objective.m, dtype=self._objective.dtype, device=tensors[0].device)
        for batch in self._batches:
            with self._objective.engine.recording():
                losses = call_loss(self._model, self._weighted, batch, "train_loss")
                check_finite(losses, "train_loss")
                parts = torch.autograd.grad(losses.sum(), tensors, allow_unused=True, materialize_grads=True)
            total += float(losses.detach().double().sum())
            gradient += torch.cat([part.reshape(-1) for part in parts]).to(gradient.dtype)
        theta = self.theta()
        value = total / self._n + self._weight_decay / 2 * float(theta.double().square().sum())
        return value, gradient / self._n + self._weight_decay * theta

    def lbfgs(self, tolerance: float, max_iterations: int) -> None:
        """A fresh L-BFGS with a strong Wolfe search over the whole vector."""
        vector = self.theta().requires_grad_()
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
            self.move(vector.detach())
            value, vector.grad = self.value_and_gradient()
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.move(vector.detach())

    def factor(self) -> Tensor | None:
        """Cholesky factor of the Hessian here, lifted to be positive definite; None if the model is too large."""
        if not self.newtonian:
            return None
        self._place = 0
        matrix = dense_hessian(self._objective)
        sizes, vectors = torch.linalg.eigh(matrix)
        floor = 1e-7 * sizes.abs().max().clamp_min(1e-12)
        lifted = (vectors * sizes.abs().clamp_min(floor)) @ vectors.T
        return torch.linalg.cholesky(lifted)

    def newton(self, tolerance: float, factor: Tensor | None, most: int = 60) -> Minimum:
        """Steps ``−B⁻¹∇J`` with halving; where these shrink the gradient slowly, ``−H⁻¹∇J`` with H as it is there.

        H's steps are solved for by conjugate gradients preconditioned with B, which differs from it by an example or
        two. B is renewed where H has negative curvature.
        """
        value, gradient = self.value_and_gradient()
        norm = float(gradient.norm())
        steps = 0
        renewed, exact = factor is None, False
        while self.newtonian and norm > tolerance and steps < most:
            if factor is None:
                factor, renewed = self.factor(), True
            if factor is None:
                break
            direction = self._solved(-gradient, factor) if exact else _by(factor, -gradient)
            if direction is None:
                factor, exact = None, False
                continue
            origin, length = self.theta(), 1.0
            while length > 1e-6:
                self.move(origin + length * direction)
                fresh_value, fresh = self.value_and_gradient()
                smaller = float(fresh.norm()) < 0.9 * norm
                if smaller or fresh_value < value + 1e-4 * length * float(gradient @ direction):
                    break
                length /= 2
            else:
                self.move(origin)
                if renewed:
                    break  # as far as rounding lets it
                factor, exact = None, False
                continue
            steps += 1
            exact = exact or float(fresh.norm()) > 0.1 * norm
            value, gradient, norm = fresh_value, fresh, float(fresh.norm())
            renewed = False
        return Minimum(value, norm, steps)

    def _solved(self, right: Tensor, factor: Tensor, accuracy: float = 1e-3, most: int = 200) -> Tensor | None:
        """``H⁻¹·right`` with the Hessian here; None where it has negative curvature."""
        self._place = 0
        x, r = torch.zeros_like(right), right.clone()
        z = _by(factor, r)
        p, rz = z, float(r @ z)
        with self._objective.kept_graphs():
            for _ in range(most):
                product = self._objective.products(p[None])[0]
                curvature = float(p @ product)
                if curvature <= 0:
                    return None
                x += rz / curvature * p
                r -= rz / curvature * product
                if float(r.norm()) <= accuracy * float(right.norm()):
                    break
                z = _by(factor, r)
                rz, before = float(r @ z), rz
                p = z + rz / before * p
        return x


def _by(factor: Tensor, vector: Tensor) -> Tensor:
    """``B⁻¹·vector`` by B's Cholesky factor."""
    return torch.cholesky_solve(vector.double()[:, None], factor)[:, 0].to(vector.dtype)
