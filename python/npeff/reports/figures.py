"""Plots of a few curves, which the templates draw, and arrays as pictures in ``data:`` addresses."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]

# ---- curves -------------------------------------------------------------------------------------------------

MOST_POINTS = 300
"""Points of a curve that are drawn; of a longer one, some."""


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        name: What stands beside it.
        low: The least number on it.
        high: The largest number on it.
        logarithmic: Whether equal ratios take equal lengths.
        marked: Numbers that are written beside it; by default powers of ten, or multiples of 1, 2, 2.5 or 5 times one.
    """

    name: str
    low: float
    high: float
    logarithmic: bool = False
    marked: Sequence[float] = ()

    def at(self, values: npt.ArrayLike) -> Array:
        """Return where numbers stand, from 0 to 1."""
        scale = np.log if self.logarithmic else np.asarray
        low, high, found = (scale(np.asarray(part, np.float64)) for part in (self.low, self.high, values))
        return np.asarray((found - low) / ((high - low) or 1.0))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The numbers that are written beside it, with their texts."""
        if self.marked or self.logarithmic:
            low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [(mark, f"{mark:g}") for mark in self.marked or [10.0**k for k in range(low, high + 1)]]
        span = (self.high - self.low) or 1.0
        power = math.floor(math.log10(span / 6))
        step = next(step for f in (1, 2, 2.5, 5, 10) if span / (step := f * 10.0**power) <= 6)
        digits = next(d for d in range(20) if abs(round(step, d) - step) < 1e-6 * step)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        form = f".{digits}f" if digits <= 3 and self.high < 1e4 else ".3g"
        return [(step * k, f"{step * k:{form}}") for k in range(first, last + 1)]


class Curve(NamedTuple):
    """One curve: its name in the legend, its points, and whether another one is compared with it."""

    name: str
    x: Array
    y: Array
    beside: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over two axes.

    Attributes:
        label: The text for those who do not see it.
        x: The axis below.
        y: The axis at the left.
        curves: The curves.
        width: Of the picture, which is 180 high.
        note: What stands at the end of the first curve; its points are marked where there is none.
        chosen: The point that a ring is drawn around.
        here: Where a vertical line stands.
    """

    label: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    width: int = 389
    note: str = ""
    chosen: tuple[float, float] | None = None
    here: float | None = None

    def across(self, value: npt.ArrayLike) -> Array:
        """Return the horizontal positions of numbers in the picture."""
        return np.round(46 + self.x.at(value) * (self.width - 56), 1)

    def down(self, value: npt.ArrayLike) -> Array:
        """Return the vertical positions of numbers in the picture."""
        return np.round(142 - self.y.at(value) * 130, 1)


def loss_curve(curve: Array) -> Plot | None:
    """Plot the relative loss ``(iterations,)``; nothing for a curve without two finite points."""
    y = np.asarray(curve, np.float64)
    known = np.flatnonzero(np.isfinite(y))
    if len(known) < 2:
        return None
    drawn = known[np.unique(np.round(np.geomspace(1, len(known), MOST_POINTS)).astype(int)) - 1]
    least, most = float(y[known].min()), float(y[known].max())
    wide = least > 0 and most / least > 30
    return Plot(
        f"Relative loss over {len(y)} iterations, from {y[0]:.4g} to {y[-1]:.4g}",
        Axis("iteration", 1, len(y), logarithmic=len(y) > 40),  # most happens in the first few
        Axis("relative loss", least if wide else 0, most if wide else most * 1.06, wide),
        [Curve("", drawn + 1, y[drawn])],
        note=f"{y[known[-1]]:.4f}",
    )


def held_out_curve(
    held_out: Sequence[tuple[int, float]], train: Sequence[tuple[int, float]], chosen: int | None, used: int
) -> Plot | None:
    """Plot the loss on held-out and on decomposed examples against the number of components; nothing for one point.

    Both are ``(number of components, relative loss)``, ascending; ``chosen`` is the number that the held-out losses
    speak for, ``used`` that of this report.
    """
    if len(held_out) < 2:
        return None
    numbers, losses = np.array(held_out, np.float64).T
    curves = [Curve("held out", numbers, losses)]
    if len(train) > 1:
        tried, own = np.array(train, np.float64).T
        curves.append(Curve("decomposed", tried, own, True))
    ends = [*numbers, used]
    every = np.concatenate([curve.y for curve in curves])
    margin = 0.05 * float(np.ptp(every))
    best = int(losses.argmin())
    return Plot(
        f"Held-out loss by number of components, least {losses[best]:.4g} at {numbers[best]:.0f}",
        Axis("components", min(ends), max(ends), True, numbers.tolist()),
        Axis("relative loss", float(every.min()) - margin, float(every.max()) + margin),
        curves,
        chosen=None if chosen is None else (chosen, float(np.interp(chosen, numbers, losses))),
        here=used,
    )


def effect_curve(magnitudes: Sequence[float], top: Sequence[float], baseline: Sequence[float]) -> Plot | None:
    """Plot the mean KL on the top examples and on the baseline (either may be empty) against the step length.

    Nothing is drawn for fewer than two steps.
    """
    x = np.asarray(magnitudes, np.float64)
    order = np.argsort(x, kind="stable")
    given = [("top examples", top), ("baseline", baseline)]
    curves = [Curve(name, x[order], np.asarray(y)[order], name == "baseline") for name, y in given if len(y)]
    known = [float(v) for curve in curves for v in curve.y if np.isfinite(v)]
    if len(x) < 2 or not known:
        return None
    last = ", ".join(f"{curve.name} {curve.y[-1]:.3g}" for curve in curves)
    return Plot(
        f"KL when the weights move along it; at {x[order[-1]]:.3g}: {last}",
        Axis("step along the component", float(x.min()), float(x.max())),
        Axis("KL (nats)", 0, max(known) * 1.05),
        curves,
        width=302,
    )


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
