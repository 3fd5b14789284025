"""Compare decompositions: match their components, and test whether parts of the examples give them again.

Components of inner products alone are combinations of the same rows. With K = A Aᵀ and vectors
``g_j = Σ_row c_row,j a_row``, K replaces the rows: inner products of vectors are ``cᵀ K c'``, those of rows with
vectors ``K c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from npeff import kernels
from npeff.components.components import Components
from npeff.components.strategies import strategies_of_each
from npeff.decomposition.decompose import decompose
from npeff.errors import ArgumentError, check_integer, check_number
from npeff.fishers.fishers import Fishers
from npeff.fishers.options import sketch_of
from npeff.fishers.scaling import scale

Array = npt.NDArray[Any]

COLUMNS = 1 << 16
"""Columns that are multiplied at a time, in float64."""


def similarity(a: Components, b: Components) -> Array:
    """Compute |cos| between the vectors of two decompositions of the same parameters.

    The vectors are compared as they were factorised, on the columns that either kept; without block weights where these
    differ; those of different sketches, or of inner products alone, as they were recovered in parameter space.

    Args:
        a: Components, ``r_a`` of them.
        b: Components of the same kind and parameters, ``r_b`` of them.

    Returns:
        ``(r_a, r_b)`` float64 in [0, 1].

    Raises:
        ArgumentError: Kind or parameters differ, or vectors have to be recovered first.
    """
    if a.kind != b.kind or a.parameters != b.parameters:
        raise ArgumentError(
            f"b: expected {a.kind} components of the parameters of a ({len(a.parameters)} tensors, {a.n_parameters:,} "
            f"elements), got {b.kind} ones of {len(b.parameters)} tensors, {b.n_parameters:,} elements"
            f"{' of other names or shapes' if a.parameters != b.parameters else ''}; compare decompositions of the "
            "same Fishers or of parts of them"
        )
    va, vb = _comparable(a, b)
    if a.columns is not None or b.columns is not None:
        everything = np.arange(a.n_parameters)
        ca, cb = (everything if x.columns is None else np.asarray(x.columns) for x in (a, b))
        _, ia, ib = np.intersect1d(ca, cb, assume_unique=True, return_indices=True)
    else:
        ia = ib = np.arange(va.shape[1])
    products = np.zeros((len(va), len(vb)))
    for start in range(0, len(ia), COLUMNS):
        part = slice(start, start + COLUMNS)
        products += va[:, ia[part]].astype(np.float64) @ vb[:, ib[part]].astype(np.float64).T
    norms = np.outer(*(np.sqrt(np.einsum("ij,ij->i", v, v, dtype=np.float64)) for v in (va, vb)))
    return np.asarray(np.minimum(np.abs(products) / np.maximum(norms, 1e-30), 1.0))


def _comparable(a: Components, b: Components) -> tuple[Array, Array]:
    """The vectors of both in one space: as factorised, without block weights, or recovered in parameter space.

    Raises:
        ArgumentError: They were factorised in different spaces, and were not all recovered.
    """
    elsewhere = [x.compression in ("sketch", "gram") for x in (a, b)]
    sketches = [sketch_of(x.provenance.get("fishers", {})) for x in (a, b)]
    ours, theirs = ([(x.block_weights or {}).get(name, 1.0) for name in x.parameters.names] for x in (a, b))
    if np.allclose(ours, theirs, rtol=1e-6, atol=0):
        if not any(elsewhere) or (sketches[0] is not None and sketches[0] == sketches[1]):
            return a.vectors, b.vectors
    elif not any(elsewhere):
        return a.unweighted(), b.unweighted()
    found = []
    for x in (a, b):
        x.check_recovered(range(x.n_components))
        found.append(x.unweighted() if x.columns is not None else np.stack([x.vector(j) for j in range(len(x))]))
    return found[0], found[1]


def match(a: Components, b: Components) -> tuple[Array, Array]:
    """Find the one-to-one matching of largest total |cos| (Hungarian algorithm).

    Args:
        a: Components, ``r_a`` of them.
        b: Components of the same parameters, ``r_b`` of them.

    Returns:
        ``(r_a,)`` int64 partner in b of each component of a, −1 where b has fewer, and ``(r_a,)`` float64 |cos| with
        it, 0 without a partner.

    Raises:
        ArgumentError: As :func:`similarity`.
    """
    return assigned(similarity(a, b))


def assigned(cosines: Array) -> tuple[Array, Array]:
    """Match as :func:`match`, from the ``(r_a, r_b)`` |cos|."""
    rows, columns = linear_sum_assignment(-cosines)
    partner = np.full(len(cosines), -1, np.int64)
    cosine = np.zeros(len(cosines))
    partner[rows], cosine[rows] = columns, cosines[rows, columns]
    return partner, cosine


def explained(components: Components, fishers: Fishers) -> Array:
    """Compute ``1 − ‖F_i − Σ_j w_ij C_j‖² / ‖F_i‖²`` with the best w_ij ≥ 0, C_j = g_j g_jᵀ (or h_j).

    Args:
        components: A decomposition.
        fishers: Fishers of the same parameters, of the decomposed examples or of others; where they keep inner products
            alone, those that the components were made from.

    Returns:
        ``(n,)`` float64 in [0, 1]: 1 when the components give the whole Fisher, 0 when none of it; NaN for a zero
        Fisher.

    Raises:
        ArgumentError: Kind or parameters differ.
    """
    if fishers.rows.products_only:
        share = InnerProducts(fishers, components).explained()
    else:
        share = 1 - components.encode(fishers).unexplained
    share[fishers.zero] = np.nan
    return np.asarray(np.clip(share, 0, 1))


def check_own(fishers: Fishers, components: Components) -> None:
    """Refuse Fishers of other examples than those that the components were made from.

    Raises:
        ArgumentError: Parts of them, or shuffled ones, say nothing about these components.
    """
    if not components.made_from(fishers):
        raise ArgumentError(
            f"fishers: expected those of the {len(components.coefficients)} examples that the components were made "
            f"from, in their order, got {len(fishers)} that are not these: what comes back from some examples, or by "
            "chance, is compared with the decomposition of the same ones. Decompose these Fishers first; "
            "npeff.trust.match compares two decompositions"
        )


class InnerProducts:
    """All examples' inner products, and the components made of all or of some of them.

    Args:
        fishers: Fishers that keep inner products alone.
        components: Of them.

    Raises:
        ArgumentError: The components are not of these Fishers, or do not say which combinations of rows they are.
    """

    def __init__(self, fishers: Fishers, components: Components) -> None:
        assert fishers.rows.products_only
        if components.compression != "gram" or not components.made_from(fishers):
            raise ArgumentError(
                "fishers: inner products alone (GramOnly) say nothing about other examples; expected those that the "
                "components were made from"
            )
        self.K, self.offsets = fishers.rows.values, np.array(fishers.row_offsets)  # torch wants it writable
        scaled = scale(fishers, "energy", components.provenance.get("normalize", "stored"))
        self.factors, self.norms = scaled.row_factors, scaled.fisher_norms
        self.weights = self.combinations(components, np.arange(len(fishers)))

    def combinations(self, components: Components, examples: Array) -> Array:
        """Return the combinations c ``(n_rows, r)`` float64 of components made of some of the examples.

        Raises:
            ArgumentError: They do not hold them.
        """
        if components.row_weights is None:
            raise ArgumentError(
                "components: they do not hold the combinations of rows that their vectors are, because they were "
                "expanded; decompose all at once"
            )
        rows = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in examples])
        c = np.zeros((len(self.K), components.n_components))
        c[rows] = components.row_weights
        return c

    def cosines(self, c: Array) -> Array:
        """Compute ``(r, r')`` float64 |cos| between the components and those with the combinations c."""
        ours, theirs = self._times(self.weights), self._times(c)
        products = np.abs(self.weights.T @ theirs)
        squares = [np.einsum("ij,ij->j", w, k) for w, k in ((self.weights, ours), (c, theirs))]
        return np.asarray(np.minimum(products / np.sqrt(np.maximum(np.outer(*squares), 1e-60)), 1.0))

    def coefficients(self, c: Array) -> Array:
        """Solve for ``(n, r')`` float32 coefficients of all examples on the components with the combinations c."""
        return np.asarray(self._solved(c)[0].float().numpy())

    def explained(self) -> Array:
        """Compute ``(n,)`` float64 ``1 − ‖F_i − Σ_j w_ij C_j‖² / ‖F_i‖²`` with the best w_ij ≥ 0."""
        w, cross, gram = self._solved(self.weights)
        told = (2 * (w * cross).sum(1) - ((w @ gram) * w).sum(1)).numpy()
        return np.asarray(told / np.maximum(self.norms**2, 1e-30))

    def _solved(self, c: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solve for the coefficients on the components with the combinations c; return them, ``cross`` and ``gram``."""
        Kc = self._times(c)
        cross = kernels.cross(torch.from_numpy(Kc * self.factors[:, None]), torch.from_numpy(self.offsets))
        gram = torch.from_numpy(c.T @ Kc) ** 2
        return kernels.nnls(gram, cross, exact=True).w, cross, gram

    def _times(self, c: Array) -> Array:
        """``K c`` in float64, some rows of K at a time."""
        parts = np.array_split(np.arange(len(self.K)), max(1, len(self.K) * len(self.K) >> 24))
        return np.concatenate([self.K[part].astype(np.float64) @ c for part in parts])


# ---- parts of the examples --------------------------------------------------------------------------------------

MOST_STRATEGIES = 16
EQUAL = 0.05  # adjusted Rand indices that differ by less say the same


@dataclass(frozen=True, eq=False)
class Stability:
    """Agreement of a decomposition with those of parts of the examples.

    Attributes:
        cosines: ``(repeats, r)`` float64 |cos| of each component with its partner in every repeat.
        strategies: Number of strategies → mean adjusted Rand index between the repeats' ways to sort all examples
            into so many strategies: 1 when they always agree, 0 when no better than chance.
        share: Share of the examples that each repeat saw.
    """

    cosines: Array
    strategies: dict[int, float]
    share: float

    def __repr__(self) -> str:
        repeats, r = self.cosines.shape
        back = self.components
        found = f"mean |cos| {back.mean():.2f}, lowest {back.min():.2f}" if r else "no components"
        n = self.n_strategies
        groups = f"{n} strategies come back best (adjusted Rand index {self.strategies[n]:.2f})"
        return f"Stability({r} components, {repeats} parts of {self.share:.0%} of the examples: {found}; {groups})"

    @property
    def components(self) -> Array:
        """``(r,)`` float64 mean |cos| of each component with its partners; 1: it always comes back."""
        return np.asarray(self.cosines.mean(0))

    @property
    def stable_numbers(self) -> tuple[int, ...]:
        """Numbers of strategies that come back about as well as the best one (index within 0.05), ascending."""
        best = max(self.strategies.values())
        return tuple(n for n, index in sorted(self.strategies.items()) if index >= best - EQUAL)

    @property
    def n_strategies(self) -> int:
        """The smallest of :attr:`stable_numbers`: finer levels of the tree divide its strategies further."""
        return self.stable_numbers[0]

    def to_json(self) -> dict[str, Any]:
        """Describe the result for JSON."""
        return {
            "share": self.share,
            "cosines": self.cosines.tolist(),
            "components": self.components.tolist(),
            "strategies": {str(n): index for n, index in self.strategies.items()},
            "stable_numbers": list(self.stable_numbers),
            "n_strategies": self.n_strategies,
        }


def stability(
    fishers: Fishers,
    components: Components,
    *,
    repeats: int = 4,
    share: float = 0.5,
    most_strategies: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Stability:
    """Decompose parts of the examples, and compare with the decomposition of all.

    Every repeat decomposes a random share of the examples with another seed. Components are matched one to one by |cos|
    of their vectors. Every repeat also sorts *all* examples into strategies: their coefficients on its components are
    solved for, and the group of its tree with the largest mean response wins; the adjusted Rand index (Hubert & Arabie
    1985) says how much two repeats agree.

    Args:
        fishers: The Fishers that the components were made from.
        components: The decomposition to judge.
        repeats: Number of parts.
        share: Share of the examples in each.
        most_strategies: Judge 2 to so many strategies; by default up to 16, fewer for few components.
        seed: Decides the parts.
        progress: Show a progress bar.
        **options: As for :func:`npeff.decompose`; by default those that the components were made with.

    Raises:
        ArgumentError: An option is out of range, or the Fishers are not those of the components.
    """
    check_integer("repeats", repeats, 2)
    check_integer("seed", seed, 0)
    if most_strategies is not None:
        check_integer("most_strategies", most_strategies, 2)
    check_number("share", share)
    if share > 1:
        raise ArgumentError(f"share: expected a share above 0 and at most 1, got {share}")
    inner = InnerProducts(fishers, components) if fishers.rows.products_only else None
    if inner is None:
        components.check_compatible(fishers)
        check_own(fishers, components)
    n, r = len(fishers), components.n_components
    size = max(1, round(share * n))
    most = min(r, most_strategies or MOST_STRATEGIES)
    options = {**components.scaling_of(fishers), **options, "progress": False}
    rng = np.random.default_rng(seed)
    cosines, sorted_examples = [], []
    for repeat in tqdm(range(repeats), "stability", disable=not progress, unit="part"):
        part = np.sort(rng.permutation(n)[:size]) if size < n else np.arange(n)
        again = decompose(fishers[part], r, seed=seed + 1 + repeat, **options)
        if inner is None:
            cosines.append(match(components, again)[1])
            coefficients = again.encode(fishers).coefficients
        else:
            c = inner.combinations(again, part)
            cosines.append(assigned(inner.cosines(c))[1])
            coefficients = inner.coefficients(c)
        sorted_examples.append(strategies_of_each(again, coefficients, range(2, most + 1)))
    seen = ~fishers.zero
    indices = {
        k: float(np.mean([rand_index(a[k][seen], b[k][seen]) for a, b in combinations(sorted_examples, 2)]))
        for k in range(2, most + 1)
    }
    return Stability(np.stack(cosines), indices or {1: 1.0}, share)


def rand_index(a: Array, b: Array) -> float:
    """Compute the adjusted Rand index of two ways to sort the same things (Hubert & Arabie 1985).

    Args:
        a: ``(n,)`` group of each thing.
        b: ``(n,)`` its group in the other sorting.

    Returns:
        1 for equal sortings, 0 on average for unrelated ones.
    """
    table = np.zeros((int(a.max(initial=0)) + 1, int(b.max(initial=0)) + 1))
    np.add.at(table, (a, b), 1)
    pairs = [float((x * (x - 1) / 2).sum()) for x in (table, table.sum(0), table.sum(1))]
    both, of_b, of_a = pairs
    total = len(a) * (len(a) - 1) / 2
    expected = of_a * of_b / total if total else 0.0
    largest = (of_a + of_b) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)
