"""JSON files that tell a report more: what other commands write and ``npeff report --extras`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npeff.components import Components
from npeff.errors import ArgumentError, ExtrasError, StorageError
from npeff.reports.extras import KINDS, RECORDS, TRUST_KEYS, called, influences_of, read_extras
from npeff.storage.documents import read_json
from npeff.storage.files import atomic, path_of

DIGEST = "components_digest"
"""The field that says which components a file is about: :attr:`npeff.Components.digest`."""
LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read."""
_WRITTEN_BY = (
    "expected a JSON file written by npeff trust, perturb, trace, linearize --component, influence --component or "
    f"rollback --component, or a JSON object with any of {', '.join([*KINDS, 'trust'])}"
)


def load_extras(*paths: str | Path, components: Components | None = None) -> dict[str, Any]:
    """Read JSON files that other commands wrote, ready for :func:`npeff.report`.

    Args:
        *paths: Files of ``npeff trust --out``, ``perturb --out``, ``trace --out``, of the companions with
            ``--component``, of :func:`save_extras`; or JSON objects with any of ``effects``, ``trust``,
            ``attributions``, ``influences`` and ``traces``. What they say is put together. ``attributions`` hold per
            component, and within it per index of an example, nested lists of numbers.
        components: What the files should be about: each file is checked against these components.

    Returns:
        Keywords for :func:`npeff.report`, as many as the files have.

    Raises:
        ExtrasError: A file is damaged or of another kind, is about other components, or two say the same thing.
    """
    r, n = (components.n_components, len(components.coefficients)) if components else (None, None)
    merged: dict[str, dict[Any, Any]] = {}
    for path in map(path_of, paths):
        found, about = _recognised(path, read_extras_file(path))
        if components is not None and about and about != {components.digest}:
            raise ExtrasError(
                f"{path}: {DIGEST}: expected {components.digest}, the components of this report, got "
                f"{', '.join(sorted(about))[:80]}: the file is about another decomposition; run the command that "
                "wrote it on these components"
            )
        with _naming(path):
            read_extras(r, n, **found)
            entries = _entries(found, r, n)
        for key, values in entries.items():
            known = merged.setdefault(key, {})
            if twice := [entry for entry in values if entry in known]:
                example = f" (example {twice[0][1]})" if key == "attributions" else ""
                raise ExtrasError(
                    f"{path}: {key} of {called(key, twice[0])} were given by another file already{example}; pass one "
                    "of them"
                )
            known |= values
    return merged


def describe_extras(path: str | Path) -> dict[str, Any]:
    """Say what a JSON file holds for a report.

    Args:
        path: A file that :func:`load_extras` reads.

    Returns:
        ``path``, ``bytes``, ``format``, ``content``, ``components_digest`` where the file says so, and per key of
        :func:`load_extras` what it is about. JSON-able.

    Raises:
        ExtrasError: The file is damaged or of another kind.
    """
    path = path_of(path)
    found, about = _recognised(path, read_extras_file(path))
    summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "format": "JSON"}
    summary["content"] = "for npeff report --extras"
    if about:
        summary[DIGEST] = min(about)
    with _naming(path):
        entries = _entries(found, None, None)
    return summary | {key: "; ".join(dict.fromkeys(called(key, e) for e in entries[key])) for key in entries}


