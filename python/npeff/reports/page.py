"""The page that everything hangs on: the overview, the data for its script, and the parts that stand in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from npeff.components.parameter_vectors import not_recovered
from npeff.reports import records
from npeff.reports.assets import environment, script, style
from npeff.reports.book import Book, script_json
from npeff.reports.figures import bars, held_out_curve, loss_curve
from npeff.reports.fragments import (
    PROFILED,
    component_page,
    moved_groups,
    row,
    strategy_page,
)
from npeff.reports.layout import positions
from npeff.reports.study import Study, node_address, node_heading
from npeff.reports.summary import DELAY, Summary, known_predictions
from npeff.reports.wording import number, percent

ROWS = 100
"""Rows of the overview that stand in the page from the start; in a folder, the others come when they are needed."""

COLUMNS = ("j", "heading", "share", "active", "purity", "accuracy", "stability", "kl_ratio", "group", "class", "x", "y")
KINDS = {
    "component": "component pages",
    "strategy": "strategy pages",
    "examples": "examples’ pages",
    "pictures": "examples’ inputs",
}


def write(study: Study, book: Book, title: str, progress: bool = True) -> None:
    """Put all parts where they belong, and finish with the page.

    Args:
        study: What is known.
        book: Where the parts go, in the order of their importance: where its limit ends, the last are left out.
        title: The page's heading.
        progress: Show a progress bar.
    """
    summaries = study.summaries
    has = _columns(study)
    separate = book.folder and len(summaries) > ROWS
    rows = [row(study, s, book, separate, has) for s in summaries]
    if book.folder:
        for start in range(ROWS, len(rows), ROWS):
            book.add(f"rows-{start // ROWS}", rows[start : start + ROWS])
        rows = rows[:ROWS]
    book.size += sum(map(len, rows))  # they are always there
    for place in tqdm(range(len(summaries)), "pages", delay=DELAY, disable=not progress, unit="component"):
        name = f"component-{summaries[place].j}"
        if not book.full(name):
            book.add_html(name, component_page(study, place))
    book.close_html()
    book.add("tree-0", [_node(study, node) for node in study.nodes])
    for part, lines in records.parts(study):
        book.add(f"examples-{part}", lines)
    by_size = sorted((n for n in study.nodes if not n.leaf), key=lambda n: (-len(n.components), n.id))
    for node in by_size:
        name = f"strategy-{node.id}"
        if not book.full(name):
            book.add(name, strategy_page(study, node))
    ids = np.asarray(study.components.ids)
    if _first_id(ids) is None:
        book.add("ids-0", ids.tolist())
    for part, shown in records.pictures(study):
        book.add(f"pictures-{part}", shown)
    book.finish(_page(study, book, title, has, rows))


def _columns(study: Study) -> dict[str, Any]:
    return {
        "thumbs": any(
            study.gallery.encoded(
                s.top[0].position,
            )
            is not None
            for s in study.summaries
            if s.top
        ),
        "accuracy": any(s.accuracy is not None for s in study.summaries),
        "stability": study.extras.trust.stability is not None,
        "effects": any(len(key) == 1 and effect.kl_ratio is not None for key, effect in study.extras.effects.items()),
        "profile": study.components.logits.shape[1] in PROFILED,
        "largest_share": max((s.share for s in study.summaries), default=0.0) or 1.0,
    }


def _page(study: Study, book: Book, title: str, has: Mapping[str, Any], rows: list[str]) -> str:
    components, summaries = study.components, study.summaries
    labels, predictions = np.asarray(components.labels), known_predictions(components)
    known = (labels >= 0) & (predictions >= 0)
    code, digest = script()
    trust = study.extras.trust
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            version=_version(),
            style=style(),
            script=code,
            script_digest=digest,
            parts=book.parts,
            n_examples=len(labels),
            n_components=len(summaries),
            n_parameters=components.parameters.n_parameters,
            kind={"low_rank": "low-rank", "diagonal": "diagonal"}.get(components.kind, components.kind),
            loss=float(components.loss),
            accuracy=float((labels == predictions)[known].mean()) if known.any() else None,
            n_zero=int(np.sum(components.zero)),
            n_below_null=sum(map(study.below_null, summaries)) if trust.null_threshold is not None else None,
            left_out=_left_out(book),
            n_unknown=len(not_recovered(components)),
            kept_as="sketches" if components.compression == "sketch" else "inner products alone",
            figures=[
                (
                    loss_curve(components.loss_curve),
                    "The fit: squared error left, as a share of the Fishers’ squared norm.",
                ),
                (
                    held_out_curve(trust.held_out, trust.train, trust.chosen, len(summaries)),
                    "How many components: the loss on what was held out, and on what was decomposed.",
                ),
            ],
            sizes=bars(
                [s.share for s in summaries],
                540,
                130,
                [f"component {s.j}: {percent(s.share)}" for s in summaries] if len(summaries) <= 300 else None,
                "Size of each component, the largest first",
                least=16,
            ),
            has=has,
            rows=[Markup(r) for r in rows],
            pages=[Markup(html) for html in book.html],
            complete=book.complete,
            inline=[(name, Markup(content)) for name, content in book.inline.items()],
            data=Markup(script_json(_data(study, book))),
            moved_groups=moved_groups(study),
            provenance=_flatten(components.provenance),
        )
    )


def _data(study: Study, book: Book) -> dict[str, Any]:
    """What the script needs from the start: a line per component."""
    components = study.components
    order = [s.j for s in study.summaries]
    places = positions(1 - study.cosines)
    n_classes = max(int(components.logits.shape[1]), int(np.max(components.labels, initial=-1)) + 1)
    branches = [study.branches[group] for group in sorted(study.branches)]
    ids = np.asarray(components.ids)
    return {
        "columns": COLUMNS,
        "rows": [_line(study, s, *places[j]) for s, j in zip(study.summaries, order, strict=True)],
        "groups": [{"heading": node_heading(study, b), "address": node_address(b)} for b in branches],
        "classes": [study.names[c] for c in range(n_classes)],
        "parts": book.parts,
        "absent": sorted(book.absent),
        "limit": size_of(book.limit),
        "rows_per_part": ROWS if book.folder else max(ROWS, len(order)),
        "examples_per_part": records.PER_PART,
        "n_examples": len(ids),
        "first_id": _first_id(ids),
        "has_labels": bool((np.asarray(components.labels) >= 0).any()),
        "pictures": len(study.gallery) > 0,
    }


def _line(study: Study, s: Summary, x: float, y: float) -> list[Any]:
    effect = study.effect(s.j)
    numbers = (s.purity, s.accuracy, study.stability(s.j), effect.kl_ratio if effect else None)
    return [
        s.j,
        study.headings[s.j],
        _short(s.share),
        s.n_active,
        *map(_short, numbers),
        study.leaves[s.j].group,
        s.leading_class,
        round(float(x), 3),
        round(float(y), 3),
    ]


def _node(study: Study, node: Any) -> list[Any]:
    j = node.components[0] if node.leaf else -1
    head = [node.parent, node.children, len(node.components), _short(node.share), _short(node.distance)]
    return [*head, node_heading(study, node), j, node.group]


def _first_id(ids: Any) -> int | None:
    """The first position, where the others follow it without a gap; None otherwise."""
    return int(ids[0]) if len(ids) and np.array_equal(ids, np.arange(len(ids)) + ids[0]) else None


def _left_out(book: Book) -> str:
    missing = [
        f"{number(n)} of {number(n + book.added[kind])} {KINDS[kind]}"
        if kind not in ("examples", "pictures")
        else f"{KINDS[kind]} ({percent(n / (n + book.added[kind]))} of them)"
        for kind, n in book.left_out.items()
        if kind in KINDS
    ]
    if not missing:
        return ""
    return (
        f"Left out, for this report may take no more than {size_of(book.limit)}: {', '.join(missing)}. "
        + ("A larger size_limit" if book.folder else "A folder, or a larger size_limit,")
        + " holds everything."
    )


def size_of(n_bytes: int) -> str:
    """A number of bytes for people."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Provenance as lines ``(path, text)``."""
    if isinstance(value, Mapping) and value:
        return [
            line for key, item in value.items() for line in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return [(prefix, text if len(text) <= 400 else text[:400] + " …")] if prefix else []


def _version() -> str:
    try:
        return version("npeff")
    except PackageNotFoundError:
        return "(source tree)"
