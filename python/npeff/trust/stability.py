"""Test whether components, and groups of them, come back from parts of the examples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.components.components import Components
from npeff.components.strategies import strategies_of_each
from npeff.decomposition.decompose import decompose
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers
from npeff.trust.comparison import InnerProducts, assigned, match

Array = npt.NDArray[Any]

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
        """The smallest of them: finer levels of the tree divide its strategies further."""
        return self.stable_numbers[0]

    def to_json(self) -> dict[str, Any]:
        """Describe it for JSON."""
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
    if repeats < 2:
        raise ArgumentError(f"repeats: expected at least 2, got {repeats}")
    if not 0 < share <= 1:
        raise ArgumentError(f"share: expected a share above 0 and at most 1, got {share}")
    inner = InnerProducts(fishers, components) if fishers.rows.products_only else None
    if inner is None:
        components.check_compatible(fishers)
    n, r = len(fishers), components.n_components
    size = max(1, round(share * n))
    most = min(r, most_strategies or MOST_STRATEGIES)
    options = {**options_of(components), **options, "progress": False}
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


def options_of(components: Components) -> dict[str, Any]:
    """Give the options of ``decompose`` that decide what is minimised, as the components were made with them."""
    return {
        "block_weights": components.block_weights or "energy",
        "normalize": components.provenance.get("normalize", "stored"),
    }
