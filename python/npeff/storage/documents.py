"""JSON from files: of bounded size and depth, of the expected type, or a StorageError that names file and field."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from npeff.errors import StorageError

MOST_BYTES = 256 << 20
"""Larger documents are refused."""

MOST_DEPTH = 64
"""Documents nested more deeply are refused."""

_NAMES = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def read_json(
    path: Path | str, expected: type | tuple[type, ...] = dict, *, finite: bool = True, most: int = MOST_BYTES
) -> Any:
    """Read the JSON document in a file.

    Args:
        path: The file.
        expected: Type, or types, that the document must have: dict, list, str, int, float, bool or NoneType.
        finite: Refuse NaN and infinite numbers.
        most: Bytes; larger files are refused.

    Raises:
        StorageError: There is no such file, it is no regular file, or it holds something else.
    """
    path = Path(path)
    check_regular(path)
    if (size := path.stat().st_size) > most:
        raise StorageError(f"{path}: expected at most {most:,} bytes of JSON, got {size:,}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return parse_json(raw, str(path), expected, finite=finite, most=most)


def parse_json(
    raw: bytes | str,
    where: str,
    expected: type | tuple[type, ...] = dict,
    *,
    finite: bool = True,
    most: int = MOST_BYTES,
) -> Any:
    """Read a JSON document; no name may stand twice in an object.

    Args:
        raw: The document, UTF-8.
        where: File and field, for messages.
        expected: Type, or types, that the document must have.
        finite: Refuse NaN and infinite numbers.
        most: Bytes; larger documents are refused.

    Raises:
        StorageError: It is no JSON, is too large or too deep, or has another type.
    """
    if len(raw) > most:
        raise StorageError(f"{where}: expected at most {most:,} bytes of JSON, got {len(raw):,}")
    try:
        value = json.loads(raw, object_pairs_hook=_object)
    except RecursionError as error:
        raise StorageError(f"{where} is damaged: expected JSON (lists or objects nested too deeply)") from error
    except ValueError as error:
        raise StorageError(f"{where} is damaged: expected JSON ({error})") from error
    _check_nodes(value, where, finite)
    return expect(value, where, expected)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r:.80} stands twice")
    return content


def _check_nodes(value: Any, where: str, finite: bool) -> None:
    """Refuse documents that are too deep, and numbers that are not finite, level by level.

    Raises:
        StorageError: See :func:`parse_json`.
    """
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH + 1):
        if finite:
            for node in level:
                if type(node) is float and not math.isfinite(node):
                    raise StorageError(f"{where} is damaged: expected finite numbers or null, got {node}")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise StorageError(f"{where} is damaged: expected at most {MOST_DEPTH} levels of JSON")


def expect(value: Any, where: str, expected: type | tuple[type, ...]) -> Any:
    """``value``, once it has one of the expected types. A whole number serves as a number, true and false do not.

    Args:
        value: Of a JSON document.
        where: File and field, for messages.
        expected: dict, list, str, int, float, bool, NoneType, or several of them.

    Raises:
        StorageError: It has another type.
    """
    types = expected if isinstance(expected, tuple) else (expected,)
    wide = (*types, int) if float in types else types
    if object in types or type(value) in wide:
        return value
    names = " or ".join(_NAMES[item] for item in types)
    raise StorageError(f"{where} is damaged: expected {names}, got {_NAMES.get(type(value), type(value).__name__)}")


def item(document: dict[str, Any], key: str, where: str, expected: type | tuple[type, ...]) -> Any:
    """``document[key]``, of one of the expected types; where NoneType is among them the key may be missing.

    Args:
        document: A JSON object.
        key: A key of it.
        where: File and field of the object, for messages.
        expected: As in :func:`expect`.

    Raises:
        StorageError: The key is missing, or its value has another type.
    """
    types = expected if isinstance(expected, tuple) else (expected,)
    if key not in document and type(None) not in types:
        raise StorageError(f"{where} is damaged: {key!r} is missing")
    return expect(document.get(key), f"{where}, {key!r}", expected)


def check_regular(path: Path) -> None:
    """Make sure that ``path`` is a regular file: reading from a pipe or a device may never end.

    Raises:
        StorageError: Nothing is there, or a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "no such file" if missing else getattr(error, "strerror", None) or str(error)
        raise StorageError(f"{path}: {reason}; check the path") from error
    if stat.S_ISDIR(mode):
        raise StorageError(f"{path}: expected a file, but this is a folder; give the file inside it")
    if not stat.S_ISREG(mode):
        raise StorageError(f"{path}: expected a regular file, but this is a device, pipe or socket; give a file")
