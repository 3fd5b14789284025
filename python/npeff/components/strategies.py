"""Group components that respond on the same examples into a tree.

Components that respond on the same examples may have quite different vectors: by 1 − |cos| the vectors of one group can
be as far apart as those of different groups, and a single outlying component then takes a cut for itself. The
*response* of example i to a move along component j is to second order ½ δ² gⱼᵀF_i gⱼ, and with F_i ≈ Σ_k W_ik g_k g_kᵀ

    E_ij = Σ_k W_ik (g_k·g_j)²        (low-rank; Σ_k W_ik h_k·h_j for the diagonal kind).

Components are alike as the columns of E are: similarity_jk = cos(E_·j, E_·k).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.factorisation import Factorisation
from npeff.errors import ArgumentError, check_integer
from npeff.short_repr import several

Array = npt.NDArray[Any]

PARTS_SHOWN = 16
"""Parts of a strategy that its text lists."""

LEAST_SHARE = 0.1
"""A group is a strategy when it holds this share of all coefficients, or half of an equal share if that is less."""


@dataclass(frozen=True, eq=False)
class Strategy:
    """A node of the tree; iterating over it gives its groups, of which ``len`` is the number.

    The groups are its children; a node without children is its own single group. The root that
    ``components.strategies(n)`` returns has n groups.

    Attributes:
        components: Indices of the components below it, ascending.
        coefficient: ``(n,)`` float32 sum of their coefficients.
        distance: Average ``1 − similarity`` at which its children were joined; 0 for a leaf.
        children: Its parts; empty for a leaf.
    """

    components: tuple[int, ...]
    coefficient: Array
    distance: float = 0.0
    children: tuple[Strategy, ...] = ()

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self.children or (self,))

    def __len__(self) -> int:
        return max(1, len(self.children))

    def __repr__(self) -> str:
        return f"Strategy({self._head()}{'; ' + several(self._parts(), 4) if self.children else ''})"

    def __str__(self) -> str:
        """What the group holds, and a line for each of its largest parts."""
        parts = [f"  {part}" for part in self._parts()]
        more = [f"  and {len(parts) - PARTS_SHOWN} smaller parts"] if len(parts) > PARTS_SHOWN else []
        return "\n".join([f"Strategy({self._head()})", *parts[:PARTS_SHOWN], *more])

    def _head(self) -> str:
        head = f"{len(self.components)} component{'s' if len(self.components) > 1 else ''}: {several(self.components)}"
        joined = f"; {len(self)} parts joined at 1 − similarity = {self.distance:.2f}" if len(self) > 1 else ""
        return f"{head}; {len(self.coefficient):,} examples{joined}"

    def _parts(self) -> list[str]:
        """The children, the largest share of the coefficients first."""
        whole = float(self.coefficient.sum(dtype=np.float64)) or 1.0
        shares = [(float(child.coefficient.sum(dtype=np.float64)) / whole, child) for child in self.children]
        shares.sort(key=lambda item: -item[0])
        return [f"{share:.0%} of the coefficients: {several(child.components)}" for share, child in shares]

    def top_examples(self, k: int = 16) -> Array:
        """Find the k examples with the largest summed coefficient; give their indices, descending."""
        return np.argsort(-self.coefficient, kind="stable")[:k].astype(np.int64)

    def walk(self) -> Iterator[Strategy]:
        """Iterate over this node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def response_weights(components: Factorisation) -> Array:
    """Compute S ``(r, r)`` float64 with E = W S: squared cosines of the vectors, or cosines for the diagonal kind."""
    cosines = components.cosines().astype(np.float64)
    return np.asarray(cosines**2 if components.kind == "low_rank" else cosines)


def response_similarity(components: Factorisation) -> Array:
    """Compute ``(r, r)`` float64 in [0, 1]: cosines between the columns of E (module docstring)."""
    S, W = response_weights(components), components.coefficients
    products = S @ (W.T @ W).astype(np.float64) @ S
    norms = np.sqrt(np.maximum(np.diag(products), 1e-30))
    out = np.clip(products / np.outer(norms, norms), 0, 1)
    np.fill_diagonal(out, 1)
    return np.asarray((out + out.T) / 2)


