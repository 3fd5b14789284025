"""Coefficients as tables for other programs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npeff.storage.files import atomic
from npeff.storage.hdf5 import Data, write_hdf5
from npeff.storage.recognition import refuse_npeff_file

if TYPE_CHECKING:
    from npeff.components.components import Encoded
    from npeff.fishers.fishers import Fishers

SUFFIXES = (".h5", ".hdf5", ".npz", ".csv")


def write_coefficients(encoded: Encoded, fishers: Fishers, path: Path) -> None:
    """Write coefficients, and beside them what identifies the examples and tells how well they were solved.

    Args:
        encoded: Of the examples of ``fishers``.
        fishers: Supplies ``ids``, ``labels`` and ``predictions``.
        path: ``.h5`` or ``.npz``: arrays ``coefficients (n, r)``, and ``kkt``, ``unexplained``, ``ids``,
            ``labels``, ``predictions``, each ``(n,)``. ``.csv``: one line per example, with a column
            ``component_j`` per component.

    Raises:
        StorageError: Fishers or Components are there, or the file cannot be written.
    """
    refuse_npeff_file(path)
    columns: dict[str, Any] = {
        "ids": np.asarray(fishers.ids),
        "labels": np.asarray(fishers.labels),
        "predictions": np.asarray(fishers.predictions),
        "kkt": encoded.kkt,
        "unexplained": encoded.unexplained,
    }
    with atomic(path) as scratch:
        if path.suffix.lower() == ".csv":
            with scratch.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow([*columns, *(f"component_{j}" for j in range(encoded.coefficients.shape[1]))])
                for i, row in enumerate(encoded.coefficients):
                    writer.writerow([*(column[i] for column in columns.values()), *row])
        elif path.suffix.lower() == ".npz":
            with scratch.open("wb") as binary:
                np.savez_compressed(binary, coefficients=encoded.coefficients, **columns)
        else:
            arrays = {"coefficients": encoded.coefficients, **columns}
            write_hdf5(scratch, [Data.of(name, values) for name, values in arrays.items()], {})
