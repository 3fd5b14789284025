"""What else a report can show, when it is given; and the JSON files that other commands write of it.

The same functions read what :func:`npeff.report` is given and what ``npeff report --extras`` finds in files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError, ExtrasError, StorageError
from npeff.reports.evidence import (
    TRUST_KEYS,
    EffectSummary,
    InfluenceSummary,
    TraceSummary,
    TrustSummary,
    effect_of,
    excerpt_of,
    field_of,
    index_of,
    influences_of,
    items_of,
    numbers,
    trace_of,
    trust_of,
)
from npeff.storage.checks import read_json
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[Any]

RECORDS = {
    "effects": ("npeff.perturb", ("components", "figures")),
    "traces": ("npeff.trace", ("components", "groups", "alone")),
}
"""Per input, which function returns one, and the fields by which it is known; the second is in no other record."""
DIGEST = "components_digest"
"""The field that says which components a file is about: :attr:`npeff.Components.digest`."""
LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class Extras:
    """All optional inputs of a report, checked.

    Attributes:
        effects: Per component or group of components, ascending, as many as were perturbed.
        traces: Per component or group of components.
        influences: Per component.
        attributions: ``(component, index of the example)`` → array of the shape of the example's input (or one
            number per token), positive where the input speaks for the component.
        trust: See :class:`TrustSummary`.
    """

    effects: Mapping[tuple[int, ...], EffectSummary]
    traces: Mapping[tuple[int, ...], TraceSummary]
    influences: Mapping[int, InfluenceSummary]
    attributions: Mapping[tuple[int, int], Array]
    trust: TrustSummary

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Groups of several components that were moved along or traced."""
        return sorted({key for key in (*self.effects, *self.traces) if len(key) > 1})


def read_extras(r: int | None, n: int | None, **given: Any) -> Extras:
    """Check the optional inputs of :func:`npeff.report`.

    Args:
        r: Number of components; None where it is not known.
        n: Number of examples; None where it is not known.
        **given: ``effects``, ``traces``, ``influences``, ``attributions`` and ``trust``, as for :func:`npeff.report`.

    Raises:
        ArgumentError: One of them has another form than documented, or names components or examples that are not
            there.
    """
    checked = {
        key: {entry: read(name, value) for entry, (name, value) in entries(key, given.get(key), r, n).items()}
        for key, (entries, read) in KINDS.items()
    }
    return Extras(**checked, trust=trust_of(given.get("trust"), r, n))


# ---- entries: what each input says, of which components -----------------------------------------------------

Entries = dict[Any, tuple[str, Any]]
"""What an entry is about → its name for messages, and its value."""


def _by_group(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Effects or traces by component, or by a group of components.

    Args:
        key: ``"effects"`` or ``"traces"``.
        given: What ``npeff.perturb`` or ``npeff.trace`` returned, or the JSON of it: one, a sequence of them, or a
            mapping from components (or tuples of them), which may hold forms that do not say what they are of.
        r: Number of components, where it is known.
        n: Number of examples.

    Raises:
        ArgumentError: It is none of these, names no component, or says two things of one.
    """
    maker, (_, sign, *_rest) = RECORDS[key]
    entries: Entries = {}
    if given is None:
        return entries
    if field_of(given, sign) is not None:
        given = [given]
    if isinstance(given, Mapping):
        for j, item in given.items():
            several = j if isinstance(j, tuple) and j else (j,)
            group = tuple(sorted({index_of(k, r, key) for k in several}))
            if field_of(item, sign) is not None and (own := _members(item, r, f"{key}[{j}]")) != group:
                raise ArgumentError(f"{key}[{j}]: is about {called(key, own)}")
            entries[group] = (f"{key}[{j}]", item)
        return entries
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ArgumentError(f"{key}: expected a mapping from components, or a list, got {type(given).__name__}")
    for i, item in enumerate(given):
        if field_of(item, sign) is None:
            raise ArgumentError(
                f"{key}: expected a mapping, got {type(given).__name__} whose item {i} is not what {maker} returned: "
                f"{excerpt_of(item)}"
            )
        group = _members(item, r, f"{key}[{i}]")
        if group in entries:
            raise ArgumentError(f"{key}[{i}]: another one of {called(key, group)} was given; pass one of them")
        entries[group] = (f"{key}[{i}]", item)
    return entries


def _by_component(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Influences by component.

    Raises:
        ArgumentError: They are no mapping, or one is about another component.
    """
    entries: Entries = {}
    for given_key, value in items_of(given, key):
        j = index_of(given_key, r, key)
        if (own := getattr(value, "j", j)) != j:
            raise ArgumentError(f"{key}[{j}]: is about component {own}")
        entries[j] = (f"{key}[{j}]", value)
    return entries


def _by_example(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Attributions by component and example: ``{(j, i): …}``, or ``{j: {i: …}}`` as in JSON.

    Raises:
        ArgumentError: A key is neither.
    """
    entries: Entries = {}
    for given_key, value in items_of(given, key):
        pairs = [(given_key, value)]
        if not isinstance(given_key, tuple) and isinstance(value, Mapping):
            pairs = [((given_key, i), weights) for i, weights in value.items()]
        for pair, weights in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ArgumentError(
                    f"{key}: expected keys (component, example), got {excerpt_of(pair)}; in JSON, an object with "
                    "components, and within them examples, as keys"
                )
            j, i = index_of(pair[0], r, key), index_of(pair[1], n, key, "examples")
            entries[j, i] = (f"{key}[{j}, {i}]", weights)
    return entries


def _members(item: Any, r: int | None, name: str) -> tuple[int, ...]:
    components = field_of(item, "components")
    if not isinstance(components, Sequence) or isinstance(components, str) or not len(components):
        raise ArgumentError(f"{name}.components: expected the numbers of components, got {excerpt_of(components)}")
    return tuple(sorted({index_of(j, r, f"{name}.components") for j in components}))


def called(key: str, entry: Any) -> str:
    """Say what an entry is about."""
    if key == "trust":
        return str(entry)
    members = entry[:1] if key == "attributions" else entry if isinstance(entry, tuple) else (entry,)
    return f"component{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"


KINDS: dict[str, tuple[Callable[[str, Any, int | None, int | None], Entries], Callable[[str, Any], Any]]] = {
    "effects": (_by_group, effect_of),
    "traces": (_by_group, trace_of),
    "attributions": (_by_example, lambda name, value: numbers(value, name)),
    "influences": (_by_component, influences_of),
}
"""Every optional input but ``trust``, whose entries are its fields: what tells its entries apart, what reads each.

The keys are those of files, too.
"""


# ---- files --------------------------------------------------------------------------------------------------

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
        key: {entry: value for entry, (_, value) in KINDS[key][0](key, found[key], r, n).items()}
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
