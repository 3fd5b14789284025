"""Triples with names, as tab-separated text, and the integers that models work with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import DataError, StorageError
from npeff.short_repr import short_repr
from npeff.storage.files import path_of

Array = npt.NDArray[Any]
Triple = tuple[str, str, str]


def read_triples(path: str | Path) -> list[Triple]:
    """Read ``head⇥relation⇥tail``, one triple per line; empty lines are skipped.

    Args:
        path: A UTF-8 text file.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: The file cannot be read.
        DataError: A line has not three fields, or there is none.
    """
    path = path_of(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text with three tab-separated fields a line ({error})") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_triples(text, str(path))


def parse_triples(text: str, source: str = "triples") -> list[Triple]:
    """The same, from text.

    Args:
        text: The lines.
        source: Where they come from, for messages.

    Raises:
        DataError: A line has not three fields, or there is none.
    """
    found: list[Triple] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = tuple(field.strip() for field in line.split("\t"))
        if len(fields) != 3 or not all(fields):
            raise DataError(
                f"{source}, line {number}: expected head, relation and tail separated by tabs, got {line!r}"
            )
        found.append((fields[0], fields[1], fields[2]))
    if not found:
        raise DataError(f"{source}: holds no triples")
    return found


@dataclass(frozen=True)
class Vocabulary:
    """Names of entities and relations; their positions are the rows of a model's tables.

    Attributes:
        entities: Names in order.
        relations: Names in order.
    """

    entities: tuple[str, ...]
    relations: tuple[str, ...]

    __repr__ = short_repr

    @classmethod
    def of(cls, triples: Iterable[Triple]) -> Vocabulary:
        """The names that occur, sorted."""
        triples = list(triples)
        heads = {name for head, _, tail in triples for name in (head, tail)}
        return cls(tuple(sorted(heads)), tuple(sorted({relation for _, relation, _ in triples})))

    @cached_property
    def _rows(self) -> dict[str, dict[str, int]]:
        return {
            "entity": {name: i for i, name in enumerate(self.entities)},
            "relation": {name: i for i, name in enumerate(self.relations)},
        }

    def encode(self, triples: Sequence[Triple], name: str = "triples") -> Array:
        """Triples as ``(n, 3)`` int64.

        Args:
            triples: With names.
            name: Of the argument, for messages.

        Raises:
            DataError: An entity or a relation is unknown; similar names are told.
        """
        kinds = ("entity", "relation", "entity")
        rows = np.empty((len(triples), 3), np.int64)
        for i, triple in enumerate(triples):
            for j, (kind, given) in enumerate(zip(kinds, triple, strict=True)):
                row = self._rows[kind].get(given)
                if row is None:
                    near = difflib.get_close_matches(given, self._rows[kind], n=3)
                    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
                    raise DataError(
                        f"{name}: unknown {kind} {given!r} in {' '.join(triple)}; the model knows the "
                        f"{len(self._rows[kind])} it was trained on{hint}"
                    )
                rows[i, j] = row
        return rows

    def decode(self, rows: Array) -> list[Triple]:
        """Integers ``(n, 3)`` as names."""
        return [(self.entities[h], self.relations[r], self.entities[t]) for h, r, t in np.asarray(rows).tolist()]
