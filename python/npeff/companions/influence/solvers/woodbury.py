"""Gauss–Newton and empirical Fisher, inverted exactly through whichever of rows and parameters are fewer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from npeff.companions.influence.objective import Objective
from npeff.companions.influence.solvers.base import Inverse, Solution, Solver, relative_residual
from npeff.companions.influence.solvers.exact import DenseInverse
from npeff.companions.influence.solvers.factor_rows import FactorRows, OutputLoss, Outputs
from npeff.errors import ArgumentError


@dataclass(frozen=True)
class GaussNewton(Solver):
    """``H ≈ (1/n) Σ JᵀCJ + w I``, C the curvature of a convex loss in the model's outputs.

    Attributes:
        outputs: ``outputs(model, batch) -> (b, C)``.
        output_loss: ``output_loss(outputs, batch) -> (b,)``; of the outputs it must be the training loss.
    """

    outputs: Outputs
    output_loss: OutputLoss
    name = "gauss-newton"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        for name in ("outputs", "output_loss"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"{name}: expected a callable, got {getattr(self, name)!r}")
        return invert(FactorRows(objective, self.outputs, self.output_loss), objective, damping, memory)


@dataclass(frozen=True)
class EmpiricalFisher(Solver):
    """``H ≈ (1/n) Σ ∇ℓ ∇ℓᵀ + w I``, from the per-example gradients alone.

    It needs nothing but the loss, and is the Fisher only where the model is well specified and its labels are its own
    (Kunstner, Balles & Hennig 2019): its scale may be far from the Hessian's.
    """

    name = "empirical-fisher"

    @override
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        return invert(FactorRows(objective, None, None), objective, damping, memory)


def invert(source: FactorRows, objective: Objective, damping: float, memory: int) -> Inverse:
    """Invert ``(1/n) AᵀA + λI``, A ``(N, m)`` the rows of all examples, λ = damping + weight decay.

    By m × m products when the parameters are fewer than the rows, by Woodbury's identity otherwise:
    ``(1/λ)(v − Aᵀ(nλ I + AAᵀ)⁻¹ A v)``.

    Raises:
        ArgumentError: λ is 0 where Woodbury's identity needs it, or neither form fits into memory.
    """
    m, size = objective.m, torch.finfo(objective.dtype).bits // 8
    ridge = damping + objective.weight_decay
    kept: list[Tensor] = []
    n_rows = 0
    square: Tensor | None = None
    for rows in source.dense():
        n_rows += len(rows)
        if square is None:
            kept.append(rows)
            if n_rows <= m and n_rows * m * size + 16 * n_rows * n_rows <= memory:
                continue
            if 16 * m * m > memory:
                raise ArgumentError(
                    f"solver: {n_rows:,} rows or more of {m:,} parameters fit into "
                    f"memory= {memory / 1e9:.2f} GB neither as rows nor as a matrix; "
                    "use EKFAC(…) or ConjugateGradients(), fewer examples in fit(), or fewer parameters"
                )
            square = torch.zeros((m, m), dtype=torch.float64, device=objective.device)
            for part in kept:
                square.addmm_(part.double().T, part.double())
            kept = []
        else:
            square.addmm_(rows.double().T, rows.double())
    if square is not None:
        square /= objective.n
        square.diagonal().add_(objective.weight_decay)
        return DenseInverse(square, damping)
    if ridge <= 0:
        raise ArgumentError(
            f"damping: {n_rows:,} rows cannot determine {m:,} parameters without damping or weight decay; set "
            "damping > 0"
        )
    return _Woodbury(torch.cat(kept), objective.n, ridge)


class _Woodbury(Inverse):
    def __init__(self, rows: Tensor, n: int, ridge: float) -> None:
        super().__init__()
        self._rows, self._n, self._ridge = rows, n, ridge
        gram = _wide(rows, rows)
        gram.diagonal().add_(n * ridge)
        self._factor = torch.linalg.cholesky(gram)

    @override
    def solve(self, vectors: Tensor) -> Solution:
        inner = torch.cholesky_solve(_wide(self._rows, vectors), self._factor)
        x = (vectors - inner.T.to(vectors.dtype) @ self._rows) / self._ridge
        products = (x @ self._rows.T) @ self._rows / self._n + self._ridge * x
        return Solution(x, relative_residual(products, vectors))


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` accumulated in float64 over slices of the columns."""
    total = torch.zeros((len(a), len(b)), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], 8192):
        total.addmm_(a[:, start : start + 8192].double(), b[:, start : start + 8192].double().T)
    return total
