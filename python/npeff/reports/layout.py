"""Lay components out: as the tree of strategies, as points of a map, and as layers by parts and heads."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh
from torch import Tensor

from npeff.components.components import Components
from npeff.components.strategies import Strategy, response_similarity, strategy_tree
from npeff.errors import ArgumentError, DataError
from npeff.models.parameters import Parameter, Parameters
from npeff.reports.summary import ComponentSummary, TopExample, top_examples

Array = npt.NDArray[Any]
Heads = int | Mapping[str, int] | None

MOST_GROUPS = 12
"""Strategies that get a colour of their own; where the caller names no number, no more are made."""
AT_ONCE = 64
"""Nodes of the tree whose coefficients are summed at once."""
STEPS, EXAGGERATED = 350, 100  # of t-SNE
_SEARCH_STEPS, _ENTROPY_TOLERANCE = 100, 1e-8  # of its neighbourhoods; the entropy is in nats
MOST_POINTS = 2500  # components; with more, r² numbers a step take too long, and the map is classical scaling alone

# ---- the tree -----------------------------------------------------------------------------------------------


@dataclass
class StrategyNode:
    """A node of the tree of strategies as a report shows it.

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
    top: list[TopExample] = field(default_factory=list)
    profile: Array = field(default_factory=lambda: np.zeros(0))
    accuracy: float | None = None

    @property
    def leaf(self) -> bool:
        """Whether the node is a single component."""
        return not self.children

    @property
    def address(self) -> str:
        """The address at which the page shows the node."""
        return f"#component-{self.components[0]}" if self.leaf else f"#strategy-{self.id}"


def tree_of(
    components: Components,
    summaries: Sequence[ComponentSummary],
    k: int,
    strategies: Any = None,
    similarity: Array | None = None,
) -> list[StrategyNode]:
    """Number the nodes of the tree of strategies, parents before children, and measure each, with k examples.

    ``strategies`` is what ``components.strategies()`` gives, or a number of strategies to colour, by default the one
    with the best silhouette; ``similarity (r, r)`` is by default that of the components' responses.

    Raises:
        ArgumentError: ``strategies`` is neither a tree over these components nor such a number.
    """
    similarity = response_similarity(components) if similarity is None else similarity
    r = components.n_components
    root = strategies
    if not isinstance(strategies, Strategy):
        counted = isinstance(strategies, int) and not isinstance(strategies, bool)
        if strategies is not None and not (counted and 1 <= strategies <= r):
            raise ArgumentError(f"strategies: expected a Strategy or a number from 1 to {r}, got {strategies!r}")
        mass = components.coefficients.sum(0, dtype=np.float64)
        nothing = components.coefficients[:0]  # the tree's shape alone: no sums over the examples yet
        root = strategy_tree(similarity, nothing, strategies, mass)
    if sorted(root.components) != list(range(r)):
        raise ArgumentError(
            f"strategies: expected a tree over the components 0 to {r - 1}; take components.strategies()"
        )
    shares = {s.j: s.share for s in summaries}
    nodes: list[StrategyNode] = []
    waiting = [(root, -1)]
    while waiting:  # no recursion: a tree may be as deep as there are components
        strategy, parent = waiting.pop()
        node = StrategyNode(len(nodes), strategy.components, float(strategy.distance), parent)
        node.share = sum(shares[j] for j in node.components)
        nodes.append(node)
        if parent >= 0:
            nodes[parent].children.append(node.id)
        by_share = sorted(strategy.children, key=lambda child: sum(shares[j] for j in child.components))
        waiting += [(child, node.id) for child in by_share]
    _colour(nodes, similarity, strategies if isinstance(strategies, int) else None)
    _measure(components, nodes, k)
    return nodes


def _colour(nodes: list[StrategyNode], similarity: Array, number: int | None) -> None:
    if number == 1:
        cut = [0]
    elif number is not None or len(nodes[0].children) not in (0, 2):
        cut = nodes[0].children  # already cut
    else:
        cut = _best_cut(nodes, similarity)
    for group, top in enumerate(sorted(cut, key=lambda i: -nodes[i].share)):
        below = [top]
        while below:
            node = nodes[below.pop()]
            node.group = group
            below += node.children


