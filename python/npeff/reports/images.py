"""Arrays as pictures that stand in the page itself, as ``data:`` addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]
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
    """How numbers become brightness: the same for all examples of a page, so that they can be compared.

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
        """Brightness of an image: uint8, same shape; NaN becomes black."""
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
    """Draw numbers as a strip of colours: blue below zero, white at zero, red above.

    Args:
        values: ``(d,)`` or ``(t, d)``; the first 64 rows are drawn, long rows are averaged into 256 cells.
        limit: The magnitude that gets full colour.

    Returns:
        uint8 ``(t, ≤ 256, 3)``.
    """
    rows = np.atleast_2d(np.nan_to_num(values.astype(np.float64)))[:64]
    cells = np.stack([part.mean(1) for part in np.array_split(rows, min(256, rows.shape[1]), axis=1)], 1)
    return _coloured(cells / (limit or 1), WHITE)


def overlay(pixels: Pixels, weights: Array, name: str = "attribution") -> Pixels:
    """Draw an attribution over a fainter image: red where the input speaks for the component, blue where against.

    Args:
        pixels: uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``.
        weights: ``(H, W)``, or with channels first or last, which are summed.
        name: For the message.

    Returns:
        uint8 ``(H, W, 3)``.

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
