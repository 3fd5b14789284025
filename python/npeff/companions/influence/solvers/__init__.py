"""Ways to multiply by the inverse curvature: exact ones, iterative ones, and approximations."""

from __future__ import annotations

from npeff.companions.influence.solvers.base import Inverse, Solution, Solver
from npeff.companions.influence.solvers.conjugate_gradients import ConjugateGradients
from npeff.companions.influence.solvers.ekfac import EKFAC
from npeff.companions.influence.solvers.exact import Exact, Identity
from npeff.companions.influence.solvers.lissa import LiSSA
from npeff.companions.influence.solvers.woodbury import EmpiricalFisher, GaussNewton
from npeff.errors import ArgumentError

__all__ = [
    "EKFAC",
    "ConjugateGradients",
    "EmpiricalFisher",
    "Exact",
    "GaussNewton",
    "Identity",
    "Inverse",
    "LiSSA",
    "Solution",
    "Solver",
    "resolve",
]

_NAMED: dict[str, type[Solver]] = {
    kind.name: kind for kind in (ConjugateGradients, Exact, LiSSA, EmpiricalFisher, EKFAC, Identity)
}
NAMES = tuple(_NAMED)


def resolve(solver: Solver | str) -> Solver:
    """The solver that a name means, with its default options; solvers as they are.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in _NAMED:
        return _NAMED[solver]()
    raise ArgumentError(
        f"solver: expected a solver such as ConjugateGradients(), or one of {', '.join(NAMES)}; got {solver!r}"
    )
