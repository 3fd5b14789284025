"""Plots as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

# Drawn in these colours, then handed over to the style sheet.
_INK, _FAINT, _ACCENT = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--muted)", _FAINT: "var(--rule)", _ACCENT: "var(--accent)"}


def loss_curve(curve: npt.NDArray[Any]) -> Markup:
    """The relative loss against the iteration.

    Args:
        curve: ``(iterations,)``.

    Returns:
        An ``<svg>``, or nothing for a curve without two finite points.
    """
    y = np.asarray(curve, np.float64)
    if np.isfinite(y).sum() < 2:
        return Markup("")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "npeff", "font.size": 9.5}):
        figure = Figure((5.4, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(np.arange(1, len(y) + 1), y, color=_ACCENT, linewidth=1.6)
        axes.plot(len(y), y[-1], "o", color=_ACCENT, markersize=4, clip_on=False)
        axes.annotate(f"{y[-1]:.4f}", (len(y), y[-1]), (-4, 7), textcoords="offset points", ha="right", color=_INK)
        if np.nanmin(y) > 0 and np.nanmax(y) / np.nanmin(y) > 30:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, float(np.nanmax(y[np.isfinite(y)])) * 1.06)
        axes.set_xlim(1, max(2, len(y)))
        if len(y) > 40:  # most happens in the first few
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("iteration", color=_INK)
        axes.set_ylabel("relative loss", color=_INK)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(colors=_INK, length=0)
        axes.tick_params(axis="x", length=3, color=_FAINT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    label = f"Relative loss over {len(y)} iterations, from {y[0]:.4g} to {y[-1]:.4g}"
    return _themed(buffer.getvalue(), label)


def bars(
    heights: Sequence[float],
    width: float,
    height: float,
    titles: Sequence[str],
    label: str,
    least: int = 1,
) -> Markup:
    """A row of bars that stand on one line.

    Args:
        heights: Of each bar, the largest filling the height.
        width: Of the drawing, in user units.
        height: Of the drawing.
        titles: What a pointer over each bar shows.
        label: Text alternative of the whole.
        least: Fewer bars are drawn no wider than so many would be.
    """
    top = max(heights, default=0) or 1
    step = width / max(least, len(heights), 1)
    gap = min(1.5, step * 0.18)
    parts = []
    for i, (value, title) in enumerate(zip(heights, titles, strict=True)):
        size = 0.0 if value <= 0 else max(1.0, height * value / top)
        parts.append(
            Markup('<rect x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                f"{i * step:.2f}", f"{height - size:.2f}", f"{step - gap:.2f}", f"{size:.2f}", title
            )
        )
    start = Markup(
        '<svg class="bars" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">'
    ).format(width, height, label)
    return start + Markup("").join(parts) + Markup("</svg>")


def _themed(svg: str, label: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    opening = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Markup(svg.replace("<svg ", opening, 1))
