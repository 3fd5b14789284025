"""Arrays as pictures: data URIs that need no file beside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]

LARGEST = 160  # pixels on the longer side kept in the page
PIXELATED_BELOW = 64
TILE = 32  # pixels of a thumbnail
GAP = 4  # between thumbnails of one strip


@dataclass(frozen=True)
class Scale:
    """How numbers become brightness, the same for all examples of a page, so that they can be compared.

    Attributes:
        low: Per channel, the value shown black.
        high: Per channel, the value shown white.
    """

    low: Array
    high: Array

    @classmethod
    def of(cls, images: Sequence[Array]) -> Scale:
        """Find the scale of images ``(H, W)`` or ``(H, W, C)``.

        Bytes, and floats within [0, 1] or [0, 255], are taken as they are. Anything else was standardised:
        per channel, the 0.5th and 99.5th percentile over all images become black and white (the extremes,
        where those coincide).
        """
        channels = images[0].shape[2] if images and images[0].ndim == 3 else 1
        values = [_pixels(image, channels) for image in images] or [np.zeros((1, channels))]
        flat = np.concatenate(values)
        low, high = flat.min(), flat.max()
        if images and all(np.issubdtype(image.dtype, np.integer) for image in images) and low >= 0:
            top = 255.0 if high > 1 else 1.0
            return cls(np.zeros(channels), np.full(channels, top if high <= 255 else high))
        if low >= 0 and high <= 1:
            return cls(np.zeros(channels), np.ones(channels))
        if low >= 0 and 1.5 < high <= 255 and high > 16:
            return cls(np.zeros(channels), np.full(channels, 255.0))
        lo, hi = np.percentile(flat, [0.5, 99.5], axis=0)
        flat_channel = hi - lo <= 1e-6 * np.maximum(1, np.abs(hi))
        lo, hi = np.where(flat_channel, flat.min(0), lo), np.where(flat_channel, flat.max(0), hi)
        return cls(lo, np.where(hi > lo, hi, lo + 1))

    def bytes(self, image: Array) -> npt.NDArray[np.uint8]:
        """Brightness of an image: uint8, same shape; NaN becomes black."""
        values = np.nan_to_num(image.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        low, high = (self.low, self.high) if image.ndim == 3 else (self.low[0], self.high[0])
        return np.asarray(np.round(np.clip((values - low) / (high - low), 0, 1) * 255), np.uint8)


def looks_like_image(array: Array) -> bool:
    """Whether an array is plausibly one picture: ``(H, W)``, or 1 or 3 channels of it, first or last.

    Both sides must be at least 4 and no more than 16 times apart, so that ``(tokens, features)`` matrices
    rarely qualify.
    """
    if array.ndim == 3 and {1, 3} & {array.shape[0], array.shape[2]}:
        height, width = array.shape[1:] if array.shape[0] in (1, 3) else array.shape[:2]
    elif array.ndim == 2:
        height, width = array.shape
    else:
        return False
    return bool(min(height, width) >= 4 and max(height, width) <= 16 * min(height, width))


def data_uri(pixels: npt.NDArray[np.uint8], largest: int = LARGEST) -> str:
    """A ``data:`` address of an image, shrunk to ``largest`` on the longer side.

    Args:
        pixels: uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``.
        largest: In pixels.

    Returns:
        PNG for small pictures (exact), WebP for photographs (a tenth of the bytes).
    """
    picture = picture_of(pixels)
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= PIXELATED_BELOW:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "WEBP", quality=78, method=4)
        kind = "webp"
    return uri_of(buffer.getvalue(), kind)


def uri_of(content: bytes, kind: str) -> str:
    """A ``data:`` address of an encoded picture of that kind."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture_of(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """uint8 ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)`` as a picture."""
    return Image.fromarray(
        pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else np.ascontiguousarray(pixels)
    )


def tile(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A thumbnail: the middle square of a picture, ``(TILE, TILE, 3)`` uint8; small pictures keep hard pixels."""
    picture = picture_of(pixels).convert("RGB")
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    how = Image.Resampling.NEAREST if side < TILE else Image.Resampling.LANCZOS
    return np.asarray(picture.crop((left, upper, left + side, upper + side)).resize((TILE, TILE), how))


def sprite(tiles: Sequence[npt.NDArray[np.uint8]]) -> bytes:
    """Thumbnails side by side in one WebP file, transparent between them."""
    strip_of = np.zeros((TILE, len(tiles) * (TILE + GAP) - GAP, 4), np.uint8)
    for i, one in enumerate(tiles):
        start = i * (TILE + GAP)
        strip_of[:, start : start + TILE] = np.dstack([one, np.full((TILE, TILE), 255, np.uint8)])
    buffer = io.BytesIO()
    Image.fromarray(strip_of, "RGBA").save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()


def strip(values: Array, limit: float) -> npt.NDArray[np.uint8]:
    """Numbers as a strip of colours: blue below zero, white at zero, red above.

    Args:
        values: ``(d,)`` or ``(t, d)``; long vectors are averaged into 256 cells.
        limit: The magnitude that gets full colour.

    Returns:
        uint8 ``(t, ≤ 256, 3)``.
    """
    rows = np.atleast_2d(np.nan_to_num(values.astype(np.float64)))
    rows = np.stack([[part.mean() for part in np.array_split(row, min(256, len(row)))] for row in rows[:64]])
    level = np.clip(rows / (limit or 1), -1, 1)[..., None]
    white, red, blue = np.array([250, 250, 248.0]), np.array([178, 65, 36.0]), np.array([33, 92, 140.0])
    colours = np.where(level >= 0, white + (red - white) * level, white + (blue - white) * -level)
    return np.asarray(np.round(colours), np.uint8)


def limit_of(values: Iterable[Array]) -> float:
    """The magnitude that gets full colour in strips: the 99th percentile of |values|."""
    flat = np.concatenate([np.abs(np.nan_to_num(v.astype(np.float64))).ravel() for v in values])
    return float(np.percentile(flat, 99)) or float(flat.max(initial=0)) or 1.0


def _pixels(image: Array, channels: int) -> Array:
    """``(pixels, channels)`` float64, non-finite values dropped to 0."""
    return np.nan_to_num(image.astype(np.float64).reshape(-1, channels), posinf=0.0, neginf=0.0)
