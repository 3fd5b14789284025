"""What is perturbed: one component, or the components of a strategy, and the ways to move along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.perturbation.directions import Directions, Reject, Rejection
from npeff.perturbation.options import Combine

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A component or a group of them.

    Attributes:
        members: The components.
        coefficient: ``(n,)`` float64 coefficient of every example: a component's own, a strategy's sum.
        mass: Share of the group's coefficients that each member holds; they sum to 1.
    """

    members: tuple[int, ...]
    coefficient: Array
    mass: Array


@dataclass(frozen=True, eq=False)
class Move:
    """A way to move.

    Attributes:
        vector: ``(m,)`` float64 of unit norm.
        component: The component it belongs to; None for a combination.
        share: Its share in the average over a strategy's moves; they sum to 1.
        rejection: What was taken out of it.
        explained: Share of the group's weighted directions that a principal direction holds.
        mix: λ of a diagonal component's interpolation.
        scale: Norm of ρ ∘ sign(gradient): magnitude / scale is δ.
    """

    vector: Array
    component: int | None
    share: float = 1.0
    rejection: Rejection | None = None
    explained: float | None = None
    mix: float | None = None
    scale: float | None = None


def subject_of(components: Components, j: Any) -> Subject:
    """What ``j`` names.

    Raises:
        ArgumentError: Neither a component nor a strategy of these components.
    """
    r = components.n_components
    if isinstance(j, Strategy) or (hasattr(j, "components") and hasattr(j, "coefficient")):
        members = tuple(int(k) for k in j.components)
        if not members or max(members) >= r or len(j.coefficient) != len(components.coefficients):
            raise ArgumentError(
                f"j: the strategy is not one of these {r} components of {len(components.coefficients)} examples; "
                "take it from components.strategies()"
            )
    elif isinstance(j, int | np.integer) and not isinstance(j, bool) and -r <= j < r:
        members = (int(j) % r,)
    else:
        raise ArgumentError(f"j: expected a component from 0 to {r - 1}, or a strategy of components, got {j!r}")
    W = components.coefficients[:, list(members)].astype(np.float64)
    mass = W.sum(0)
    return Subject(members, W.sum(1), mass / mass.sum() if mass.sum() > 0 else np.full(len(members), 1 / len(members)))


def needed_vectors(components: Components, subjects: Sequence[Subject], reject: Reject | None) -> list[int]:
    """Components whose vectors a move needs: the subjects' own, and all of them where the others are rejected."""
    return list(range(components.n_components)) if reject else [j for subject in subjects for j in subject.members]


def moves_of(
    directions: Directions, subject: Subject, combine: Combine, reject: Reject | None, max_sim: float | None
) -> list[Move]:
    """Unit directions to move a low-rank subject along.

    Args:
        directions: Of all components.
        subject: The component or group.
        combine: Of a group: ``"each"`` direction by itself, their ``"principal"`` direction, or weights.
        reject: Take the other components out.
        max_sim: See :meth:`Directions.reject`.

    Returns:
        One move; for a group with ``"each"``, one per member that is not zero.

    Raises:
        ArgumentError: A direction is zero, or nothing is left of it; weights do not go with the group.
    """
    members = subject.members
    found: list[tuple[Array, int | None, float, float | None]]
    if len(members) == 1:
        found = [(directions.combination(members, [1.0]), members[0], 1.0, None)]
    elif isinstance(combine, str) and combine == "principal":
        vector, explained = directions.principal(members, subject.mass)
        found = [(vector, None, 1.0, explained)]
    elif isinstance(combine, str):
        norms = directions.norms(members)
        alive = [(k, s) for k, s, norm in zip(members, subject.mass, norms, strict=True) if norm > 0 and s > 0]
        if not alive:
            raise ArgumentError(f"j: the components {list(members)} are all zero, so there is no direction")
        total = sum(s for _, s in alive)
        found = [(directions.combination([k], [1.0]), k, float(s / total), None) for k, s in alive]
    else:
        found = [(directions.combination(members, _weights(combine, members)), None, 1.0, None)]
    moves = []
    for vector, component, share, held in found:
        rejection = None
        if reject is not None:
            vector, rejection = directions.reject(vector, members, reject, max_sim)
        moves.append(Move(directions.full(vector), component, share, rejection, held))
    return moves


def _weights(given: Any, members: Sequence[int]) -> Sequence[float]:
    weights = np.asarray(given, np.float64)
    if weights.shape != (len(members),) or not np.isfinite(weights).all():
        raise ArgumentError(f"combine: expected a weight for each of the {len(members)} components, got {given!r}")
    return list(weights)


def direction(
    components: Components,
    j: Any,
    *,
    combine: Combine = "principal",
    reject: Reject | None = None,
    max_sim: float | None = None,
) -> dict[str, torch.Tensor]:
    """The unit direction of a low-rank component or strategy, for :func:`npeff.applied` and its like.

    Args:
        components: Low-rank components.
        j: A component, or a strategy of them.
        combine: A strategy's ``"principal"`` direction (the top eigenvector of ``Σ_k w_k g_k g_kᵀ``, w_k the
            member's share of the strategy's coefficients), or a weight per member for ``Σ_k a_k g_k``.
        reject: Take the other components out, as for :func:`npeff.perturb`.
        max_sim: As for :func:`npeff.perturb`.

    Returns:
        Parameter-shaped float32 tensors by name, of unit norm together.

    Raises:
        ArgumentError: The components are not low-rank, or there is no such direction.
    """
    if components.kind != "low_rank":
        raise ArgumentError("components: expected low-rank ones; a diagonal component's direction depends on the data")
    if isinstance(combine, str) and combine != "principal":
        raise ArgumentError(f"combine: expected 'principal' or weights, got {combine!r}: one direction is asked for")
    (move,) = moves_of(Directions(components), subject_of(components, j), combine, reject, max_sim)
    flat = components.parameters.unflatten(move.vector.astype(np.float32))
    return {name: torch.from_numpy(part.copy()) for name, part in flat.items()}
