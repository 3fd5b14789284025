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
            ModelError: It is of a class that npeff does not know.
        """
        from npeff.companions.rollback.models import MODELS

        if self.model_kind not in MODELS:
            raise ModelError(
                f"record: its model is of a class of your own ({self.model_kind or 'unnamed'}); build it and load "
                "record.final with load_tables"
            )
        model = MODELS[self.model_kind](**self.model_options)
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
        """Open a record; its arrays are mapped, not read.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: There is no such file, or it is damaged.
            ForeignFileError: It holds something else.
        """
        arrays, meta = read_record(path, CONTENT, verify=verify)
        try:
            tables = sorted(set(meta["columns"]))
            moves = {
                table: Moves(*(arrays[f"moves/{table}/{part}"] for part in ("offsets", "rows", "values")))
                for table in tables
            }
            return cls(
                examples=arrays["examples"],
                columns=tuple(meta["columns"]),
                moves=moves,
                initial={table: arrays[f"initial/{table}"] for table in tables},
                final={table: arrays[f"final/{table}"] for table in tables},
                recipe=None if meta["recipe"] is None else Recipe(**meta["recipe"]),
                model_kind=meta["model_kind"],
                model_options=meta["model_options"],
                names=meta["names"],
                negatives=bool(meta["negatives"]),
            )
        except (KeyError, TypeError) as error:
            raise StorageError(f"{path}: damaged: {error}") from error


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
