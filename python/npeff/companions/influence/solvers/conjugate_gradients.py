"""Conjugate gradients on Hessian–vector products, all right-hand sides in every pass over the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from npeff.companions.influence.objective import Objective
from npeff.companions.influence.solvers.base import (
    Inverse,
    Solution,
    Solver,
    check_count,
    check_positive,
    indefinite,
    relative_residual,
)
from npeff.errors import ArgumentError, ModelError


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """``(H + λI) x = v`` by conjugate gradients (Hestenes & Stiefel 1952), exact for float arithmetic's purposes.

    The right-hand sides run side by side: one pass over the data, with one batched double backward pass per batch,
    serves all those that have not converged. Memory: about 5 vectors of length m per right-hand side.

    Attributes:
        tolerance: Relative residual at which a right-hand side is done.
        max_iterations: Most passes over the data.
        preconditioner: Another solver, fitted to the same objective, whose inverse is the preconditioner: EKFAC() or
            EmpiricalFisher() save passes on ill-conditioned problems; the answer is the same.
    """

    tolerance: float = 1e-5
    max_iterations: int = 500
    preconditioner: Solver | None = None
    name = "cg"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        check_positive("tolerance", self.tolerance)
        check_count("max_iterations", self.max_iterations)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Solver):
            raise ArgumentError(f"preconditioner: expected a solver such as EKFAC(), got {self.preconditioner!r}")
        before = None if self.preconditioner is None else self.preconditioner.fit(objective, damping, memory)
        return _Iterated(self, objective, damping, before)


class _Iterated(Inverse):
    def __init__(
        self, options: ConjugateGradients, objective: Objective, damping: float, before: Inverse | None
    ) -> None:
        super().__init__()
        self._options, self._objective, self._damping, self._before = options, objective, damping, before
        self.notes += [] if before is None else [f"preconditioner: {note}" for note in before.notes]

    def _products(self, vectors: Tensor) -> Tensor:
        return self._objective.products(vectors).add_(vectors, alpha=self._damping)

    def _precondition(self, vectors: Tensor) -> Tensor:
        return vectors.clone() if self._before is None else self._before.solve(vectors).x

    @override
    def solve(self, vectors: Tensor) -> Solution:
        with self._objective.kept_graphs():
            return self._solve(vectors)

    def _solve(self, vectors: Tensor) -> Solution:
        options = self._options
        sizes = vectors.double().norm(dim=1)
        x = torch.zeros_like(vectors)
        active = (sizes > 0).nonzero()[:, 0]
        r = vectors[active].clone()
        z = self._precondition(r)
        p = z.clone()
        rz = _dots(r, z)
        iterations = 0
        while len(active) and iterations < options.max_iterations:
            q = self._products(p)
            iterations += 1
            curvature = _dots(p, q)
            self._check(curvature, p)
            step = (rz / curvature)[:, None].to(p.dtype)
            x[active] += step * p
            r -= step * q
            going = r.double().norm(dim=1) > options.tolerance * sizes[active]
            if not bool(going.all()):
                active, r, p, rz = active[going], r[going], p[going], rz[going]
            if not len(active):
                break
            z = self._precondition(r)
            fresh = _dots(r, z)
            p = z.add_((fresh / rz)[:, None].to(p.dtype) * p)
            rz = fresh
        residual = relative_residual(self._products(x), vectors)
        worst = float(residual.max()) if len(residual) else 0.0
        if worst > 10 * options.tolerance:
            warnings.warn(
                f"solver: conjugate gradients stopped after {iterations} passes with a relative residual of "
                f"{worst:.1e} (wanted {options.tolerance:.1e}); raise max_iterations or damping, give a preconditioner "
                "such as EKFAC(), or make the model float64 with model.double()",
                stacklevel=2,
            )
        return Solution(x, residual, iterations)

    def _check(self, curvature: Tensor, directions: Tensor) -> None:
        if not bool(torch.isfinite(curvature).all()):
            raise ModelError(
                "train_loss: a Hessian–vector product is not finite; find the operation whose second derivative "
                "overflows (a norm or a square root at 0 is the usual one)"
            )
        rayleigh = curvature / _dots(directions, directions)
        if bool((curvature <= 0).any()):
            lowest = float(rayleigh.min())
            raise ModelError(indefinite(lowest, self._damping, "curvature along a search direction"))


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products in float64, ``(k,)``."""
    return (a.double() * b.double()).sum(dim=1)
