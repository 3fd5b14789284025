"""The parts of a report as markup: a page per component, a page per strategy, the rows of the overview."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from markupsafe import Markup

from npeff.reports.assets import environment
from npeff.reports.book import Book
from npeff.reports.energy import block_map, head_map
from npeff.reports.extras import INFLUENCES, Influences, Traced
from npeff.reports.figures import bars, effect_curve
from npeff.reports.groups import Node
from npeff.reports.images import uri_of
from npeff.reports.relations import closest
from npeff.reports.study import Study, doubts, node_address, node_heading
from npeff.reports.summary import Summary, Top
from npeff.reports.text import printable
from npeff.reports.wording import ClassNames, percent

Array = npt.NDArray[Any]

THUMBS = 8
THUMBS_SHARE = 0.2
"""What thumbnails may take of a single file's limit."""

PARTS = 16  # of a network that are shown of a trace
MEMBERS = 60  # components listed on a strategy's page
PROFILED = range(2, 21)
"""Numbers of classes whose shares are drawn side by side in the overview."""


def component_page(study: Study, place: int) -> str:
    """The page of the component at that place among the summaries."""
    summary, names = study.summaries[place], study.names
    j = summary.j
    counts = [max(a, b) for _, a, b in summary.classes]
    lists = {
        name: [study.gallery.show(top, names) for top in items]
        for name, items in (("shown", summary.top), ("middle", summary.middle), ("random", summary.random))
    }
    influences = study.extras.influences.get(j, Influences([]))
    known = bool(summary.block_energy)
    vector = study.components.vector(j) if study.heads is not None and known else None
    context = {
        "s": summary,
        **lists,
        "heading": study.headings[j],
        "tall": any(item["kind"] == "text" for item in lists["shown"]),
        "contest": [(names[c], share) for c, share in summary.contest],
        "blocks": [("all others" if name is None else name, share) for name, share in summary.blocks],
        "classes": [(names[c], a, b) for c, a, b in summary.classes],
        "most": max(counts, default=0) or 1,
        "has_labels": any(a for _, a, _ in summary.classes),
        "histogram": histogram(summary),
        "stability": study.stability(j),
        "explained": study.explained_of(summary),
        "chance": study.extras.trust.null_threshold is not None and not study.below_null(summary),
        "held_out": dict(study.extras.trust.held_out).get(study.components.n_components),
        **_moved(study, j),
        "strategy": study.strategy(j),
        "doubtful": doubts(study, summary),
        "neighbours": [(i, study.headings[i], value) for i, value in closest(study.cosines, j)],
        "together": [(i, study.headings[i], value) for i, value in closest(study.together, j)],
        "known": known,
        "block_map": block_map(summary.block_energy) if known else None,
        "head_map": None if vector is None else head_map(study.components.parameters, vector, study.heads),
        "attributions": [
            {"j": j, "item": study.gallery.show(top, names), "drawn": what}
            for top, what in study.attributions.get(j, [])
        ],
        "influences": [_influence(study, influences, *pair) for pair in influences.pairs[:INFLUENCES]],
        "influences_by": influences.by,
    }
    near = [study.summaries[p].j if 0 <= p < len(study.summaries) else None for p in (place - 1, place + 1)]
    return environment().get_template("component.html.j2").render(c=context, previous=near[0], next=near[1])


def _moved(study: Study, *components: int) -> dict[str, Any]:
    """What is known of moving the weights along a component, or a group of components."""
    effect = study.effect(*components)
    curve = effect_curve(effect.magnitudes, effect.kl_top, effect.kl_baseline) if effect else Markup("")
    acts = study.extras.traces.get(components)
    return {"effect": effect, "curve": curve, "acts": acts.parts[:PARTS] if acts else (), "more": _more(acts)}


def _more(acts: Traced | None) -> int:
    return max(0, len(acts.parts) - PARTS) if acts else 0


def moved_groups(study: Study) -> list[dict[str, Any]]:
    """Groups of components that were moved along or traced, for the page of strategies."""
    nodes = {node.components: node for node in study.nodes if not node.leaf}
    return [
        {
            "components": members,
            "address": node_address(nodes[members]) if members in nodes else None,
            **_moved(study, *members),
        }
        for members in study.extras.groups
    ]


def _influence(study: Study, influences: Influences, position: int, score: float) -> dict[str, Any]:
    shown = study.training.show(Top(position, position, 0.0, -1, -1), study.names)
    if shown["kind"] == "number" and position in influences.texts:
        shown |= {"kind": "text", "start": printable(influences.texts[position]), "rest": ""}
    return {**shown, "position": position, "score": score}


def strategy_page(study: Study, node: Node) -> str:
    """The page of a node of the tree that is no single component."""
    names, shares = study.names, {s.j: s.share for s in study.summaries}
    parts = [study.nodes[i] for i in node.children]
    members = sorted(node.components, key=lambda j: -shares[j])
    profile = sorted(enumerate(node.profile.tolist()), key=lambda item: -item[1])[:8]
    return (
        environment()
        .get_template("strategy.html.j2")
        .render(
            node=node,
            heading=node_heading(study, node),
            shown=[study.gallery.show(top, names) for top in node.top],
            profile=[(names[c], share) for c, share in profile if share >= 0.005],
            parts_of=[(node_address(part), node_heading(study, part), part.share) for part in parts],
            members=[(j, study.headings[j], shares[j]) for j in members[:MEMBERS]],
            n_more=len(members[MEMBERS:]),
        )
    )


def row(study: Study, summary: Summary, book: Book, separate: bool, has: Mapping[str, Any]) -> str:
    """A component's row in the overview.

    Args:
        study: What is known.
        summary: The component.
        book: Takes the thumbnails that go beside the page.
        separate: Whether they do.
        has: Which columns there are.
    """
    j = summary.j
    strip = study.gallery.thumbs(summary.top[:THUMBS])
    address = None
    if strip is not None:
        if separate:
            address = book.add_file(f"thumb-{j}.webp", strip)
        elif book.add_bytes(f"thumb-{j}", 4 * len(strip) // 3, THUMBS_SHARE):
            address = uri_of(strip, "webp")
    context = {
        "s": summary,
        "heading": study.headings[j],
        "thumbs": address,
        "quote": study.gallery.quote(summary.top[0]) if summary.top else "",
        "stability": study.stability(j),
        "effect": study.effect(j),
        "strategy": study.strategy(j),
        "profile": profile(summary, study.names),
    }
    return environment().get_template("row.html.j2").render(c=context, has=has)


def profile(summary: Summary, names: ClassNames) -> Markup:
    """The component's weight per predicted class, where there are few classes."""
    if len(summary.profile) not in PROFILED:
        return Markup("")
    shares = [(names[c], float(share)) for c, share in enumerate(summary.profile)]
    large = ", ".join(f"{name} {percent(share)}" for name, share in shares if share >= 0.05)
    titles = [f"{name}: {percent(share)}" for name, share in shares]
    label = f"Share of its weight per predicted class: {large}"
    return bars([share for _, share in shares], 96, 22, titles, label, least=6)


def histogram(summary: Summary) -> Markup:
    """Coefficients of the examples that use the component; heights are logarithmic."""
    width = summary.largest / max(1, len(summary.histogram))
    titles = [f"{i * width:.3g} to {(i + 1) * width:.3g}: {n} examples" for i, n in enumerate(summary.histogram)]
    heights = [math.log2(1 + n) for n in summary.histogram]
    label = f"Histogram of the coefficients above zero, to {summary.largest:.3g}; counts on a logarithmic scale"
    return bars(heights, 280, 56, titles, label)
