"""The record of a training: the examples, the updates that each made, the first and last tables, and the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from npeff.companions.rollback.factor_models import MODELS, FactorModel
from npeff.errors import ArgumentError, ModelError, StorageError, check_integers, check_number
from npeff.short_repr import short_repr
from npeff.storage.checks import FLOAT, Field, Sizes, expect, item, refuse
from npeff.storage.container import check_replaceable, read_record
from npeff.storage.writing import scratch_array, write_record

Array = npt.NDArray[Any]
CONTENT = "rollback"
SAME = ("model_kind", "model_options", "names", "all_rows")
"""Fields of a record that its meta data hold as they are."""

OptimizerName = Literal["sgd", "adagrad", "adam"]

_CHUNK = 1 << 22  # random keys at a time


@dataclass(frozen=True)
class Recipe:
    """Training at batch size 1 on the softmax over an example's answer and its negatives.

    The loss of example d = (c, a) with negatives N is ``−log(exp s(c, a) / Σ_{a' ∈ {a} ∪ N} exp s(c, a'))``. Order and
    negatives depend on ``seed``, the epoch and the number of examples alone: a training that leaves examples out
    keeps those of the others.

    Attributes:
        epochs: Passes over the examples.
        negatives: Different answers drawn per step, other than the example's own; all others where there are no more.
        learning_rate: Of the optimiser.
        optimizer: ``"sgd"``; ``"adagrad"``; ``"adam"``, in the form that changes only rows with a gradient
            (``torch.optim.SparseAdam``).
        seed: Decides order and negatives.
    """

    epochs: int = 10
    negatives: int = 13
    learning_rate: float = 0.1
    optimizer: OptimizerName = "sgd"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, {"epochs": 1, "negatives": 1, "seed": 0})
        check_number("learning_rate", self.learning_rate)
        if self.optimizer not in get_args(OptimizerName):
            known = ", ".join(map(repr, get_args(OptimizerName)))
            raise ArgumentError(
                f"optimizer: expected one of {known}, got {self.optimizer!r}; RollbackRecorder records any torch "
                "optimiser"
            )

    def schedule(self, epoch: int, answers: Array, n_answers: int) -> tuple[Array, Array]:
        """Draw the order ``(n,)`` and the candidates ``(n, 1 + N)`` of an epoch, for answers ``(n,)``.

        Row d of the candidates, for example d and not step d, is its answer, then its negatives, all different.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(answers))
        others = _distinct(rng, len(answers), min(self.negatives, n_answers - 1), n_answers - 1)
        others += others >= answers[:, None]  # skip the answer
        return order, np.concatenate([answers[:, None], others], axis=1)


