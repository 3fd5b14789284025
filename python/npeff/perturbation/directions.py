"""Directions in parameter space: of components and groups of components, with the others rejected, and random ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.fishers.block_weights import column_factors
from npeff.perturbation.options import Combine, Reject, as_numbers, check_components

Array = npt.NDArray[Any]

CHUNK = 1 << 16
"""Columns worked on at a time: a chunk of 512 components is 256 MB in float64."""
DEFAULT_MAX_SIM = {"span": 1.0, "sequential": 0.1}


@dataclass(frozen=True, eq=False)
class Target:
    """A component, or a group of components, to perturb.

    Attributes:
        members: The components.
        coefficient: ``(n,)`` float64 coefficient of every example: a component's own, a strategy's sum.
        shares: Share of the group's coefficients that each member holds; they sum to 1.
    """

    members: tuple[int, ...]
    coefficient: Array
    shares: Array


@dataclass(frozen=True)
class Rejection:
    """The part that was removed from a direction.

    Attributes:
        mode: ``"span"`` or ``"sequential"``.
        components: The components whose directions were removed.
        kept: Norm of the rest of the unit vector: 1 when nothing was lost.
    """

    mode: Reject
    components: tuple[int, ...]
    kept: float


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit direction along which the weights move.

    In a large model a direction takes much memory: it is made when it is asked for, and not kept.

    Attributes:
        vector: Makes it, ``(m,)`` float64 of unit norm.
        component: The component of the direction; None for a combination.
        share: Weight in the average over a strategy's directions; the weights sum to 1.
        rejection: What was removed from the direction.
        explained: Share of the group's weighted directions that a principal direction holds.
        lam: λ of a diagonal component's interpolation.
        scale: Norm of ρ ∘ sign(gradient): magnitude / scale is δ.
    """

    vector: Callable[[], Array]
    component: int | None = None
    share: float = 1.0
    rejection: Rejection | None = None
    explained: float | None = None
    lam: float | None = None
    scale: float | None = None


def target_of(components: Components, j: Any, argument: str = "j") -> Target:
    """Return the component or strategy that ``j`` names; warn of the root of a tree of several groups.

    Raises:
        ArgumentError: ``j`` is neither a component nor a strategy of these components.
    """
    r = components.n_components
    if isinstance(j, Strategy):
        members = tuple(int(k) for k in j.components)
        if not members or max(members) >= r or len(j.coefficient) != len(components.coefficients):
            raise ArgumentError(
                f"{argument}: the strategy is not one of these {r} components of {len(components.coefficients)} "
                "examples; take it from components.strategies()"
            )
        if len(members) == r and len(j) > 1:
            warnings.warn(
                f"{argument}: this strategy is the root of a tree: all {r} components are used, those of its {len(j)} "
                "groups together. For one group iterate over it: for group in components.strategies(n)",
                stacklevel=6 if argument == "j" else 4,
            )
    elif isinstance(j, int | np.integer) and not isinstance(j, bool) and -r <= j < r:
        members = (int(j) % r,)
    else:
        raise ArgumentError(
            f"{argument}: expected a component from 0 to {r - 1}, or a strategy of components, got {j!r}"
        )
    W = components.coefficients[:, list(members)].astype(np.float64)
    mass = W.sum(0)
    shares = mass / mass.sum() if mass.sum() > 0 else np.full(len(members), 1 / len(members))
    return Target(members, W.sum(1), shares)


