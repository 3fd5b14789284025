"""Models whose training steps change few rows of their tables, and the names of these rows.

A score is the inner product of a query, made of the rows of the context, and the row of an answer.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, DataError, ModelError, StorageError, check_integer, check_number
from npeff.short_repr import short_repr
from npeff.storage.files import path_of

Array = npt.NDArray[Any]
Triple = tuple[str, str, str]


class FactorModel(nn.Module, ABC):
    """``score(c, a) = query(rows of c) · row of a``, and ``P(a | c) = softmax_a score(c, a)``.

    An example is a row of integers ``(c_1, …, c_m, a)``: the context and its answer. A subclass names the table that
    each column indexes and gives the query. With ``query`` in torch operations alone, recording by
    :class:`~npeff.companions.rollback.RollbackRecorder`, rollback and the baselines work; ``query_gradient`` adds the
    fast training of :func:`~npeff.companions.rollback.fit`.

    Args:
        sizes: Rows of each table.
        widths: Elements per row of each table.
        scale: Standard deviation of the initial elements.
        seed: Decides the initial elements.

    Attributes:
        columns: Table of each column of an example; the last one is the table of answers.
        options: Arguments to build the same model again, kept in records.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, sizes: Mapping[str, int], widths: Mapping[str, int], scale: float, seed: int) -> None:
        super().__init__()
        for name in sizes:
            check_integer(f"n_{name}", sizes[name])
            check_integer(f"width of {name}", widths[name])
        check_number("scale", scale)
        check_integer("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        self._names = tuple(sizes)
        for name in sizes:
            rows = scale * torch.randn(int(sizes[name]), int(widths[name]), generator=generator)
            self.register_parameter(f"{name}_table", nn.Parameter(rows))
        self.options: dict[str, Any] = {}

    @abstractmethod
    def query(self, context: Sequence[Any]) -> Any:
        """Compute the vector that answers are compared with.

        Args:
            context: One tensor or numpy array per context column, ``(width, …)``: the elements of a row come first,
                the other axes are alike.

        Returns:
            ``(width of the answers' table, …)``.
        """

    def query_gradient(self, context: Sequence[Any], gradient: Any) -> list[Any]:
        """Compute the gradients by the context rows, given the gradient by the query; shapes as for :meth:`query`.

        Raises:
            NotImplementedError: The model has none; only :func:`~npeff.companions.rollback.fit` needs it.
        """
        raise NotImplementedError

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters, by table: ``(rows, width)``."""
        return {name: self._parameters[f"{name}_table"] for name in self._names}  # type: ignore[misc]

    @property
    def answers(self) -> str:
        """The table of answers."""
        return self.columns[-1]

    @property
    def n_answers(self) -> int:
        """Number of answers."""
        return len(self.tables[self.answers])

    def queries(self, contexts: Array | Tensor, tables: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the queries of several contexts.

        Args:
            contexts: ``(n, m)`` or ``(n, m + 1)`` integers; an answer column is ignored.
            tables: Rows to take in place of the model's own.

        Returns:
            ``(n, width)``.
        """
        index = contexts if isinstance(contexts, Tensor) else torch.tensor(np.asarray(contexts))
        tables = self.tables if tables is None else tables
        rows = [tables[table][index[:, j].long()].T for j, table in enumerate(self.columns[:-1])]
        found: Tensor = self.query(rows).T
        return found

    def forward(self, contexts: Array | Tensor) -> Tensor:
        """Compute the scores of all answers.

        Args:
            contexts: ``(n, m)`` or ``(n, m + 1)`` integers; an answer column is ignored.

        Returns:
            ``(n, n_answers)``; their softmax is P(a | c).
        """
        return self.queries(contexts) @ self.tables[self.answers].T

    def check_examples(self, examples: Array | Tensor, name: str = "examples", *, least: int = 0) -> Array:
        """Check examples and convert them to ``(n, m + 1)`` int64, each index inside its table.

        Args:
            examples: One example per row.
            name: The argument's name, for messages.
            least: How many there must be.

        Raises:
            ArgumentError: Wrong shape or dtype, an index without a row, or too few examples.
        """
        array = np.asarray(examples)
        width = len(self.columns)
        if array.ndim != 2 or array.shape[1] != width or (array.size and array.dtype.kind not in "iu"):
            raise ArgumentError(
                f"{name}: expected an integer array (n, {width}) with the columns {', '.join(self.columns)}, got "
                f"{array.dtype} of shape {array.shape}"
            )
        if len(array) < least:
            raise ArgumentError(f"{name}: expected at least {least}, got {len(array)}")
        for j, table in enumerate(self.columns):
            rows = len(self.tables[table])
            outside = np.flatnonzero((array[:, j] < 0) | (array[:, j] >= rows))
            if len(outside):
                i = int(outside[0])
                raise ArgumentError(
                    f"{name}: row {i} has {int(array[i, j])} in column {j}, but the model's table {table!r} has rows "
                    f"0 to {rows - 1}; encode names and examples with the vocabulary that the model was made for"
                )
        return array.astype(np.int64)

    def numpy_tables(self) -> dict[str, Array]:
        """Copy the tables to numpy arrays.

        Raises:
            ModelError: They are of a dtype that numpy lacks.
        """
        if any(table.dtype == torch.bfloat16 for table in self.tables.values()):
            raise ModelError("model: its tables are bfloat16, expected float32 or float64; convert it: model.float()")
        return {name: table.detach().cpu().numpy().copy() for name, table in self.tables.items()}

    def load_tables(self, tables: Mapping[str, Array]) -> None:
        """Set the tables, in place.

        Raises:
            ArgumentError: One is missing, or of another shape.
        """
        for name, table in self.tables.items():
            if name not in tables or tables[name].shape != tuple(table.shape):
                came = tables[name].shape if name in tables else "nothing"
                raise ArgumentError(f"tables: expected {name!r} of shape {tuple(table.shape)}, got {came}")
        with torch.no_grad():
            for name, table in self.tables.items():
                table.copy_(torch.tensor(np.asarray(tables[name])))


class DistMult(FactorModel):
    """Knowledge-graph triples (head, relation, tail): ``score = Σ_k h_k r_k t_k`` (Yang et al. 2015, arXiv 1412.6575).

    Args:
        n_entities: Rows of the entity table.
        n_relations: Rows of the relation table.
        dim: Elements per row.
        scale: Standard deviation of the initial elements.
        seed: Decides the initial elements.
    """

    columns = ("entities", "relations", "entities")
    _numbers = 1  # real numbers per element of a row

    def __init__(self, n_entities: int, n_relations: int, dim: int = 10, *, scale: float = 0.5, seed: int = 0) -> None:
        check_integer("dim", dim)
        sizes = {"entities": n_entities, "relations": n_relations}
        super().__init__(sizes, dict.fromkeys(sizes, self._numbers * dim), scale, seed)
        self.options = {"n_entities": int(n_entities), "n_relations": int(n_relations), "dim": int(dim)}

    def query(self, context: Sequence[Any]) -> Any:
        """Compute ``h ∘ r``."""
        head, relation = context
        return head * relation

    def query_gradient(self, context: Sequence[Any], gradient: Any) -> list[Any]:
        """Compute ``(g ∘ r, g ∘ h)``."""
        head, relation = context
        return [gradient * relation, gradient * head]


class ComplEx(DistMult):
    """Triples with complex rows: ``score = Re Σ_k h_k r_k t̄_k`` (Trouillon et al. 2016, arXiv 1606.06357).

    A row holds the real parts, then the imaginary ones, so that the score is the real inner product of ``h ∘ r`` and t:
    the tables have 2·dim columns. Arguments as for :class:`DistMult`.
    """

    _numbers = 2

    def query(self, context: Sequence[Any]) -> Any:
        """Compute ``h ∘ r``, complex."""
        head, relation = context
        return _complex_product(head, relation)

    def query_gradient(self, context: Sequence[Any], gradient: Any) -> list[Any]:
        """Compute ``(g ∘ r̄, g ∘ h̄)``."""
        head, relation = context
        return [_complex_product(gradient, _conjugate(row)) for row in (relation, head)]


class MatrixFactorization(FactorModel):
    """A recommender on pairs (user, item): ``score = p_u · q_i + b_i``, and P(i | u) its softmax over items.

    The bias is the last element of an item's row, so that a step on one pair touches one row of each table.

    Args:
        n_users: Rows of the user table.
        n_items: Rows of the item table, which has dim + 1 columns.
        dim: Elements per user.
        scale: Standard deviation of the initial elements.
        seed: Decides the initial elements.
    """

    columns = ("users", "items")

    def __init__(self, n_users: int, n_items: int, dim: int = 16, *, scale: float = 0.1, seed: int = 0) -> None:
        check_integer("dim", dim)
        super().__init__({"users": n_users, "items": n_items}, {"users": dim, "items": dim + 1}, scale, seed)
        self.options = {"n_users": int(n_users), "n_items": int(n_items), "dim": int(dim)}

    def query(self, context: Sequence[Any]) -> Any:
        """Compute ``(p_u, 1)``."""
        (user,) = context
        return _join([user, user[:1] * 0 + 1])

    def query_gradient(self, context: Sequence[Any], gradient: Any) -> list[Any]:
        """Leave out the gradient's last element, that of the constant."""
        return [gradient[:-1]]


MODELS: dict[str, type[FactorModel]] = {"distmult": DistMult, "complex": ComplEx, "matrix": MatrixFactorization}
"""Models by the name they have in records and on the command line."""


def _join(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def _conjugate(x: Any) -> Any:
    half = len(x) // 2
    return _join([x[:half], -x[half:]])


def _complex_product(x: Any, y: Any) -> Any:
    half = len(x) // 2
    a, b, c, d = x[:half], x[half:], y[:half], y[half:]
    return _join([a * c - b * d, a * d + b * c])


def read_triples(path: str | Path) -> list[Triple]:
    """Read ``head⇥relation⇥tail``, one triple per line; empty lines are skipped.

    Args:
        path: A UTF-8 text file.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: The file cannot be read.
        DataError: A line does not have three fields, or there are no lines.
    """
    path = path_of(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text with three tab-separated fields a line ({error})") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    found: list[Triple] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = tuple(field.strip() for field in line.split("\t"))
        if len(fields) != 3 or not all(fields):
            raise DataError(f"{path}, line {number}: expected head, relation and tail separated by tabs, got {line!r}")
        found.append((fields[0], fields[1], fields[2]))
    if not found:
        raise DataError(f"{path}: holds no triples")
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
        """Collect the names that occur, sorted."""
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
        """Convert triples to ``(n, 3)`` int64.

        Args:
            triples: With names.
            name: The argument's name, for messages.

        Raises:
            DataError: An entity or a relation is unknown; the message lists similar names.
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
        """Convert integers ``(n, 3)`` to names."""
        return [(self.entities[h], self.relations[r], self.entities[t]) for h, r, t in np.asarray(rows).tolist()]
