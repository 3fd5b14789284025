"""Plots as inline SVG that follow the page's colours, light or dark; and tables of energy by layer, part and head."""

from __future__ import annotations

import fnmatch
import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from npeff.errors import ArgumentError
from npeff.models.parameters import Parameter, Parameters
from npeff.reports.summary import ComponentSummary
from npeff.reports.text import ClassNames, percent

Array = npt.NDArray[Any]
Heads = int | Mapping[str, int] | None

# Drawn in these colours, then handed over to the style sheet.
_INK, _FAINT, _ACCENT = "#010203", "#040506", "#070809"
_SOLID: dict[str, Any] = {"color": _ACCENT, "linewidth": 1.6, "marker": "o", "markersize": 3.5}
_DASHED: dict[str, Any] = {"color": _INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}
_VARIABLES = {_INK: "var(--muted)", _FAINT: "var(--rule)", _ACCENT: "var(--accent)"}
PROFILED = range(2, 21)
"""Numbers of classes whose shares are drawn side by side in the overview."""


# ---- curves, by matplotlib ----------------------------------------------------------------------------------


def loss_curve(curve: Array) -> Markup:
    """Draw the relative loss ``(iterations,)``; nothing for a curve without two finite points."""
    y = np.asarray(curve, np.float64)
    if np.isfinite(y).sum() < 2:
        return Markup("")

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

    label = f"Relative loss over {len(y)} iterations, from {y[0]:.4g} to {y[-1]:.4g}"
    return _drawn(draw, label, ("iteration", "relative loss"))


def held_out_curve(
    held_out: Sequence[tuple[int, float]], train: Sequence[tuple[int, float]], chosen: int | None, used: int
) -> Markup:
    """Draw the loss on held-out and on decomposed examples against the number of components; nothing for one point.

    Both are ``(number of components, relative loss)``, ascending; ``chosen`` is the number that the held-out losses
    speak for, ``used`` that of this report.
    """
    if len(held_out) < 2:
        return Markup("")
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
        axes.legend(frameon=False, labelcolor=_INK)

    best = int(losses.argmin())
    label = f"Held-out loss by number of components, least {losses[best]:.4g} at {numbers[best]:.0f}"
    return _drawn(draw, label, ("components", "relative loss"))