def _best_cut(nodes: Sequence[StrategyNode], similarity: Array) -> list[int]:
    """Cut the tree where the groups have the largest mean silhouette under ``1 − similarity``.

    The cuts compared have 2, 3, … nodes: each time the widest node is split.
    """
    distances = 1 - similarity
    cut, best, chosen = [0], -np.inf, [0]
    while len(cut) < min(MOST_GROUPS, len(similarity)):
        widest = max((i for i in cut if nodes[i].children), key=lambda i: (nodes[i].distance, -i))
        cut = [i for i in cut if i != widest] + nodes[widest].children
        member = np.zeros((len(distances), len(cut)))
        for column, i in enumerate(cut):
            member[list(nodes[i].components), column] = 1
        value = silhouette(distances, member)
        if value > best + 1e-12:
            best, chosen = value, cut
    return chosen


def silhouette(distances: Array, member: Array) -> float:
    """Average ``(b − a) / max(a, b)``: a the mean distance within the own group, b to the nearest other one.

    Rousseeuw (1987). Distances are ``(r, r)``; ``member (r, groups)`` holds one 1 per row. A point alone in its group
    counts as 0.
    """
    sizes = member.sum(0)
    sums = distances @ member - np.diag(distances)[:, None] * member
    own = member.astype(bool)
    alone = (own * sizes).sum(1) <= 1
    a = (sums * own).sum(1) / np.maximum((own * sizes).sum(1) - 1, 1)
    b = np.where(own, np.inf, sums / sizes).min(1)
    return float(np.where(alone, 0, (b - a) / np.maximum(np.maximum(a, b), 1e-12)).mean())


def _measure(components: Components, nodes: list[StrategyNode], k: int) -> None:
    """Sum the coefficients below each inner node, some nodes at once."""
    W, predictions = components.coefficients, components.predictions
    inner = [node for node in nodes if not node.leaf]
    for start in range(0, len(inner), AT_ONCE):
        some = inner[start : start + AT_ONCE]
        member = np.zeros((W.shape[1], len(some)), np.float32)
        for column, node in enumerate(some):
            member[list(node.components), column] = 1
        for node, w in zip(some, (W @ member).T, strict=True):
            _describe(components, predictions, node, np.ascontiguousarray(w), k)


def _describe(components: Components, predictions: Array, node: StrategyNode, w: Array, k: int) -> None:
    order = np.argpartition(-w, min(k, len(w) - 1))[:k] if len(w) else np.zeros(0, np.int64)
    order = order[np.lexsort((order, -w[order]))]
    node.top = top_examples(components, order[w[order] > 0], w)
    labels, weights, n_classes = np.asarray(components.labels), w.astype(np.float64), components.logits.shape[1]
    if n_classes:
        mass = np.bincount(predictions, weights, minlength=n_classes)
        node.profile = mass / (mass.sum() or 1.0)
    known = (labels >= 0) & (predictions >= 0)
    if known.any() and weights[known].sum() > 0:
        node.accuracy = float(np.average((labels == predictions)[known], weights=weights[known]))


# ---- the map ------------------------------------------------------------------------------------------------


def map_positions(distances: Array) -> Array:
    """Lay points out in the unit square so that near points stay near.

    Classical scaling (Torgerson 1952), from which t-SNE (van der Maaten & Hinton 2008) starts: exact, with a perplexity
    of a tenth of the points (3 to 30). The same distances ``(r, r)`` give the same map: ``(r, 2)`` float64 in [0, 1],
    its longer side filling that range.
    """
    r = len(distances)
    if r == 1:
        return np.full((1, 2), 0.5)
    Y = _classical_scaling(distances)
    if 6 <= r <= MOST_POINTS:
        Y = _tsne(distances, Y, min(30.0, max(3.0, r / 10), (r - 1) / 3))
    low, high = Y.min(0), Y.max(0)
    side = float((high - low).max()) or 1.0
    return np.asarray((Y - (low + high) / 2) / side + 0.5)


def _classical_scaling(distances: Array) -> Array:
    """The two leading coordinates of ``−½ J D² J``, ``(r, 2)``."""
    r = len(distances)
    squared = np.square(distances)
    centred = -0.5 * (squared - squared.mean(0) - squared.mean(1)[:, None] + squared.mean())
    values, vectors = eigh(centred, subset_by_index=(max(0, r - 2), r - 1))
    Y = np.zeros((r, 2))
    Y[:, : len(values)] = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1]
    signs = np.sign(Y[np.abs(Y).argmax(0), range(2)])
    return np.asarray(Y * np.where(signs == 0, 1, signs))


