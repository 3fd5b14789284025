"""Fishers computed by several processes: each computes every n-th batch, process 0 joins the files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npeff.batches.batches import batch_digest, check_data, read_batch
from npeff.components.loading import load
from npeff.decomposition.processes import Group, Local, connect, ending_together
from npeff.distributed.merging import merge_shares, remove_shares, share_path
from npeff.errors import ArgumentError, DataError, ModelError, ResumeError
from npeff.fishers import computation
from npeff.fishers.computation import EmptyShareError
from npeff.fishers.fishers import Fishers
from npeff.fishers.options import GramOnly
from npeff.fishers.parts import parts_folder
from npeff.models.digests import model_digest
from npeff.storage.files import check_target, path_of, refuse_link


def compute_fishers(
    model: nn.Module,
    data: Iterable[Any],
    *,
    out: str | Path,
    group: Group | Local | None = None,
    progress: bool = True,
    **options: Any,
) -> Fishers:
    """Compute Fishers with all processes, with the arrays that :func:`npeff.compute_fishers` would write.

    Every process calls it, with the same model, the same data in the same order, and the same options. Batch b is
    computed by process b mod n; each saves its work as it goes, so that a killed process loses little and the same
    call resumes. Process 0 then joins the shares: ``out`` must lie on a disk that all processes see.

    Args:
        model: As for :func:`npeff.compute_fishers`; each process's own copy.
        data: Likewise. Every process reads all batches and computes its own.
        out: The file.
        group: The processes; by default those that :func:`npeff.distributed.connect` finds.
        progress: Show process 0's progress bar.
        **options: As for :func:`npeff.compute_fishers`; ``device="cuda"`` is the GPU of the process.

    Returns:
        The Fishers, opened from ``out``, in every process.

    Raises:
        ArgumentError: An option is unknown or has a wrong value.
        DataError: The processes see different data.
        ModelError: The processes have different models.
        ResumeError: Work on disk belongs to another model, other data, other options or another number of processes.
        WorkerError: Another process failed or is gone.
    """
    group = connect() if group is None else group
    if "share" in options:
        raise ArgumentError("share: the processes share the work by themselves; leave it out")
    out = path_of(out)
    if isinstance(group, Local):
        return computation.compute_fishers(model, data, out=out, progress=progress, **options)
    if isinstance(options.get("compress"), GramOnly):
        raise ArgumentError(
            "compress: inner products alone (GramOnly) are of the rows of all examples with each other, and cannot be "
            "shared out among processes; compute them in one, or use TopK(k) or Sketch(d)"
        )
    if torch.device(options.get("device") or "cpu") == torch.device("cuda"):
        options["device"] = torch.device("cuda", torch.cuda.current_device())
    share = (group.rank, group.size)
    group.together(lambda: _check_leftovers(out, group.size))
    if group.agreed(float(out.exists())):
        if group.rank == 0:
            group.together(lambda: computation.compute_fishers(model, data, out=out, progress=progress, **options))
            remove_shares(out, group.size)
        else:
            group.together(lambda: None)
        return load(out)  # type: ignore[return-value]
    same = _SameForAll(check_data(data), model, group, options.get("forward") is not None)

    def work() -> None:
        with contextlib.suppress(EmptyShareError):
            computation.compute_fishers(
                model,
                same,
                out=share_path(out, share),
                share=share,
                progress=progress and group.rank == 0,
                **options,
            )

    with ending_together(group):
        group.together(work)
        same.compare("the end")
        group.together(lambda: merge_shares(out, group.size) if group.rank == 0 else None)
    if group.rank == 0:
        remove_shares(out, group.size)
    return load(out)  # type: ignore[return-value]


def _check_leftovers(out: Path, size: int) -> None:
    """Refuse to begin beside the shares of another number of processes, or with a link in place of a share.

    Raises:
        ResumeError: There are some.
        StorageError: There is one.
    """
    check_target(out)
    for k in range(size):
        refuse_link(share_path(out, (k, size)))
    for path in sorted(out.parent.glob(f"{out.name}.*-of-*")):
        words = path.name.removeprefix(f"{out.name}.").removesuffix(".parts").split("-of-")
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) != size:
            raise ResumeError(
                f"{path}: unfinished work of {words[1]} processes, and now there are {size}; start {words[1]}, or "
                f"remove {out.name}.*-of-{words[1]}* to start anew"
            )
    if parts_folder(out).is_dir():
        raise ResumeError(
            f"{parts_folder(out)}: unfinished work of one process, and now there are {size}; start one, or remove it "
            "to start anew"
        )


class _SameForAll:
    """Data that checks that every process has the same: at the first batch, and, in one digest, of all batches."""

    def __init__(self, data: Iterable[Any], model: nn.Module, group: Group, any_layout: bool) -> None:
        self._data, self._model, self._group, self._any_layout = data, model, group, any_layout
        self._digest = hashlib.blake2b(digest_size=16)
        self._count = 0

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]  # a TypeError where it has none, as for the data itself

    def __iter__(self) -> Iterator[Any]:
        cpu = torch.device("cpu")
        for number, raw in enumerate(self._data):
            batch = read_batch(raw, cpu, number, self._any_layout, False)
            self._digest.update(batch_digest(batch).encode())
            self._count += 1
            if number == 0:
                self._compare_models()
                self.compare("the first batch")
            yield raw

    def _compare_models(self) -> None:
        digests = self._group.objects(model_digest(self._model))
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            raise ModelError(
                f"model: rank {other} has other weights, buffers or modules than rank 0; load the same model in every "
                "process, or seed its making"
            )

    def compare(self, when: str) -> None:
        """Compare the batches that the processes have read so far.

        Raises:
            DataError: It differs.
        """
        seen = self._group.objects((self._digest.hexdigest(), self._count))
        other = next((rank for rank, theirs in enumerate(seen) if theirs != seen[0]), None)
        if other is not None:
            raise DataError(
                f"data: up to {when}, rank {other} sees other batches than rank 0; give every process all the data in "
                "the same order (no shuffling, no DistributedSampler)"
            )
