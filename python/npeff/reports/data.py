"""Everything that is known about a decomposition when its report is written, and what to call its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.reports.evidence import INFLUENCES, trust_of
from npeff.reports.examples import Gallery
from npeff.reports.extras import Extras, read_extras
from npeff.reports.figures import Heads, check_heads
from npeff.reports.layout import StrategyNode, map_positions, tree_of
from npeff.reports.summary import (
    ComponentSummary,
    TopExample,
    coactivation,
    explained_shares,
    summarise,
    top_examples,
)
from npeff.reports.text import ClassNames

Array = npt.NDArray[Any]

UNSTABLE = 0.7
"""A component below this stability is to be read with doubt."""
NODE_EXAMPLES = 12
THUMBS = 8


@dataclass
class ReportData:
    """What a report shows of a decomposition.

    Attributes:
        components: The decomposition.
        summaries: Its components, the largest share first.
        nodes: The tree of strategies.
        gallery: The examples' pictures and texts.
        training: Pictures and texts of influential training examples.
        extras: The optional inputs.
        names: Of the classes.
        cosines: ``(r, r)`` |cos| between the vectors.
        together: ``(r, r)`` cosine between the coefficients.
        places: ``(r, 2)`` in [0, 1] where the components stand on the map.
        explained: ``(n,)`` explained share of each example, or None.
        attributions: Per component, ``(example, what is drawn)``.
        heads: Attention heads per layer, see :func:`npeff.reports.figures.head_map`.
    """

    components: Components
    summaries: Sequence[ComponentSummary]
    nodes: Sequence[StrategyNode]
    gallery: Gallery
    training: Gallery
    extras: Extras
    names: ClassNames
    cosines: Array
    together: Array
    places: Array
    explained: Array | None = None
    attributions: Mapping[int, list[tuple[TopExample, dict[str, Any]]]] = field(default_factory=dict)
    heads: Heads = None

    def __post_init__(self) -> None:
        self.headings = {s.j: heading(s, self.names) for s in self.summaries}
        self.leaves = {node.components[0]: node for node in self.nodes if node.leaf}
        self.branches: dict[int, StrategyNode] = {}
        for node in self.nodes:  # parents come first: the first node of a group is its branch
            if node.group >= 0:
                self.branches.setdefault(node.group, node)

    def __enter__(self) -> ReportData:
        return self

    def __exit__(self, *error: object) -> None:
        self.gallery.close()
        self.training.close()

    def stability(self, j: int) -> float | None:
        """Return a component's stability, where it is known."""
        values = self.extras.trust.stability
        return None if values is None or not np.isfinite(values[j]) else float(values[j])

    def explained_of(self, summary: ComponentSummary) -> float | None:
        """Return the mean explained share of its top examples' Fishers, where it is known."""
        values = [] if self.explained is None else [self.explained[t.index] for t in summary.top]
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

    def kl_ratio(self, j: int) -> float | None:
        """Return the KL ratio of moving the weights along a component, where it is known."""
        effect = self.extras.effects.get((j,))
        return effect.kl_ratio if effect else None

    def strategy(self, j: int) -> StrategyNode | None:
        """Return the coloured strategy that a component belongs to, where there are several."""
        group = self.leaves[j].group
        return self.branches[group] if group >= 0 and len(self.branches) > 1 else None

    def below_null(self, summary: ComponentSummary) -> bool:
        """Whether chance would give a component of as much energy."""
        threshold = self.extras.trust.null_threshold
        return threshold is not None and summary.energy <= threshold

    def doubts(self, summary: ComponentSummary) -> str:
        """Give the reasons to doubt a component in a sentence; empty where none is known."""
        reasons = []
        stability = self.stability(summary.j)
        if stability is not None and stability < UNSTABLE:
            reasons.append(f"it does not come back when the decomposition is repeated (stability {stability:.2f})")
        if self.below_null(summary):
            threshold = self.extras.trust.null_threshold
            reasons.append(
                f"components of shuffled Fishers have as much energy ({summary.energy:.2g} ≤ {threshold:.2g})"
            )
        return "Read this one with doubt: " + ", and ".join(reasons) + "." if reasons else ""

    def node_heading(self, node: StrategyNode) -> str:
        """Describe a node in a few words: its component's heading, or the classes that it predicts."""
        if node.leaf:
            return self.headings[node.components[0]]
        if node.parent < 0:
            return "all components"
        order = np.argsort(-node.profile, kind="stable")
        known = [(self.names[int(c)], float(node.profile[c])) for c in order if node.profile[c] > 0]
        if not known:
            return f"{len(node.components)} components"
        if known[0][1] >= 0.8:
            return f"mostly {known[0][0]}"
        head = [name for name, share in known[:4] if share >= 0.1] or [known[0][0]]
        more = sum(share for _, share in known[len(head) :]) >= 0.1
        return ", ".join(head) + (", …" if more else "")


def heading(summary: ComponentSummary, names: ClassNames) -> str:
    """Describe a component in a few words: the classes between which the model weighs, else what it predicts most."""
    if not summary.top:
        return "unused"
    if summary.purity is None:
        return "no predictions on record"
    contest = summary.contest
    binary = len(summary.profile) == 2
    if len(contest) > 1 and contest[0][1] + contest[1][1] >= 0.55 and not (binary and summary.purity >= 0.75):
        return f"{names[contest[0][0]]} or {names[contest[1][0]]}"
    if contest and contest[0][1] >= 0.35 and not binary:
        return f"{names[contest[0][0]]} or something else"
    if summary.purity >= 0.5:
        values = [t.prediction for t in summary.top]
        return f"mostly {names[max(set(values), key=values.count)]}"
    return "several classes"