def conditional_probabilities(distances: Tensor, perplexity: float) -> Tensor:
    """Compute p_{j|i} ∝ exp(−β_i d_ij), with β_i such that the entropy of row i is log perplexity.

    All rows are searched at once, by Newton steps in β within a bracket that is bisected where they leave it.

    Args:
        distances: ``(n, n)`` float64 squared distances.
        perplexity: Effective number of neighbours, above 1 and below n − 1.

    Returns:
        ``(n, n)`` float64, rows sum to 1, zero diagonal.

    Raises:
        ArgumentError: The perplexity is out of range.
        DataError: Distances are not finite.
    """
    n = len(distances)
    if not 1 <= perplexity <= n - 1:
        raise ArgumentError(f"perplexity: expected 1 ≤ perplexity ≤ n − 1 = {n - 1}, got {perplexity}")
    if not bool(torch.isfinite(distances).all()):
        raise DataError("distances: expected finite numbers, got NaN or infinite values")
    target = math.log(perplexity)
    others = ~torch.eye(n, dtype=torch.bool, device=distances.device)
    # Distances from the nearest one: the same probabilities, and exp never underflows altogether.
    gaps = distances.masked_fill(~others, torch.inf)
    gaps = (gaps - gaps.min(1, keepdim=True).values).masked_fill(~others, 0.0)
    scale = gaps.sum(1, keepdim=True) / (n - 1)
    beta = 1 / torch.where(scale > 0, scale, 1.0)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    p = torch.empty_like(distances)
    for _ in range(_SEARCH_STEPS):
        weights = torch.exp(-beta * gaps) * others
        total = weights.sum(1, keepdim=True)
        p = weights / total
        entropy = total.log() + beta * (p * gaps).sum(1, keepdim=True)
        if float((entropy - target).abs().max()) < _ENTROPY_TOLERANCE:
            break
        mean = (p * gaps).sum(1, keepdim=True)
        slope = -beta * ((p * gaps.square()).sum(1, keepdim=True) - mean.square())  # dH/dβ
        flat = entropy > target
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
        middle = torch.where(torch.isinf(high), 2 * beta, (low + high) / 2)
        newton = beta - (entropy - target) / slope
        inside = (newton > low) & (newton < high.clamp_max(4 * beta))
        beta = torch.where(inside, newton, middle).clamp_max(1e300)
    return p


def _tsne(distances: Array, start: Array, perplexity: float) -> Array:
    """Run exact t-SNE from the coordinates ``start (r, 2)``, which are scaled down first."""
    r = len(distances)
    P = conditional_probabilities(torch.from_numpy(np.square(distances, dtype=np.float64)), perplexity).numpy()
    P = np.maximum((P + P.T) / (2 * r), 1e-12)
    Y = start / max(float(start.std()), 1e-12) * 1e-2
    # Points that coincide would never part.
    Y = Y + np.random.default_rng(0).normal(scale=1e-4, size=Y.shape)
    velocity, gains = np.zeros_like(Y), np.ones_like(Y)
    rate = max(r / 12, 10.0)
    for step in range(STEPS):
        scale, momentum = (12.0, 0.5) if step < EXAGGERATED else (1.0, 0.8)
        norms = np.square(Y).sum(1)
        kernel = 1 / (1 + np.maximum(norms[:, None] + norms - 2 * Y @ Y.T, 0))
        np.fill_diagonal(kernel, 0)
        weights = (scale * P - kernel / kernel.sum()) * kernel
        gradient = 4 * (weights.sum(1)[:, None] * Y - weights @ Y)
        gains = np.clip(np.where(np.sign(gradient) != np.sign(velocity), gains + 0.2, gains * 0.8), 0.01, None)
        velocity = momentum * velocity - rate * gains * gradient
        Y = Y + velocity
        Y -= Y.mean(0)
    return np.asarray(Y)


# ---- tables of energy ---------------------------------------------------------------------------------------

# Where a parameter keeps its heads: (pattern of the name, dimension, equal parts that each hold all heads).
_HEADS = (
    (r"(^|\.)(in_proj_weight|in_proj_bias|qkv\.(weight|bias))$", 0, 3),
    (r"(^|\.)c_attn\.(weight|bias)$", -1, 3),
    (r"(^|\.)query_key_value\.(weight|bias)$", 0, 1),
    (r"(^|\.)(q|k|v|query|key|value)(_proj|_lin|_linear)?\.(weight|bias)$", 0, 1),
    (r"(^|\.)(o_proj|out_proj|out_lin|wo)\.weight$", 1, 1),
    (r"attention\.output\.dense\.weight$", 1, 1),
    (r"attn\.c_proj\.weight$", 0, 1),
)


