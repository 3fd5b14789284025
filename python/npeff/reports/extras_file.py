"""What a report can show besides, as JSON: what other commands write and ``npeff report --extras`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npeff.errors import ArgumentError
from npeff.reports.extras import influences_of
from npeff.storage.files import atomic, path_of

FILE_KEYS = ("effects", "trust", "attributions", "influences")
PER_COMPONENT = ("effects", "attributions", "influences")


def load_extras(*paths: str | Path) -> dict[str, Any]:
    """Read ``effects``, ``trust``, ``attributions`` and ``influences`` from JSON files, ready for :func:`npeff.report`.

    Args:
        *paths: JSON objects with any of these keys; what they say of components is put together. ``attributions`` hold
            per component, and within it per index of an example, nested lists of numbers.

    Raises:
        ArgumentError: A file is no such JSON, or two say the same thing of one component.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        for key, value in _read(path).items():
            if key not in PER_COMPONENT:
                if key in merged:
                    raise ArgumentError(f"{path}: {key} were given by another file already; pass one of them")
                merged[key] = value
                continue
            if not isinstance(value, Mapping):
                raise ArgumentError(f"{path}: expected {key} to be an object with components as keys")
            known = merged.setdefault(key, {})
            if twice := sorted(set(known) & set(value)):
                raise ArgumentError(f"{path}: {key} of component {twice[0]} were given by another file already")
            known |= value
    if "attributions" in merged:
        merged["attributions"] = {
            (_whole(j), _whole(i)): np.asarray(values, np.float64)
            for j, examples in merged["attributions"].items()
            for i, values in examples.items()
        }
    return merged


def save_extras(
    path: str | Path,
    *,
    attributions: Mapping[tuple[int, int], Any] | None = None,
    influences: Mapping[int, Any] | None = None,
) -> Path:
    """Write what :func:`load_extras` reads.

    Args:
        path: Ending in ``.json``.
        attributions: As for :func:`npeff.report`; four significant digits are kept.
        influences: As for :func:`npeff.report`.

    Returns:
        The path.

    Raises:
        ArgumentError: The name ends otherwise, or the influences are of another form.
        StorageError: The file cannot be written.
    """
    path = path_of(path)
    if path.suffix.lower() != ".json":
        raise ArgumentError(f"out: expected a name ending in .json, got {path}")
    content: dict[str, Any] = {}
    for (j, i), values in (attributions or {}).items():
        digits = np.vectorize(lambda v: float(f"{v:.4g}"), otypes=[float])(np.asarray(values, np.float64))
        content.setdefault("attributions", {}).setdefault(str(j), {})[str(i)] = digits.tolist()
    for j, value in (influences or {}).items():
        found = influences_of(j, value)
        texts = {str(i): text for i, text in found.texts.items()}
        content.setdefault("influences", {})[str(j)] = {"by": found.by, "pairs": found.pairs, "texts": texts}
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path}: expected a JSON file with {', '.join(FILE_KEYS)} ({error})") from error
    if not isinstance(content, dict) or not set(content) <= set(FILE_KEYS):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ArgumentError(f"{path}: expected a JSON object with any of {', '.join(FILE_KEYS)}, got {found}")
    return content


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"attributions: expected numbers of components and examples, got {text!r}") from None
