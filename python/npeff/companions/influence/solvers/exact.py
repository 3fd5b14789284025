"""The Hessian itself, for models of a few thousand parameters; and no Hessian at all, the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from npeff.companions.influence.objective import Objective
from npeff.companions.influence.solvers.base import Inverse, Solution, Solver, indefinite, relative_residual
from npeff.errors import ArgumentError, ModelError


@dataclass(frozen=True)
class Exact(Solver):
    """``H + λI`` as a dense float64 matrix, and its Cholesky factor.

    m Hessian–vector products and 16 m² bytes: for tiny models, and as the oracle of the other solvers.
    """

    name = "exact"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        m = objective.m
        if 16 * m * m > memory:
            raise ArgumentError(
                f"solver: Exact() holds a {m:,} × {m:,} Hessian and its factor, {16 * m * m / 1e9:.1f} GB, more than "
                f"memory= {memory / 1e9:.1f} GB; use ConjugateGradients(), GaussNewton(…) or EKFAC(…), or select "
                "fewer parameters"
            )
        return DenseInverse(dense_hessian(objective), damping)


def dense_hessian(objective: Objective) -> Tensor:
    """``∇²J`` with weight decay, ``(m, m)`` float64, symmetrised."""
    m = objective.m
    hessian = torch.empty((m, m), dtype=torch.float64, device=objective.device)
    step = max(1, min(m, 2048))
    with objective.kept_graphs():
        for start in range(0, m, step):
            rows = torch.zeros((min(step, m - start), m), dtype=objective.dtype, device=objective.device)
            rows[:, start:].fill_diagonal_(1.0)
            hessian[start : start + step] = objective.products(rows)
    return (hessian + hessian.T) / 2


class DenseInverse(Inverse):
    """Cholesky factor of a dense curvature matrix.

    Args:
        curvature: ``(m, m)`` float64, without the damping; overwritten.
        damping: Added to its diagonal.

    Raises:
        ModelError: The sum is not positive definite.
    """

    def __init__(self, curvature: Tensor, damping: float) -> None:
        super().__init__()
        curvature.diagonal().add_(damping)
        self._matrix = curvature
        self._factor, failed = torch.linalg.cholesky_ex(curvature)
        if bool(failed):
            lowest = float(torch.linalg.eigvalsh(curvature)[0])
            raise ModelError(indefinite(lowest, damping, "smallest eigenvalue"))

    @override
    def solve(self, vectors: Tensor) -> Solution:
        wide = vectors.to(torch.float64)
        x = torch.cholesky_solve(wide.T, self._factor).T
        return Solution(x.to(vectors.dtype), relative_residual(x @ self._matrix, wide))


@dataclass(frozen=True)
class Identity(Solver):
    """``H = I``: the plain gradient product, as in TracIn with one checkpoint. A baseline, not an influence."""

    name = "identity"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        return _Same()


class _Same(Inverse):
    @override
    def solve(self, vectors: Tensor) -> Solution:
        return Solution(vectors.clone(), torch.zeros(len(vectors), dtype=torch.float64))
