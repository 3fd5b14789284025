"""Plots as inline SVG in the colours of the page, and arrays as pictures in ``data:`` addresses."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]

# Drawn in these colours, then handed over to the style sheet.
_INK, _FAINT, _ACCENT = "#010203", "#040506", "#070809"
_SOLID: dict[str, Any] = {"color": _ACCENT, "linewidth": 1.6, "marker": "o", "markersize": 3.5}
_DASHED: dict[str, Any] = {"color": _INK, "linewidth": 1.2, "linestyle": (0, (4, 3))}
_VARIABLES = {_INK: "var(--muted)", _FAINT: "var(--rule)", _ACCENT: "var(--accent)"}


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


# ---- arrays as pictures -------------------------------------------------------------------------------------

Pixels = npt.NDArray[np.uint8]

LARGEST = 160  # pixels on the longer side kept in the page
PIXELATED_BELOW = 64
TILE = 32  # pixels of a thumbnail
GAP = 4  # between thumbnails of one strip
WHITE, RED, BLUE = np.array([250, 250, 248.0]), np.array([178, 65, 36.0]), np.array([33, 92, 140.0])
FAINT = 0.45
"""How much of an image stays visible below the colours of an attribution."""


@dataclass(frozen=True)
class Scale:
    """The scale from numbers to brightness: the same for all examples of a page, so that they can be compared.

    Attributes:
        low: Per channel, the value shown black.
        high: Per channel, the value shown white.
    """

    low: Array
    high: Array

    @classmethod
    def of(cls, images: Sequence[Array]) -> Scale:
        """Find the scale of images ``(H, W)`` or ``(H, W, C)``.

        Bytes, and floats within [0, 1] or [0, 255], are taken as they are. Other images were standardised: per channel,
        the 0.5th and 99.5th percentile over all images become black and white (the extremes, where those coincide).
        """
        channels = channels_of(images[0])
        # Non-finite values count as 0.
        flat = np.concatenate(
            [np.nan_to_num(i.astype(np.float64).reshape(-1, channels), posinf=0.0, neginf=0.0) for i in images]
        )
        low, high = flat.min(), flat.max()
        if all(np.issubdtype(image.dtype, np.integer) for image in images) and low >= 0:
            top = 255.0 if high > 1 else 1.0
            return cls(np.zeros(channels), np.full(channels, top if high <= 255 else high))
        if low >= 0 and high <= 1:
            return cls(np.zeros(channels), np.ones(channels))
        if low >= 0 and 16 < high <= 255:
            return cls(np.zeros(channels), np.full(channels, 255.0))
        lo, hi = np.percentile(flat, [0.5, 99.5], axis=0)
        flat_channel = hi - lo <= 1e-6 * np.maximum(1, np.abs(hi))
        lo, hi = np.where(flat_channel, flat.min(0), lo), np.where(flat_channel, flat.max(0), hi)
        return cls(lo, np.where(hi > lo, hi, lo + 1))

    def bytes(self, image: Array) -> Pixels:
        """Convert an image to brightness: uint8, same shape; NaN becomes black."""
        values = np.nan_to_num(image.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        low, high = (self.low, self.high) if image.ndim == 3 else (self.low[0], self.high[0])
        return np.asarray(np.round(np.clip((values - low) / (high - low), 0, 1) * 255), np.uint8)


def channels_of(image: Array) -> int:
    """Return the number of channels of an image ``(H, W)`` or ``(H, W, C)``."""
    return int(image.shape[2]) if image.ndim == 3 else 1


def picture_of(pixels: Pixels) -> Image.Image:
    """Turn uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)`` into Pillow's image."""
    return Image.fromarray(
        pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else np.ascontiguousarray(pixels)
    )


def data_uri(pixels: Pixels, largest: int = LARGEST) -> str:
    """Encode ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)`` as a ``data:`` address, the longer side at most ``largest``.

    Small pictures become PNG (exact), photographs WebP (a tenth of the bytes).
    """
    picture = picture_of(pixels)
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= PIXELATED_BELOW:
        picture.save(buffer, "PNG", optimize=True)
        return uri_of(buffer.getvalue(), "png")
    picture.save(buffer, "WEBP", quality=78, method=4)
    return uri_of(buffer.getvalue(), "webp")


def uri_of(content: bytes, kind: str) -> str:
    """Write an encoded picture of that kind (``"png"``, ``"webp"``) as a ``data:`` address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tile(pixels: Pixels) -> Pixels:
    """Make a thumbnail: the middle square, ``(TILE, TILE, 3)`` uint8; small pictures keep hard pixels."""
    picture = picture_of(pixels).convert("RGB")
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    how = Image.Resampling.NEAREST if side < TILE else Image.Resampling.LANCZOS
    return np.asarray(picture.crop((left, upper, left + side, upper + side)).resize((TILE, TILE), how))


def sprite(tiles: Sequence[Pixels]) -> bytes:
    """Put thumbnails side by side into one WebP file, transparent between them."""
    row = np.zeros((TILE, len(tiles) * (TILE + GAP) - GAP, 4), np.uint8)
    for i, one in enumerate(tiles):
        row[:, i * (TILE + GAP) :][:, :TILE] = np.dstack([one, np.full((TILE, TILE), 255, np.uint8)])
    buffer = io.BytesIO()
    Image.fromarray(row, "RGBA").save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def strip(values: Array, limit: float) -> Pixels:
    """Draw numbers ``(d,)`` or ``(t, d)`` as a strip of colours: blue below zero, white at zero, red above.

    The first 64 rows are drawn, long rows averaged into 256 cells; the magnitude ``limit`` gets full colour.
    """
    rows = np.atleast_2d(np.nan_to_num(values.astype(np.float64)))[:64]
    cells = np.stack([part.mean(1) for part in np.array_split(rows, min(256, rows.shape[1]), axis=1)], 1)
    return _coloured(cells / (limit or 1), WHITE)


def overlay(pixels: Pixels, weights: Array, name: str = "attribution") -> Pixels:
    """Draw an attribution over a fainter image: red where the input speaks for the component, blue where against.

    Channels of the weights, first or last, are summed; the name is for the message.

    Raises:
        ArgumentError: The weights have another height and width.
    """
    size = pixels.shape[:2]
    w = np.nan_to_num(weights.reshape(weights.shape[1:] if weights.ndim == 4 and len(weights) == 1 else weights.shape))
    if w.ndim == 3:
        w = w.sum(0) if w.shape[1:] == size else w.sum(2) if w.shape[:2] == size else w
    if w.shape != size:
        raise ArgumentError(f"{name}: expected shape {size} (or with channels) as the image's, got {weights.shape}")
    grey = pixels.reshape(*size, -1).astype(np.float64).mean(2)
    return _coloured(w / full_colour(w), np.repeat((255 - (255 - grey) * FAINT)[..., None], 3, axis=2))


def full_colour(*values: Array) -> float:
    """Return the magnitude that gets full colour: the 99th percentile of |values|, or the largest."""
    flat = np.concatenate([np.abs(np.nan_to_num(v.astype(np.float64))).ravel() for v in values] or [np.zeros(0)])
    return float(np.percentile(flat, 99) if flat.size else 0) or float(flat.max(initial=0)) or 1.0


def _coloured(levels: Array, ground: Array) -> Pixels:
    """Colour levels ``(H, W)`` in [−1, 1] over a ground ``(3,)`` or ``(H, W, 3)``: blue below zero, red above."""
    levels = np.clip(levels, -1, 1)[..., None]
    return np.asarray(np.round(ground + (np.where(levels >= 0, RED, BLUE) - ground) * np.abs(levels)), np.uint8)
