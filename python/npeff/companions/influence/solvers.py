"""Solvers: products with the inverse of the training objective's Hessian."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from npeff.batches.batches import Batch
from npeff.companions.influence.objective import TrainingObjective
from npeff.errors import ArgumentError, ModelError, check_integer, check_number
from npeff.short_repr import short_repr

Product = Callable[[Tensor], Tensor]
"""A linear map of rows ``(k, m)``."""


@dataclass(frozen=True)
class Solution:
    """``x ≈ (H + λI)⁻¹ v`` for several v.

    Attributes:
        x: ``(k, m)``.
        residual: ``(k,)`` float64 ``‖v − (H + λI) x‖ / ‖v‖`` with the solver's own H, measured and not estimated.
        iterations: Products with H that were made; 0 for direct solvers.
    """

    x: Tensor
    residual: Tensor
    iterations: int = 0

    __repr__ = short_repr


@dataclass(frozen=True)
class Inverse:
    """Products with the inverse of one objective's curvature.

    Attributes:
        apply: Computes ``(H + λI)⁻¹ v`` for rows v, and how many products with H that took.
        product: Computes ``(H + λI) x``, to measure the residual with.
        notes: Approximations, parameters without a factor, and estimates, for the user.
        name: What iterates, for the warning.
        accepted: Warn where the relative residual is larger; None: never.
        advice: Ends that warning.
    """

    apply: Callable[[Tensor], tuple[Tensor, int]]
    product: Product
    notes: tuple[str, ...] = ()
    name: str = "a direct solver"
    accepted: float | None = None
    advice: str = ""

    __repr__ = short_repr

    def solve(self, vectors: Tensor) -> Solution:
        """Solve for the right-hand sides ``(k, m)`` at once, and measure the residuals."""
        x, iterations = self.apply(vectors)
        right = vectors.double()
        norms = right.norm(dim=1)
        residual = (right - self.product(x).double()).norm(dim=1) / norms.where(norms > 0, norms.new_ones(()))
        worst = float(residual.max()) if len(residual) else 0.0
        if self.accepted is not None and worst > self.accepted:
            warnings.warn(
                f"solver: {self.name} stopped after {iterations} passes with a relative residual of {worst:.1e} "
                f"(expected ≤ {self.accepted:.1e}); {self.advice}",
                stacklevel=2,
            )
        return Solution(x, residual, iterations)


@dataclass(frozen=True)
class Solver(ABC):
    """The options of a solver; :meth:`fit` does the work that all right-hand sides share.

    Attributes:
        name: As on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        """Prepare for one objective; λ is added to its weight decay, and the inverse may hold ``memory`` bytes."""


def indefinite(value: float, damping: float, what: str) -> str:
    """Make the message for curvature that is not positive."""
    more = f"{1.1 * (damping - value) + 1e-12:.3g}" if value < 0 else "a little more"
    return (
        f"train_loss: its Hessian, with damping and weight decay, is not positive definite ({what} {value:.3g}), so "
        "the model is at no strict minimum and the influence is not defined. Train further (a saddle has descent "
        f"directions), or set damping ≥ {more} in all, or use a curvature that is never negative: GaussNewton(…), "
        "EmpiricalFisher(), EKFAC(…)"
    )


# ---- direct ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(Solver):
    """``H + λI`` as a dense float64 matrix, and its Cholesky factor.

    m Hessian–vector products and 16 m² bytes: for tiny models, and as the reference for the other solvers.
    """

    name = "exact"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        m = objective.m
        if 16 * m * m > memory:
            raise ArgumentError(
                f"solver: Exact() holds a {m:,} × {m:,} Hessian and its factor, {16 * m * m / 1e9:.1f} GB, more than "
                f"memory= {memory / 1e9:.1f} GB; use ConjugateGradients(), GaussNewton(…) or EKFAC(…), or select "
                "fewer parameters"
            )
        return dense_inverse(objective.hessian(), damping)


def dense_inverse(curvature: Tensor, damping: float) -> Inverse:
    """Factorise a dense curvature matrix ``(m, m)`` float64, overwritten, plus the damping, by Cholesky.

    Raises:
        ModelError: The sum is not positive definite.
    """
    curvature.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(curvature)
    if bool(failed):
        lowest = float(torch.linalg.eigvalsh(curvature)[0])
        raise ModelError(indefinite(lowest, damping, "smallest eigenvalue"))
    return Inverse(
        lambda vectors: (torch.cholesky_solve(vectors.double().T, factor).T.to(vectors.dtype), 0),
        lambda x: x.double() @ curvature,
    )


@dataclass(frozen=True)
class Identity(Solver):
    """``H = I``: the plain gradient product, as in TracIn with one checkpoint. A baseline, not an influence."""

    name = "identity"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        return Inverse(lambda vectors: (vectors.clone(), 0), lambda x: x)


