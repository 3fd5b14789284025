"""What in an input speaks for a component: drawn over the image, the tokens, or the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.reports.examples import Example
from npeff.reports.gallery import Gallery
from npeff.reports.images import data_uri, strip
from npeff.reports.text import printable

Array = npt.NDArray[Any]

FOR, AGAINST = np.array([178, 65, 36.0]), np.array([33, 92, 140.0])
FAINT = 0.45
"""How much of the image stays visible below the colours."""


def drawn(
    gallery: Gallery, position: int, weights: Array, tokenizer: Any, name: str
) -> dict[str, Any]:  # fmt: skip
    """An attribution as a picture or as coloured tokens.

    Args:
        gallery: Holds the raw example at ``position``.
        position: In the data.
        weights: Of the shape of the input, or one number per token.
        tokenizer: To cut a text into its tokens.
        name: For messages.

    Returns:
        ``{"uri": …, "small": …}`` or ``{"tokens": [(text, level), …]}``, levels in [−1, 1].

    Raises:
        ArgumentError: The weights do not fit the example.
    """
    example = gallery.kept[position]
    if example.image is not None:
        pixels = gallery.pixels(example.image)
        return {"uri": data_uri(overlay(pixels, weights, name)), "small": max(pixels.shape[:2]) <= 64}
    if example.text is not None:
        return {"tokens": coloured(tokens_of(example, weights.size, tokenizer, name), weights)}
    assert example.values is not None
    if weights.size != example.values.size:
        raise ArgumentError(f"{name}: expected shape {example.values.shape} as the example's, got {weights.shape}")
    shaped = weights.reshape(example.values.shape)
    return {"uri": data_uri(strip(shaped, limit(shaped)), 256), "small": True}


def overlay(pixels: npt.NDArray[np.uint8], weights: Array, name: str = "attribution") -> npt.NDArray[np.uint8]:
    """Colours over a fainter image: red where the input speaks for the component, blue where against.

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
    ground = np.repeat((255 - (255 - grey) * FAINT)[..., None], 3, axis=2)
    level = np.clip(w / limit(w), -1, 1)[..., None]
    colours = np.where(level >= 0, FOR, AGAINST)
    return np.asarray(np.round(ground + (colours - ground) * np.abs(level)), np.uint8)


def limit(weights: Array) -> float:
    """The magnitude that gets full colour: the 99th percentile, or the largest."""
    size = np.abs(np.nan_to_num(weights)).ravel()
    return float(np.percentile(size, 99) if size.size else 0) or float(size.max(initial=0)) or 1.0


def coloured(tokens: list[str], weights: Array) -> list[tuple[str, float]]:
    """Tokens with levels in [−1, 1]."""
    flat = np.nan_to_num(weights.ravel())
    top = float(np.abs(flat).max(initial=0)) or 1.0
    return [(printable(token), round(float(w) / top, 3)) for token, w in zip(tokens, flat, strict=True)]


def tokens_of(example: Example, count: int, tokenizer: Any, name: str) -> list[str]:
    """The ``count`` tokens of a text: those of its ids, each decoded alone; else its words.

    Raises:
        ArgumentError: There are not so many.
    """
    counts: Mapping[str, int] = {}
    if example.ids is not None and tokenizer is not None:
        ids = np.asarray(example.ids).ravel()
        if len(ids) >= count:  # weights may leave out the padding behind
            return [str(tokenizer.decode([int(i)])) for i in ids[:count]]
        counts = {"tokens": len(ids)}
    found = (example.text or "").split()
    if len(found) == count:
        return [word + " " for word in found]
    counts = {**counts, "words": len(found)}
    have = " and ".join(f"{number} {what}" for what, number in counts.items())
    raise ArgumentError(f"{name}: {count} weights for a text of {have}; pass a number per token, and tokenizer=")
