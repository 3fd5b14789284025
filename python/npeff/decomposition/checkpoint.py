"""The state of a search, and the file that keeps it: written whole or not at all, and resumed by the same run only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.decomposition.objective import State
from npeff.decomposition.problem import Problem
from npeff.errors import ResumeError, StorageError
from npeff.storage.checks import Field, Sizes, item
from npeff.storage.container import read_record
from npeff.storage.files import Lock, check_target, explain, path_of, refuse_link
from npeff.storage.writing import write_record

CONTENT = "search"
FIELDS = (
    Field("W", ("<f4", "<f8"), ("n_examples", "n_components"), least=0),
    Field("coords", ("<f4", "<f8"), ("n_components", "n_coordinates")),
    Field("curve", ("<f8",), ("n_losses",)),
)
NUMBERS = ["failures", "finished", "iteration", "kept", "unit"]


@dataclass
class SearchState:
    """The state of a search between units; at the end, the result of the search.

    Attributes:
        unit: Units (starts and replacements) finished.
        failures: Replacements since the last that helped.
        iteration: Iterations done.
        kept: Replacements that helped.
        finished: 1 after the polish, else 0.
        best: The best factorisation.
        curve: Its losses: those of its start, then of every improvement.
        subspace: The dimensions of the subspace that was searched, and the share of the rows' energy in it.
        seconds: Time since the search began or was resumed.
    """

    unit: int = 0
    failures: int = 0
    iteration: int = 0
    kept: int = 0
    finished: int = 0
    best: State | None = None
    curve: list[float] = field(default_factory=list)
    subspace: dict[str, Any] | None = None
    seconds: float = 0.0

    def extend_curve(self, curve: list[float]) -> None:
        """Continue the curve by losses on the way to the best state's, which ends it."""
        assert self.best is not None
        self.curve += [loss for loss in curve if loss < self.curve[-1]]
        end_at(self.curve, self.best.loss)


def end_at(curve: list[float], loss: float) -> None:
    """End a falling curve at a loss; losses below it go."""
    while curve and curve[-1] <= loss:
        curve.pop()
    curve.append(loss)