@dataclass(frozen=True)
class HeatMap:
    """Energy in a table.

    Attributes:
        rows: Names of the layers.
        columns: Names of the parts.
        values: ``(rows, columns)`` shares of ‖g_j‖²; NaN where a layer has no such part.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array

    @property
    def largest(self) -> float:
        """The largest share, at least a very small number."""
        return float(np.nanmax(self.values, initial=1e-12))

    @property
    def totals(self) -> list[float]:
        """Sum per row."""
        return [float(v) for v in np.nansum(self.values, axis=1)]


def block_map(energy: Mapping[str, float]) -> HeatMap:
    """Arrange the share of ‖g_j‖² per parameter name as layers by parts, in the model's order.

    A name is cut behind its first number (``encoder.layer.3 | attention.query.weight``), names without one before their
    last part.
    """
    cells = {layer_and_part(name): share for name, share in energy.items()}
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), share in cells.items():
        values[rows.index(row), columns.index(column)] = share
    return HeatMap(rows, columns, values)


def layer_and_part(name: str) -> tuple[str, str]:
    """Cut a parameter's name into its layer and its part."""
    parts = name.split(".")
    cut = next((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:cut]) or "(model)", ".".join(parts[cut:])


def check_heads(parameters: Parameters, heads: Heads) -> None:
    """Make sure that ``heads`` fits some parameters.

    Raises:
        ArgumentError: It is no number and no mapping, or no parameter can be cut that way.
    """
    if heads is None:
        return
    numbers = list(heads.values()) if isinstance(heads, Mapping) else [heads]
    if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ArgumentError(f"heads: expected a number of heads, or a mapping from name patterns to one, got {heads!r}")
    if not any(_heads_of(parameter, heads) for parameter in parameters):
        raise ArgumentError(
            f"heads: no parameter could be cut into {heads!r} heads; leave heads out, give another number, or, from "
            "Python, a mapping from name patterns to numbers, for parameters whose first dimension holds the heads. "
            f"Names: {', '.join(parameters.names[:6])}, …"
        )


def head_map(parameters: Parameters, vector: Array, heads: Heads) -> HeatMap | None:
    """Sum the energy of a vector ``(n_parameters,)`` per layer and attention head; None where no parameter has heads.

    ``heads`` is the number per layer, for parameters with the usual names of attention projections; or a mapping from
    name patterns (``"*.attn.*"``) to numbers, for parameters whose first dimension holds the heads. Parameters that do
    not divide evenly (keys and values shared by several heads) are left out.
    """
    found: dict[str, Array] = {}
    for parameter in parameters:
        cut = _heads_of(parameter, heads)
        if cut is None:
            continue
        axis, parts, number = cut
        block = np.square(vector[parameter.slice].astype(np.float64)).reshape(parameter.shape)
        along = block.sum(tuple(d for d in range(block.ndim) if d != axis % block.ndim))
        energy = along.reshape(parts, number, -1).sum((0, 2))
        layer = layer_and_part(parameter.name)[0]
        old = found.get(layer, np.zeros(0))
        size = max(len(old), number)
        found[layer] = np.pad(old, (0, size - len(old))) + np.pad(energy, (0, size - number))
    if not found:
        return None
    most = max(map(len, found.values()))
    values = np.stack([np.pad(v, (0, most - len(v)), constant_values=np.nan) for v in found.values()])
    return HeatMap(tuple(found), tuple(str(h) for h in range(most)), values)


def _heads_of(parameter: Parameter, heads: Heads) -> tuple[int, int, int] | None:
    """``(dimension, parts, heads)`` of a parameter that holds heads; None for others."""
    if isinstance(heads, Mapping):
        number = next((n for pattern, n in heads.items() if fnmatch.fnmatchcase(parameter.name, pattern)), None)
        rules = [(0, 1)]
    else:
        number = heads
        rules = [(axis, parts) for pattern, axis, parts in _HEADS if re.search(pattern, parameter.name)]
    for axis, parts in rules:
        if number and -len(parameter.shape) <= axis < len(parameter.shape):
            size = parameter.shape[axis]
            if size and size % (parts * number) == 0:
                return axis, parts, number
    return None
