"""Decomposition by several processes: each holds a block of examples, the solver's sums go over all of them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.components.components import Components
from npeff.decomposition import decomposition
from npeff.decomposition.blocks import scaled_block
from npeff.decomposition.checkpoint import Checkpoint
from npeff.decomposition.communicator import Group, Local
from npeff.decomposition.options import Options
from npeff.decomposition.place import Place
from npeff.decomposition.problem import Problem
from npeff.decomposition.search_state import Memory, Progress
from npeff.decomposition.sharded_space import ShardedSpace
from npeff.distributed.launch import connect, told_to_end
from npeff.errors import ArgumentError, StorageError
from npeff.fishers.fishers import Fishers
from npeff.models.devices import usable_device

OURS = ("init", "checkpoint", "callback", "progress", "device", "published")
"""Arguments of ``decompose`` that do not determine the result by themselves."""


def decompose(
    fishers: Fishers,
    n_components: int,
    *,
    group: Group | Local | None = None,
    checkpoint: str | Path | None = None,
    callback: Callable[[Progress], Any] | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Components | None:
    """Factorise Fishers with all processes; the result is that of one, up to rounding.

    Every process calls it with the same Fishers (opened from one file, of which each reads its block) and the same
    options. W and the projections are spread by examples; a step exchanges r·(d + r) numbers and a handful of scalars,
    whatever the number of examples. Works on the rows, never on K = A Aᵀ.

    Args:
        fishers: All Fishers, either kind, with rows.
        n_components: Number of components.
        group: The processes; by default those that :func:`npeff.distributed.connect` finds.
        checkpoint: A file that keeps the search's state, on a disk that all processes see; the same call resumes, with
            any number of processes.
        callback: Called in process 0, as by :func:`npeff.decompose`.
        progress: Show process 0's progress bar.
        device: Where products run; ``"cuda"`` is the GPU of the process.
        **options: As for :func:`npeff.decompose`, without ``init``.

    Returns:
        The components in process 0, None in the others.

    Raises:
        ArgumentError: An option has a wrong value, or does not go with several processes.
        DataError: There is nothing to decompose, or a stored value is not finite.
        ResumeError: The checkpoint belongs to other Fishers or other options.
        WorkerError: Another process failed or is gone.
    """
    group = connect() if group is None else group
    if isinstance(group, Local):
        return decomposition.decompose(
            fishers,
            n_components,
            checkpoint=checkpoint,
            callback=callback,
            progress=progress,
            device=device,
            **options,
        )
    known = [name for name in inspect.signature(decomposition.decompose).parameters if name not in OURS]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"options: {', '.join(unknown)} cannot be given to several processes")
    if torch.device(device) == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    with told_to_end(group):
        chosen = group.together(lambda: Options(n_components, **options))
        there = group.together(lambda: usable_device(device))
        own, scaled, plan, place = scaled_block(fishers, chosen, group, there)
        problem = _Shared(own, scaled, plan, chosen, there, place, group, _digest(fishers))
        watched = None if callback is None else _asked_once(callback, group)
        state, curve, course = problem.solve(None, checkpoint, watched, progress and group.rank == 0)
        part = group.together(lambda: decomposition.components_of(problem, state, curve, course))
        return _joined(part, fishers, group)


def _joined(part: Components, fishers: Fishers, group: Group) -> Components | None:
    """The components of all examples, in process 0, from each process's for its own block of examples."""
    coefficients = group.collected(torch.from_numpy(part.coefficients))
    weights = None if part.row_weights is None else group.collected(torch.from_numpy(part.row_weights))
    if coefficients is None:
        return None
    return replace(
        part,
        coefficients=coefficients.numpy(),
        row_weights=None if weights is None else weights.numpy(),
        row_offsets=None if weights is None else np.asarray(fishers.row_offsets),
        labels=np.asarray(fishers.labels),
        logits=np.asarray(fishers.logits),
        ids=np.asarray(fishers.ids),
        norms=np.asarray(fishers.norms),
    )


def _asked_once(callback: Callable[[Progress], Any], group: Group) -> Callable[[Progress], bool]:
    """A callback that is called in process 0, its answer known to all."""
    return lambda progress: bool(group.agreed(float(bool(group.rank == 0 and callback(progress)))))


def _digest(fishers: Fishers) -> str:
    """What identifies the Fishers, whoever holds which of them."""
    digest = hashlib.blake2b(json.dumps(fishers.provenance, sort_keys=True, default=str).encode(), digest_size=16)
    for array in (fishers.row_offsets, fishers.ids, fishers.norms, fishers.logits):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class _Shared(Problem):
    """A problem of which this process holds a block."""

    def __init__(
        self,
        own: Fishers,
        scaled: Any,
        plan: Any,
        options: Options,
        device: torch.device,
        place: Place,
        group: Group,
        digest: str,
    ) -> None:
        self.place, self.group, self._identity = place, group, digest
        super().__init__(own, scaled, plan, options, device)
        self.reason = f"{group.size} processes hold a block of rows each"

    def shared(self, space: Any) -> ShardedSpace:
        """The space over the rows of all processes."""
        return ShardedSpace(space, self.place)

    def keeper(self, path: Path, options: dict[str, Any]) -> Checkpoint:
        """A checkpoint of all processes' state."""
        return _SharedCheckpoint(path, self._identity, options, self.place, self.group, self.form.n_examples)


class _SharedCheckpoint(Checkpoint):
    """One file for the state of all processes: process 0 writes it, all read it, each keeps its part of W."""

    def __init__(
        self, path: Path, identity: str, options: dict[str, Any], place: Place, group: Group, n_own: int
    ) -> None:
        self._path = path
        self._key = {"rows": identity, "options": json.loads(json.dumps(options, default=str, sort_keys=True))}
        self._place, self._group, self._n_own = place, group, n_own

    def __enter__(self) -> Checkpoint:
        """Take the file: process 0, for all of them."""
        self._group.together(lambda: super(_SharedCheckpoint, self).__enter__() if self._group.rank == 0 else None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._group.rank == 0:
            super().__exit__(*error)

    def save(self, memory: Memory) -> None:
        """Replace the file by the present state."""
        assert memory.best is not None
        W = self._group.collected(memory.best.W)
        whole = None if W is None else replace(memory, best=replace(memory.best, W=W))
        self._group.together(lambda: None if whole is None else super(_SharedCheckpoint, self).save(whole))

    def load(self) -> Memory | None:
        """The state in the file with this process's part of W, or None when there is no file.

        Raises:
            StorageError: Some processes see the file and others do not.
        """
        memory = self._group.together(super().load)
        seen = self._group.objects(memory is not None)
        if len(set(seen)) > 1:
            raise StorageError(
                f"checkpoint: ranks {', '.join(str(r) for r, s in enumerate(seen) if not s)} do not see {self._path}; "
                "put it on a disk that all processes share"
            )
        if memory is None or memory.best is None:
            return None
        first = self._place.first_example
        memory.best = replace(memory.best, W=memory.best.W[first : first + self._n_own].contiguous())
        return memory

    def remove(self) -> None:
        """Delete the file, once nobody needs it."""
        self._group.objects(None)
        if self._group.rank == 0:
            super().remove()
