"""The search's state on disk: written whole or not at all, and only ever resumed by the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.errors import ResumeError, StorageError
from npeff.rows import SparseRows
from npeff.solver.course import Memory
from npeff.solver.forms import State
from npeff.solver.scaling import ScaledRows
from npeff.storage.files import Lock, atomic, check_target, explain, refuse_link
from npeff.streamed_rows import StreamedRows


class Checkpoint:
    """Keeps a :class:`npeff.solver.course.Memory` in one ``.npz`` file.

    A context manager: within it no other process may keep its state there.

    Args:
        path: The file; its folder must exist.
        scaled: The rows being factorised; the file remembers their digest.
        options: Everything else that determines the result.
    """

    def __init__(self, path: Path, scaled: ScaledRows, options: dict[str, Any]) -> None:
        self._path = path
        self._key = {"rows": _digest(scaled), "options": json.loads(json.dumps(options, default=str, sort_keys=True))}

    def __enter__(self) -> Checkpoint:
        """Take the file for this process.

        Raises:
            StorageError: Another process keeps its state there, or no file can be written there.
        """
        check_target(self._path)
        path = self._path.with_name(f"{self._path.name}.lock")
        try:
            self._lock = Lock(path, f"keeping the state of a search in {self._path}")
        except StorageError:
            raise
        except OSError as error:
            failure = explain(path, error, "Nothing was computed yet.")
            raise failure from error
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def save(self, memory: Memory) -> None:
        """Replace the file by the present state.

        Raises:
            StorageError: The file cannot be written.
        """
        assert memory.best is not None
        numbers = {"unit": memory.unit, "failures": memory.failures, "iteration": memory.iteration, "kept": memory.kept}
        meta = {"key": self._key, "numbers": numbers, "loss": memory.best.loss, "frozen": memory.best.frozen}
        kept = "The state that was saved there before is kept."
        with atomic(self._path, kept=kept) as scratch, scratch.open("wb") as file:
            np.savez(
                file,
                meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
                W=memory.best.W.cpu().numpy(),
                coords=memory.best.coords.cpu().numpy(),
                curve=np.asarray(memory.curve, np.float64),
            )

    def load(self) -> Memory | None:
        """The state in the file, or None when there is no file.

        Raises:
            ResumeError: The file belongs to other Fishers or other options.
            StorageError: The file cannot be read.
        """
        refuse_link(self._path)
        if not self._path.exists():
            return None
        try:
            with np.load(self._path) as file:
                meta = json.loads(file["meta"].tobytes())
                W, coords, curve = (torch.from_numpy(file[name]) for name in ("W", "coords", "curve"))
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(
                f"checkpoint: {self._path} is not a readable checkpoint ({error}); remove it or choose another path"
            ) from error
        if meta["key"] != self._key:
            theirs, ours = meta["key"]["options"], self._key["options"]
            differing = [name for name in ours if theirs.get(name) != ours[name]] or ["the Fishers themselves"]
            raise ResumeError(
                f"checkpoint: {self._path} is of another run; it differs in {', '.join(differing)}. Remove "
                "it, or choose another path"
            )
        empty = W.new_zeros(0, 0)
        best = State(W, coords, empty, empty, meta["loss"], meta["frozen"])  # every unit refreshes P and Q
        return Memory(best=best, curve=curve.tolist(), **meta["numbers"])

    def remove(self) -> None:
        """Delete the file: the search has ended."""
        self._path.unlink(missing_ok=True)


def _digest(scaled: ScaledRows) -> str:
    digest = hashlib.blake2b(digest_size=16)
    rows = scaled.rows
    arrays = [scaled.row_offsets, np.asarray(rows.values)]
    if isinstance(rows, StreamedRows):
        given = (rows.row_factors, rows.column_factors, rows.columns)
        arrays += [array for array in given if array is not None]
        rows = rows.stored
    if isinstance(rows, SparseRows):
        arrays += [rows.indptr, rows.indices]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
