"""Put the optional inputs of a report together, from Python and from JSON files, by the components they are about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npeff.components.components import Components
from npeff.errors import ArgumentError, ExtrasError, StorageError
from npeff.reports.evidence import (
    TRUST_KEYS,
    Array,
    EffectSummary,
    Given,
    InfluenceSummary,
    TraceSummary,
    TrustSummary,
)
from npeff.storage.checks import read_json
from npeff.storage.files import atomic, path_of

Entries = dict[Any, Given]
"""What each entry is about (a group of components, a component, or a component and an example) → the entry."""

RECORDS = {
    "effects": ("npeff.perturb", ("components", "figures")),
    "traces": ("npeff.trace", ("components", "groups", "alone")),
}
"""Per input, which function returns one, and the fields by which it is known; the second is in no other record."""
DIGEST = "components_digest"
"""The field that says which components a file is about: :attr:`npeff.Components.digest`."""
LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read."""

INPUTS = ("effects", "traces", "attributions", "influences", "trust")
"""The optional inputs, as keywords of :func:`npeff.report` and as keys of files."""


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

    @classmethod
    def of(cls, given: Mapping[str, Any], r: int | None, n: int | None) -> Extras:
        """Check the optional inputs of :func:`npeff.report`, of r components and n examples where these are known.

        Raises:
            ArgumentError: One of them has another form than documented, or names components or examples that are not
                there.
        """
        found = entries_of(given, r, n)
        checked = {key: {entry: read(one) for entry, one in found[key].items()} for key, read in READERS.items()}
        return cls(**checked, trust=TrustSummary.of(found["trust"]))

    def effect_of(self, j: int) -> EffectSummary:
        """Return the effect of one component; without any value where none was given."""
        return self.effects.get((j,), EffectSummary())

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Groups of several components that were moved along or traced."""
        return sorted({key for key in (*self.effects, *self.traces) if len(key) > 1})


READERS: dict[str, Callable[[Given], Any]] = {
    "effects": EffectSummary.of,
    "traces": TraceSummary.of,
    "attributions": Given.array,
    "influences": InfluenceSummary.of,
}
"""What reads an entry of each input but ``trust``, whose entries belong together."""


def entries_of(given: Mapping[str, Any], r: int | None, n: int | None) -> dict[str, Entries]:
    """Tell apart what each input says, by what it is about.

    Raises:
        ArgumentError: An input has another form, or says two things of one.
    """
    ways = {"trust": _by_statement, "attributions": _by_example, "influences": _by_component}
    return {key: ways.get(key, _by_group)(Given(key, given.get(key), r, n)) for key in INPUTS}


def _by_group(given: Given) -> Entries:
    """Effects or traces, by component or by a group of components.

    They may be what ``npeff.perturb`` or ``npeff.trace`` returned, or the JSON of it: one, a sequence of them, or a
    mapping from components (or tuples of them), which may hold forms that do not say what they are of.

    Raises:
        ArgumentError: They are none of these, name no component, or say two things of one.
    """
    key, entries = given.name, Entries()
    maker, (_, sign, *_rest) = RECORDS[key]
    if given[sign].known:
        given = given.part("", [given.value])
    if isinstance(given.value, Mapping):
        for j, item in given.items():
            group = tuple(sorted({given.part("", k).component() for k in (j if isinstance(j, tuple) and j else (j,))}))
            entries[group] = one = given.part(f"[{j}]", item)
            if one[sign].known and (own := _members(one)) != group:
                raise ArgumentError(f"{one.name}: is about {_called(key, own)}")
        return entries
    if given.known and not given.listed:
        given.refuse("a mapping from components, or a list", type(given.value).__name__)
    for i, item in enumerate(given.value or ()):
        one = given.part(f"[{i}]", item)
        if not one[sign].known:
            wrong = f"{type(given.value).__name__} whose item {i} is not what {maker} returned: {item!r:.80}"
            given.refuse("a mapping", wrong)
        if (group := _members(one)) in entries:
            raise ArgumentError(f"{one.name}: another one of {_called(key, group)} was given; pass one of them")
        entries[group] = one
    return entries


def _members(given: Given) -> tuple[int, ...]:
    """Read the components that a result says it is about."""
    own = given["components"]
    if not own.listed or not len(own.value):
        own.refuse("the numbers of components")
    return tuple(sorted({own.part("", j).component() for j in own.value}))


def _by_component(given: Given) -> Entries:
    """Influences, by component.

    Raises:
        ArgumentError: One is about another component.
    """
    entries = {given.part("", j).component(): given.part(f"[{j}]", value) for j, value in given.items()}
    for j, one in entries.items():
        if (own := getattr(one.value, "j", j)) != j:
            raise ArgumentError(f"{one.name}: is about component {own}")
    return entries


def _by_example(given: Given) -> Entries:
    """Attributions, by component and example: ``{(j, i): …}``, or ``{j: {i: …}}`` as in JSON."""
    entries = Entries()
    for key, value in given.items():
        nested = not isinstance(key, tuple) and isinstance(value, Mapping)
        for pair, weights in [((key, i), own) for i, own in value.items()] if nested else [(key, value)]:
            if not isinstance(pair, tuple) or len(pair) != 2:
                remedy = "in JSON, an object with components, and within them examples, as keys"
                given.refuse("keys (component, example)", f"{pair!r:.80}; {remedy}")
            j, i = given.part("", pair[0]).component(), given.part("", pair[1]).example()
            entries[j, i] = given.part(f"[{j}, {i}]", weights)
    return entries


def _by_statement(given: Given) -> Entries:
    """Trust, by what is said: a mapping with the keys ``TRUST_KEYS``; anything else is the stability."""
    said = given.value
    if isinstance(said, TrustSummary):
        return {"summary": given}
    if not isinstance(said, Mapping) or not set(map(str, said)) <= set(TRUST_KEYS):
        said = {"stability": said}
    return {key: given.part(f".{key}", value) for key, value in said.items() if value is not None}


def _called(key: str, entry: Any) -> str:
    """Say what an entry is about."""
    if key == "trust":
        return str(entry)
    members = entry[:1] if key == "attributions" else entry if isinstance(entry, tuple) else (entry,)
    return f"component{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"


# ---- files --------------------------------------------------------------------------------------------------

_WRITTEN_BY = (
    "expected a JSON file written by npeff trust, perturb, trace, linearize --component, influence --component or "
    f"rollback --component, or a JSON object with any of {', '.join(INPUTS)}"
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
            Extras.of(found, r, n)
            entries = entries_of(found, r, n)
        for key in found:
            own = {entry: one.value for entry, one in entries[key].items()}
            known = merged.setdefault(key, {})
            if twice := [entry for entry in own if entry in known]:
                example = f" (example {twice[0][1]})" if key == "attributions" else ""
                raise ExtrasError(
                    f"{path}: {key} of {_called(key, twice[0])} were given by another file already{example}; pass one "
                    "of them"
                )
            known |= own
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
    with _naming(path):
        entries = entries_of(found, None, None)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "format": "JSON",
        "content": "for npeff report --extras",
        **({DIGEST: min(about)} if about else {}),
        **{key: "; ".join(dict.fromkeys(_called(key, entry) for entry in entries[key])) for key in found},
    }


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
        attributions: As for :func:`npeff.report`; six significant digits are kept.
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
        digits = np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[float])(np.asarray(values, np.float64))
        content.setdefault("attributions", {}).setdefault(str(j), {})[str(i)] = digits.tolist()
    for j, value in (influences or {}).items():
        content.setdefault("influences", {})[str(j)] = asdict(InfluenceSummary.of(Given(f"influences[{j}]", value)))
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
    if not found or not set(found) <= set(INPUTS):
        raise ExtrasError(f"{path}: {_WRITTEN_BY}; got {', '.join(content)[:200]}")
    own = Given("trust", found.get("trust"))["stability"][DIGEST].value
    return found, {text for text in (digest, own) if isinstance(text, str) and text}


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
