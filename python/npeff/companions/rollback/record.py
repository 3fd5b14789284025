"""The record of a training: the examples, what each moved, where it began and ended, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npeff.companions.rollback.moves import Accumulator, Moves
from npeff.companions.rollback.recipe import Recipe
from npeff.errors import ArgumentError, ModelError, StorageError
from npeff.storage.documents import expect, item
from npeff.storage.fields import FLOAT, Field, Sizes, refuse
from npeff.storage.hdf5 import Data
from npeff.storage.records import check_record_target, read_record, write_record

if TYPE_CHECKING:
    from npeff.companions.rollback.models import FactorModel

Array = npt.NDArray[Any]
CONTENT = "rollback"


@dataclass(frozen=True, eq=False)
class Record:
    """γ[d, w]: how far every training example d moved every row w it touched, over the whole training.

    Attributes:
        examples: ``(n, m + 1)`` int64 training examples.
        columns: The table of each column of an example.
        moves: By table.
        initial: The tables before training.
        final: The tables after it.
        recipe: How :func:`~npeff.companions.rollback.fit` trained; None where something else did.
        model_kind: Name in :data:`~npeff.companions.rollback.models.MODELS`, None for a model of another class.
        model_options: Its arguments.
        names: Names of rows, by table, where known.
        negatives: Whether all moved rows were recorded, not only those of the example itself.
    """

    examples: Array
    columns: tuple[str, ...]
    moves: Mapping[str, Moves]
    initial: Mapping[str, Array]
    final: Mapping[str, Array]
    recipe: Recipe | None = None
    model_kind: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    negatives: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        vectors = sum(len(moves.rows) for moves in self.moves.values())
        return f"Record({len(self)} examples, {vectors:,} moves{', negatives too' if self.negatives else ''})"

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded moves."""
        return sum(moves.nbytes for moves in self.moves.values())

    def model(self) -> FactorModel:
        """The trained model, built anew.

        Raises:
            ModelError: It is of a class that npeff does not know, or has no such options.
        """
        from npeff.companions.rollback.models import MODELS

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
        """Make sure that a model's weights are those the record ended with.

        Raises:
            ArgumentError: They differ: a rollback from elsewhere means nothing.
        """
        if tuple(model.columns) != tuple(self.columns):
            raise ArgumentError(f"model: expected one with the columns {self.columns}, got {tuple(model.columns)}")
        for name, table in model.numpy_tables().items():
            if name not in self.final or not np.array_equal(table, self.final[name]):
                raise ArgumentError(
                    f"model: its table {name!r} is not the one the record ended with; load record.final with "
                    "model.load_tables, or record the training anew"
                )

    def meta(self) -> dict[str, Any]:
        """Everything but the arrays, JSON-able."""
        return {
            "columns": list(self.columns),
            "recipe": None if self.recipe is None else self.recipe.to_json(),
            "model_kind": self.model_kind,
            "model_options": self.model_options,
            "names": self.names,
            "negatives": self.negatives,
        }

    def save(self, path: str | Path) -> Path:
        """Write to an HDF5 file; :meth:`load` maps it.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: Something else is there, or the file cannot be written.
        """
        arrays: dict[str, Array | Data] = {}
        for table, moves in self.moves.items():
            arrays |= {f"moves/{table}/{part}": getattr(moves, part) for part in ("offsets", "rows", "values")}
        return write_record(path, CONTENT, {**_fixed(self), **arrays}, self.meta())

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
            moves={
                table: Moves(*(arrays[f"moves/{table}/{part}"] for part in ("offsets", "rows", "values")))
                for table in tables
            },
            initial={table: arrays[f"initial/{table}"] for table in tables},
            final={table: arrays[f"final/{table}"] for table in tables},
            recipe=recipe,
            model_kind=meta.get("model_kind"),
            model_options=meta["model_options"],
            names=meta["names"],
            negatives=meta["negatives"],
        )


def _describe(meta: dict[str, Any], where: str) -> tuple[list[Field], Sizes]:
    """What is expected of a record's arrays.

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
    item(meta, "negatives", where, bool)
    sizes = {"n_columns": len(columns)}
    fields = [Field("examples", ("<i8",), ("n_examples", "n_columns"), least=0)]
    for table in sorted(set(columns)):
        rows, width, moved = (f"{what} of {table}" for what in ("n_rows", "width", "n_moves"))
        fields += [Field(f"{part}/{table}", FLOAT, (rows, width)) for part in ("initial", "final")]
        offsets = Field(f"moves/{table}/offsets", ("<i8",), ("n_examples + 1",), ascends_to=moved)
        moves = Field(f"moves/{table}/rows", ("<i8",), (moved,), least=0, below=rows, ascending_in=offsets.name)
        fields += [offsets, moves, Field(f"moves/{table}/values", FLOAT, (moved, width))]
    for table, names in item(meta, "names", where, dict).items():
        for name in expect(names, f"{where}, {table!r} of 'names'", list):
            expect(name, f"{where}, {table!r} of 'names'", str)
    return fields, sizes


def _fixed(record: Record) -> dict[str, Array | Data]:
    arrays: dict[str, Array | Data] = {"examples": np.asarray(record.examples, np.int64)}
    for part in ("initial", "final"):
        arrays |= {f"{part}/{table}": values for table, values in getattr(record, part).items()}
    return arrays


def finish_record(record: Record, accumulators: Mapping[str, Accumulator], out: Path | None) -> Record:
    """Fill a record with what was added up; with ``out`` it is streamed there and mapped again.

    Args:
        record: All but the moves.
        accumulators: By table; closed afterwards.
        out: The file, checked beforehand.
    """
    from dataclasses import replace

    try:
        if out is None:
            return replace(record, moves={table: sums.finish() for table, sums in accumulators.items()})
        arrays = _fixed(record)
        for table, sums in accumulators.items():
            arrays |= sums.streams(f"moves/{table}")
        write_record(out, CONTENT, arrays, record.meta())
    finally:
        for sums in accumulators.values():
            sums.close()
    return Record.load(out)


def open_accumulators(
    sizes: Mapping[str, tuple[int, int]], n_examples: int, out: str | Path | None
) -> tuple[dict[str, Accumulator], Path | None]:
    """Accumulators for tables of given ``(rows, width)``; with ``out`` their sums lie in files beside it.

    Raises:
        ArgumentError: ``out`` is no path.
        StorageError: No record can be written there.
    """
    path = None if out is None else check_record_target(out, CONTENT)
    folder = None if path is None else path.resolve().parent
    return {table: Accumulator(n_examples, *size, folder) for table, size in sizes.items()}, path
