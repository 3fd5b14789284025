"""A trace as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npeff.errors import ArgumentError
from npeff.perturbation.measures import Interval

if TYPE_CHECKING:
    from npeff.perturbation.tracing import Trace

ENDINGS = (".png", ".svg", ".pdf")
ALONE, LOST = "#3366aa", "#cc7733"
SEPARATOR = " · "


def draw(trace: Trace, path: str | Path, most: int) -> Path:
    """Draw a trace into a file.

    Args:
        trace: What to draw.
        path: ``.png``, ``.svg`` or ``.pdf``.
        most: Bars at most.

    Returns:
        The file.

    Raises:
        ArgumentError: The ending is another.
        StorageError: Fishers or Components are there, or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from npeff.storage import refuse_npeff_file
    from npeff.storage.files import atomic, path_of

    path = path_of(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ArgumentError(f"path: expected a name ending in .png, .svg or .pdf, got {path}")
    refuse_npeff_file(path)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "npeff", "font.size": 9}):
        grid = _grid(trace)
        figure: Any = Figure(layout="constrained")
        if grid is None:
            _bars(figure, trace, most)
        else:
            _heat(figure, trace, *grid)
        figure.suptitle(f"Where {trace.name} acts: mean KL {trace.kl.mean():.3g} on {len(trace.kl)} top examples")
        with atomic(path) as scratch:
            figure.savefig(scratch, format=ending[1:], dpi=150, metadata={"Date": None} if ending == ".svg" else None)
    return path


def _bars(figure: Any, trace: Trace, most: int) -> None:
    carried = np.array([max(abs(a.value), abs(b.value)) for a, b in zip(trace.alone, trace.lost, strict=True)])
    shown = np.sort(np.argsort(-np.nan_to_num(carried), kind="stable")[:most])
    left_out = len(trace) - len(shown)
    figure.set_size_inches(7.5, 1.6 + 0.36 * len(shown))
    axes = figure.subplots()
    y = np.arange(len(shown))
    for offset, parts, colour, label in (
        (-0.2, trace.alone, ALONE, "in this part alone"),
        (0.2, trace.lost, LOST, "lost without this part"),
    ):
        some = [parts[g] for g in shown]
        values = [i.value for i in some]
        axes.barh(y + offset, values, 0.38, color=colour, label=label)
        axes.errorbar(values, y + offset, xerr=_errors(some), fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.set_yticks(y, [f"{trace.groups[g]}  ({trace.energy[g]:.0%})" for g in shown])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    note = f"; {left_out} parts that carry less are left out" if left_out else ""
    axes.set_xlabel(f"share of the KL of the whole perturbation (in brackets: of its squared norm){note}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)


def _errors(parts: list[Interval]) -> Any:
    ends = np.array([[i.value - i.low, i.high - i.value] for i in parts]).T
    return np.nan_to_num(np.maximum(ends, 0))


def _grid(trace: Trace) -> tuple[list[str], list[str]] | None:
    """Row and column names, where every part but the rest is ``row · column``."""
    pairs = [name.split(SEPARATOR) for name in trace.groups if SEPARATOR in name]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    rows, columns = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    return (rows, columns) if len(pairs) == len(trace) or len(rows) > 1 else None


def _heat(figure: Any, trace: Trace, rows: list[str], columns: list[str]) -> None:
    figure.set_size_inches(3.0 + 2 * (1 + 0.3 * len(columns)), 2.2 + 0.32 * len(rows))
    panels = figure.subplots(1, 2)
    for axes, parts, title in (
        (panels[0], trace.alone, "in this part alone"),
        (panels[1], trace.lost, "lost without this part"),
    ):
        values = np.full((len(rows), len(columns)), np.nan)
        other = []
        for name, interval in zip(trace.groups, parts, strict=True):
            if SEPARATOR in name:
                row, column = name.split(SEPARATOR)
                values[rows.index(row), columns.index(column)] = interval.value
            else:
                other.append(f"{name}: {interval.value:.0%}")
        limit = float(np.nanmax(np.abs(values))) or 1.0
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows if axes is panels[0] else [""] * len(rows))
        axes.set_title("\n".join([title, *other[:4]]), fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the whole KL")
