"""Directions in parameter space: of components and groups of them, without the others', and at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.fishers.scaling import column_factors

Array = npt.NDArray[Any]
Reject = Literal["span", "sequential"]

CHUNK = 1 << 16
"""Columns worked on at a time: a chunk of 512 components is 256 MB in float64."""
DEFAULT_MAX_SIM = {"span": 1.0, "sequential": 0.1}


@dataclass(frozen=True)
class Rejection:
    """What was taken out of a direction.

    Attributes:
        mode: ``"span"`` or ``"sequential"``.
        components: The components whose directions were taken out.
        kept: Norm of what is left of the unit vector: 1 when nothing was lost.
    """

    mode: Reject
    components: tuple[int, ...]
    kept: float


@dataclass(eq=False)
class Directions:
    """Unit directions of low-rank components, in the Fisher's own parameter space (block weights undone).

    Everything is float64 on the columns that the components keep; only the result has all parameters.

    Attributes:
        components: The decomposition.
    """

    components: Components
    _factor: Array = field(init=False)
    _columns: Array | None = field(init=False)
    _norms: dict[int, float] = field(init=False, default_factory=dict)
    _known: dict[int, Array] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        c = self.components
        self._columns = c.columns
        kept = c.n_parameters if c.columns is None else len(c.columns)
        self._stored = c.compression not in ("sketch", "gram")
        if not self._stored:  # sketches or inner products: what was recovered in parameter space counts
            kept, self._columns = c.n_parameters, None
        self._factor = np.ones(kept)
        if self._stored and c.block_weights is not None:
            full = column_factors(c.parameters, c.block_weights, c.kind).astype(np.float64)
            full = np.divide(1.0, full, out=np.zeros_like(full), where=full > 0)
            self._factor = full if c.columns is None else full[c.columns]

    def _rows(self, which: Sequence[int], columns: slice) -> Array:
        if self._stored:
            return self.components.vectors[list(which)][:, columns].astype(np.float64) * self._factor[columns]
        for k in which:
            if k not in self._known:
                self._known[k] = self.components.vector(k)
        rows = [self._known[k][columns].astype(np.float64) for k in which]
        return np.stack(rows) if rows else np.zeros((0, len(self._factor[columns])))

    def _chunks(self) -> list[slice]:
        return [slice(start, start + CHUNK) for start in range(0, len(self._factor), CHUNK)]

    def norms(self, which: Sequence[int]) -> Array:
        """``(k,)`` float64 norms of some vectors, their block weights undone."""
        if new := [k for k in which if k not in self._norms]:
            squares = sum((np.square(self._rows(new, c)).sum(1) for c in self._chunks()), np.zeros(len(new)))
            self._norms.update(zip(new, np.sqrt(squares).tolist(), strict=True))
        return np.array([self._norms[k] for k in which], np.float64)

    def gram(self, which: Sequence[int]) -> Array:
        """``(k, k)`` float64 cosines between some directions; 0 beside a zero direction."""
        products = sum((rows @ rows.T for rows in (self._rows(which, c) for c in self._chunks())), np.zeros(()))
        norms = self.norms(which)
        scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        return np.asarray(products * scale[:, None] * scale)

    def _combined(self, which: Sequence[int], weights: Array) -> Array:
        """``Σ_k weights_k ĝ_k`` on the kept columns."""
        norms = self.norms(which)
        scaled = np.divide(weights, norms, out=np.zeros(len(norms)), where=norms > 0)
        return np.concatenate([scaled @ self._rows(which, c) for c in self._chunks()] or [np.zeros(0)])

    def _against(self, which: Sequence[int], vector: Array) -> Array:
        """``ĝ_k · vector`` for each k."""
        norms = self.norms(which)
        products = sum((self._rows(which, c) @ vector[c] for c in self._chunks()), np.zeros(len(norms)))
        return np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)

    def combination(self, which: Sequence[int], weights: Sequence[float]) -> Array:
        """The unit vector along ``Σ_k weights_k ĝ_k``, ``(n_kept,)`` float64.

        Raises:
            ArgumentError: It is zero.
        """
        vector = self._combined(which, np.asarray(weights, np.float64))
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            what = f"component {which[0]} is zero" if len(which) == 1 else f"the components {list(which)} cancel"
            raise ArgumentError(f"j: {what}, so there is no direction to move along")
        return vector / norm

    def principal(self, which: Sequence[int], weights: Array) -> tuple[Array, float]:
        """The top eigenvector of ``Σ_k weights_k ĝ_k ĝ_kᵀ``, and the share of the trace that it holds.

        It does not depend on the arbitrary signs of the directions. Its own sign is that of the heaviest direction.
        """
        root = np.sqrt(np.asarray(weights, np.float64))
        cosines = self.gram(which)
        values, vectors = np.linalg.eigh(root[:, None] * cosines * root)
        coordinates = root * vectors[:, -1]
        heaviest = int(np.argmax(np.asarray(weights)))
        sign = np.sign((cosines @ coordinates)[heaviest]) or 1.0
        return self.combination(which, sign * coordinates), float(values[-1] / max(values.sum(), 1e-300))

    def reject(
        self, vector: Array, members: Sequence[int], mode: Reject, max_sim: float | None
    ) -> tuple[Array, Rejection]:
        """Take the other components' directions out of a unit vector.

        ``"span"``: ``v ← v − P v``, P the orthogonal projection onto the span of the others, so that v ends
        orthogonal to each of them. ``"sequential"``, as published: ``v ← v − (v·ĝ_k) ĝ_k`` for one k after the
        other, in their order; where the ĝ_k are not orthogonal to each other, v does not end orthogonal to all.

        Args:
            vector: ``(n_kept,)`` unit.
            members: Components that ``vector`` stands for: not rejected.
            mode: Which form.
            max_sim: Only components with ``|cos(ĝ_k, vector)|`` up to this are rejected; by default 1 (all)
                for the span, 0.1 for the sequential form.

        Returns:
            What is left, scaled to unit norm, and what was done.

        Raises:
            ArgumentError: Nothing is left.
        """
        limit = DEFAULT_MAX_SIM[mode] if max_sim is None else max_sim
        others = [k for k in range(self.components.n_components) if k not in set(members)]
        similar = np.abs(self._against(others, vector)) if others else np.zeros(0)
        alive = (similar <= limit + 1e-12) & (self.norms(others) > 0)
        chosen = [k for k, kept in zip(others, alive, strict=True) if kept]
        left = self._beside_span(vector, chosen) if mode == "span" else self._one_by_one(vector, chosen)
        kept = float(np.linalg.norm(left))
        if kept < 1e-5:
            raise ArgumentError(
                f"reject: the direction lies in the span of the {len(chosen)} other components, nothing is left of "
                "it; reject fewer with max_sim=, or none"
            )
        return left / kept, Rejection(mode, tuple(chosen), kept)

    def _beside_span(self, vector: Array, chosen: Sequence[int]) -> Array:
        if not chosen:
            return vector
        values, vectors = np.linalg.eigh(self.gram(chosen))
        kept = values > 1e-9 * values[-1]
        inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
        for _ in range(3):  # each round shrinks what rounding left of the projection
            vector = vector - self._combined(chosen, inverse @ self._against(chosen, vector))
        return vector

    def _one_by_one(self, vector: Array, chosen: Sequence[int]) -> Array:
        for k in chosen:
            vector = vector - self._combined([k], self._against([k], vector))
        return vector

    def full(self, vector: Array) -> Array:
        """A vector on the kept columns as one over all parameters, ``(m,)`` float64."""
        if self._columns is None:
            return vector
        full = np.zeros(self.components.n_parameters)
        full[self._columns] = vector
        return full


def random_direction(n_parameters: int, seed: int, number: int) -> Array:
    """An isotropic unit vector ``(m,)`` float64; the seed and the number decide it."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, number]))
    vector = generator.standard_normal(n_parameters)
    return np.asarray(vector / np.linalg.norm(vector))
