"""Examples that are text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXCERPT = 220


def words(item: Any) -> str | None:
    """The text of an item, or None when it is not text.

    Args:
        item: A string, bytes, or a tuple or list of strings (sentence pairs), shown one per line.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    if isinstance(item, np.str_):
        return str(item)
    if isinstance(item, Sequence) and item and all(isinstance(part, str) for part in item):
        return "\n".join(item)
    return None


def excerpt(text: str, length: int = EXCERPT) -> tuple[str, str]:
    """Cut a text at a word boundary.

    Args:
        text: Any text.
        length: About how many characters to keep.

    Returns:
        The beginning, and the rest (empty when it is short).
    """
    text = text.strip()
    if len(text) <= length * 1.15:
        return text, ""
    cut = text.rfind(" ", int(length * 0.7), length)
    cut = cut if cut > 0 else length
    return text[:cut].rstrip(), text[cut:]


def printable(text: str) -> str:
    """The text without what UTF-8 cannot hold: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