def strategy_tree(similarity: Array, coefficients: Array, n: int | None = None, mass: Array | None = None) -> Strategy:
    """Link components on average ``1 − similarity``, and cut the tree into groups with enough coefficient mass.

    The cut goes down from the root: the pair that was joined at the largest distance is split first, but a part with
    less than ``LEAST_SHARE`` of all coefficients is no strategy: it joins, at the end, the strategy that it is most
    similar to on average.

    Args:
        similarity: ``(r, r)`` in [0, 1] between components.
        coefficients: ``(n_examples, r)``.
        n: Number of nodes directly below the root, or None for the binary tree.
        mass: ``(r,)`` weight of each component; by default its summed coefficients.

    Returns:
        The root.

    Raises:
        ArgumentError: ``n`` is not between 1 and r.
    """
    from scipy.cluster.hierarchy import linkage  # a third of a second to import
    from scipy.spatial.distance import squareform

    r = len(similarity)
    if n is not None and check_integer("n", n) > r:
        raise ArgumentError(f"n: expected 1 ≤ n ≤ {r} strategies, got {n!r}")

    def node(children: Sequence[Strategy], distance: float) -> Strategy:
        parts = tuple(sorted(j for child in children for j in child.components))
        return Strategy(parts, coefficients[:, list(parts)].sum(1), distance, tuple(children))

    nodes = [Strategy((j,), coefficients[:, j]) for j in range(r)]
    if r == 1:
        return nodes[0]
    distances = np.clip(1 - (similarity + similarity.T) / 2, 0, 1)
    np.fill_diagonal(distances, 0)
    merges = linkage(squareform(distances, checks=False), "average")
    for left, right, distance, _ in merges:
        nodes.append(node((nodes[int(left)], nodes[int(right)]), float(distance)))
    if n is None or n == 1:
        return nodes[-1]
    mass = coefficients.sum(0, dtype=np.float64) if mass is None else np.asarray(mass, np.float64)
    tops = []
    for top, others in _cut(nodes, merges, mass, int(n), similarity):
        far = max([nodes[top].distance] + [1 - _mean(similarity, nodes[top], nodes[v]) for v in others])
        tops.append(node((nodes[top], *(nodes[v] for v in others)), far) if others else nodes[top])
    return node(sorted(tops, key=lambda v: v.components), nodes[-1].distance)


def _mean(similarity: Array, a: Strategy, b: Strategy) -> float:
    return float(similarity[np.ix_(a.components, b.components)].mean())


def _cut(nodes: list[Strategy], merges: Array, mass: Array, n: int, similarity: Array) -> list[tuple[int, list[int]]]:
    """So many nodes of the tree, none below another, each with the light nodes that go with it."""
    r = len(mass)
    weight = np.array([mass[list(node.components)].sum() for node in nodes])
    weight /= weight[-1] or 1.0
    least = min(LEAST_SHARE, 0.5 / n)
    while True:
        aside: list[int] = []

        def settle(v: int, least: float = least, aside: list[int] = aside) -> int:
            """The first node from v downwards both of whose parts weigh enough, or a leaf."""
            while v >= r:
                light, heavy = sorted((int(merges[v - r, 0]), int(merges[v - r, 1])), key=lambda u: weight[u])
                if weight[light] >= least:
                    break
                aside.append(light)
                v = heavy
            return v

        tops = [settle(len(nodes) - 1)]
        while len(tops) < n and max(tops) >= r:
            widest = max((v for v in tops if v >= r), key=lambda v: (nodes[v].distance, v))
            tops.remove(widest)
            tops += [settle(int(child)) for child in merges[widest - r, :2]]
        if len(tops) == n:
            break
        least = least / 2 if least > 1e-6 else 0.0  # not enough groups that heavy
    groups: dict[int, list[int]] = {top: [] for top in tops}
    for v in aside:
        groups[max(tops, key=lambda top: _mean(similarity, nodes[top], nodes[v]))].append(v)
    return list(groups.items())


def strategies_of_each(components: Factorisation, coefficients: Array, numbers: Iterable[int]) -> dict[int, Array]:
    """Find the strategy that each example follows: that with the largest mean response.

    The mean is over the strategy's components, weighted by their summed coefficients.

    Args:
        components: A decomposition.
        coefficients: ``(n, r)`` of these or other examples on the components; they decide the tree too.
        numbers: Numbers of strategies to sort into.

    Returns:
        Number of strategies → ``(n,)`` int64.
    """
    of_these = replace(components, coefficients=coefficients)
    similarity, mass = response_similarity(of_these), coefficients.sum(0, dtype=np.float64)
    responses = coefficients @ response_weights(components)
    sorted_into = {}
    for n in numbers:
        root = strategy_tree(similarity, coefficients[:0], n, mass)
        groups = root.children if n > 1 else (root,)
        means = []
        for group in groups:
            own = list(group.components)
            means.append(responses[:, own] @ (mass[own] / (mass[own].sum() or 1.0)))
        sorted_into[n] = np.argmax(np.stack(means, 1), axis=1)
    return sorted_into
