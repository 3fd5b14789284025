"""Check everything that is read: JSON documents, and arrays against the table that their format states.

JSON is of bounded size and depth and of the expected type. A format states each array as a :class:`Field`; one check
serves them all, whether arrays are mapped from HDF5 or cut from others. Sizes have names: the
first field whose shape mentions ``"n_rows"`` decides it, all others have to agree. What is not as expected is a
``StorageError`` that names file and field.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from npeff.errors import StorageError

Array = npt.NDArray[Any]
Sizes = dict[str, int]

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
    """Return ``value``, once it has an expected type. A whole number serves as a number, true and false do not.

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
    """Return ``document[key]``, of an expected type; where NoneType is among them the key may be missing.

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


# ---- arrays ----------------------------------------------------------------------------------------------------

PIECE_BYTES = 1 << 20
"""Bytes that are looked at together: they stay in the processor's cache from one check to the next."""

MOST_PARAMETERS = 1 << 48
"""No model has as many; arrays of one number per parameter stay below what can be addressed."""

FLOAT = ("<f2", "<f4", "<f8")
INT = ("<i4", "<i8")


class Shaped(Protocol):
    """An array, or the description of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its elements."""


@dataclass(frozen=True)
class Field:
    """One array of a format. Floating-point numbers have to be finite where nothing else is said.

    Attributes:
        name: Its name in the file.
        dtypes: Types accepted, such as ``"<f4"``; a single letter (``"f"``, ``"i"``) stands for every width and byte
            order of that kind.
        shape: A number, a size's name, or a size's name with ``" + 1"``, per axis.
        least: Elements are at least this.
        below: Elements are below this size.
        ascends_to: Elements rise from 0 to this size, each at least its predecessor: offsets.
        adds_up_to: Elements, each at least 0, add up to this size: counts.
        ascending_in: Elements rise strictly between each two offsets of the field of this name; ``""``: all of them.
        nan: NaN is accepted: an unknown number.
        infinite: Infinite numbers are accepted: results that overflowed.
        optional: The field may be missing.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int | str, ...]
    least: int | None = None
    below: str | None = None
    ascends_to: str | None = None
    adds_up_to: str | None = None
    ascending_in: str | None = None
    nan: bool = False
    infinite: bool = False
    optional: bool = False


def refuse(where: object, name: str, expected: str) -> NoReturn:
    """Refuse an array that is not as expected.

    Raises:
        StorageError: Always.
    """
    raise StorageError(f"{where}: dataset {name!r} is damaged: expected {expected}")


def check_shapes(where: object, found: Mapping[str, Shaped], fields: Sequence[Field], sizes: Sizes) -> None:
    """Make sure that types and shapes are as expected and agree with each other.

    Args:
        where: The file, for messages.
        found: Arrays or their descriptions, by name.
        fields: What is expected.
        sizes: Sizes known beforehand; those that the fields decide are added.

    Raises:
        StorageError: A field is missing, or has another type or shape.
    """
    for field in fields:
        if field.name not in found:
            if field.optional:
                continue
            raise StorageError(
                f"{where}: dataset {field.name!r} is missing; the file was changed by another program, or is damaged"
            )
        shape, dtype = found[field.name].shape, found[field.name].dtype
        if not any(accepted in (dtype.str, dtype.kind) for accepted in field.dtypes):
            refuse(where, field.name, f"the type {' or '.join(field.dtypes)}, got {dtype}")
        if len(shape) != len(field.shape) or not all(map(_agrees, shape, field.shape, [sizes] * len(shape))):
            known = {key: size for key, size in sizes.items() if any(key in str(axis) for axis in field.shape)}
            about = f" with {', '.join(f'{key} = {size:,}' for key, size in known.items())}" if known else ""
            expected = ", ".join(map(str, field.shape))
            refuse(where, field.name, f"the shape ({expected}){about}, got {tuple(shape)}")


def _agrees(found: int, expected: int | str, sizes: Sizes) -> bool:
    """Compare an axis with the expected size; decide the size where it is not known yet."""
    if isinstance(expected, int):
        return found == expected
    name, _, more = expected.partition(" + ")
    return found - int(more or 0) >= 0 and found - int(more or 0) == sizes.setdefault(name, found - int(more or 0))


def check_arrays(where: object, arrays: Mapping[str, Array], fields: Sequence[Field], sizes: Sizes) -> None:
    """Make sure that arrays in memory are as a format expects them, in type, shape and contents.

    Args:
        where: The file that they come from, for messages.
        arrays: By name.
        fields: What is expected; fields that others refer to come first.
        sizes: Sizes known beforehand; those that the fields decide are added.

    Raises:
        StorageError: One is not.
    """
    check_shapes(where, arrays, fields, sizes)
    for field in fields:
        if field.name in arrays:
            for _ in checked_pieces(where, field, arrays, sizes):
                pass


def checked_pieces(where: object, field: Field, arrays: Mapping[str, Array], sizes: Sizes) -> Iterator[Array]:
    """Yield a field's elements in flat pieces, each once it is checked.

    Args:
        where: The file, for messages.
        field: The field; its type and shape are right.
        arrays: Holds the field's array, and the offsets that it refers to.
        sizes: All sizes that it refers to.

    Raises:
        StorageError: An element is not as expected; names it.
    """
    array = arrays[field.name]
    flat = array.reshape(-1)
    last, total = 0, 0
    if field.ascends_to is not None and (not len(flat) or flat[0] != 0):
        refuse(where, field.name, f"offsets from 0 on, got {flat[0] if len(flat) else 'none'}")
    step = max(1, PIECE_BYTES // max(1, array.dtype.itemsize))
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        for wrong, expected in _rules(field, piece, sizes):
            _refuse(where, field, piece, start, wrong, expected)
        if field.ascends_to is not None:
            if piece[0] < last:
                _refuse(where, field, piece, start, np.array([True]), f"at least the {last} before it")
            last = int(piece[-1])
        if field.adds_up_to is not None:
            total += int(piece.sum())  # cannot overflow: every count is at most the size
        if field.ascending_in is not None:
            before = flat[start - 1 : start + step] if start else piece
            rises = before[1:] > before[:-1]
            first = start + (0 if start else 1)  # of the element that rises[0] is about
            offsets = arrays[field.ascending_in] if field.ascending_in else np.zeros(0, np.int64)
            starts = offsets[slice(*np.searchsorted(offsets, [first, first + len(rises)]))]
            rises[np.asarray(starts, np.int64) - first] = True
            _refuse(where, field, before[1:], first, ~rises, "entries that rise within a row")
        yield piece
    size = sizes[field.ascends_to or field.adds_up_to or ""] if field.ascends_to or field.adds_up_to else 0
    if field.ascends_to is not None and last != size:
        refuse(where, field.name, f"offsets up to {size:,}, {field.ascends_to}, got {last:,}")
    if field.adds_up_to is not None and total != size:
        refuse(where, field.name, f"counts that add up to {size:,}, {field.adds_up_to}, got {total:,}")


def _rules(field: Field, piece: Array, sizes: Sizes) -> Iterator[tuple[Array, str]]:
    """Yield, per rule, which elements break it, and what it expects."""
    if piece.dtype.kind == "f":
        wrong = ~np.isfinite(piece)
        if wrong.any() and (field.nan or field.infinite):
            wrong &= ~(np.isnan(piece) & field.nan | np.isinf(piece) & field.infinite)
        yield wrong, "finite numbers"
    least = 0 if field.ascends_to or field.adds_up_to else field.least
    if least is not None:
        yield piece < least, f"numbers ≥ {least}"
    if field.below is not None:
        yield piece >= sizes[field.below], f"numbers < {sizes[field.below]:,}, {field.below}"
    if field.adds_up_to is not None:
        yield piece > sizes[field.adds_up_to], f"numbers ≤ {sizes[field.adds_up_to]:,}, {field.adds_up_to}"
    if field.ascends_to is not None:
        yield np.append(False, piece[1:] < piece[:-1]), "offsets that do not fall"


def _refuse(where: object, field: Field, piece: Array, start: int, wrong: Array, expected: str) -> None:
    if wrong.any():
        at = int(wrong.argmax())
        refuse(where, field.name, f"{expected}, got {piece[at]} as element {start + at:,}")