def _distinct(rng: np.random.Generator, n: int, k: int, size: int) -> Array:
    """Draw ``(n, k)`` int64: rows of k different numbers below ``size``, uniform."""
    if k == size:
        return np.tile(np.arange(size), (n, 1))
    if k * k > size:  # collisions are likely: take the smallest of random keys
        rows = max(1, _CHUNK // size)
        parts = [
            np.argpartition(rng.random((min(rows, n - start), size)), k - 1, axis=1)[:, :k]
            for start in range(0, n, rows)
        ]
        return np.concatenate(parts) if parts else np.empty((0, k), np.int64)
    drawn = rng.integers(size, size=(n, k))
    while True:
        ordered = np.sort(drawn, axis=1)
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(again):
            return drawn
        drawn[again] = rng.integers(size, size=(len(again), k))


@dataclass(frozen=True, eq=False)
class RowUpdates:
    """The recorded updates γ[d, w] of one table's rows w by the examples d, sorted by example.

    Attributes:
        offsets: ``(n + 1,)`` int64; example d owns entries ``offsets[d]:offsets[d + 1]``.
        rows: ``(R,)`` int64 row of the table, ascending within an example.
        values: ``(R, width)`` float32, γ.
    """

    offsets: Array
    rows: Array
    values: Array

    __repr__ = short_repr

    def of(self, examples: Array) -> tuple[Array, Array, Array]:
        """Get for each entry of some examples ``(c,)`` the position in these, its row, and γ ``(e, width)``."""
        starts, counts = self.offsets[examples], self.offsets[examples + 1] - self.offsets[examples]
        owner = np.repeat(np.arange(len(examples)), counts)
        firsts = np.cumsum(counts) - counts
        entries = np.arange(len(owner)) - firsts[owner] + starts[owner]
        return owner, self.rows[entries], self.values[entries]


@dataclass(frozen=True, eq=False)
class Record:
    """γ[d, w]: the sum of the updates that every training example d made to every row w, over the whole training.

    Attributes:
        examples: ``(n, m + 1)`` int64 training examples.
        columns: The table of each column of an example.
        updates: By table.
        initial: The tables before training.
        final: The tables after training.
        recipe: How :func:`~npeff.companions.rollback.fit` trained; None where something else did.
        model_kind: Name in :data:`~npeff.companions.rollback.factor_models.MODELS`, None for a model of another class.
        model_options: Its arguments.
        names: Names of rows, by table, where known.
        all_rows: Whether the updates of all rows were recorded, not only those of the example's own rows.
    """

    examples: Array
    columns: tuple[str, ...]
    updates: Mapping[str, RowUpdates]
    initial: Mapping[str, Array]
    final: Mapping[str, Array]
    recipe: Recipe | None = None
    model_kind: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    all_rows: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        vectors = sum(len(updates.rows) for updates in self.updates.values())
        return f"Record({len(self)} examples, {vectors:,} updates{' of all rows' if self.all_rows else ''})"

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded updates."""
        return sum(array.nbytes for updates in self.updates.values() for array in vars(updates).values())

    def text(self, position: int) -> str | None:
        """Get the names in a training example; None where the record lacks names of a table."""
        if not all(table in self.names for table in self.columns):
            return None
        rows = self.examples[position].tolist()
        return " · ".join(self.names[table][row] for table, row in zip(self.columns, rows, strict=True))

    def model(self) -> FactorModel:
        """Build the trained model anew.

        Raises:
            ModelError: It is of a class that npeff does not know, or has no such options.
        """
        if self.model_kind not in MODELS:
            raise ModelError(
                f"record: its model is of a class of your own ({self.model_kind or 'unnamed'}); build it and load "
                "record.final with load_tables"
            )
        try:
            model = MODELS[self.model_kind](**self.model_options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"record: no {self.model_kind} model has the options {self.model_options}") from error
        dtype = next(iter(self.final.values())).dtype
        if dtype == np.float64:
            model.double()
        model.load_tables(self.final)
        return model

    def check_model(self, model: FactorModel) -> None:
        """Make sure that a model's weights are those that the record ended with.

        Raises:
            ArgumentError: They differ, so that a rollback would mean nothing.
        """
        if tuple(model.columns) != tuple(self.columns):
            raise ArgumentError(f"model: expected one with the columns {self.columns}, got {tuple(model.columns)}")
        for name, table in model.numpy_tables().items():
            if name not in self.final or not np.array_equal(table, self.final[name]):
                raise ArgumentError(
                    f"model: its table {name!r} is not the one the record ended with; load record.final with "
                    "model.load_tables, or record the training anew"
                )

    def save(self, path: str | Path) -> Path:
        """Write to an HDF5 file; :meth:`load` maps it.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: Something else is there, or the file cannot be written.
        """
        arrays = {"examples": np.asarray(self.examples, np.int64)}
        for part in ("initial", "final"):
            arrays |= {f"{part}/{table}": values for table, values in getattr(self, part).items()}
        for table, updates in self.updates.items():
            arrays |= {f"updates/{table}/{part}": array for part, array in vars(updates).items()}
        recipe = None if self.recipe is None else asdict(self.recipe)
        same = {name: getattr(self, name) for name in SAME}
        return write_record(path, CONTENT, arrays, {"columns": list(self.columns), "recipe": recipe, **same})

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Record:
        """Open a record; its arrays are mapped. Those up to 256 MiB are checked and compared with their checksums.

        Args:
            path: The file.
            verify: Check larger arrays too.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: There is no such file, or it is damaged.
            ForeignFileError: It holds something else.
        """
        arrays, meta = read_record(path, CONTENT, _describe, verify=verify)
        columns, examples = tuple(meta["columns"]), arrays["examples"]
        tables = sorted(set(columns))
        for column, table in enumerate(columns):
            n_rows = len(arrays[f"initial/{table}"])
            if len(examples) and not 0 <= examples[:, column].min() <= examples[:, column].max() < n_rows:
                refuse(path, "examples", f"rows 0 to {n_rows - 1} of {table!r} in column {column}")
            if len(meta["names"].get(table, arrays[f"initial/{table}"])) < n_rows:
                refuse(path, "meta", f"a name for each of the {n_rows} rows of {table!r}")
        try:
            recipe = None if meta.get("recipe") is None else Recipe(**meta["recipe"])
        except (TypeError, ArgumentError) as error:
            raise StorageError(f"{path}: dataset 'meta', 'recipe', is damaged: {error}") from error
        return cls(
            examples=examples,
            columns=columns,
            updates={
                table: RowUpdates(*(arrays[f"updates/{table}/{part}"] for part in ("offsets", "rows", "values")))
                for table in tables
            },
            initial={table: arrays[f"initial/{table}"] for table in tables},
            final={table: arrays[f"final/{table}"] for table in tables},
            recipe=recipe,
            **{name: meta[name] for name in SAME},
        )


def _describe(meta: dict[str, Any], where: str) -> tuple[list[Field], Sizes]:
    """Check the meta data of a record, and state what is expected of its arrays.

    Raises:
        StorageError: The meta data are not as expected.
    """
    nothing = type(None)
    columns = item(meta, "columns", where, list)
    for table in columns:
        expect(table, f"{where}, 'columns'", str)
    item(meta, "recipe", where, (dict, nothing))
    item(meta, "model_kind", where, (str, nothing))
    item(meta, "model_options", where, dict)
    item(meta, "all_rows", where, bool)
    sizes = {"n_columns": len(columns)}
    fields = [Field("examples", ("<i8",), ("n_examples", "n_columns"), least=0)]
    for table in sorted(set(columns)):
        rows, width, updated = (f"{what} of {table}" for what in ("n_rows", "width", "n_updates"))
        fields += [Field(f"{part}/{table}", FLOAT, (rows, width)) for part in ("initial", "final")]
        offsets = Field(f"updates/{table}/offsets", ("<i8",), ("n_examples + 1",), ascends_to=updated)
        updates = Field(f"updates/{table}/rows", ("<i8",), (updated,), least=0, below=rows, ascending_in=offsets.name)
        fields += [offsets, updates, Field(f"updates/{table}/values", FLOAT, (updated, width))]
    for table, names in item(meta, "names", where, dict).items():
        for name in expect(names, f"{where}, {table!r} of 'names'", list):
            expect(name, f"{where}, {table!r} of 'names'", str)
    return fields, sizes


class RecordBuilder:
    """Adds the updates up (in :attr:`sums`, by table) while a model is trained, and makes the record at the end.

    With ``out`` the sums lie in temporary files beside that HDF5 file, and the record is written to it.
    """

    def __init__(
        self,
        model: FactorModel,
        examples: Array,
        all_rows: bool,
        names: Mapping[str, Sequence[str]] | None,
        out: str | Path | None,
    ) -> None:
        self._out = None if out is None else check_replaceable(out, CONTENT)
        self._model, self._examples, self._all_rows = model, examples, all_rows
        self._names = {table: list(given) for table, given in (names or {}).items()}
        self._initial = model.numpy_tables()
        self.sums = {name: UpdateSums(len(examples), table, self._out) for name, table in self._initial.items()}

    def finish(self, recipe: Recipe | None = None) -> Record:
        """Make the record of the trained model; with ``out`` it is written there and mapped."""
        record = Record(
            examples=self._examples,
            columns=tuple(self._model.columns),
            updates={name: sums.updates() for name, sums in self.sums.items()},
            initial=self._initial,
            final=self._model.numpy_tables(),
            recipe=recipe,
            model_kind=next((name for name, cls in MODELS.items() if type(self._model) is cls), None),
            model_options=self._model.options,
            names=self._names,
            all_rows=self._all_rows,
        )
        return record if self._out is None else Record.load(record.save(self._out))


class UpdateSums:
    """The sums γ of one table, each in a slot that its example and row receive at the first update."""

    def __init__(self, n_examples: int, table: Array, out: Path | None) -> None:
        self._n_examples, (self._n_rows, self._width), self._out = n_examples, table.shape, out
        self._slots: dict[int, int] = {}
        self._values = self._allocate(max(64, n_examples))

    def _allocate(self, slots: int) -> Array:
        shape = (slots, self._width)
        if self._out is None:
            return np.zeros(shape, np.float32)
        return scratch_array(self._out, shape, np.float32, "No record was written.")

    def _slot(self, key: int) -> int:
        slot = self._slots.setdefault(key, len(self._slots))
        if slot >= len(self._values):
            grown = self._allocate(2 * len(self._values))
            grown[: len(self._values)] = self._values
            self._values = grown
        return slot

    def add(self, example: int, row: int, update: Array) -> None:
        """Add an update ``(width,)`` to γ[example, row]."""
        slot = self._slot(example * self._n_rows + row)
        self._values[slot] += update

    def add_rows(self, example: int, rows: Sequence[int], updates: Array) -> None:
        """Add updates ``(len(rows), width)`` to γ of several different rows."""
        first = example * self._n_rows
        slots = [self._slot(first + row) for row in rows]
        self._values[slots] += updates

    def updates(self) -> RowUpdates:
        """Sort the sums by example and row."""
        keys = np.fromiter(self._slots, np.int64, len(self._slots))
        order = np.argsort(keys)  # keys are numbered in the order of their slots
        keys = keys[order]
        offsets = np.searchsorted(keys, np.arange(self._n_examples + 1) * self._n_rows)
        values = self._allocate(len(order))
        np.take(self._values, order, axis=0, out=values, mode="clip")  # "raise" would make another copy
        return RowUpdates(offsets.astype(np.int64), keys % self._n_rows, values)
