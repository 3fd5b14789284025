"""Read texts and their labels from lists, tables and files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from npeff.errors import ArgumentError, DataError

FILES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Endings of files with texts."""

LONGEST_NAME = 200
"""Characters of a path that messages show."""

KINDS = (
    f"a list of texts, a list of mappings, a pandas column or frame, a datasets.Dataset, a mapping of columns, or the "
    f"path of a file ({', '.join(FILES)}) or of a folder written by Dataset.save_to_disk"
)


class Text(NamedTuple):
    """One text.

    Attributes:
        source: Where it stands, for messages: ``"prompts.jsonl, line 3"``.
        text: The text.
        label: Its label as the source has it; None where it has none.
    """

    source: str
    text: str
    label: Any


def read_texts(texts: Any, text_column: str, label_column: str | None) -> list[Text]:
    """Read texts of any source.

    Args:
        texts: What :data:`KINDS` lists.
        text_column: The column of the texts, where the source has columns.
        label_column: The column of the labels; None: no labels.

    Raises:
        ArgumentError: ``texts`` is something else, or a package that reads it is missing.
        DataError: A file cannot be read, a column is missing, or a text is empty or no text.
    """
    if isinstance(texts, str | os.PathLike):
        rows = _file(Path(texts), text_column, label_column)
    elif getattr(texts, "column_names", None) is not None or hasattr(texts, "columns") or isinstance(texts, Mapping):
        rows = _table(texts, "texts", text_column, label_column)
    elif isinstance(texts, Iterable) and not isinstance(texts, set | frozenset):  # sets have no order that stays
        rows = _items(texts, text_column, label_column)
    else:
        raise ArgumentError(f"texts: expected {KINDS}, got {type(texts).__name__}")
    found = []
    for source, text, label in rows:
        if not isinstance(text, str):
            raise DataError(f"texts: {source} is {text!r}; expected a text")
        if not text.strip():
            raise DataError(f"texts: {source} is empty; leave it out")
        if not is_unicode(text):
            raise DataError(
                f"texts: {source} has half a surrogate pair, which is no character; mend it or leave it out"
            )
        found.append(Text(source, text, None if _missing(label) else label))
    if not found:
        raise DataError("texts: there are none")
    return found


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written; halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(label: Any) -> bool:
    """Whether a label stands for none: also NaN and NA of pandas, which equal nothing."""
    if label is None or isinstance(label, str):
        return not label
    try:
        return bool(label != label)
    except (TypeError, ValueError):  # NA has no truth value; nor has a comparison of arrays
        return type(label).__name__ == "NAType"