# ---- iterative ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """``(H + λI) x = v`` by conjugate gradients (Hestenes & Stiefel 1952), to the wanted residual.

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
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        check_number("tolerance", self.tolerance)
        check_integer("max_iterations", self.max_iterations)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Solver):
            raise ArgumentError(f"preconditioner: expected a solver such as EKFAC(), got {self.preconditioner!r}")
        before = None if self.preconditioner is None else self.preconditioner.fit(objective, damping, memory)
        precondition = torch.clone if before is None else lambda rows: before.apply(rows)[0]
        product = partial(objective.products, damping=damping)

        def apply(vectors: Tensor) -> tuple[Tensor, int]:
            with objective.kept_graphs():
                x, iterations, lowest = self._solve(product, vectors, precondition)
            if lowest is not None:
                raise ModelError(indefinite(lowest, damping, "curvature along a search direction"))
            return x, iterations

        return Inverse(
            apply,
            product,
            () if before is None else tuple(f"preconditioner: {note}" for note in before.notes),
            "conjugate gradients",
            10 * self.tolerance,
            "raise max_iterations or damping, give a preconditioner such as EKFAC(), or make the model float64 with "
            "model.double()",
        )

    def _solve(self, product: Product, vectors: Tensor, precondition: Product) -> tuple[Tensor, int, float | None]:
        """Solve ``A x = v`` for the rows v ``(k, m)`` side by side.

        Returns:
            x ``(k, m)``, the number of products, and None, or the curvature ``pᵀAp/pᵀp ≤ 0`` of a direction that ended
            the search.

        Raises:
            ModelError: A product is not finite.
        """
        sizes = vectors.double().norm(dim=1)
        x = torch.zeros_like(vectors)
        active = (sizes > 0).nonzero()[:, 0]
        r = vectors[active].clone()
        p = precondition(r).clone()
        rz = _dots(r, p)
        iterations = 0
        while len(active) and iterations < self.max_iterations:
            q = product(p)
            iterations += 1
            curvature = _dots(p, q)
            if not bool(torch.isfinite(curvature).all()):
                raise ModelError(
                    "train_loss: a Hessian–vector product is not finite; find the operation whose second derivative "
                    "overflows (a norm or a square root at 0 is the usual one)"
                )
            if bool((curvature <= 0).any()):
                return x, iterations, float((curvature / _dots(p, p)).min())
            step = (rz / curvature)[:, None].to(p.dtype)
            x[active] += step * p
            r -= step * q
            going = r.double().norm(dim=1) > self.tolerance * sizes[active]
            if not bool(going.all()):
                active, r, p, rz = active[going], r[going], p[going], rz[going]
            if not len(active):
                break
            z = precondition(r)
            previous, rz = rz, _dots(r, z)
            p = z + (rz / previous)[:, None].to(p.dtype) * p
        return x, iterations, None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products in float64, ``(k,)``."""
    return (a.double() * b.double()).sum(dim=1)


@dataclass(frozen=True)
class LiSSA(Solver):
    """``s ← v + (I − (H_batch + λI)/σ) s``, then ``x = s/σ``.

    Agarwal, Bullins & Hazan 2017, as Koh & Liang 2017 use it. ``Σ_t (I − A/σ)ᵗ = σ A⁻¹``: without the final division
    by σ the answer is σ times too large. It converges where ``0 < A < 2σ`` on every batch, at the rate ``1 − λ_min/σ``:
    small damping needs many steps. The residual is measured at the end on all data.

    Attributes:
        steps: How many batches.
        scale: σ; None: 1.1 times the largest eigenvalue found by power iteration on the batches, reported in the notes.
        seed: Decides which batch comes when.
    """

    steps: int = 1000
    scale: float | None = None
    seed: int = 0
    name = "lissa"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        check_integer("steps", self.steps)
        if self.scale is not None:
            check_number("scale", self.scale)
        batches = list(objective.data)
        notes: tuple[str, ...] = ()
        scale = self.scale
        if scale is None:
            scale = 1.1 * (max(self._largest(objective, batch) for batch in batches) + damping)
            notes = (f"LiSSA: scale {scale:.4g}, from the largest eigenvalue of a batch's Hessian",)

        def apply(vectors: Tensor) -> tuple[Tensor, int]:
            generator = torch.Generator().manual_seed(self.seed)
            weights = torch.tensor([float(batch.n_examples) for batch in batches])
            most = 1e8 * max(float(vectors.double().norm()), 1e-300)
            order = torch.multinomial(weights, self.steps, replacement=True, generator=generator)
            s = vectors.clone()
            for number, index in enumerate(order.tolist(), 1):
                s = vectors + s - objective.products(s, [batches[index]], damping) / scale
                if (number % 50 == 0 or number == self.steps) and not float(s.double().norm()) <= most:
                    raise ModelError(
                        f"solver: LiSSA diverged within {number} steps: some batch has an eigenvalue above 2·scale "
                        f"(scale {scale:.3g}) or below 0. Raise damping (negative curvature), raise scale, or use "
                        "ConjugateGradients(), which tells them apart"
                    )
            return s / scale, self.steps

        advice = "raise steps or damping, take larger batches, or use ConjugateGradients()"
        return Inverse(apply, partial(objective.products, damping=damping), notes, "LiSSA", 0.1, advice)

    def _largest(self, objective: TrainingObjective, batch: Batch) -> float:
        """Estimate the largest eigenvalue of a batch's Hessian by power iteration."""
        generator = torch.Generator().manual_seed(self.seed)
        vector = torch.randn((1, objective.m), generator=generator, dtype=torch.float64)
        vector = (vector / vector.norm()).to(objective.device, objective.dtype)
        size = 0.0
        for _ in range(30):
            product = objective.products(vector, [batch])
            before, size = size, float(product.norm())
            if size == 0 or abs(size - before) <= 1e-3 * size:
                break
            vector = product / size
        return size
