"""What a report can show besides, as JSON: what other commands write and ``npeff report --extras`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from npeff.errors import ArgumentError, ExtrasError
from npeff.reports.extras import TRUST_KEYS, influences_of, numbers, read_extras, trust_of
from npeff.storage.files import atomic, path_of

if TYPE_CHECKING:
    from npeff.components.components import Components

FILE_KEYS = ("effects", "trust", "attributions", "influences", "traces")
DIGEST = "components_digest"
"""The field that says which components a file is about: :attr:`npeff.Components.digest`."""

LIMIT = 1 << 30
"""Bytes of the largest file that is read."""

DIGITS = 20
"""Digits of the longest whole number that is read."""

WRITTEN_BY = (
    "expected a JSON file written by npeff trust, perturb, trace, linearize --component, influence --component or "
    f"rollback --component, or a JSON object with any of {', '.join(FILE_KEYS)}"
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
    merged: dict[str, dict[Any, Any]] = {}
    for given in paths:
        path = path_of(given)
        found, about = _understood(path, read_json(path))
        if components is not None and about and about != {components.digest}:
            raise ExtrasError(
                f"{path}: {DIGEST}: expected {components.digest}, the components of this report, got "
                f"{', '.join(sorted(about))[:80]}: the file is about another decomposition; run the command that "
                "wrote it on these components"
            )
        with _naming(path):
            _check(found, components)
        for key, entries in found.items():
            known = merged.setdefault(key, {})
            if twice := [name for name in entries if name in known]:
                raise ExtrasError(
                    f"{path}: {key} of {_words(key, twice[0])} were given by another file already"
                    f"{_example(key, twice[0])}; pass one of them"
                )
            known |= entries
    return merged


def describe_extras(path: str | Path) -> dict[str, Any]:
    """What a JSON file holds for a report.

    Args:
        path: A file that :func:`load_extras` reads.

    Returns:
        ``path``, ``bytes``, ``format``, ``content``, ``components_digest`` where the file says so, and per key of
        :func:`load_extras` what it is about. JSON-able.

    Raises:
        ExtrasError: The file is damaged or of another kind.
    """
    path = path_of(path)
    found, about = _understood(path, read_json(path))
    summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "format": "JSON"}
    summary["content"] = "for npeff report --extras"
    if about:
        summary[DIGEST] = sorted(about)[0]
    for key, entries in found.items():
        summary[key] = "; ".join(dict.fromkeys(_words(key, name) for name in entries))
    return summary


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
        found = influences_of(j, value)
        texts = {str(i): text for i, text in found.texts.items()}
        content.setdefault("influences", {})[str(j)] = {"by": found.by, "pairs": found.pairs, "texts": texts}
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


# ---- reading -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read JSON of bounded size, without NaN or infinities, and with no name twice in an object.

    Args:
        path: A file of at most ``LIMIT`` bytes.

    Raises:
        ExtrasError: The file is not that.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "no such file"
        raise ExtrasError(f"{path}: {WRITTEN_BY} ({what}; check the path)")
    size = path.stat().st_size
    if size > LIMIT:
        raise ExtrasError(f"{path}: {WRITTEN_BY}; got {size:,} bytes, and at most {LIMIT:,} are read")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ExtrasError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if raw.startswith(b"\x89HDF"):
        raise ExtrasError(f"{path}: {WRITTEN_BY}; got an HDF5 file, made by an --out that does not end in .json")
    try:
        return json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_whole
        )
    except RecursionError as error:
        raise ExtrasError(f"{path}: {WRITTEN_BY}; got lists or objects nested too deeply") from error
    except ValueError as error:
        raise ExtrasError(f"{path}: {WRITTEN_BY} ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r:.80} stands twice")
    return content


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON; write null for what is unknown")


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _understood(path: Path, content: Any) -> tuple[dict[str, dict[Any, Any]], set[str]]:
    """Keywords for :func:`npeff.report`, and the digests of the components that the file says it is about.

    Raises:
        ExtrasError: The file is of another kind.
    """
    items = content if isinstance(content, list) else [content]
    for key, fields in (("effects", {"components", "figures"}), ("traces", {"components", "groups", "alone"})):
        if items and all(isinstance(item, dict) and fields <= set(item) for item in items):
            details = [item["details"] for item in items if isinstance(item.get("details"), dict)]
            about = {digest for d in details if isinstance(digest := d.get(DIGEST), str)}
            with _naming(path):
                return {key: _by_components(key, items)}, about
    if not isinstance(content, dict) or not content:
        got = f"a list of {len(content)}" if isinstance(content, list) else f"{content!r:.40}"
        raise ExtrasError(f"{path}: {WRITTEN_BY}; got {got}")
    found = dict(content)
    digest = found.pop(DIGEST, None)
    if not isinstance(digest, str | None):
        raise ExtrasError(f"{path}: {DIGEST}: expected a text, got {digest!r:.40}")
    if found and set(found) <= TRUST_KEYS:
        found = {"trust": found}
    about = {digest} if digest else set()
    stability = found["trust"].get("stability") if isinstance(found.get("trust"), dict) else None
    if isinstance(stability, dict) and isinstance(own := stability.get(DIGEST), str):
        about.add(own)
    if not found or not set(found) <= set(FILE_KEYS):
        raise ExtrasError(f"{path}: {WRITTEN_BY}; got {', '.join(content)[:200]}")
    with _naming(path):
        return {key: _READERS[key](key, value) for key, value in found.items() if value is not None}, about


def _by_components(key: str, value: Any) -> dict[Any, Any]:
    """Effects, traces or influences by component, or by a group of components.

    Raises:
        ArgumentError: They do not say what they are of, or two are of the same.
    """
    if isinstance(value, dict):
        return {str(_number_of(key, j)): item for j, item in value.items()}
    if not isinstance(value, list) or key == "influences":
        raise ArgumentError(f"{key}: expected an object with components as keys, got {value!r:.80}")
    found: dict[Any, Any] = {}
    for i, item in enumerate(value):
        members = item.get("components") if isinstance(item, dict) else None
        if not isinstance(members, list) or not members or not all(type(j) is int and j >= 0 for j in members):
            raise ArgumentError(f"{key}[{i}].components: expected numbers of components, got {members!r:.80}")
        name = str(members[0]) if len(members) == 1 else tuple(sorted(members))
        if name in found:
            raise ArgumentError(f"{key}[{i}]: {_words(key, name)} was described before")
        found[name] = item
    return found


def _trust(key: str, value: Any) -> dict[Any, Any]:
    plain = not isinstance(value, dict) or not set(value) <= TRUST_KEYS
    return {"stability": value} if plain else {name: item for name, item in value.items() if item is not None}


def _attributions(key: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict) or not all(isinstance(examples, dict) for examples in value.values()):
        raise ArgumentError(f"{key}: expected an object with components, and within them examples, as keys")
    return {
        (_number_of(key, j), _number_of(key, i)): np.asarray(numbers(weights, f"{key}[{j}, {i}]"))
        for j, examples in value.items()
        for i, weights in examples.items()
    }


_READERS = {
    "effects": _by_components,
    "traces": _by_components,
    "influences": _by_components,
    "trust": _trust,
    "attributions": _attributions,
}


def _number_of(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < DIGITS):
        raise ArgumentError(f"{key}: expected numbers of components and examples, got {text!r:.80}")
    return int(text)


def _words(key: str, name: Any) -> str:
    """What an entry is about."""
    if key == "trust":
        return str(name)
    if key == "attributions":
        return f"component {name[0]}"
    return f"components {', '.join(map(str, name))}" if isinstance(name, tuple) else f"component {name}"


def _example(key: str, name: Any) -> str:
    return f" (example {name[1]})" if key == "attributions" else ""


def _check(found: Mapping[str, Any], components: Components | None) -> None:
    """Check every value, against the components where they are given.

    Raises:
        ArgumentError: One is not as it should be.
    """
    if components is None:
        trust = found.get("trust", {})
        stability = trust.get("stability")
        own = stability.get("components", stability) if isinstance(stability, dict) else stability
        r = len(own) if isinstance(own, list) else 1
        sized = {name: item for name, item in trust.items() if name != "stability" or isinstance(own, list)}
        trust_of(sized, r, len(trust["explained"]) if isinstance(trust.get("explained"), list) else 1)
        read_extras(1 << 62, 1 << 62, **{key: value for key, value in found.items() if key != "trust"})
        return
    read_extras(components.n_components, len(components.coefficients), **found)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about what it holds.

    Raises:
        ExtrasError: In place of an ArgumentError.
    """
    try:
        yield
    except ExtrasError:
        raise
    except ArgumentError as error:
        raise ExtrasError(f"{path}: {error}; write the file again with the command that made it") from error