def effect_curve(magnitudes: Sequence[float], top: Sequence[float], baseline: Sequence[float]) -> Markup:
    """Draw the mean KL on the top and the other examples (either may be empty) against the step length.

    Nothing is drawn for fewer than two steps.
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
        axes.legend(frameon=False, labelcolor=_INK)

    last = [f"{name} {values[order[-1]]:.3g}" for name, values in curves if len(values)]
    label = f"KL when the weights move along it; at {x[order[-1]]:.3g}: {', '.join(last)}"
    return _drawn(draw, label, ("step along the component", "KL (nats)"), (4.2, 2.5))


def _drawn(
    draw: Callable[[Any], None], label: str, names: tuple[str, str], size: tuple[float, float] = (5.4, 2.5)
) -> Markup:
    """Draw a plot in the page's colours, with the names of its two axes."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "npeff", "font.size": 9.5}):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(names[0], color=_INK)
        axes.set_ylabel(names[1], color=_INK)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        axes.tick_params(colors=_INK, length=0)
        axes.tick_params(axis="x", length=3, color=_FAINT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several plots stand on one page: their ids must differ.
    tag = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r' id="([^"]+)"', rf' id="{tag}\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{tag}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for measure in ("height", "width"):
        svg = re.sub(rf'(<svg[^>]*?) {measure}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(label), 1))


# ---- bars ---------------------------------------------------------------------------------------------------


def bars(
    heights: Sequence[float],
    width: float,
    height: float,
    titles: Sequence[str] | None,
    label: str,
    least: int = 1,
) -> Markup:
    """Draw a row of bars that stand on one line.

    The largest fills the height. ``titles`` show at a pointer over each bar; without them all bars are one shape, for
    many. ``label`` is the text alternative; fewer bars than ``least`` are drawn no wider than so many would be.
    """
    top = max(heights, default=0) or 1
    step = width / max(least, len(heights), 1)
    gap = min(1.5, step * 0.18)
    sizes = [0.0 if value <= 0 else max(1.0, height * value / top) for value in heights]
    if titles is None:
        outline = "".join(
            f"M{i * step:.2f} {height}v-{size:.2f}h{step - gap:.2f}v{size:.2f}z" for i, size in enumerate(sizes)
        )
        drawn = Markup('<path d="{}"/>').format(outline)
    else:
        bar = Markup('<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
        drawn = Markup("").join(
            bar.format(i * step, height - size, step - gap, size, title)
            for i, (size, title) in enumerate(zip(sizes, titles, strict=True))
        )
    return Markup(
        '<svg class="bars" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, label, drawn)


def size_bars(summaries: Sequence[ComponentSummary]) -> Markup:
    """Draw each component's share of all coefficients, the largest first."""
    few = len(summaries) <= 300
    titles = [f"component {s.j}: {percent(s.share)}" for s in summaries] if few else None
    return bars([s.share for s in summaries], 540, 130, titles, "Size of each component, the largest first", least=16)


def profile(summary: ComponentSummary, names: ClassNames) -> Markup:
    """Draw the component's weight per predicted class, where there are few classes."""
    if len(summary.profile) not in PROFILED:
        return Markup("")
    shares = [(names[c], float(share)) for c, share in enumerate(summary.profile)]
    large = ", ".join(f"{name} {percent(share)}" for name, share in shares if share >= 0.05)
    titles = [f"{name}: {percent(share)}" for name, share in shares]
    label = f"Share of its weight per predicted class: {large}"
    return bars([share for _, share in shares], 96, 22, titles, label, least=6)


def histogram(summary: ComponentSummary) -> Markup:
    """Draw the coefficients of the examples that use the component; heights are logarithmic."""
    width = summary.largest / max(1, len(summary.histogram))
    titles = [f"{i * width:.3g} to {(i + 1) * width:.3g}: {n} examples" for i, n in enumerate(summary.histogram)]
    heights = [math.log2(1 + n) for n in summary.histogram]
    label = f"Histogram of the coefficients above zero, to {summary.largest:.3g}; counts on a logarithmic scale"
    return bars(heights, 280, 56, titles, label)


# ---- tables of energy ---------------------------------------------------------------------------------------

# Where a parameter keeps its heads: (pattern of the name, dimension, equal parts that each hold all heads).
_HEADS = (
    (r"(^|\.)(in_proj_weight|in_proj_bias|qkv\.(weight|bias))$", 0, 3),
    (r"(^|\.)c_attn\.(weight|bias)$", -1, 3),
    (r"(^|\.)query_key_value\.(weight|bias)$", 0, 1),
    (r"(^|\.)(q|k|v|query|key|value)(_proj|_lin|_linear)?\.(weight|bias)$", 0, 1),
    (r"(^|\.)(o_proj|out_proj|out_lin|wo)\.weight$", 1, 1),
    (r"attention\.output\.dense\.weight$", 1, 1),
    (r"attn\.c_proj\.weight$", 0, 1),
)


@dataclass(frozen=True)
class HeatMap:
    """Energy in a table.

    Attributes:
        rows: Names of the layers.
        columns: Names of the parts.
        values: ``(rows, columns)`` shares of ‖g_j‖²; NaN where a layer has no such part.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array

    @property
    def largest(self) -> float:
        """The largest share, at least a very small number."""
        return float(np.nanmax(self.values, initial=1e-12))

    @property
    def totals(self) -> list[float]:
        """Sum per row."""
        return [float(v) for v in np.nansum(self.values, axis=1)]


def block_map(energy: Mapping[str, float]) -> HeatMap:
    """Arrange the energy of parameters as layers by parts.

    Args:
        energy: Share of ‖g_j‖² per parameter name, in the model's order. A name is cut behind its first number
            (``encoder.layer.3 | attention.query.weight``), names without one before their last part.
    """
    cells = {layer_and_part(name): share for name, share in energy.items()}
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), share in cells.items():
        values[rows.index(row), columns.index(column)] = share
    return HeatMap(rows, columns, values)


def layer_and_part(name: str) -> tuple[str, str]:
    """Cut a parameter's name into its layer and its part."""
    parts = name.split(".")
    cut = next((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:cut]) or "(model)", ".".join(parts[cut:])


def check_heads(parameters: Parameters, heads: Heads) -> None:
    """Make sure that ``heads`` fits some parameters.

    Raises:
        ArgumentError: It is no number and no mapping, or no parameter can be cut that way.
    """
    if heads is None:
        return
    numbers = list(heads.values()) if isinstance(heads, Mapping) else [heads]
    if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ArgumentError(f"heads: expected a number of heads, or a mapping from name patterns to one, got {heads!r}")
    if not any(_heads_of(parameter, heads) for parameter in parameters):
        raise ArgumentError(
            f"heads: no parameter could be cut into {heads!r} heads; leave heads out, give another number, or, from "
            "Python, a mapping from name patterns to numbers, for parameters whose first dimension holds the heads. "
            f"Names: {', '.join(parameters.names[:6])}, …"
        )


def head_map(parameters: Parameters, vector: Array, heads: Heads) -> HeatMap | None:
    """Sum the energy per layer and attention head.

    Args:
        parameters: What the vector stands for.
        vector: ``(n_parameters,)`` unit-norm pseudo-Fisher vector.
        heads: Heads per layer, for parameters with the usual names of attention projections; or a mapping
            from name patterns (``"*.attn.*"``) to numbers, for parameters whose first dimension holds the heads.
            Parameters that do not divide evenly (keys and values shared by several heads) are left out.

    Returns:
        Layers by heads; None where no parameter has heads.
    """
    found: dict[str, Array] = {}
    for parameter in parameters:
        cut = _heads_of(parameter, heads)
        if cut is None:
            continue
        axis, parts, number = cut
        block = np.square(vector[parameter.slice].astype(np.float64)).reshape(parameter.shape)
        along = block.sum(tuple(d for d in range(block.ndim) if d != axis % block.ndim))
        energy = along.reshape(parts, number, -1).sum((0, 2))
        layer = layer_and_part(parameter.name)[0]
        old = found.get(layer, np.zeros(0))
        size = max(len(old), number)
        found[layer] = np.pad(old, (0, size - len(old))) + np.pad(energy, (0, size - number))
    if not found:
        return None
    most = max(map(len, found.values()))
    values = np.stack([np.pad(v, (0, most - len(v)), constant_values=np.nan) for v in found.values()])
    return HeatMap(tuple(found), tuple(str(h) for h in range(most)), values)


def _heads_of(parameter: Parameter, heads: Heads) -> tuple[int, int, int] | None:
    """``(dimension, parts, heads)`` of a parameter that holds heads; None for others."""
    if isinstance(heads, Mapping):
        number = next((n for pattern, n in heads.items() if fnmatch.fnmatchcase(parameter.name, pattern)), None)
        rules = [(0, 1)]
    else:
        number = heads
        rules = [(axis, parts) for pattern, axis, parts in _HEADS if re.search(pattern, parameter.name)]
    for axis, parts in rules:
        if number and -len(parameter.shape) <= axis < len(parameter.shape):
            size = parameter.shape[axis]
            if size and size % (parts * number) == 0:
                return axis, parts, number
    return None
