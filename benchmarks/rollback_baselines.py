"""The methods that Gradient Rollback is compared with: random neighbours, gradient products, influence functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.companions.rollback import Explainer, FactorModel, Record
from npeff.errors import ArgumentError, ModelError

Array = npt.NDArray[Any]
Direction = dict[str, Tensor]
"""A direction in parameter space, by table ``(rows, width)``; with a leading axis several of them."""

_CHUNK_BYTES = 64 << 20


class RandomNeighbours(Explainer):
    """NH-k: candidates in random order; the influences are random numbers in [0, 1).

    Args:
        model: The trained model.
        record: Of its training.
        seed: Decides the order; each target has its own.
    """

    def __init__(self, model: FactorModel, record: Record, seed: int = 0) -> None:
        super().__init__(model, record)
        self._seed = seed

    def support(self, target: Array, candidates: Array) -> Array:
        """See :class:`Explainer`; uniform noise."""
        return np.random.default_rng([self._seed, *target.tolist()]).random(len(candidates))


class GradientProducts(Explainer):
    """``I(d) = −∇ log P(target) · ∇L(d)`` at the trained weights, L(d) = −log P(d), P the softmax over all answers."""

    def support(self, target: Array, candidates: Array) -> Array:
        """See :class:`Explainer`; in units of a squared gradient."""
        return self._supports(self._gradient(target), candidates)

    def _gradient(self, target: Array) -> Direction:
        """∇ log P of one target, dense."""
        found = {name: torch.zeros_like(table) for name, table in self._tables.items()}
        A = self._tables[self.model.answers]
        rows = [row[:, 0] for row in self._context(target[None])]
        q, pull = torch.func.vjp(lambda *given: self.model.query(given), *rows)[:2]
        residual = -torch.softmax(A @ q, 0)
        residual[target[-1]] += 1
        found[self.model.answers] += residual[:, None] * q
        for j, gradient in enumerate(pull(residual @ A)):
            found[self.model.columns[j]][target[j]] += gradient
        return found

    def _context(self, examples: Array) -> list[Tensor]:
        """The context rows, ``(width, n)`` each."""
        return [self._tables[table][examples[:, j]].T for j, table in enumerate(self.model.columns[:-1])]

    def _supports(self, direction: Direction, candidates: Array) -> Array:
        """``−∇L(d) · v`` for every candidate: how fast log P(d) rises along v."""
        step = max(1, _CHUNK_BYTES // (8 * self.model.n_answers))
        parts = [np.empty(0)]
        for start in range(0, len(candidates), step):
            examples = self.record.examples[candidates[start : start + step]]
            q, rate = self._rates(examples, direction)
            p = torch.softmax(q @ self._tables[self.model.answers].T, 1)
            own = rate[torch.arange(len(examples)), torch.from_numpy(examples[:, -1].copy())]
            parts.append((own - (p * rate).sum(1)).numpy())
        return np.concatenate(parts)

    def _rates(self, contexts: Array, direction: Direction) -> tuple[Tensor, Tensor]:
        """The queries, and how fast the scores ``(c, n_answers)`` change along a direction."""
        rows = self._context(contexts)
        tangents = [direction[table][contexts[:, j]].T for j, table in enumerate(self.model.columns[:-1])]
        q, change = torch.func.jvp(lambda *given: self.model.query(given).T, tuple(rows), tuple(tangents))[:2]
        return q, change @ self._tables[self.model.answers].T + q @ direction[self.model.answers].T


class InfluenceFunctions(GradientProducts):
    """``I(d) = −∇ log P(target)ᵀ (H + λI)⁻¹ ∇L(d)`` (Koh & Liang 2017, arXiv 1703.04730), H Gauss–Newton.

    ``H = (1/n) Σ_d J_dᵀ (diag p_d − p_d p_dᵀ) J_d`` over all training examples and all parameters, J the derivatives of
    the scores. It is summed over distinct contexts and never built: conjugate gradients need its products only.

    Args:
        model: The trained model.
        record: Of its training.
        damping: λ > 0.
        tolerance: Relative residual at which a solve ends.
        max_iterations: Of conjugate gradients.

    Raises:
        ArgumentError: ``damping`` or ``tolerance`` is not > 0.
    """

    def __init__(
        self,
        model: FactorModel,
        record: Record,
        damping: float = 1e-2,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ) -> None:
        for name, value in (("damping", damping), ("tolerance", tolerance)):
            if not value > 0:
                raise ArgumentError(f"{name}: expected a number > 0, got {value!r}")
        super().__init__(model, record)
        self._damping, self._tolerance, self._limit = damping, tolerance, max_iterations
        self._contexts, counts = np.unique(record.examples[:, :-1], axis=0, return_counts=True)
        self._shares = torch.from_numpy(counts / len(record))
        A = self._tables[model.answers]
        with torch.no_grad():
            self._p = torch.softmax(model.queries(self._contexts, self._tables) @ A.T, 1)

    def support(self, target: Array, candidates: Array) -> Array:
        """See :class:`Explainer`; n times the first-order change of log P(target) when d is left out.

        Raises:
            ModelError: Conjugate gradients did not converge.
        """
        return self._supports(self.solve(self._gradient(target)), candidates)

    def product(self, v: Direction) -> Direction:
        """``(H + λI) v``."""
        answers = self.model.answers
        rows = self._context(self._contexts)
        q, rate = self._rates(self._contexts, v)
        u = self._p * (rate - (self._p * rate).sum(1, keepdim=True)) * self._shares[:, None]
        found = {name: self._damping * table for name, table in v.items()}
        found[answers] += u.T @ q
        _, pull = torch.func.vjp(lambda *given: self.model.query(given), *rows)[:2]
        for j, gradient in enumerate(pull((u @ self._tables[answers]).T)):
            found[self.model.columns[j]].index_add_(0, torch.from_numpy(self._contexts[:, j].copy()), gradient.T)
        return found

    def solve(self, right: Direction) -> Direction:
        """``(H + λI)⁻¹`` times a direction, by conjugate gradients.

        Raises:
            ModelError: No convergence within ``max_iterations``.
        """
        x = {name: torch.zeros_like(table) for name, table in right.items()}
        residual = {name: table.clone() for name, table in right.items()}
        search = {name: table.clone() for name, table in right.items()}
        squared = start = _dot(residual, residual)
        for _ in range(self._limit):
            if squared <= self._tolerance**2 * start:
                return x
            image = self.product(search)
            length = squared / _dot(search, image)
            for name in x:
                x[name] += length * search[name]
                residual[name] -= length * image[name]
            squared, before = _dot(residual, residual), squared
            for name in x:
                search[name] = residual[name] + (squared / before) * search[name]
        if squared <= self._tolerance**2 * start:
            return x
        raise ModelError(
            f"influence functions: conjugate gradients reached a relative residual of {(squared / start) ** 0.5:.1e} "
            f"in {self._limit} iterations, expected {self._tolerance:.0e}; raise damping ({self._damping}) or "
            "max_iterations"
        )


def _dot(a: Direction, b: Direction) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))