class ComponentDirections:
    """Unit directions of low-rank components, in the Fisher's own parameter space (block weights undone).

    Everything is float64 on the columns that the components keep; only :meth:`full` has all parameters.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        # Of sketches and inner products, the vectors recovered in parameter space are used.
        self._stored = components.compression not in ("sketch", "gram")
        self._columns = components.columns if self._stored else None
        self._n_columns = components.n_parameters if self._columns is None else len(self._columns)
        self._norms: dict[int, float] = {}
        self._factor: Array | None = None
        if self._stored and components.block_weights is not None:
            factors = column_factors(components.parameters, components.block_weights, components.kind)
            factors = (factors if self._columns is None else factors[self._columns]).astype(np.float64)
            self._factor = np.divide(1.0, factors, out=np.zeros(len(factors)), where=factors > 0)

    def of_target(
        self, target: Target, combine: Combine, reject: Reject | None, max_sim: float | None
    ) -> list[Direction]:
        """Compute the unit directions along which a target moves; the arguments are those of :func:`npeff.perturb`.

        Returns:
            One direction; for a group with ``combine="each"``, one per member that is not zero.

        Raises:
            ArgumentError: A direction is zero, or nothing is left of it; weights do not fit the group.
        """
        members, explained = target.members, None
        if not isinstance(combine, str):
            weights = as_numbers("combine", combine)
            if weights.shape != (len(members),) or not np.isfinite(weights).all():
                raise ArgumentError(
                    f"combine: expected a weight for each of the {len(members)} components, got {combine!r}"
                )
            return [self._direction(members, weights, members, reject, max_sim)]
        if len(members) == 1:
            return [self._direction(members, np.ones(1), members, reject, max_sim, component=members[0])]
        if combine == "principal":
            weights, explained = self.principal(members, target.shares)
            return [self._direction(members, weights, members, reject, max_sim, explained=explained)]
        shares = np.where(self.norms(members) > 0, target.shares, 0.0)
        if not shares.any():
            raise ArgumentError(f"j: the components {list(members)} are all zero, so there is no direction")
        return [
            self._direction([k], np.ones(1), members, reject, max_sim, component=k, share=float(share / shares.sum()))
            for k, share in zip(members, shares, strict=True)
            if share > 0
        ]

    def _direction(
        self,
        which: Sequence[int],
        weights: Array,
        members: Sequence[int],
        reject: Reject | None,
        max_sim: float | None,
        **known: Any,
    ) -> Direction:
        """The direction of a combination, made once here to see that there is one."""

        def made() -> tuple[Array, Rejection | None]:
            vector = self.combination(which, weights)
            return (vector, None) if reject is None else self.reject(vector, members, reject, max_sim)

        return Direction(lambda: self.full(made()[0]), rejection=made()[1], **known)

    def combination(self, which: Sequence[int], weights: Sequence[float] | Array) -> Array:
        """Compute the unit vector along ``Σ_k weights_k ĝ_k``, ``(n_kept,)`` float64.

        Raises:
            ArgumentError: The sum is zero.
        """
        vector = self._sum(which, np.asarray(weights, np.float64))
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            what = f"component {which[0]} is zero" if len(which) == 1 else f"the components {list(which)} cancel"
            raise ArgumentError(f"j: {what}, so there is no direction to move along")
        vector /= norm
        return vector

    def principal(self, which: Sequence[int], weights: Array) -> tuple[Array, float]:
        """Find the top eigenvector of ``Σ_k weights_k ĝ_k ĝ_kᵀ``, as a combination, and its share of the trace.

        The eigenvector does not depend on the arbitrary signs of the directions. Its own sign is the sign of the
        direction with the largest weight.
        """
        root = np.sqrt(np.asarray(weights, np.float64))
        cosines = self.gram(which)
        values, vectors = np.linalg.eigh(root[:, None] * cosines * root)
        coordinates = root * vectors[:, -1]
        sign = np.sign((cosines @ coordinates)[int(np.argmax(root))]) or 1.0
        return sign * coordinates, float(values[-1] / max(values.sum(), 1e-300))

    def reject(
        self, vector: Array, members: Sequence[int], mode: Reject, max_sim: float | None
    ) -> tuple[Array, Rejection]:
        """Remove the directions of the components beside ``members`` from a unit vector ``(n_kept,)``.

        ``"span"``: ``v ← v − P v``, P the orthogonal projection onto the span of the others, so that v ends
        orthogonal to each of them. ``"sequential"``, as published: ``v ← v − (v·ĝ_k) ĝ_k`` for one k after the
        other, in their order; if the ĝ_k are not orthogonal to each other, v does not end orthogonal to all. Only
        components with ``|cos(ĝ_k, v)|`` up to ``max_sim`` are removed.

        Returns:
            The rest, scaled to unit norm, and what was removed.

        Raises:
            ArgumentError: Nothing is left.
        """
        limit = DEFAULT_MAX_SIM[mode] if max_sim is None else max_sim
        others = [k for k in range(self.components.n_components) if k not in set(members)]
        chosen: list[int] = []
        if others:
            alive = (np.abs(self._products(others, vector)) <= limit + 1e-12) & (self.norms(others) > 0)
            chosen = [k for k, kept in zip(others, alive, strict=True) if kept]
        left = vector
        if mode == "sequential":
            for k in chosen:
                left = left - self._sum([k], self._products([k], left))
        elif chosen:
            inverse = np.linalg.pinv(self.gram(chosen), rcond=1e-9, hermitian=True)
            for _ in range(3):  # each round shrinks what rounding left of the projection
                left = left - self._sum(chosen, inverse @ self._products(chosen, left))
        kept = float(np.linalg.norm(left))
        if kept < 1e-5:
            raise ArgumentError(
                f"reject: the direction lies in the span of the {len(chosen)} other components, nothing is left of "
                "it; reject fewer with max_sim=, or none"
            )
        return left / kept, Rejection(mode, tuple(chosen), kept)

    def full(self, vector: Array) -> Array:
        """Extend a vector on the kept columns to all parameters, ``(m,)`` float64."""
        if self._columns is None:
            return vector
        full = np.zeros(self.components.n_parameters)
        full[self._columns] = vector
        return full

    def norms(self, which: Sequence[int]) -> Array:
        """Compute the ``(k,)`` float64 norms of some vectors, their block weights undone."""
        if new := [k for k in which if k not in self._norms]:
            squares = sum((np.square(self._rows(new, c)).sum(1) for c in self._chunks(new)), np.zeros(len(new)))
            self._norms.update(zip(new, np.sqrt(squares).tolist(), strict=True))
        return np.array([self._norms[k] for k in which], np.float64)

    def gram(self, which: Sequence[int]) -> Array:
        """Compute the ``(k, k)`` float64 cosines between some directions; 0 beside a zero direction."""
        products = sum((rows @ rows.T for rows in (self._rows(which, c) for c in self._chunks(which))), np.zeros(()))
        scale = self._inverse_norms(which)
        return np.asarray(products * scale[:, None] * scale)

    def _inverse_norms(self, which: Sequence[int]) -> Array:
        norms = self.norms(which)
        return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)

    def _sum(self, which: Sequence[int], weights: Array) -> Array:
        """``Σ_k weights_k ĝ_k`` on the kept columns."""
        scaled, total = weights * self._inverse_norms(which), np.empty(self._n_columns)
        for c in self._chunks(which):
            total[c] = scaled @ self._rows(which, c)
        return total

    def _products(self, which: Sequence[int], vector: Array) -> Array:
        """``ĝ_k · vector`` for each k."""
        products = sum((self._rows(which, c) @ vector[c] for c in self._chunks(which)), np.zeros(len(which)))
        return np.asarray(products * self._inverse_norms(which))

    def _rows(self, which: Sequence[int], columns: slice) -> Array:
        if self._stored:
            rows = self.components.vectors[list(which), columns].astype(np.float64)
            return rows if self._factor is None else rows * self._factor[columns]
        return np.stack([self.components.recovered_entries(k, columns) for k in which]).astype(np.float64)

    def _chunks(self, which: Sequence[int]) -> list[slice]:
        size = CHUNK * max(1, 64 // len(which))
        return [slice(start, start + size) for start in range(0, self._n_columns, size)]


def random_direction(n_parameters: int, seed: int, number: int) -> Array:
    """Draw an isotropic unit vector ``(m,)`` float64 that the seed and the number determine."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, number]))
    vector = generator.standard_normal(n_parameters)
    vector /= np.linalg.norm(vector)
    return vector


