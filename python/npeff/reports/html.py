"""The pages of a report as markup: the overview, a page per component, strategy and example, and what scripts need."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from npeff.models.devices import format_bytes
from npeff.reports.data import LIKELIEST, THUMBS, UNSTABLE, ReportData
from npeff.reports.evidence import CONTINUED, PUSHED
from npeff.reports.figures import (
    effect_curve,
    held_out_curve,
    loss_curve,
    uri_of,
)
from npeff.reports.layout import StrategyNode, block_map
from npeff.reports.summary import COLUMNS, DELAY, Column, ComponentSummary
from npeff.reports.text import coefficient, number, percent, plain, short, visible
from npeff.reports.writer import GENERATOR, ReportWriter, script_json

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dom", "parts", "table", "map", "tree", "examples", "routes")
ROWS = 100
"""Rows of the overview that stand in the page from the start; in a folder, the others come when they are needed."""
PER_PART = 300
"""Examples in a part beside the page."""
PART_KINDS = {
    "component": "component pages",
    "strategy": "strategy pages",
    "examples": "examples’ pages",
    "pictures": "examples’ inputs",
}
THUMBS_SHARE = 0.2
"""What thumbnails may take of a single file's limit."""
TRACED = 16  # parts of a network that are shown of a trace
MEMBERS = 60  # components listed on a strategy's page
LISTED, LEAST = 12, 0.005  # components listed of an example, and the least share of its summed coefficients