def collect_report_data(
    components: Components,
    data: Iterable[Any] | None,
    *,
    class_names: Sequence[str] | None = None,
    k: int = 16,
    tokenizer: Any = None,
    strategies: Any = None,
    influence_data: Iterable[Any] | None = None,
    heads: Heads = None,
    all_examples: bool = False,
    seed: int = 0,
    progress: bool = False,
    **extras: Any,
) -> ReportData:
    """Measure the components, build the tree, and encode the examples in one pass over the data.

    The arguments are those of :func:`npeff.report`; ``extras`` are its ``effects``, ``traces``, ``influences``,
    ``attributions`` and ``trust``. With ``all_examples`` every example is encoded, not only those on some component's
    page.

    Returns:
        The data of the report, to be closed: for use in a ``with`` block.

    Raises:
        ArgumentError: An argument is not as documented.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
    """
    check_data(components, data, k, tokenizer)
    check_data(components, influence_data, k, None)
    names = class_names_of(class_names, data, components)
    given = read_extras(components.n_components, len(components.coefficients), **extras)
    selection = components.provenance.get("selection")
    if selection is not None and not given.trust.held_out:  # of npeff decompose --select
        known = trust_of({"selection": selection}, None, None)
        own = replace(given.trust, held_out=known.held_out, train=known.train, chosen=known.chosen)
        given = replace(given, trust=own)
    if given.attributions and data is None:
        raise ArgumentError("attributions: need the data to be drawn over; pass data=")
    check_heads(components.parameters, heads)
    k = int(k)
    summaries = summarise(components, k, seed, progress=progress)
    nodes = tree_of(
        components,
        summaries,
        min(k, NODE_EXAMPLES),
        given.trust.n_strategies if strategies is None else strategies,
    )
    ids, labels = np.asarray(components.ids), np.asarray(components.labels)
    shown = {top.position for s in summaries for top in s.shown} | {top.position for node in nodes for top in node.top}
    attributed = {int(ids[i]) for _, i in given.attributions}
    gallery = Gallery(shown | attributed, {top.position for s in summaries for top in s.top[:THUMBS]}, attributed)
    if data is not None:
        wanted = set(ids.tolist()) if all_examples else shown | attributed
        gallery.fill(data, wanted, dict(zip(ids.tolist(), labels.tolist(), strict=True)), tokenizer, progress)
    influential = {position for found in given.influences.values() for position, _ in found.pairs[:INFLUENCES]}
    training = Gallery(influential)
    if influence_data is not None:
        training.fill(influence_data, influential, {}, tokenizer)
    explained = given.trust.explained
    if explained is None:
        explained = explained_shares(components.vectors, components.coefficients, components.loss, components.kind)
    cosines = components.cosines()
    return ReportData(
        components=components,
        summaries=summaries,
        nodes=nodes,
        gallery=gallery,
        training=training,
        extras=given,
        names=names,
        cosines=cosines,
        together=coactivation(components.coefficients),
        places=map_positions(1 - cosines),
        explained=explained,
        attributions=_drawn_attributions(gallery, components, given, tokenizer),
        heads=heads,
    )


def _drawn_attributions(
    gallery: Gallery, components: Components, extras: Extras, tokenizer: Any
) -> dict[int, list[tuple[TopExample, dict[str, Any]]]]:
    """Draw all attributions; see :meth:`Gallery.draw_attribution`."""
    found: dict[int, list[tuple[TopExample, dict[str, Any]]]] = {}
    for (j, i), weights in extras.attributions.items():
        (top,) = top_examples(components, np.array([i]), components.coefficients[:, j])
        drawn = gallery.draw_attribution(top.position, weights, tokenizer, f"attributions[{j}, {i}]")
        found.setdefault(j, []).append((top, drawn))
    for items in found.values():
        items.sort(key=lambda item: -item[0].coefficient)
    return found


# ---- checks -------------------------------------------------------------------------------------------------


def check_data(components: Any, data: Any, k: Any, tokenizer: Any) -> None:
    """Refuse arguments of other types than documented.

    Raises:
        ArgumentError: Naming the argument.
    """
    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}; see npeff.decompose")
    if not isinstance(k, Integral) or k < 1:
        raise ArgumentError(f"k: expected at least 1 top example per component, got {k!r}")
    if data is not None and not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ArgumentError(f"data: expected an iterable of batches, got {data!r}")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise ArgumentError(f"tokenizer: expected something with decode(ids), got a {type(tokenizer).__name__}")


def class_names_of(given: Sequence[str] | None, data: Any, components: Components) -> ClassNames:
    """Return the classes' names: as given, or as the data has them.

    Raises:
        ArgumentError: They are too few, or a single string.
    """
    n_classes = components.logits.shape[1]
    if given is not None and (isinstance(given, str) or not hasattr(given, "__len__")):
        raise ArgumentError(f"class_names: expected a list of names, got {given!r}")
    if given is not None:
        if len(given) < n_classes:
            raise ArgumentError(f"class_names: expected {n_classes} names, one per class, got {len(given)}")
        return ClassNames(given)
    dataset = getattr(data, "dataset", None)
    for owner, attribute in ((data, "class_names"), (dataset, "class_names"), (dataset, "classes")):
        found = getattr(owner, attribute, None)
        if isinstance(found, Sequence) and not isinstance(found, str) and len(found) >= n_classes:
            return ClassNames(found)
    return ClassNames(None)
