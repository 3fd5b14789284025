"""What a solver is: from a training objective to products with the inverse of its (damped) curvature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from npeff.companions.influence.objective import Objective
from npeff.errors import ArgumentError
from npeff.short_repr import short_repr


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


class Inverse(ABC):
    """Products with the inverse of one objective's curvature.

    Attributes:
        notes: What the user should know: approximations, parameters without a factor, estimates made.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def solve(self, vectors: Tensor) -> Solution:
        """Solve for ``(k, m)`` right-hand sides at once."""


@dataclass(frozen=True)
class Solver(ABC):
    """Options of a way to solve; :meth:`fit` does the work that all right-hand sides share.

    Attributes:
        name: As on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        """Prepare for one objective.

        Args:
            objective: What was trained.
            damping: Added to the diagonal, beside the objective's weight decay.
            memory: Bytes that the prepared inverse may hold.
        """

    def describe(self) -> dict[str, Any]:
        """Name and options, JSON-able."""
        options = {key: value for key, value in vars(self).items() if isinstance(value, (int, float, str, type(None)))}
        return {"solver": self.name, **options}


def relative_residual(products: Tensor, vectors: Tensor) -> Tensor:
    """``‖v − Ax‖ / ‖v‖`` per row, float64; 0 for a zero v."""
    norms = vectors.double().norm(dim=1)
    return (vectors.double() - products.double()).norm(dim=1) / norms.where(norms > 0, norms.new_ones(()))


def check_positive(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse what is no finite number > 0 (≥ 0 with ``zero``).

    Raises:
        ArgumentError: Naming the argument.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
        raise ArgumentError(f"{name}: expected a finite number {'≥' if zero else '>'} 0, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuse what is no integer ≥ 1.

    Raises:
        ArgumentError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}: expected an integer ≥ 1, got {value!r}")


def indefinite(value: float, damping: float, what: str) -> str:
    """The message for curvature that is not positive."""
    more = f"{1.1 * (damping - value) + 1e-12:.3g}" if value < 0 else "a little more"
    return (
        f"train_loss: its Hessian, with damping and weight decay, is not positive definite ({what} {value:.3g}), so "
        "the model is at no strict minimum and the influence is not defined. Train further (a saddle has descent "
        f"directions), or set damping ≥ {more} in all, or use a curvature that is never negative: GaussNewton(…), "
        "EmpiricalFisher(), EKFAC(…)"
    )