@cache
def environment() -> Environment:
    """Return the templates; everything printed by them is escaped."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(percent=percent, number=number, coefficient=coefficient, plain=plain, visible=visible)
    env.filters["curve"] = lambda effect: effect_curve(effect.magnitudes, effect.kl_top, effect.kl_baseline)
    env.filters["logarithms"] = lambda counts: [math.log2(1 + count) for count in counts]
    env.filters.update(block_map=block_map, bytes=format_bytes)
    env.globals.update(PUSHED=PUSHED, TRACED=TRACED, CONTINUED=CONTINUED, MEMBERS=MEMBERS)
    env.globals.update(GENERATOR=GENERATOR, PART_KINDS=PART_KINDS, UNSTABLE=UNSTABLE, version=version("npeff"), zip=zip)
    bodies = [(TEMPLATES / "app" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '(() => {\n"use strict";\n' + "\n".join(bodies) + "})();\n"
    # The page allows this script and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    env.globals.update(script=Markup(script), script_digest=digest, style=Markup(style))
    return env


def _render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


def write_report(data: ReportData, writer: ReportWriter) -> None:
    """Write all parts in the order of their importance, and then the page.

    Where the writer's limit ends, the last parts are left out.

    Raises:
        StorageError: The report cannot be written.
    """
    summaries = data.summaries
    columns = [column for column in COLUMNS if any(column.value(s) is not None for s in summaries)]
    around = [None, *summaries, None]
    rows = _rows(data, writer, columns)
    if writer.folder:
        for start in range(ROWS, len(rows), ROWS):
            writer.add(f"rows-{start // ROWS}", rows[start : start + ROWS])
        rows = rows[:ROWS]
    writer.size += sum(map(len, rows))  # they are always there
    hidden = not data.options.progress
    for rank in tqdm(range(len(summaries)), "pages", delay=DELAY, disable=hidden, unit="component"):
        name = f"component-{summaries[rank].j}"
        if not writer.full(name):
            previous, own, following = around[rank : rank + 3]
            page = _render("component.html.j2", data=data, s=own, columns=columns, previous=previous, next=following)
            writer.add_page(name, page)
    writer.add("tree-0", [_tree_line(data, node) for node in data.nodes])
    for part, records in _example_records(data):
        writer.add(f"examples-{part}", records)
    for node in sorted((n for n in data.nodes if not n.leaf), key=lambda n: (-len(n.components), n.id)):
        if not writer.full(f"strategy-{node.id}"):
            writer.add(f"strategy-{node.id}", _render("strategy.html.j2", data=data, node=node))
    ids = np.asarray(data.components.ids)
    if _first_id(ids) is None:
        writer.add("ids-0", ids.tolist())
    for start in range(0, len(ids), PER_PART):
        pictures = [data.gallery.encoded(int(position)) for position in ids[start : start + PER_PART]]
        if any(pictures):
            writer.add(f"pictures-{start // PER_PART}", pictures)
    writer.publish(_overview(data, writer, columns, rows))


# ---- the overview -------------------------------------------------------------------------------------------


def _rows(data: ReportData, writer: ReportWriter, columns: Sequence[Column]) -> list[str]:
    """Return the rows of the table; thumbnails go beside the page where there are many rows."""
    rows = []
    for s in data.summaries:
        strip = data.gallery.thumbs(s.top[:THUMBS])
        address = None
        if strip is not None:
            if writer.folder and len(data.summaries) > ROWS:
                address = writer.add_picture(f"thumb-{s.j}.webp", strip)
            elif writer.room_inline(f"thumb-{s.j}", 4 * len(strip) // 3, THUMBS_SHARE):
                address = uri_of(strip, "webp")
        rows.append(_render("row.html.j2", data=data, s=s, thumbs=address, columns=columns))
    return rows


def _overview(data: ReportData, writer: ReportWriter, columns: Sequence[Column], rows: list[str]) -> str:
    components, trust = data.components, data.extras.trust
    labels, predictions = np.asarray(components.labels), components.predictions
    known = (labels >= 0) & (predictions >= 0)
    figures = {
        "The fit: squared error left, as a share of the Fishers’ squared norm.": loss_curve(components.loss_curve),
        "How many components: the loss on what was held out, and on what was decomposed.": held_out_curve(
            trust.held_out, trust.train, trust.chosen, components.n_components
        ),
    }
    return _render(
        "report.html.j2",
        data=data,
        writer=writer,
        columns=columns,
        rows=rows,
        accuracy=float((labels == predictions)[known].mean()) if known.any() else None,
        n_below_null=sum(map(data.below_null, data.summaries)),
        figures=figures,
        script_data=script_json(_script_data(data, writer, columns)),
        provenance=_flatten(components.provenance),
    )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Provenance as lines ``(path, text)``."""
    if isinstance(value, Mapping) and value:
        return [
            line for key, item in value.items() for line in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return [(prefix, text if len(text) <= 400 else text[:400] + " …")] if prefix else []


# ---- what the script needs ----------------------------------------------------------------------------------


def _script_data(data: ReportData, writer: ReportWriter, columns: Sequence[Column]) -> dict[str, Any]:
    """What the script needs from the start: a line per component."""
    components = data.components
    if data.names.are_words:  # of all classes there would be too many
        data.names.find({*np.unique(components.labels).tolist(), *np.unique(components.predictions).tolist()})
    n_classes = max(int(components.logits.shape[1]), int(np.max(components.labels, initial=-1)) + 1)
    branches = [data.branches[group] for group in sorted(data.branches)]
    return {
        "columns": ["j", "heading", *(column.name for column in columns), "group", "class", "x", "y"],
        "rows": [_line(data, s, columns) for s in data.summaries],
        "numbers": [[column.name, column.title, column.is_share] for column in columns],
        "groups": [{"heading": data.node_heading(b), "address": b.address} for b in branches],
        "classes": data.names.known if data.names.are_words else [data.names[c] for c in range(n_classes)],
        "parts": writer.parts,
        "absent": sorted(writer.absent),
        "limit": format_bytes(writer.limit),
        "rows_per_part": ROWS if writer.folder else max(ROWS, len(data.summaries)),
        "examples_per_part": PER_PART,
        "n_examples": len(components.ids),
        "first_id": _first_id(np.asarray(components.ids)),
        "has_labels": bool((np.asarray(components.labels) >= 0).any()),
        "pictures": len(data.gallery) > 0,
    }


def _line(data: ReportData, s: ComponentSummary, columns: Sequence[Column]) -> list[Any]:
    """A component's values in the order of the script's columns."""
    values = [short(column.value(s)) for column in columns]
    x, y = (round(float(value), 3) for value in data.map[s.j])
    return [s.j, data.headings[s.j], *values, data.leaves[s.j].group, s.leading_class, x, y]


def _tree_line(data: ReportData, node: StrategyNode) -> list[Any]:
    j = node.components[0] if node.leaf else -1
    head = [node.parent, node.children, len(node.components), short(node.share), short(node.distance)]
    return [*head, data.node_heading(node), j, node.group]


def _first_id(ids: Any) -> int | None:
    """The first position, where the others follow it without a gap; None otherwise."""
    return int(ids[0]) if len(ids) and np.array_equal(ids, np.arange(len(ids)) + ids[0]) else None


def _example_records(data: ReportData) -> Iterator[tuple[int, list[list[Any]]]]:
    """Yield ``(number of the part, records)``.

    A record is ``[position, label, prediction, confidence, explained share, number of components with a coefficient,
    [[component, coefficient], …], [[component, what is drawn], …], [[word, probability], …]]``, None for what is
    unknown; the last but one is there where something is drawn, the last where classes are words.
    """
    components = data.components
    W, labels, predictions = components.coefficients, np.asarray(components.labels), components.predictions
    drawn: dict[int, list[list[Any]]] = {}
    for j, items in data.attributions.items():
        for top, what in items:
            drawn.setdefault(top.index, []).append([j, what])
    for start in range(0, len(W), PER_PART):
        w, logits = W[start : start + PER_PART], components.logits.take(slice(start, start + PER_PART))
        order = np.argsort(-w, axis=1, kind="stable")[:, :LISTED]
        counts, sums = (w > 0).sum(1), w.sum(1, dtype=np.float64)
        classes, shares = logits.top(LIKELIEST) if logits.n_outputs > 1 else (None, np.full((len(w), 1), np.nan))
        if classes is not None and data.names.are_words:
            data.names.find(classes.ravel())
        records = []
        for k in range(len(w)):
            i = start + k
            record: list[Any] = [
                int(components.ids[i]),
                int(labels[i]),
                int(predictions[i]),
                short(shares[k, 0]),
                None if data.explained is None else short(data.explained[i]),
                int(counts[k]),
                [[int(j), short(w[k, j])] for j in order[k] if w[k, j] > LEAST * sums[k]],
            ]
            if classes is not None and data.names.are_words:
                likely = [[data.names[int(c)], short(p)] for c, p in zip(classes[k], shares[k], strict=True)]
                record += [drawn.get(i, []), likely]
            elif i in drawn:
                record.append(drawn[i])
            records.append(record)
        yield start // PER_PART, records