def direction(
    components: Components,
    j: Any,
    *,
    combine: Combine = "principal",
    reject: Reject | None = None,
    max_sim: float | None = None,
) -> dict[str, torch.Tensor]:
    """Compute the unit direction of a low-rank component or strategy, for :func:`npeff.applied` and similar functions.

    Args:
        components: Low-rank components.
        j: A component, or a strategy of components.
        combine: A strategy's ``"principal"`` direction (the top eigenvector of ``Σ_k w_k g_k g_kᵀ``, w_k the
            member's share of the strategy's coefficients), or a weight per member for ``Σ_k a_k g_k``.
        reject: Remove the directions of the other components, as for :func:`npeff.perturb`.
        max_sim: As for :func:`npeff.perturb`.

    Returns:
        Parameter-shaped float32 tensors by name, of unit norm together.

    Raises:
        ArgumentError: The components are not low-rank, or there is no such direction.
    """
    check_components(components)
    if components.kind != "low_rank":
        raise ArgumentError("components: expected low-rank ones; a diagonal component's direction depends on the data")
    if isinstance(combine, str) and combine != "principal":
        raise ArgumentError(f"combine: expected 'principal' or weights, got {combine!r}: one direction is asked for")
    (found,) = ComponentDirections(components).of_target(target_of(components, j), combine, reject, max_sim)
    flat = components.parameters.unflatten(found.vector().astype(np.float32))
    return {name: torch.from_numpy(part.copy()) for name, part in flat.items()}
