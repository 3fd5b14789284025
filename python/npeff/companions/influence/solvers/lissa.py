"""LiSSA: the Neumann series of the inverse, on random batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from npeff.batches.batches import Batch
from npeff.companions.influence.objective import Objective
from npeff.companions.influence.solvers.base import (
    Inverse,
    Solution,
    Solver,
    check_count,
    check_positive,
    relative_residual,
)
from npeff.errors import ModelError


@dataclass(frozen=True)
class LiSSA(Solver):
    """``s ← v + (I − (H_batch + λI)/σ) s``, then ``x = s/σ``, averaged over repeats.

    Agarwal, Bullins & Hazan 2017, as Koh & Liang 2017 use it. ``Σ_t (I − A/σ)ᵗ = σ A⁻¹``: without the final division
    by σ the answer is σ times too large. It converges where ``0 < A < 2σ`` on every batch, at the rate ``1 − λ_min/σ``:
    small damping needs many steps. The residual is measured at the end on all data.

    Attributes:
        steps: Batches per repeat.
        repeats: Independent runs that are averaged.
        scale: σ; None: 1.1 times the largest eigenvalue found by power iteration on the batches, reported in the notes.
        seed: Decides which batch comes when.
    """

    steps: int = 1000
    repeats: int = 1
    scale: float | None = None
    seed: int = 0
    name = "lissa"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        check_count("steps", self.steps)
        check_count("repeats", self.repeats)
        if self.scale is not None:
            check_positive("scale", self.scale)
        return _Series(self, objective, damping)


class _Series(Inverse):
    def __init__(self, options: LiSSA, objective: Objective, damping: float) -> None:
        super().__init__()
        self._options, self._objective, self._damping = options, objective, damping
        self._batches = list(objective.data)
        self.scale = options.scale
        if self.scale is None:
            largest = max(self._largest(batch) for batch in self._batches)
            self.scale = 1.1 * (largest + damping)
            self.notes.append(f"LiSSA: scale {self.scale:.4g}, from the largest eigenvalue of a batch's Hessian")

    def _largest(self, batch: Batch) -> float:
        generator = torch.Generator().manual_seed(self._options.seed)
        vector = torch.randn((1, self._objective.m), generator=generator, dtype=torch.float64)
        vector = (vector / vector.norm()).to(self._objective.device, self._objective.dtype)
        size = 0.0
        for _ in range(30):
            product = self._objective.products(vector, [batch])
            before, size = size, float(product.norm())
            if size == 0 or abs(size - before) <= 1e-3 * size:
                break
            vector = product / size
        return size

    @override
    def solve(self, vectors: Tensor) -> Solution:
        options, scale = self._options, float(self.scale or 1.0)
        total = torch.zeros_like(vectors)
        generator = torch.Generator().manual_seed(options.seed)
        weights = torch.tensor([float(batch.n_examples) for batch in self._batches])
        start = vectors.double().norm()
        for _ in range(options.repeats):
            order = torch.multinomial(weights, options.steps, replacement=True, generator=generator)
            s = vectors.clone()
            for number, index in enumerate(order.tolist()):
                products = self._objective.products(s, [self._batches[index]]).add_(s, alpha=self._damping)
                s = vectors + s - products / scale
                if number % 50 == 49 or number == options.steps - 1:
                    self._check(s, start, number + 1)
            total += s
        x = total / (options.repeats * scale)
        products = self._objective.products(x).add_(x, alpha=self._damping)
        residual = relative_residual(products, vectors)
        worst = float(residual.max()) if len(residual) else 0.0
        if worst > 0.1:
            warnings.warn(
                f"solver: LiSSA's answer has a relative residual of {worst:.2g} after {options.steps} steps; raise "
                "steps, repeats or damping, take larger batches, or use ConjugateGradients()",
                stacklevel=2,
            )
        return Solution(x, residual, options.steps * options.repeats)

    def _check(self, s: Tensor, start: Tensor, steps: int) -> None:
        size = s.double().norm()
        if not bool(torch.isfinite(size)) or float(size) > 1e8 * max(float(start), 1e-300):
            raise ModelError(
                f"solver: LiSSA diverged within {steps} steps: some batch has an eigenvalue above 2·scale "
                f"(scale {self.scale:.3g}) or below 0. Raise damping (negative curvature), raise scale, or use "
                "ConjugateGradients(), which tells them apart"
            )