class Checkpoint:
    """Keeps a :class:`SearchState` in one file.

    A context manager: within it no other process may keep its state there. Of several processes that work together,
    process 0 writes the file, all read it, and each keeps its part of W.

    Args:
        path: The file; its folder must exist.
        problem: The decomposition; the file remembers a digest of its rows and its options.
    """

    def __init__(self, path: str | Path, problem: Problem) -> None:
        self._path, self._objective = path_of(path, "checkpoint"), problem.objective
        self._comm = problem.objective.comm
        options = {"kind": problem.fishers.kind, **problem.options.record()}
        options = json.loads(json.dumps(options, default=str, sort_keys=True))
        self._key = {"rows": problem.digest(), "options": options}
        self._lock: Lock | None = None

    def __enter__(self) -> Checkpoint:
        """Take the file for this process, or, in process 0, for all of them.

        Raises:
            StorageError: Another process keeps its state there, or no file can be written there.
        """
        self._comm.together(lambda: self._take() if self._comm.rank == 0 else None)
        return self

    def _take(self) -> None:
        check_target(self._path)
        path = self._path.with_name(f"{self._path.name}.lock")
        try:
            self._lock = Lock(path, f"keeping the state of a search in {self._path}")
        except StorageError:
            raise
        except OSError as error:
            failure = explain(path, error, "Nothing was computed yet.")
            raise failure from error

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def save(self, state: SearchState) -> None:
        """Replace the file by the present state.

        Raises:
            StorageError: The file cannot be written.
        """
        assert state.best is not None
        W = self._comm.collected(state.best.W)
        self._comm.together(lambda: None if W is None else self._write(state, state.best, W))

    def _write(self, state: SearchState, best: State | None, W: torch.Tensor) -> None:
        assert best is not None
        numbers = {name: getattr(state, name) for name in NUMBERS}
        meta = {"key": self._key, "numbers": numbers, "loss": best.loss, "frozen": best.frozen}
        arrays = {
            "W": W.cpu().numpy(),
            "coords": best.coords.cpu().numpy(),
            "curve": np.asarray(state.curve, np.float64),
        }
        write_record(self._path, CONTENT, arrays, meta, kept="The state that was saved there before is kept.")

    def load(self) -> SearchState | None:
        """Read the state in the file, with this process's part of W; None when there is no file.

        P and Q are not in the file; the caller computes them.

        Raises:
            ResumeError: The file belongs to other Fishers or other options.
            StorageError: The file cannot be read, or some processes do not see it.
        """
        state = self._comm.together(self._read)
        seen = self._comm.objects(state is not None)
        if len(set(seen)) > 1:
            raise StorageError(
                f"checkpoint: ranks {', '.join(str(r) for r, s in enumerate(seen) if not s)} do not see {self._path}; "
                "put it on a disk that all processes share"
            )
        if state is None or state.best is None:
            return None
        n, first = self._objective.n_examples, self._objective.first_example
        if len(state.best.W) != self._objective.n_all_examples:
            raise self.misfit(f"{len(state.best.W)} examples, not {self._objective.n_all_examples}")
        state.best = replace(state.best, W=state.best.W[first : first + n].contiguous())
        return state

    def misfit(self, what: object) -> StorageError:
        """Make the error that says that the file does not fit the Fishers."""
        return StorageError(
            f"checkpoint: {self._path} does not fit the Fishers ({what}); remove it or choose another path"
        )

    def _read(self) -> SearchState | None:
        refuse_link(self._path)
        if not self._path.exists():
            return None
        try:
            arrays, meta = read_record(self._path, CONTENT, _describe, verify=True)
        except StorageError as error:
            raise StorageError(
                f"checkpoint: {self._path} is not a readable checkpoint ({error}); remove it or choose another path"
            ) from error
        if meta["key"] != self._key:
            theirs, ours = meta["key"].get("options"), self._key["options"]
            theirs = theirs if isinstance(theirs, dict) else {}
            differing = [name for name in ours if theirs.get(name) != ours[name]]
            beside = "the Fishers themselves, or the vectors given beside them (init=, the components expanded)"
            raise ResumeError(
                f"checkpoint: {self._path} is of another run; it differs in {', '.join(differing) or beside}. Remove "
                "it, or choose another path"
            )
        r = self._key["options"]["n_components"]
        if arrays["W"].shape[1] != r or meta["frozen"] > r:
            raise self.misfit(f"{arrays['W'].shape[1]} components, {meta['frozen']} of them frozen, not {r}")
        W, coords = (torch.from_numpy(np.array(arrays[name])) for name in ("W", "coords"))
        empty = W.new_zeros(0, 0)
        best = State(W, coords, empty, empty, meta["loss"], meta["frozen"])
        return SearchState(best=best, curve=arrays["curve"].tolist(), **meta["numbers"])


def _describe(meta: dict[str, Any], where: str) -> tuple[Sequence[Field], Sizes]:
    """Check the meta data of a checkpoint, and state what is expected of its arrays.

    Raises:
        StorageError: They are damaged.
    """
    for name, kind in (("key", dict), ("loss", float), ("numbers", dict)):
        item(meta, name, where, kind)
    if item(meta, "frozen", where, int) < 0:
        raise StorageError(f"{where}, 'frozen', is damaged: expected a number of components, got {meta['frozen']}")
    numbers = meta["numbers"]
    if sorted(numbers) != NUMBERS or any(item(numbers, name, where, int) < 0 for name in NUMBERS):
        raise StorageError(f"{where}, 'numbers', is damaged: expected {', '.join(NUMBERS)}, each ≥ 0, got {numbers}")
    return FIELDS, {}
