"""Influence of training examples on test functions: a table, what stands out in it, and its file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, StorageError
from npeff.storage.checks import FLOAT, Field, Sizes, item
from npeff.storage.container import check_replaceable, read_record, refuse_npeff_file
from npeff.storage.files import atomic, path_of
from npeff.storage.writing import write_record

Array = npt.NDArray[Any]
Direction = Literal["raises", "lowers", "both"]
CONTENT = "influence"
SUFFIXES = (".h5", ".hdf5", ".npz", ".csv")
FIELDS = (
    Field("values", FLOAT, ("n_train", "n_test"), nan=True, infinite=True),
    Field("test_values", FLOAT, ("n_test",)),
    Field("residuals", FLOAT, ("n_test",), least=0, nan=True, infinite=True),
)


@dataclass(frozen=True, eq=False)
class Scores:
    """``I(z, z_test) = −∇L_test(z_test)ᵀ H⁻¹ ∇L_train(z)`` for all pairs.

    Weighing z up by ε changes L_test by εI: with I < 0 training on z lowers L_test (helpful, if it is a loss), with
    I > 0 it raises it. Removing z changes it by about −I/n.

    Attributes:
        values: ``(n_train, n_test)`` float64; may be mapped from a file.
        test_values: ``(n_test,)`` float64 L_test at the model's parameters.
        residuals: ``(n_test,)`` float64 relative residuals of the solves.
        n: Number of examples in H.
        provenance: Solver, damping, weight decay, gradient norms, notes.
    """

    values: Array
    test_values: Array
    residuals: Array
    n: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.values, dtype=dtype, copy=True) if copy else np.asarray(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        solver = self.provenance.get("solver", "?")
        return f"Scores({self.values.shape[0]} training × {self.values.shape[1]} test examples, {solver})"

    def _column(self, test: int | None) -> Array:
        if test is None:
            return np.asarray(self.values.sum(axis=1))
        if not isinstance(test, int | np.integer) or not -self.values.shape[1] <= test < self.values.shape[1]:
            raise ArgumentError(f"test: expected a test example below {self.values.shape[1]}, or None, got {test!r}")
        return np.asarray(self.values[:, test])

    def top(self, k: int = 16, test: int | None = None, direction: Direction = "both") -> Array:
        """Find the training examples with most influence, strongest first, ties by lower index.

        Args:
            k: How many at most.
            test: On which test example; None: on the sum over all.
            direction: ``"raises"``: training on them raises L_test (I > 0, harmful if it is a loss); ``"lowers"``:
                lowers it; ``"both"``: by |I|.

        Returns:
            ``(≤ k,)`` int64 indices. Examples of the other sign are left out.

        Raises:
            ArgumentError: An argument has another value.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 0:
            raise ArgumentError(f"k: expected a number ≥ 0, got {k!r}")
        if direction not in get_args(Direction):
            raise ArgumentError(f"direction: expected one of {', '.join(get_args(Direction))}, got {direction!r}")
        column = self._column(test)
        key = {"raises": column, "lowers": -column, "both": np.abs(column)}[direction]
        order = np.argsort(-key, kind="stable")[:k]
        return order[key[order] > 0].astype(np.int64)

    def group(self, indices: Any) -> Array:
        """Influence of a group, the sum of its examples', ``(n_test,)``.

        First order in the group's share of the data: for large groups the true effect of removal is usually larger,
        the order of groups is kept better (Koh, Ang, Teo & Liang 2019).

        Raises:
            ArgumentError: ``indices`` are no training examples, or contain one twice.
        """
        try:
            chosen = np.arange(len(self))[np.asarray(indices, None if len(indices) else np.int64)]
        except (IndexError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"indices: expected training examples below {len(self)}, or a mask ({error})"
            ) from error
        if chosen.ndim != 1 or len(np.unique(chosen)) != len(chosen):
            raise ArgumentError("indices: expected a list in which no training example comes twice")
        return np.asarray(self.values[chosen].sum(axis=0))

    def removal(self, indices: Any = None) -> Array:
        """Predicted change of L_test when examples are removed and the model is trained again: ``−I/n``.

        The others keep their weight 1/n in the objective.

        Args:
            indices: Remove these together, ``(n_test,)``; None: each alone, ``(n_train, n_test)``.
        """
        return np.asarray(-(self.values if indices is None else self.group(indices)) / self.n)

    def save(self, path: str | Path) -> Path:
        """Write to ``.h5``, ``.npz`` (arrays ``values``, ``test_values``, ``residuals``) or ``.csv`` (one line per z).

        Raises:
            ArgumentError: The name ends otherwise.
            StorageError: The path holds other work of npeff, or the file cannot be written.
        """
        path = check_path(path)
        arrays = {part.name: getattr(self, part.name) for part in FIELDS}
        meta = json.loads(json.dumps({"n": self.n, "provenance": self.provenance}, default=str))
        if path.suffix.lower() not in (".npz", ".csv"):
            return write_record(path, CONTENT, arrays, meta)
        with atomic(path) as scratch:
            if path.suffix.lower() == ".npz":
                with scratch.open("wb") as binary:
                    np.savez(binary, **arrays, provenance=np.array(json.dumps({"n": self.n, **meta["provenance"]})))
            else:
                with scratch.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    writer.writerow(["train", *(f"test_{j}" for j in range(self.values.shape[1]))])
                    writer.writerows([i, *row] for i, row in enumerate(self.values.tolist()))
        return path

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Scores:
        """Open scores from ``.h5``; the table stays on disk, mapped.

        Types and shapes are checked; arrays up to 256 MiB are read once, checked, and compared with their checksums.

        Args:
            path: The file.
            verify: Read and check larger tables too.

        Raises:
            ArgumentError: ``path`` is no path.
            ForeignFileError: The file holds something else.
            StorageError: It cannot be read, or is damaged.
        """
        arrays, meta = read_record(path, CONTENT, _describe, verify=verify)
        return cls(**arrays, n=meta["n"], provenance=meta["provenance"])


def _describe(meta: dict[str, Any], where: str) -> tuple[Sequence[Field], Sizes]:
    """Check the meta data of a file of scores, and state what is expected of its arrays.

    Raises:
        StorageError: The meta data are not as expected.
    """
    if (n := item(meta, "n", where, int)) < 1:
        raise StorageError(f"{where}, 'n', is damaged: expected a number of examples, got {n}")
    item(meta, "provenance", where, dict)
    return FIELDS, {}


def check_path(path: str | Path) -> Path:
    """Refuse names that no writer serves, and files that hold other work of npeff.

    Raises:
        ArgumentError: The name ends otherwise.
        StorageError: Something else is there, or the folder is missing.
    """
    path = path_of(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"out: expected a name ending in .h5, .npz or .csv, got {path}")
    if path.suffix.lower() not in (".npz", ".csv"):
        return check_replaceable(path, CONTENT)
    refuse_npeff_file(path)
    return path
