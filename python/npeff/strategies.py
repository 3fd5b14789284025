"""Groups of components that work along similar directions, as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Strategy:
    """A node of the tree.

    Attributes:
        components: Indices of the components below it, ascending.
        coefficient: ``(n,)`` float32 sum of their coefficients.
        distance: Average ``1 − |cos|`` at which its children were joined; 0 for a leaf.
        children: Its parts; empty for a leaf.
    """

    components: tuple[int, ...]
    coefficient: Array
    distance: float = 0.0
    children: tuple[Strategy, ...] = ()

    def top_examples(self, k: int = 16) -> Array:
        """Indices of the k examples with the largest summed coefficient, descending."""
        return np.argsort(-self.coefficient, kind="stable")[:k].astype(np.int64)

    def walk(self) -> Iterator[Strategy]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def strategy_tree(cosines: Array, coefficients: Array, n: int | None = None) -> Strategy:
    """Average linkage on ``1 − |cos|``.

    Args:
        cosines: ``(r, r)`` |cos| between components.
        coefficients: ``(n_examples, r)``.
        n: Number of nodes directly below the root, or None for the binary tree.

    Returns:
        The root.

    Raises:
        ArgumentError: ``n`` is not between 1 and r.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # a third of a second to import
    from scipy.spatial.distance import squareform

    r = len(cosines)
    if n is not None and (not isinstance(n, int | np.integer) or not 1 <= n <= r):
        raise ArgumentError(f"n: expected 1 ≤ n ≤ {r} strategies, got {n!r}")

    def node(children: tuple[Strategy, ...], distance: float) -> Strategy:
        parts = tuple(sorted(j for child in children for j in child.components))
        return Strategy(parts, coefficients[:, list(parts)].sum(1), distance, children)

    nodes = [Strategy((j,), coefficients[:, j]) for j in range(r)]
    if r == 1:
        return nodes[0]
    distances = np.clip(1 - (cosines + cosines.T) / 2, 0, 1)
    np.fill_diagonal(distances, 0)
    merges = linkage(squareform(distances, checks=False), "average")
    for left, right, distance, _ in merges:
        nodes.append(node((nodes[int(left)], nodes[int(right)]), float(distance)))
    if n is None or n == r == 1:
        return nodes[-1]
    groups = fcluster(merges, n, "maxclust")
    wanted = {tuple(np.flatnonzero(groups == g).tolist()) for g in set(groups)}
    tops = tuple(sorted((v for v in nodes if v.components in wanted), key=lambda v: v.components))
    return tops[0] if len(tops) == 1 else node(tops, nodes[-1].distance)