def _items(texts: Iterable[Any], text_column: str, label_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    """The texts of an iterable: strings, or mappings with a text each."""
    for number, item in enumerate(texts):
        yield _row(f"text {number}", item, text_column, label_column)


def _row(source: str, item: Any, text_column: str, label_column: str | None) -> tuple[str, Any, Any]:
    """One text that is a string, or stands in a mapping.

    Raises:
        DataError: The mapping lacks a column.
    """
    if not isinstance(item, Mapping):
        if label_column is not None:
            raise DataError(f"texts: {source} is no mapping, so it has no label_column={label_column!r}")
        return source, item, None
    for option, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None and column not in item:
            raise DataError(f"texts: {source} has no {option}={column!r}; it has {', '.join(map(str, item))}")
    return source, item[text_column], None if label_column is None else item[label_column]


def _table(table: Any, source: str, text_column: str, label_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    """The texts of a frame, a dataset, an Arrow table or a mapping of columns.

    Raises:
        DataError: A column is missing, is there twice, is no column, or has another length.
    """
    names = [str(name) for name in getattr(table, "column_names", getattr(table, "columns", table))]

    def column(option: str, name: str) -> list[Any]:
        if name not in names:
            raise DataError(f"{source}: there is no {option}={name!r}; the columns are {', '.join(names)}")
        if names.count(name) > 1:
            raise DataError(f"{source}: there are {names.count(name)} columns {option}={name!r}; rename all but one")
        values = table[name]
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise DataError(f"{source}: expected a column of values as {option}={name!r}, got {values!r}")
        return list(values.to_pylist() if hasattr(values, "to_pylist") else values)

    found = column("text_column", text_column)
    labels = [None] * len(found) if label_column is None else column("label_column", label_column)
    if len(labels) != len(found):
        raise DataError(
            f"{source}: expected as many labels as texts, got {len(labels)} in {label_column!r} and {len(found)} in "
            f"{text_column!r}"
        )
    for number, (text, label) in enumerate(zip(found, labels, strict=True)):
        yield f"text {number}", text, label


def _file(path: Path, text_column: str, label_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    """The texts of a file, or of a folder that the datasets package wrote.

    Raises:
        ArgumentError: There is no such file, it has another ending, or a package is missing.
        DataError: It cannot be read.
    """
    try:
        there = path.exists()
    except (OSError, ValueError):  # no path at all: too long, or with a zero byte
        there = False
    if not there:
        name = str(path) if len(str(path)) <= LONGEST_NAME else f"{str(path)[:LONGEST_NAME]}…"
        raise ArgumentError(f"texts: there is no file {name}; for one text pass a list, [text]")
    ending = path.suffix.lower()
    try:
        if path.is_dir():
            yield from _table(_saved_dataset(path), str(path), text_column, label_column)
        elif ending == ".parquet":
            yield from _table(_parquet(path), str(path), text_column, label_column)
        elif ending == ".txt":
            if label_column is not None:
                raise DataError(f"texts: {path} has no columns, so no label_column={label_column!r}")
            # Not splitlines(), which also ends lines within a text, as at U+2028.
            with path.open(encoding="utf-8-sig") as file:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield f"{path}, line {line}", text.removesuffix("\n"), None
        elif ending in (".jsonl", ".ndjson"):
            yield from _json_lines(path, text_column, label_column)
        elif ending in (".csv", ".tsv"):
            yield from _csv(path, "\t" if ending == ".tsv" else ",", text_column, label_column)
        else:
            raise ArgumentError(f"texts: expected a file ending in {', '.join(FILES)}, got {path}")
    except ImportError as error:
        needed = "datasets" if path.is_dir() else "pyarrow"
        raise ArgumentError(f"texts: {path} is read by {needed}: pip install {needed} ({error})") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"texts: {path} cannot be read: {error}") from error


def _parquet(path: Path) -> Any:
    """The Arrow table in a Parquet file.

    Raises:
        DataError: It is none.
    """
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path)
    except ArrowException as error:
        raise DataError(f"texts: {path} cannot be read: {error}") from error


def _saved_dataset(path: Path) -> Any:
    """A dataset that ``save_to_disk`` wrote.

    Raises:
        DataError: The folder holds none, or several.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"texts: the folder {path} holds no dataset written by Dataset.save_to_disk") from error
    if isinstance(found, Mapping):
        raise DataError(f"texts: {path} holds several datasets; name one: {', '.join(str(path / k) for k in found)}")
    return found


def _json_lines(path: Path, text_column: str, label_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    """The texts of a file with one JSON value per line.

    Raises:
        DataError: A line is no JSON, or neither a text nor an object.
    """
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            source = f"{path}, line {line}"
            try:
                item = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"texts: {source} is no JSON ({error}); expected one object per line") from error
            yield _row(source, item, text_column, label_column)


def _csv(path: Path, delimiter: str, text_column: str, label_column: str | None) -> Iterator[tuple[str, Any, Any]]:
    """The texts of a table whose first line names the columns.

    Raises:
        DataError: A column is missing or there twice, a line ends before it or has more cells than the first line, or
            quotes do not end.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        columns = list(reader.fieldnames or [])
        for column in (text_column, label_column):
            if columns.count(str(column)) > 1:
                raise DataError(
                    f"texts: {path} has {columns.count(str(column))} columns {column!r}; rename all but one"
                )
        for row in reader:
            source = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"texts: {source} has {len(columns) + len(row[None])} cells, and the first line names "
                    f"{len(columns)}; put cells that hold {delimiter!r} between double quotes"
                )
            found = _row(source, row, text_column, label_column)
            if found[1] is None or (label_column is not None and found[2] is None):
                raise DataError(f"texts: {source} has fewer columns than the first line, {len(columns)}")
            yield found
