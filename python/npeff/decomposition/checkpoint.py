"""The search's state on disk: written whole or not at all, and only ever resumed by the same run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.decomposition.forms import State
from npeff.decomposition.search_state import Memory
from npeff.errors import ResumeError, StorageError
from npeff.fishers.scaling import ScaledRows
from npeff.storage.archives import read_npz
from npeff.storage.documents import item, parse_json
from npeff.storage.fields import Field, Sizes
from npeff.storage.files import Lock, atomic, check_target, explain, refuse_link

FIELDS = (
    Field("meta", ("|u1",), ("n_bytes",)),
    Field("W", ("<f4", "<f8"), ("n_examples", "n_components"), least=0),
    Field("coords", ("<f4", "<f8"), ("n_components", "n_coordinates")),
    Field("curve", ("<f8",), ("n_losses",)),
)
NUMBERS = ["failures", "iteration", "kept", "unit"]


class Checkpoint:
    """Keeps a :class:`npeff.decomposition.search_state.Memory` in one ``.npz`` file.

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
            meta, arrays = self._read()
        except StorageError as error:
            raise StorageError(
                f"checkpoint: {self._path} is not a readable checkpoint ({error}); remove it or choose another path"
            ) from error
        if meta["key"] != self._key:
            theirs, ours = meta["key"].get("options"), self._key["options"]
            theirs = theirs if isinstance(theirs, dict) else {}
            differing = [name for name in ours if theirs.get(name) != ours[name]] or ["the Fishers themselves"]
            raise ResumeError(
                f"checkpoint: {self._path} is of another run; it differs in {', '.join(differing)}. Remove "
                "it, or choose another path"
            )
        r = self._key["options"].get("n_components")
        if arrays["W"].shape[1] != r:
            raise StorageError(
                f"checkpoint: {self._path} is not a readable checkpoint (array 'W' has {arrays['W'].shape[1]} "
                f"components, not {r}); remove it or choose another path"
            )
        W, coords = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["coords"])
        empty = W.new_zeros(0, 0)
        best = State(W, coords, empty, empty, meta["loss"], meta["frozen"])  # every unit refreshes P and Q
        return Memory(best=best, curve=arrays["curve"].tolist(), **meta["numbers"])

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the file says, and its arrays.

        Raises:
            StorageError: It is damaged.
        """
        sizes: Sizes = {}
        arrays = read_npz(self._path, FIELDS, sizes)
        where = f"{self._path}: array 'meta'"
        meta = parse_json(arrays["meta"].tobytes(), where)
        item(meta, "key", where, dict)
        if not 0 <= item(meta, "frozen", where, int) <= sizes["n_components"]:
            raise StorageError(f"{where}, 'frozen', is damaged: expected a number of components, got {meta['frozen']}")
        item(meta, "loss", where, float)
        numbers = item(meta, "numbers", where, dict)
        if sorted(numbers) != NUMBERS or any(item(numbers, name, where, int) < 0 for name in NUMBERS):
            raise StorageError(
                f"{where}, 'numbers', is damaged: expected {', '.join(NUMBERS)}, each ≥ 0, got {numbers}"
            )
        return meta, arrays

    def remove(self) -> None:
        """Delete the file: the search has ended."""
        self._path.unlink(missing_ok=True)


def _digest(scaled: ScaledRows) -> str:
    digest = hashlib.blake2b(digest_size=16)
    rows = scaled.rows
    for array in (scaled.row_offsets, *rows.deciding()):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
