"""Texts: read them and their labels from lists, tables and files, and cut them into tokens.

Of tokens: which characters each stands for, which of them are places, and words that are one token.
"""

from __future__ import annotations

import csv
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, DataError

Ids = npt.NDArray[np.int64]
Where = str | Callable[[str, list[str]], Iterable[int]]

FILES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Endings of files with texts."""

LONGEST_NAME = 200
"""Characters of a path that messages show."""

BEFORE_WORDS = ".,:;!?)]}=>"
"""Characters, beside letters and digits, that a word follows with a space between."""

KINDS = (
    f"a list of texts, a list of mappings, a pandas column or frame, a datasets.Dataset, a mapping of columns, or the "
    f"path of a file ({', '.join(FILES)}) or of a folder written by Dataset.save_to_disk"
)

AT_ONCE = 1_000
"""Texts that the tokenizer is given at a time."""


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
    elif isinstance(texts, Iterable):
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


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text.

    Attributes:
        text: The text.
        ids: ``(t,)`` their numbers.
        spans: ``(t, 2)`` the characters that each stands for, as start and end; empty for tokens that the tokenizer
            adds of its own, and for white space where the tokenizer says so.
        added: ``(t,)`` 1 for tokens that the tokenizer adds of its own, else 0.
    """

    text: str
    ids: Ids
    spans: Ids
    added: Ids

    @property
    def own(self) -> Ids:
        """Positions of the tokens that stand for a part of the text."""
        return np.flatnonzero(self.added == 0)

    @property
    def n_leading(self) -> int:
        """How many tokens the tokenizer put before the text."""
        own = self.own
        return int(own[0]) if len(own) else len(self.ids)

    def pieces(self, tokenizer: Any) -> list[str]:
        """Cut the text into the parts that the tokens stand for; tokens that were added have their own names."""
        found, end = [], 0
        for token, stop, added in zip(self.ids.tolist(), self.spans[:, 1].tolist(), self.added.tolist(), strict=True):
            found.append(str(tokenizer.convert_ids_to_tokens(token)) if added else self.text[end:stop])
            end = max(end, stop)
        return found


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Iterator[Tokens]:
    """Iterate over the tokens of each text.

    Raises:
        ArgumentError: The tokenizer does not know the characters of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            "tokenizer: expected a fast tokenizer of transformers (AutoTokenizer.from_pretrained), which knows the "
            f"characters of each token, got {type(tokenizer).__name__}"
        )
    for start in range(0, len(texts), AT_ONCE):
        some = list(texts[start : start + AT_ONCE])
        wanted = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_attention_mask": False}
        read = tokenizer(some, **wanted, verbose=False)
        columns = read["input_ids"], read["offset_mapping"], read["special_tokens_mask"]
        for text, ids, spans, added in zip(some, *columns, strict=True):
            yield Tokens(
                text, np.array(ids, np.int64), np.array(spans, np.int64).reshape(-1, 2), np.array(added, np.int64)
            )


def prompt_ids(tokenizer: Any, text: str) -> Ids:
    """Give the tokens ``(t,)`` of a text that is to be continued: without those that the tokenizer puts after it."""
    if not getattr(tokenizer, "is_fast", False):  # any other is trusted to put none
        return np.asarray(tokenizer(text, return_tensors="pt")["input_ids"]).reshape(-1).astype(np.int64)
    (tokens,) = tokenize(tokenizer, [text])
    return tokens.ids[: tokens.own[-1] + 1] if len(tokens.own) else tokens.ids[:0]


def finder(where: Where, tokenizer: Any) -> Callable[[Tokens, Text], Ids]:
    """Make the function that finds the places of a text: ``(p,)`` positions of tokens, ascending.

    Raises:
        ArgumentError: ``where`` is neither a regular expression nor callable.
    """
    if where == "last":
        return lambda tokens, text: tokens.own[-1:]
    if where == "every":
        return lambda tokens, text: tokens.own
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ArgumentError(
                f"where: expected 'last', 'every', a regular expression or a callable; {where!r} is none: {error}"
            ) from error
        return lambda tokens, text: _of_matches(pattern, tokens)
    if not callable(where):
        raise ArgumentError(f"where: expected 'last', 'every', a regular expression or a callable, got {where!r}")

    def called(tokens: Tokens, text: Text) -> Ids:
        positions = where(tokens.text, tokens.pieces(tokenizer))
        try:
            given = list(positions)
            found = sorted({operator.index(position) for position in given})
        except (TypeError, ValueError) as error:
            raise DataError(f"where: expected positions of tokens of {text.source}, got {positions!r}") from error
        if any(str(getattr(position, "dtype", type(position).__name__)).endswith("bool") for position in given):
            raise DataError(
                f"where: expected positions of tokens of {text.source}, got True and False: give the numbers"
            )
        if found and not 0 <= found[0] <= found[-1] < len(tokens.ids):
            raise DataError(f"where: expected positions from 0 to {len(tokens.ids) - 1} of {text.source}, got {found}")
        return np.array(found, np.int64)

    return called


def _of_matches(pattern: re.Pattern[str], tokens: Tokens) -> Ids:
    """The tokens that hold the last character of each match; of several for one character, the last."""
    own = tokens.own
    ends = np.array([match.end() for match in pattern.finditer(tokens.text) if match.end() > match.start()], np.int64)
    starts = tokens.spans[own, 0]
    return np.unique(own[np.maximum(np.searchsorted(starts, ends - 1, side="right") - 1, 0)]) if len(own) else own


def continuation(tokenizer: Any, before: str, word: str, what: str) -> int:
    """Find the token that a word is where it continues a text.

    Args:
        tokenizer: The tokenizer.
        before: The text before the word; empty: the word alone.
        word: The word.
        what: Names the word in messages: ``"answers"``, ``"label of text 3"``.

    Raises:
        ArgumentError: The word is several tokens, or none, or the token of unknown words, or changes those before it.
    """
    if not is_unicode(word):
        raise ArgumentError(f"{what}: expected a word of one token, and {word!r} has half a surrogate pair")
    (start, whole) = tokenize(tokenizer, [before, before + word])
    first, both = start.ids[start.own].tolist(), whole.ids[whole.own].tolist()
    if both[: len(first)] == first and len(both) == len(first) + 1:
        if both[-1] == getattr(tokenizer, "unk_token_id", None) and word.strip() != tokenizer.unk_token:
            raise ArgumentError(
                f"{what}: expected a word that the tokenizer knows, and {word!r} becomes {tokenizer.unk_token!r}, as "
                "all words that it does not know"
            )
        return int(both[-1])
    kept = [i for i in whole.own.tolist() if whole.spans[i, 1] > len(before)]
    pieces = [piece for i, piece in enumerate(whole.pieces(tokenizer)) if i in set(kept)]
    after = f" after {before[-24:]!r}" if before else ""
    shown = ", ".join(map(repr, pieces)) or "none"
    hint = ""
    if before and before[-1].isspace():
        hint = "; the text ends in white space, which most tokenizers put at the beginning of the next word: cut it off"
    elif word and not word[0].isspace():
        hint = f"; perhaps with a space before it, {' ' + word!r}"
    raise ArgumentError(f"{what}: expected a word of one token, and {word!r}{after} becomes {shown}{hint}")


def with_space(tokenizer: Any, before: str, word: str) -> str | None:
    """Give a word with a space before it, where that is another token and what one would write after a text.

    Args:
        tokenizer: The tokenizer.
        before: The text before the word.
        word: A word that is one token there.
    """
    if not before or word[0].isspace() or not (before[-1].isalnum() or before[-1] in BEFORE_WORDS):
        return None
    texts = list(tokenize(tokenizer, [before, before + word, f"{before} {word}"]))
    start, plain, spaced = (tokens.ids[tokens.own].tolist() for tokens in texts)
    return f" {word}" if len(spaced) == len(plain) and spaced[:-1] == start and spaced != plain else None
