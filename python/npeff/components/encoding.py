"""Solve for coefficients of examples on given components: a convex problem, to optimality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff import kernels
from npeff.fishers.rows import Kind
from npeff.fishers.scaling import ScaledRows

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """Coefficients of examples on given components.

    Attributes:
        coefficients: ``(n, r)`` float32, the non-negative least-squares solution.
        kkt: ``(n,)`` float64 relative KKT residual of each example's solution: the largest violation of
            ``w ≥ 0, ∇ ≥ 0, w·∇ = 0`` over the largest |cross_ij|.
        unexplained: ``(n,)`` float64 share ``‖F_i − Σ_j w_j g_j g_jᵀ‖² / ‖F_i‖²`` that is left; 0 for a zero Fisher.
    """

    coefficients: Array
    kkt: Array
    unexplained: Array

    def __repr__(self) -> str:
        n, r = self.coefficients.shape
        left, worst = (float(np.median(self.unexplained)), float(self.kkt.max())) if n else (0.0, 0.0)
        return f"Encoded({n} examples, {r} components, unexplained: median {left:.0%}, KKT residual ≤ {worst:.1e})"

    def __len__(self) -> int:
        return len(self.coefficients)


def solve(kind: Kind, scaled: ScaledRows, vectors: Array, tolerance: float) -> Encoded:
    """Solve ``min_{w ≥ 0} ‖F_i − Σ_j w_j g_j g_jᵀ‖²`` for every example, in float64.

    Args:
        kind: Of the Fishers.
        scaled: The examples' rows, scaled as those of the components.
        vectors: ``(r, n_columns)``.
        tolerance: Relative KKT residual at which an example counts as solved.
    """
    cross, gram = statistics(kind, scaled, torch.from_numpy(vectors).double())
    solution = kernels.nnls(gram, cross, tol=tolerance, exact=True)
    w = solution.w
    energy = torch.from_numpy(scaled.fisher_norms**2)
    left = energy - 2 * (w * cross).sum(1) + ((w @ gram) * w).sum(1)
    unexplained = torch.where(energy > 0, left.clamp_min(0) / energy.clamp_min(1e-30), torch.zeros_like(energy))
    return Encoded(w.float().numpy(), np.asarray(solution.kkt, np.float64), unexplained.numpy())


def statistics(kind: Kind, scaled: ScaledRows, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``cross (n, r)`` and ``gram (r, r)`` of the least-squares problem for W, in the dtype of ``vectors``."""
    P, Q = scaled.rows.project(vectors), vectors @ vectors.T
    if kind == "diagonal":
        return P, Q
    return kernels.cross(P, torch.tensor(np.asarray(scaled.row_offsets))), Q * Q
