"""One self-contained HTML page about a decomposition."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from npeff.reports.examples import Example
from npeff.reports.figures import bars, loss_curve
from npeff.reports.gallery import Gallery
from npeff.reports.summary import Summary, known_predictions
from npeff.reports.wording import ClassNames, coefficient, number, percent

if TYPE_CHECKING:
    from npeff.components import Components

THUMBS = 8
PROFILED = range(2, 21)
"""Numbers of classes whose shares are drawn side by side in the overview."""


@cache
def environment() -> Environment:
    """The templates; everything printed by them is escaped."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, number=number, coefficient=coefficient)
    return env


def render(
    components: Components,
    summaries: Sequence[Summary],
    examples: Mapping[int, Example],
    class_names: Sequence[str] | None,
    title: str,
) -> str:
    """The page's HTML.

    Args:
        components: A decomposition.
        summaries: Its components, in the order of the page.
        examples: What to show for positions in the data; may lack any.
        class_names: One per class; numbers otherwise.
        title: The page's heading.
    """
    names = ClassNames(class_names)
    gallery = Gallery(examples)
    labels, predictions = np.asarray(components.labels), known_predictions(components)
    known = (labels >= 0) & (predictions >= 0)
    n_classes = components.logits.shape[1]
    shares = [s.share for s in summaries]
    shown = [_component(s, gallery, names) for s in summaries]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            n_examples=len(labels),
            n_components=len(summaries),
            n_parameters=components.parameters.n_parameters,
            kind={"low_rank": "low-rank", "diagonal": "diagonal"}.get(components.kind, components.kind),
            loss=float(components.loss),
            accuracy=float((labels == predictions)[known].mean()) if known.any() else None,
            n_zero=int(np.sum(components.zero)),
            loss_curve=loss_curve(components.loss_curve),
            sizes=bars(
                shares,
                540,
                130,
                [f"component {s.j}: {percent(s.share)}" for s in summaries],
                "Size of each component, the largest first",
                least=16,
            ),
            largest_share=max(shares, default=0.0) or 1.0,
            show_profile=n_classes in PROFILED,
            components=shown,
            has_thumbs=any(thumb["kind"] != "none" for c in shown for thumb in c["thumbs"]),
            provenance=_flatten(components.provenance),
            version=_version(),
        )
    )


def _component(summary: Summary, gallery: Gallery, names: ClassNames) -> dict[str, Any]:
    shown = (
        [gallery.show(top, names) for top in summary.top]
        if gallery.examples
        else [gallery.plain(top, names) for top in summary.top]
    )
    counts = [max(a, b) for _, a, b in summary.classes]
    return {
        "s": summary,
        "heading": heading(summary, names),
        "contest": [(names[c], share) for c, share in summary.contest],
        "blocks": [("all others" if name is None else name, share) for name, share in summary.blocks],
        "shown": shown,
        "thumbs": [gallery.thumb(top) for top in summary.top[:THUMBS]],
        "kinds": {item["kind"] for item in shown},
        "profile": profile(summary, names),
        "classes": [(names[c], a, b) for c, a, b in summary.classes],
        "most": max(counts, default=0) or 1,
        "has_labels": any(a for _, a, _ in summary.classes),
        "histogram": histogram(summary),
    }


def heading(summary: Summary, names: ClassNames) -> str:
    """A few words: the classes between which the model weighs, else the commonest prediction."""
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


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Provenance as lines ``(path, text)``."""
    if isinstance(value, Mapping) and value:
        return [
            line for key, item in value.items() for line in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return [(prefix, text if len(text) <= 400 else text[:400] + " …")] if prefix else []


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("npeff")
    except PackageNotFoundError:
        return "(source tree)"
