"""The data of a report: everything that is known about a decomposition, and the names of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, check_integer
from npeff.gradients.eligibility import BLOCKS
from npeff.language.places import check_places
from npeff.models.devices import parse_bytes
from npeff.perturbation.effect import Prediction
from npeff.perturbation.options import check_components
from npeff.reports.evidence import INFLUENCES, PUSHED, Given, InfluenceSummary, TrustSummary
from npeff.reports.examples import Gallery
from npeff.reports.extras import Extras
from npeff.reports.layout import Heads, HeatMap, StrategyNode, check_heads, head_map, map_positions, tree_of
from npeff.reports.summary import (
    ComponentSummary,
    TopExample,
    closest,
    coactivation,
    explained_shares,
    summarise,
    top_examples,
)
from npeff.reports.text import TAIL, ClassNames, ReadablePlaces, printable, readable

Array = npt.NDArray[Any]

UNSTABLE = 0.7
"""A component below this stability is to be read with doubt."""
NODE_EXAMPLES = 12
THUMBS = 8
NAMED = 3  # words that a heading names as predicted
LIKELIEST = 5  # words listed that the model predicts for an example
LISTED = 8  # classes listed that a strategy predicts
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
    def checked(cls, components: Components, data: Any, given: Mapping[str, Any]) -> ReportOptions:
        """Make options from keyword arguments, and check them.

        Raises:
            ArgumentError: The components, the data or an option are of another type than documented.
        """
        options = cls(**given)
        check_components(components)
        W = components.coefficients
        if not (np.isfinite(W) & (W >= 0)).all():
            raise ArgumentError("components: expected finite coefficients ≥ 0; decompose the Fishers again")
        if not isinstance(options.k, Integral) or isinstance(options.k, bool) or options.k < 1:
            raise ArgumentError(f"k: expected at least 1 top example per component, got {options.k!r}")
        check_integer("seed", options.seed, 0)
        if not isinstance(options.title, str | None):
            raise ArgumentError(f"title: expected a text, got {options.title!r}")
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
            ArgumentError: They are too few, too many, or a single string.
        """
        given, n_outputs = self.class_names, components.logits.shape[1]
        n_classes = max(n_outputs, int(np.max(components.labels, initial=-1)) + 1)
        fits = range(n_classes, (max(n_classes, 2) if n_outputs == 1 else n_classes) + 1)  # one output: two classes
        if given is not None and (isinstance(given, str | Mapping | Set) or not hasattr(given, "__len__")):
            raise ArgumentError(f"class_names: expected a list of names, got {given!r}")
        if given is not None:
            if len(given) not in fits and (n_outputs or len(given) < n_classes):
                raise ArgumentError(f"class_names: expected {n_classes} names, one per class, got {len(given)}")
            return ClassNames(given)
        if isinstance(data, ReadablePlaces):
            return ClassNames(None, data.output_names)
        if hasattr(self.tokenizer, "__len__") and 0 < len(self.tokenizer) <= n_outputs:
            return ClassNames(None, lambda classes: [str(self.tokenizer.decode([c])) for c in classes])
        dataset = getattr(data, "dataset", None)
        for owner, attribute in ((data, "class_names"), (dataset, "class_names"), (dataset, "classes")):
            found = getattr(owner, attribute, None)
            if isinstance(found, Sequence) and not isinstance(found, str) and len(found) in fits:
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
        headings: Per component, what it is about in a few words; ``shares`` are those of all coefficients.
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
        self.shares = {s.j: s.share for s in self.summaries}
        self.largest_share = max(self.shares.values(), default=0.0) or 1.0
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

    def explained_of(self, summary: ComponentSummary) -> float | None:
        """Return the mean explained share of its top examples' Fishers, where it is known."""
        values = [] if self.explained is None else [self.explained[t.index] for t in summary.top]
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

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

    def profile(self, summary: ComponentSummary) -> list[tuple[str, float]]:
        """Return a component's weight per predicted class, where the overview has room for all classes."""
        return self.names.named(enumerate(summary.profile.tolist())) if len(summary.profile) in PROFILED else []

    def related(self, similarity: Array, j: int) -> list[tuple[int, str, float]]:
        """Return the components most similar to one: ``(component, heading, similarity)``."""
        return [(i, self.headings[i], value) for i, value in closest(similarity, j)]

    def address_of(self, members: tuple[int, ...]) -> str | None:
        """Return where the page shows a group of components; None where it is no strategy of the tree."""
        return next((node.address for node in self.nodes if not node.leaf and node.components == members), None)

    def at(self, position: int, members: Sequence[int]) -> dict[str, Any]:
        """Return what a template prints of the example at a position, its coefficient the sum over some components."""
        (found,) = np.nonzero(np.asarray(self.components.ids) == position)
        unknown = TopExample(-1, position, 0.0, -1, -1)
        tops = top_examples(self.components, found[:1], self.components.coefficients[:, list(members)].sum(1))
        return self.gallery.show(tops[0] if tops else unknown, self.names, TAIL)

    def show(self, tops: Sequence[TopExample], j: int = -1) -> list[dict[str, Any]]:
        """Return what a template prints of examples, tokens in the colours of the attributions of component j."""
        drawn = {top.index: what for top, what in self.attributions.get(j, []) if "index" in what}
        return [self.gallery.show(top, self.names) | drawn.get(top.index, {}) for top in tops]

    def attributed(self, s: ComponentSummary) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return examples and what is drawn of their attributions, but for those that :meth:`show` colours."""
        found = self.attributions.get(s.j, [])
        apart = [(top, what) for top, what in found if "index" not in what or top not in s.shown]
        return [(self.gallery.show(top, self.names), what) for top, what in apart]

    def influential(self, influences: InfluenceSummary) -> list[dict[str, Any]]:
        """Return what a template prints of the training examples with the largest influence."""
        found = []
        for position, score in influences.pairs[:INFLUENCES]:
            shown = self.training.show(TopExample(position, position, 0.0, -1, -1), self.names)
            if shown["kind"] == "number" and position in influences.texts:
                shown |= {"kind": "text", "start": printable(influences.texts[position]), "rest": ""}
            found.append({**shown, "position": position, "score": score})
        return found

    def head_map(self, j: int) -> HeatMap | None:
        """Return the energy by attention head of a component with a vector in parameter space, where asked for."""
        heads = self.options.heads
        return None if heads is None else head_map(self.components.parameters, self.components.vector(j), heads)

    def predicted(self, node: StrategyNode) -> list[tuple[str, float]]:
        """Return the classes that a node predicts most: ``(name, share)``."""
        order = np.argsort(-node.profile, kind="stable")[:LISTED]
        return [(self.names[int(c)], float(node.profile[c])) for c in order if node.profile[c] >= 0.005]

    def members(self, node: StrategyNode) -> list[tuple[int, str, float]]:
        """Return the components of a node by falling share: ``(component, heading, share)``."""
        order = sorted(node.components, key=lambda j: -self.shares[j])
        return [(j, self.headings[j], self.shares[j]) for j in order]

    def changes(self, prediction: Prediction) -> list[tuple[str, float, float]]:
        """Return the likeliest words or classes of a prediction: ``(name, probability before, and after)``."""
        classes = prediction.classes[:LIKELIEST].tolist()
        return [(self.names[c], prediction.before[k], prediction.after[k]) for k, c in enumerate(classes)]

    def below_null(self, summary: ComponentSummary) -> bool:
        """Say whether chance would give a component of as much energy."""
        threshold = self.extras.trust.null_threshold
        return threshold is not None and summary.energy <= threshold

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

    Of places and texts also the words that tell the top examples from others, as in *Paris, Rome after “capital … is”*
    and *mostly politics with “reuters”*.
    """
    if not summary.top:
        return "unused"
    described = _classes_heading(summary, names)
    if names.are_words or gallery.of_places:
        return _place_heading(described, summary.top, gallery)
    telling = ", ".join(f"“{word}”" for word in gallery.telling(summary.top))
    return f"{described} with {telling}" if telling else described


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

    Every example is encoded, or those on some component's page. The result is for use in a ``with`` block.

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
    summaries = [
        replace(
            s, stability=given.trust.stability_of(s.j), kl_ratio=effect.kl_ratio, control_ratio=effect.control_ratio
        )
        for s in summarise(components, k, options.seed, progress=options.progress)
        for effect in [given.effect_of(s.j)]
    ]
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
        training.fill(options.influence_data, influential, {}, options.tokenizer, name="influence_data")
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
