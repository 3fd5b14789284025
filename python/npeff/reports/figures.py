"""Plots as inline SVG that follow the page's colours, light or dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

# Drawn in these colours, then handed over to the style sheet.
_INK, _FAINT, _ACCENT = "#010203", "#040506", "#070809"
_SOLID: dict[str, Any] = {"color": _ACCENT, "linewidth": 1.6, "marker": "o", "markersize": 3.5}
_DASHED: dict[str, Any] = {"color": _INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}
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
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    def draw(axes: Any) -> None:
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

    return _drawn(draw, f"Relative loss over {len(y)} iterations, from {y[0]:.4g} to {y[-1]:.4g}")


def held_out_curve(
    held_out: Sequence[tuple[int, float]], train: Sequence[tuple[int, float]], chosen: int | None, used: int
) -> Markup:
    """Loss on held-out examples, and on those decomposed, against the number of components.

    Args:
        held_out: ``(number of components, relative loss)``, ascending.
        train: The same on the examples that were decomposed.
        chosen: The number that the held-out losses speak for.
        used: The number of components of this report.

    Returns:
        An ``<svg>``, or nothing for fewer than two points.
    """
    if len(held_out) < 2:
        return Markup("")
    from matplotlib.ticker import NullFormatter, NullLocator

    numbers, losses = np.array(held_out).T

    def draw(axes: Any) -> None:
        if len(train) > 1:
            axes.plot(*np.array(train).T, label="decomposed", **_DASHED)
        axes.plot(numbers, losses, label="held out", **_SOLID)
        if chosen is not None:
            ring: dict[str, Any] = {"color": _ACCENT, "markersize": 10, "fillstyle": "none"}
            axes.plot(chosen, np.interp(chosen, numbers, losses), "o", label="chosen", **ring)
        axes.axvline(used, color=_FAINT, linewidth=1.2, label="here")
        axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{value:.0f}" for value in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("components", color=_INK)
        axes.set_ylabel("relative loss", color=_INK)
        axes.legend(frameon=False, labelcolor=_INK)

    best = int(losses.argmin())
    return _drawn(draw, f"Held-out loss by number of components, least {losses[best]:.4g} at {numbers[best]:.0f}")


def effect_curve(magnitudes: Sequence[float], top: Sequence[float], baseline: Sequence[float]) -> Markup:
    """KL against how far the weights move along a component.

    Args:
        magnitudes: Step lengths.
        top: Mean KL on its top examples at each; may be empty.
        baseline: The same on the others.

    Returns:
        An ``<svg>``, or nothing for fewer than two points.
    """
    if len(magnitudes) < 2 or not (len(top) or len(baseline)):
        return Markup("")
    x = np.asarray(magnitudes, np.float64)
    order = np.argsort(x, kind="stable")
    curves = (("top examples", top), ("others", baseline))

    def draw(axes: Any) -> None:
        for (name, values), look in zip(curves, (_SOLID, _DASHED), strict=True):
            if len(values):
                axes.plot(x[order], np.asarray(values)[order], label=name, **look)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step along the component", color=_INK)
        axes.set_ylabel("KL (nats)", color=_INK)
        axes.legend(frameon=False, labelcolor=_INK)

    last = [f"{name} {values[order[-1]]:.3g}" for name, values in curves if len(values)]
    return _drawn(draw, f"KL when the weights move along it; at {x[order[-1]]:.3g}: {', '.join(last)}", (4.2, 2.5))


def _drawn(draw: Callable[[Any], None], label: str, size: tuple[float, float] = (5.4, 2.5)) -> Markup:
    """A plot by matplotlib in the page's colours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "npeff", "font.size": 9.5}):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(colors=_INK, length=0)
        axes.tick_params(axis="x", length=3, color=_FAINT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), label)


def bars(
    heights: Sequence[float],
    width: float,
    height: float,
    titles: Sequence[str] | None,
    label: str,
    least: int = 1,
) -> Markup:
    """A row of bars that stand on one line.

    Args:
        heights: Of each bar, the largest filling the height.
        width: Of the drawing, in user units.
        height: Of the drawing.
        titles: What a pointer over each bar shows; None to draw all bars as one shape, for many.
        label: Text alternative of the whole.
        least: Fewer bars are drawn no wider than so many would be.
    """
    top = max(heights, default=0) or 1
    step = width / max(least, len(heights), 1)
    gap = min(1.5, step * 0.18)
    sizes = [0.0 if value <= 0 else max(1.0, height * value / top) for value in heights]
    parts = []
    if titles is None:
        outline = "".join(
            f"M{i * step:.2f} {height}v-{size:.2f}h{step - gap:.2f}v{size:.2f}z" for i, size in enumerate(sizes)
        )
        parts.append(Markup('<path d="{}"/>').format(outline))
    for i, (size, title) in enumerate(zip(sizes, titles or (), strict=False)):
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
    # Several plots stand on one page: their ids must differ.
    tag = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r' id="([^"]+)"', rf' id="{tag}\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{tag}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    opening = Markup('<svg role="img" aria-label="{}" ').format(label)
    return Markup(svg.replace("<svg ", opening, 1))
