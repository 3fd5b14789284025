"""The data of a report: everything that is known about a decomposition, and the names of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.gradients.eligibility import BLOCKS
from npeff.language.places import check_places
from npeff.models.devices import parse_bytes
from npeff.perturbation.effect import Prediction
from npeff.reports.evidence import INFLUENCES, PUSHED, Given, TrustSummary
from npeff.reports.examples import Gallery
from npeff.reports.extras import Extras
from npeff.reports.layout import Heads, StrategyNode, check_heads, map_positions, tree_of
from npeff.reports.places import TAIL, ReadablePlaces, readable
from npeff.reports.summary import (
    ClassNames,
    ComponentSummary,
    TopExample,
    closest,
    coactivation,
    explained_shares,
    summarise,
    top_examples,
)

Array = npt.NDArray[Any]

UNSTABLE = 0.7
"""A component below this stability is to be read with doubt."""
NODE_EXAMPLES = 12
THUMBS = 8
NAMED = 3  # words that a heading names as predicted
LIKELIEST = 5  # words listed that the model predicts for an example
PROFILED = range(2, 21)
"""Numbers of classes whose shares are drawn side by side in the overview."""


@dataclass(frozen=True)
class ReportOptions:
    """The keyword arguments of :func:`npeff.report`, which documents them; collages and documents have some of them."""

    class_names: Sequence[str] | None = None
    k: int = 16
    title: str | None = None
    tokenizer: Any = None
    strategies: Strategy | int | None = None
    effects: Any = None
    traces: Any = None
    trust: Any = None
    attributions: Any = None
    influences: Any = None
    influence_data: Iterable[Any] | None = None
    heads: Heads = None
    size_limit: int | str | None = None
    seed: int = 0
    progress: bool = True

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Select the options among the arguments of a function."""
        return {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}

    @classmethod
    def checked(cls, components: Components, data: Any, given: Mapping[str, Any]) -> ReportOptions:
        """Make options from keyword arguments, and check them.

        Raises:
            ArgumentError: The components, the data or an option are of another type than documented.
        """
        options = cls(**given)
        if not isinstance(components, Components):
            raise ArgumentError(
                f"components: expected Components, got {type(components).__name__}; see npeff.decompose"
            )
        if not isinstance(options.k, Integral) or options.k < 1:
            raise ArgumentError(f"k: expected at least 1 top example per component, got {options.k!r}")
        for name, value in (("data", data), ("influence_data", options.influence_data)):
            if value is not None and not isinstance(value, Iterable) and not hasattr(value, "__getitem__"):
                raise ArgumentError(f"{name}: expected an iterable of batches, got {value!r}")
        if options.tokenizer is not None and not callable(getattr(options.tokenizer, "decode", None)):
            raise ArgumentError(
                f"tokenizer: expected something with decode(ids), got a {type(options.tokenizer).__name__}"
            )
        if options.size_limit is not None:
            parse_bytes(options.size_limit, "size_limit")
        check_heads(components.parameters, options.heads)
        return options

    def names(self, data: Any, components: Components) -> ClassNames:
        """Return the classes' names: as given, as the data has them, or words where the classes are tokens.

        Raises:
            ArgumentError: They are too few, or a single string.
        """
        given, n_classes = self.class_names, components.logits.shape[1]
        if given is not None and (isinstance(given, str) or not hasattr(given, "__len__")):
            raise ArgumentError(f"class_names: expected a list of names, got {given!r}")
        if given is not None:
            if len(given) < n_classes:
                raise ArgumentError(f"class_names: expected {n_classes} names, one per class, got {len(given)}")
            return ClassNames(given)
        if isinstance(data, ReadablePlaces):
            return ClassNames(None, data.output_names)
        if hasattr(self.tokenizer, "__len__") and 0 < len(self.tokenizer) <= n_classes:
            return ClassNames(None, lambda classes: [str(self.tokenizer.decode([c])) for c in classes])
        dataset = getattr(data, "dataset", None)
        for owner, attribute in ((data, "class_names"), (dataset, "class_names"), (dataset, "classes")):
            found = getattr(owner, attribute, None)
            if isinstance(found, Sequence) and not isinstance(found, str) and len(found) >= n_classes:
                return ClassNames(found)
        return ClassNames(None)