def save_extras(
    path: str | Path,
    *,
    attributions: Mapping[tuple[int, int], Any] | None = None,
    influences: Mapping[int, Any] | None = None,
    components: Components | None = None,
) -> Path:
    """Write what :func:`load_extras` reads.

    Args:
        path: Ending in ``.json``.
        attributions: As for :func:`npeff.report`; four significant digits are kept.
        influences: As for :func:`npeff.report`.
        components: What they are about; a report of other components then refuses the file.

    Returns:
        The path.

    Raises:
        ArgumentError: The name ends otherwise, or the influences are of another form.
        StorageError: The file cannot be written.
    """
    path = path_of(path)
    if path.suffix.lower() != ".json":
        raise ArgumentError(f"out: expected a name ending in .json, got {path}")
    content: dict[str, Any] = {} if components is None else {DIGEST: components.digest}
    for (j, i), values in (attributions or {}).items():
        digits = np.vectorize(lambda v: float(f"{v:.4g}"), otypes=[float])(np.asarray(values, np.float64))
        content.setdefault("attributions", {}).setdefault(str(j), {})[str(i)] = digits.tolist()
    for j, value in (influences or {}).items():
        found = influences_of(f"influences[{j}]", value)
        texts = {str(i): text for i, text in found.texts.items()}
        content.setdefault("influences", {})[str(j)] = {"by": found.by, "pairs": found.pairs, "texts": texts}
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read_extras_file(path: Path) -> Any:
    """Read the JSON of a file that may hold extras: an object or a list.

    Raises:
        ExtrasError: The file is missing, too large or damaged.
    """
    try:
        return read_json(path, (dict, list), most=LARGEST_FILE)
    except StorageError as error:
        why = str(error)
        if path.is_file() and path.stat().st_size <= LARGEST_FILE and path.open("rb").read(4) == b"\x89HDF":
            why = "got an HDF5 file, made by an --out that does not end in .json"
        raise ExtrasError(f"{path}: {_WRITTEN_BY} ({why})") from error


def _recognised(path: Path, content: Any) -> tuple[dict[str, Any], set[str]]:
    """Return keywords for :func:`npeff.report`, and the digests of the components that a file says it is about.

    Raises:
        ExtrasError: The file is of another kind.
    """
    records = content if isinstance(content, list) else [content]
    for key, (_, fields) in RECORDS.items():
        if records and all(isinstance(item, dict) and set(fields) <= set(item) for item in records):
            details = [item["details"] for item in records if isinstance(item.get("details"), dict)]
            return {key: records}, {d[DIGEST] for d in details if isinstance(d.get(DIGEST), str)}
    if not isinstance(content, dict) or not content:
        got = f"a list of {len(content)}" if isinstance(content, list) else f"{content!r:.40}"
        raise ExtrasError(f"{path}: {_WRITTEN_BY}; got {got}")
    found = {key: value for key, value in content.items() if value is not None}
    digest = found.pop(DIGEST, None)
    if not isinstance(digest, str | None):
        raise ExtrasError(f"{path}: {DIGEST}: expected a text, got {digest!r:.40}")
    if found and set(found) <= set(TRUST_KEYS):
        found = {"trust": found}
    if not found or not set(found) <= {*KINDS, "trust"}:
        raise ExtrasError(f"{path}: {_WRITTEN_BY}; got {', '.join(content)[:200]}")
    trust = found["trust"] if isinstance(found.get("trust"), dict) else {}
    own = trust["stability"].get(DIGEST) if isinstance(trust.get("stability"), dict) else None
    return found, {text for text in (digest, own) if isinstance(text, str) and text}


def _entries(found: Mapping[str, Any], r: int | None, n: int | None) -> dict[str, dict[Any, Any]]:
    """What each keyword says, by what it is about: what two files may not both say."""
    entries = {
        key: {entry: value for entry, (_, value) in KINDS[key].entries(key, found[key], r, n).items()}
        for key in KINDS
        if key in found
    }
    if "trust" in found:
        whole = found["trust"]
        parts = whole if isinstance(whole, Mapping) and set(whole) <= set(TRUST_KEYS) else {"stability": whole}
        entries["trust"] = {name: value for name, value in parts.items() if value is not None}
    return entries


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about what it holds.

    Raises:
        ExtrasError: In place of an ArgumentError.
    """
    try:
        yield
    except ArgumentError as error:
        raise ExtrasError(f"{path}: {error}; write the file again with the command that made it") from error
