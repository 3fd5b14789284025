"""Influence of training examples on test functions: a table, what stands out in it, and its file."""

from __future__ import annotations

import csv
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, ForeignFileError, StorageError
from npeff.storage.container import open_file
from npeff.storage.documents import item, parse_json
from npeff.storage.fields import FLOAT, Field
from npeff.storage.files import atomic, path_of
from npeff.storage.hdf5 import Data, as_bytes, pieces, write_hdf5
from npeff.storage.recognition import refuse_npeff_file

Array = npt.NDArray[Any]
Direction = Literal["raises", "lowers", "both"]
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
        """The training examples with most influence, strongest first, ties by lower index.

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
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        path = check_path(path)
        meta = json.dumps({"n": self.n, **self.provenance}, default=str)
        with atomic(path) as scratch:
            if path.suffix.lower() == ".csv":
                with scratch.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    writer.writerow(["train", *(f"test_{j}" for j in range(self.values.shape[1]))])
                    writer.writerows([i, *row] for i, row in enumerate(self.values.tolist()))
            elif path.suffix.lower() == ".npz":
                with scratch.open("wb") as binary:
                    np.savez(
                        binary,
                        values=self.values,
                        test_values=self.test_values,
                        residuals=self.residuals,
                        provenance=np.array(meta),
                    )
            else:
                _write_hdf5(scratch, self, meta)
        return path

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Scores:
        """Open scores from ``.h5``; the table stays on disk, mapped.

        Types and shapes are checked; arrays up to 256 MiB are read once, checked, and compared with their checksums,
        which files of earlier versions lack.

        Args:
            path: The file.
            verify: Read and check larger tables too.

        Raises:
            ArgumentError: ``path`` is no path.
            ForeignFileError: The file holds something else.
            StorageError: It cannot be read, or is damaged.
        """
        path = path_of(path)
        file = open_file(path)
        if file.is_npeff or file.attributes.get("content") != "influence":
            raise ForeignFileError(f"{path}: holds no influence scores; they are written by Scores.save")
        known = {"content", "provenance", "checksums"}
        unknown = sorted(name for name in file.attributes if "@" not in name and name not in known)
        if unknown:  # such as a damaged name of the checksums
            raise StorageError(
                f"{path}: attribute {unknown[0]!r} is damaged: expected {', '.join(sorted(known))} alone"
            )
        where = f"{path}: attribute 'provenance'"
        text, sums = file.attribute("provenance", str), file.checksums or {}
        if sums.get("@provenance", _crc(text)) != _crc(text):
            raise StorageError(f"{where} is damaged (its checksum differs); restore the file, or compute it again")
        meta = parse_json(text, where, finite=False)
        n = item(meta, "n", where, int)
        arrays, _ = file.read(FIELDS, {}, verify=verify)
        if n < 1:
            raise StorageError(f"{where}, 'n', is damaged: expected a number of examples, got {n}")
        provenance = {name: value for name, value in meta.items() if name != "n"}
        return cls(arrays["values"], arrays["test_values"], arrays["residuals"], n, provenance)


def _write_hdf5(path: Path, scores: Scores, meta: str) -> None:
    """Write scores and their checksums; the HDF5 library itself would not survive a full disk."""
    arrays = {name: getattr(scores, name) for name in ("values", "test_values", "residuals")}
    sums = {"@provenance": _crc(meta)}
    for name, array in arrays.items():
        total = 0
        for piece in pieces(array):
            total = zlib.crc32(as_bytes(piece, array.dtype).data, total)
        sums[name] = f"{total:08x}"
    attributes = {"content": "influence", "provenance": meta, "checksums": json.dumps(sums)}
    write_hdf5(path, [Data.of(name, array) for name, array in arrays.items()], {"/": attributes})


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def check_path(path: str | Path) -> Path:
    """Refuse names that no writer serves, and files that hold Fishers or Components.

    Raises:
        ArgumentError: The name ends otherwise.
    """
    path = path_of(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"out: expected a name ending in .h5, .npz or .csv, got {path}")
    refuse_npeff_file(path)
    return path
