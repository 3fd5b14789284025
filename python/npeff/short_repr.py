"""Represent objects that hold large arrays in one line: each field's dtype and shape, small values as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

ITEMS = 6
"""Items shown of a list or mapping; of longer ones, their number."""

CHARACTERS = 60
"""Characters shown of a text."""


def short_repr(item: Any) -> str:
    """Represent a dataclass in one line: ``Curve(magnitudes=float64 (2, 8), signs=(1, -1), …)``.

    Used as ``__repr__``. Shows arrays by dtype and shape, long lists and mappings by their number of items.
    """
    fields = ", ".join(f"{name}={_shown(getattr(item, name))}" for name in item.__dataclass_fields__)
    return f"{type(item).__name__}({fields})"


def several(items: Sequence[Any], most: int = ITEMS) -> str:
    """Write ``1, 4, 7``; of more than ``most`` items, the first ones and their number."""
    first = ", ".join(map(str, items[:most]))
    return first if len(items) <= most else f"{first}, … ({len(items)})"


def _shown(value: Any, depth: int = 0) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        kind = str(dtype).removeprefix("torch.")
        return f"{value.item():.4g}" if len(shape) == 0 and kind.startswith("float") else f"{kind} {tuple(shape)}"
    if isinstance(value, str):
        return repr(value if len(value) <= CHARACTERS else value[:CHARACTERS] + "…")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool | int | None):
        return repr(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset) and (depth > 0 or len(value) > ITEMS):
        return f"{len(value)} items" if value else "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_shown(k, 1)}: {_shown(v, 1)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return ("[{}]" if isinstance(value, list) else "({})").format(", ".join(_shown(v, 1) for v in value))
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__name__)
    own = repr(value)
    return own if "\n" not in own and len(own) <= 2 * CHARACTERS else type(value).__name__
