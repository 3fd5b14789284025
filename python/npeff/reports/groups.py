"""The tree of strategies as a report shows it: numbered nodes, each with its own coefficient and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npeff.components.strategies import Strategy, response_similarity, strategy_tree
from npeff.errors import ArgumentError
from npeff.reports.summary import Summary, Top, known_predictions, tops

if TYPE_CHECKING:
    from npeff.components.components import Components

Array = npt.NDArray[Any]

MOST_GROUPS = 12
"""Strategies that get a colour of their own; where the caller names none, no more are made."""


@dataclass
class Node:
    """A node of the tree.

    Attributes:
        id: Its number, parents before children; the root is 0.
        components: Indices of the components below it.
        distance: Average ``1 − similarity`` of the responses at which its children were joined.
        parent: The parent's number; −1 for the root.
        children: The children's numbers, the larger share first.
        group: The coloured strategy it belongs to; −1 above those.
        share: Σ of its coefficients as a share of Σ W.
        top: Examples with the largest summed coefficients.
        profile: ``(C,)`` share of its weight per predicted class.
        accuracy: Of its labelled examples, weighted by their coefficients; None without labels.
    """

    id: int
    components: tuple[int, ...]
    distance: float
    parent: int
    children: list[int] = field(default_factory=list)
    group: int = -1
    share: float = 0.0
    top: list[Top] = field(default_factory=list)
    profile: Array = field(default_factory=lambda: np.zeros(0))
    accuracy: float | None = None

    @property
    def leaf(self) -> bool:
        """Whether it is a single component."""
        return not self.children


def tree_of(
    components: Components,
    summaries: Sequence[Summary],
    k: int,
    strategies: Any = None,
    similarity: Array | None = None,
) -> list[Node]:
    """The nodes, parents before children.

    Args:
        components: A decomposition.
        summaries: Its components; their shares order the children.
        k: Examples per node.
        strategies: What ``components.strategies()`` gives, or a number of strategies to colour; by default the
            number with the best silhouette.
        similarity: ``(r, r)`` of the components; by default that of their responses
            (:mod:`npeff.components.strategies`).

    Raises:
        ArgumentError: ``strategies`` is neither a tree over these components nor such a number.
    """
    similarity = response_similarity(components) if similarity is None else similarity
    r = components.n_components
    root = strategies
    if not isinstance(strategies, Strategy):
        if strategies is not None and (not isinstance(strategies, int) or not 1 <= strategies <= r):
            raise ArgumentError(f"strategies: expected a Strategy or a number from 1 to {r}, got {strategies!r}")
        mass = components.coefficients.sum(0, dtype=np.float64)
        nothing = components.coefficients[:0]  # the tree's shape alone: no sums over the examples yet
        root = strategy_tree(similarity, nothing, strategies, mass)
    if sorted(root.components) != list(range(r)):
        raise ArgumentError(
            f"strategies: expected a tree over the components 0 to {r - 1}; take components.strategies()"
        )
    shares = {s.j: s.share for s in summaries}
    nodes: list[Node] = []
    waiting = [(root, -1)]
    while waiting:  # no recursion: a tree may be as deep as there are components
        strategy, parent = waiting.pop()
        node = Node(len(nodes), strategy.components, float(strategy.distance), parent)
        node.share = sum(shares[j] for j in node.components)
        nodes.append(node)
        if parent >= 0:
            nodes[parent].children.append(node.id)
        by_share = sorted(strategy.children, key=lambda child: sum(shares[j] for j in child.components))
        waiting += [(child, node.id) for child in by_share]
    _colour(nodes, similarity, strategies if isinstance(strategies, int) else None)
    _measure(components, nodes, k)
    return nodes


def group_of_each(nodes: Sequence[Node], r: int) -> list[int]:
    """The coloured strategy of every component."""
    groups = [0] * r
    for node in nodes:
        if node.leaf:
            groups[node.components[0]] = node.group
    return groups


def _colour(nodes: list[Node], similarity: Array, number: int | None) -> None:
    if number == 1:
        tops_of = nodes[:1]
    elif number is not None or len(nodes[0].children) > 2:
        tops_of = [nodes[i] for i in nodes[0].children]  # already cut
    else:
        tops_of = [nodes[i] for i in _best_cut(nodes, _cuts(nodes, min(MOST_GROUPS, len(similarity))), similarity)]
    for group, top in enumerate(sorted(tops_of, key=lambda node: -node.share)):
        below = [top.id]
        while below:
            node = nodes[below.pop()]
            node.group = group
            below += node.children


def _cuts(nodes: Sequence[Node], most: int) -> list[list[int]]:
    """The tree cut into 1, 2, … nodes: each time the widest one is split."""
    cuts = [[0]]
    while len(cuts[-1]) < most:
        splittable = [i for i in cuts[-1] if nodes[i].children]
        if not splittable:
            break
        widest = max(splittable, key=lambda i: (nodes[i].distance, -i))
        cuts.append([i for i in cuts[-1] if i != widest] + nodes[widest].children)
    return cuts


def _best_cut(nodes: Sequence[Node], cuts: Sequence[list[int]], similarity: Array) -> list[int]:
    """The cut, into 2 groups or more, with the largest mean silhouette (Rousseeuw 1987) under ``1 − similarity``."""
    distances = 1 - similarity
    best, chosen = -np.inf, cuts[0]
    for cut in cuts[1:]:
        member = np.zeros((len(distances), len(cut)))
        for column, i in enumerate(cut):
            member[list(nodes[i].components), column] = 1
        value = silhouette(distances, member)
        if value > best + 1e-12:
            best, chosen = value, cut
    return chosen


def silhouette(distances: Array, member: Array) -> float:
    """Mean of ``(b − a) / max(a, b)``: a the mean distance within the own group, b to the nearest other one.

    Args:
        distances: ``(r, r)``.
        member: ``(r, groups)`` 0 or 1, one 1 per row. Points alone in their group count as 0.
    """
    sizes = member.sum(0)
    sums = distances @ member - np.diag(distances)[:, None] * member
    own = member.astype(bool)
    alone = (own * sizes).sum(1) <= 1
    a = (sums * own).sum(1) / np.maximum((own * sizes).sum(1) - 1, 1)
    b = np.where(own, np.inf, sums / sizes).min(1)
    return float(np.where(alone, 0, (b - a) / np.maximum(np.maximum(a, b), 1e-12)).mean())


def _measure(components: Components, nodes: list[Node], k: int) -> None:
    """Sum coefficients from the leaves up; few arrays ``(n,)`` are alive at a time."""
    W = components.coefficients
    held: dict[int, Array] = {}
    for i in _heavy_first(nodes):
        node = nodes[i]
        if node.leaf:
            continue
        w = np.zeros(len(W), np.float32)
        for child in node.children:
            w += W[:, nodes[child].components[0]] if nodes[child].leaf else held.pop(child)
        held[i] = w
        _describe(components, node, w, k)


def _heavy_first(nodes: Sequence[Node]) -> list[int]:
    """Children before parents, the subtree with most components first: then at most log r sums are alive."""
    order, waiting = [], [0]
    while waiting:
        order.append(waiting.pop())
        children = nodes[order[-1]].children
        waiting += sorted(children, key=lambda i: -len(nodes[i].components))
    return order[::-1]


def _describe(components: Components, node: Node, w: Array, k: int) -> None:
    order = np.argpartition(-w, min(k, len(w) - 1))[:k] if len(w) else np.zeros(0, np.int64)
    order = order[np.lexsort((order, -w[order]))]
    node.top = tops(components, order[w[order] > 0], w)
    labels, predictions = np.asarray(components.labels), known_predictions(components)
    weights, n_classes = w.astype(np.float64), components.logits.shape[1]
    if n_classes:
        mass = np.bincount(predictions, weights, minlength=n_classes)
        node.profile = mass / (mass.sum() or 1.0)
    known = (labels >= 0) & (predictions >= 0)
    if known.any() and weights[known].sum() > 0:
        node.accuracy = float(np.average((labels == predictions)[known], weights=weights[known]))