@dataclass
class ReportData:
    """The data that a report shows of a decomposition.

    Attributes:
        components: The decomposition.
        options: The options of the report.
        summaries: Its components, the largest share first.
        nodes: The tree of strategies.
        gallery: The examples' pictures and texts.
        training: Pictures and texts of influential training examples.
        extras: The optional inputs.
        names: Of the classes.
        cosines: ``(r, r)`` |cos| between the vectors.
        together: ``(r, r)`` cosine between the coefficients.
        map: ``(r, 2)`` in [0, 1] where the components stand on the map.
        explained: ``(n,)`` explained share of each example, or None.
        attributions: Per component, ``(example, what is drawn)``.
    """

    components: Components
    options: ReportOptions
    summaries: Sequence[ComponentSummary]
    nodes: Sequence[StrategyNode]
    gallery: Gallery
    training: Gallery
    extras: Extras
    names: ClassNames
    cosines: Array
    together: Array
    map: Array
    explained: Array | None = None
    attributions: Mapping[int, list[tuple[TopExample, dict[str, Any]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headings = {s.j: heading(s, self.names, self.gallery) for s in self.summaries}
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

    @property
    def block_weights(self) -> dict[str, Any] | None:
        """The block weights: how they were chosen, the least, the largest, and that of each parameter."""
        weights = self.components.block_weights
        if weights is None:
            return None
        described = self._fisher_options.get("block_weights")
        chosen = described.get("choice") if isinstance(described, Mapping) else described
        own = (self.components.provenance.get("options") or {}).get("block_weights")
        of = {name: weights.get(name, 1.0) for name in self.components.parameters.names}
        choice = "balanced" if "balanced" in (chosen, own) else "given"
        return {"choice": choice, "least": min(of.values()), "largest": max(of.values()), "of": of}

    @property
    def of_transformer_blocks(self) -> bool:
        """Whether the Fishers are about the linear layers of transformer blocks alone."""
        return self._fisher_options.get("parameters") == [BLOCKS]

    @property
    def _fisher_options(self) -> Mapping[str, Any]:
        return (self.components.provenance.get("fishers") or {}).get("options") or {}

    def strategy(self, j: int) -> StrategyNode | None:
        """Return the coloured strategy that a component belongs to, where there are several."""
        group = self.leaves[j].group
        return self.branches[group] if group >= 0 and len(self.branches) > 1 else None

    @property
    def largest_share(self) -> float:
        """The largest component's share of all coefficients."""
        return max((s.share for s in self.summaries), default=0.0) or 1.0

    def profile(self, summary: ComponentSummary) -> list[tuple[str, float]]:
        """Return a component's weight per predicted class, where the overview has room for all classes."""
        return self.names.named(enumerate(summary.profile.tolist())) if len(summary.profile) in PROFILED else []

    def related(self, similarity: Array, j: int) -> list[tuple[int, str, float]]:
        """Return the components most similar to one: ``(component, heading, similarity)``."""
        return [(i, self.headings[i], value) for i, value in closest(similarity, j)]

    def address_of(self, members: tuple[int, ...]) -> str | None:
        """Return where the page shows a group of components; None where it is no strategy of the tree."""
        return next((node.address for node in self.nodes if not node.leaf and node.components == members), None)

    def at(self, position: int) -> dict[str, Any]:
        """Return what a template prints of the example at a position in the data."""
        (found,) = np.nonzero(np.asarray(self.components.ids) == position)
        unknown = TopExample(-1, position, 0.0, -1, -1)
        tops = top_examples(self.components, found[:1], np.zeros(len(self.components.ids)))
        return self.gallery.show(tops[0] if tops else unknown, self.names, TAIL)

    def changes(self, prediction: Prediction) -> list[tuple[str, float, float]]:
        """Return the likeliest words or classes of a prediction: ``(name, probability before, and after)``."""
        classes = prediction.classes[:LIKELIEST].tolist()
        return [(self.names[c], prediction.before[k], prediction.after[k]) for k, c in enumerate(classes)]

    def below_null(self, summary: ComponentSummary) -> bool:
        """Say whether chance would give a component of as much energy."""
        threshold = self.extras.trust.null_threshold
        return threshold is not None and summary.energy <= threshold

    def doubts(self, summary: ComponentSummary) -> str:
        """Return the reasons to doubt a component in a sentence; empty where none is known."""
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
        if self.names.are_words:
            return _place_heading(_predicted(node.top, self.names), node.top, self.gallery)
        order = np.argsort(-node.profile, kind="stable")
        known = [(self.names[int(c)], float(node.profile[c])) for c in order if node.profile[c] > 0]
        if not known:
            return f"{len(node.components)} components"
        if known[0][1] >= 0.8:
            return f"mostly {known[0][0]}"
        head = [name for name, share in known[:4] if share >= 0.1] or [known[0][0]]
        more = sum(share for _, share in known[len(head) :]) >= 0.1
        return ", ".join(head) + (", …" if more else "")


def heading(summary: ComponentSummary, names: ClassNames, gallery: Gallery) -> str:
    """Describe a component in a few words: the classes between which the model weighs, else what it predicts most.

    Of places also the words that tell the top examples from others, as in *Paris, Rome after “capital … is”*.
    """
    if not summary.top:
        return "unused"
    described = _classes_heading(summary, names)
    return _place_heading(described, summary.top, gallery) if names.are_words or gallery.words else described


def _classes_heading(summary: ComponentSummary, names: ClassNames) -> str:
    if summary.purity is None:
        return "" if names.are_words else "no predictions on record"
    contest = summary.contest
    binary = len(summary.profile) == 2
    if len(contest) > 1 and contest[0][1] + contest[1][1] >= 0.55 and not (binary and summary.purity >= 0.75):
        return f"{names[contest[0][0]]} or {names[contest[1][0]]}"
    if names.are_words:
        return _predicted(summary.top, names)
    if contest and contest[0][1] >= 0.35 and not binary:
        return f"{names[contest[0][0]]} or something else"
    if summary.purity >= 0.5:
        values = [t.prediction for t in summary.top]
        return f"mostly {names[max(set(values), key=values.count)]}"
    return "several classes"


def _predicted(tops: Sequence[TopExample], names: ClassNames) -> str:
    """Name the words that are predicted at some places, those with the largest coefficients first."""
    mass: dict[int, float] = {}
    for top in tops:
        if top.prediction >= 0:
            mass[top.prediction] = mass.get(top.prediction, 0.0) + top.coefficient
    total = sum(mass.values()) or 1.0
    order = sorted(mass, key=lambda c: -mass[c])
    head = [c for c in order[:NAMED] if mass[c] >= 0.1 * total] or order[:1]
    rest = total - sum(mass[c] for c in head)
    return ", ".join(names[c] for c in head) + (", …" if mass and rest >= 0.1 * total else "")


def _place_heading(described: str, tops: Sequence[TopExample], gallery: Gallery) -> str:
    telling = " … ".join(gallery.telling(tops))
    return " ".join([described, f"after “{telling}”"] if telling else [described]).strip() or "several words"


def collect_report_data(
    components: Components, data: Iterable[Any] | None, options: ReportOptions, every: bool = False
) -> ReportData:
    """Measure the components, build the tree, and encode the examples in one pass over the data.

    Args:
        components: A decomposition.
        data: The data of its Fishers.
        options: Checked options of the report.
        every: Encode every example, not only those on some component's page.

    Returns:
        The data of the report, to be closed: for use in a ``with`` block.

    Raises:
        ArgumentError: An option is not as documented.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
    """
    names = options.names(data, components)
    check_places(data, components.provenance.get("fishers") or {})
    given = Extras.of(vars(options), components.n_components, len(components.coefficients))
    selection = components.provenance.get("selection")
    if selection is not None and not given.trust.held_out:  # of npeff decompose --select
        known = TrustSummary.of({"selection": Given("trust.selection", selection)})
        own = replace(given.trust, held_out=known.held_out, train=known.train, chosen=known.chosen)
        given = replace(given, trust=own)
    if given.attributions and data is None:
        raise ArgumentError("attributions: need the data to be drawn over; pass data=")
    k = int(options.k)
    summaries = summarise(components, k, options.seed, progress=options.progress)
    cut = given.trust.n_strategies if options.strategies is None else options.strategies
    nodes = tree_of(components, summaries, min(k, NODE_EXAMPLES), cut)
    ids, labels = np.asarray(components.ids), np.asarray(components.labels)
    shown = {top.position for s in summaries for top in s.shown} | {top.position for node in nodes for top in node.top}
    attributed = {int(ids[i]) for _, i in given.attributions}
    for effect in given.effects.values():
        pushed = [one.id for one in effect.predictions[:PUSHED]] + [one.id for one in effect.continuations[:PUSHED]]
        shown |= set(ids.tolist()).intersection(pushed)
    gallery = Gallery(shown | attributed, {top.position for s in summaries for top in s.top[:THUMBS]}, attributed)
    if data is not None:
        wanted = set(ids.tolist()) if every else shown | attributed
        on_record = dict(zip(ids.tolist(), labels.tolist(), strict=True))
        gallery.fill(readable(data, components.places), wanted, on_record, options.tokenizer, options.progress)
    influential = {position for found in given.influences.values() for position, _ in found.pairs[:INFLUENCES]}
    training = Gallery(influential)
    if options.influence_data is not None:
        training.fill(options.influence_data, influential, {}, options.tokenizer)
    explained = given.trust.explained
    if explained is None:
        explained = explained_shares(components.vectors, components.coefficients, components.loss, components.kind)
    cosines = components.cosines()
    return ReportData(
        components=components,
        options=options,
        summaries=summaries,
        nodes=nodes,
        gallery=gallery,
        training=training,
        extras=given,
        names=names,
        cosines=cosines,
        together=coactivation(components.coefficients),
        map=map_positions(1 - cosines),
        explained=explained,
        attributions=_drawn_attributions(gallery, components, given, options.tokenizer),
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
