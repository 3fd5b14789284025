"""Texts, numbers and class names as a report prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXCERPT = 220
"""Characters of a text that a page shows at first."""


class ClassNames:
    """The names of the classes; numbers where no names are given."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = [str(name) for name in names] if names is not None else []

    def __getitem__(self, index: int) -> str:
        if index < 0:
            return "no label"
        return self._names[index] if index < len(self._names) else str(index)


def percent(share: float) -> str:
    """Print a share as a percentage with two significant digits."""
    if share < 0:
        return f"−{percent(-share)}"
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.1 else "< 0.1 %"


def number(value: int) -> str:
    """Print a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def coefficient(value: float) -> str:
    """Print a coefficient with two significant digits or decimals."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def plain(value: float) -> str:
    """Print a number with three significant digits, without an exponent where it needs none."""
    return f"{value:.3g}" if not 100 <= abs(value) < 1e6 else f"{value:.0f}"


def size_of(n_bytes: int) -> str:
    """Print a number of bytes: ``24 MB``."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def text_of(item: Any) -> str | None:
    """Return the text of an item of the data, or None for an item that is not text.

    Args:
        item: A string, bytes, or a tuple or list of strings (sentence pairs), which become one line each.
    """
    if isinstance(item, str):
        return str(item)
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    if isinstance(item, Sequence) and item and all(isinstance(part, str) for part in item):
        return "\n".join(item)
    return None


def excerpt(text: str, length: int = EXCERPT) -> tuple[str, str]:
    """Cut a text at a word boundary after about ``length`` characters.

    Returns:
        The beginning, and the rest (empty for a short text).
    """
    text = text.strip()
    if len(text) <= length * 1.15:
        return text, ""
    cut = text.rfind(" ", int(length * 0.7), length)
    cut = cut if cut > 0 else length
    return text[:cut].rstrip(), text[cut:]


def printable(text: str) -> str:
    """Replace what UTF-8 cannot hold: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def short(value: Any) -> float | None:
    """Round to four significant digits, what a page can show; None for an unknown number."""
    return None if value is None or not np.isfinite(value) else float(f"{float(value):.4g}")
