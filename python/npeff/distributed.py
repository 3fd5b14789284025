"""Run both stages in several processes, on one machine or many: examples are divided, the solver needs only sums.

:func:`compute_fishers` computes each process's share of the batches, and process 0 joins the files;
:func:`decompose` gives each process a block of rows. :mod:`npeff.decomposition.processes` finds the processes and adds
up numbers over them. Under ``torchrun`` the commands ``npeff fishers`` and ``npeff decompose`` do this by themselves.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.batches.batches import batch_digest
from npeff.batches.reading import check_data, read_batch
from npeff.components.components import Components
from npeff.components.loading import load
from npeff.decomposition.decompose import components_of
from npeff.decomposition.decompose import decompose as decompose_alone
from npeff.decomposition.options import WITHOUT_EFFECT, Callback, DecomposeOptions, Progress
from npeff.decomposition.problem import prepare
from npeff.decomposition.processes import Processes, connect, ending_together
from npeff.decomposition.search import Search
from npeff.errors import ArgumentError, DataError, ModelError, ResumeError, StorageError, WorkerError
from npeff.fishers import computation
from npeff.fishers.computation import EmptyShareError
from npeff.fishers.file_format import example_arrays, example_fields, joined_data, write_fishers
from npeff.fishers.fishers import Fishers, fishers_in
from npeff.fishers.options import GramOnly
from npeff.fishers.parts import batches_in, parts_folder
from npeff.models.parameters import model_digest
from npeff.storage.container import Container, open_container
from npeff.storage.files import atomic, check_target, path_of, refuse_link

__all__ = ["Processes", "WorkerError", "compute_fishers", "connect", "decompose"]

Array = npt.NDArray[Any]


def compute_fishers(
    model: nn.Module,
    data: Iterable[Any],
    *,
    out: str | Path,
    group: Processes | None = None,
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
    if group.size == 1:
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
        whole = {"out": out, "progress": progress, **options}
        group.together(lambda: computation.compute_fishers(model, data, **whole) if group.rank == 0 else None)
    else:
        same = _SameForAll(check_data(data), model, group, options.get("forward") is not None)
        own = {"out": share_path(out, share), "share": share, "progress": progress and group.rank == 0, **options}

        def work() -> None:
            with contextlib.suppress(EmptyShareError):
                computation.compute_fishers(model, same, **own)

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

    def __init__(self, data: Iterable[Any], model: nn.Module, group: Processes, any_layout: bool) -> None:
        self.data, self._model, self._group, self._any_layout = data, model, group, any_layout
        self._digest = hashlib.blake2b(digest_size=16)
        self._count = 0

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # a TypeError where it has none, as for the data itself

    def __iter__(self) -> Iterator[Any]:
        cpu = torch.device("cpu")
        for number, raw in enumerate(self.data):
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


# ---- joining the shares ----------------------------------------------------------------------------------------


def share_path(out: Path, share: tuple[int, int]) -> Path:
    """Return the file of a share of the work for ``out``: ``fishers.h5.2-of-4``."""
    return out.with_name(f"{out.name}.{share[0]}-of-{share[1]}")


def merge_shares(out: Path, n_shares: int) -> None:
    """Write ``out`` from the files of its shares, with the arrays that one process would have written.

    Args:
        out: The file to make; the shares lie beside it, see :func:`share_path`. They stay.
        n_shares: How many there are; those to which no batch fell have no file.

    Raises:
        StorageError: A share is missing, the disk is full, or a file appeared at ``out`` meanwhile.
        ResumeError: Shares were computed from different models, data or options.
    """
    paths = [share_path(out, (k, n_shares)) for k in range(n_shares)]
    found = [open_container(path) if path.exists() else None for path in paths]
    for share in found:
        if share is not None:
            fishers_in(share).verify()
    lengths = [0 if share is None else len(batches_in(share)) for share in found]
    n_batches = sum(lengths)
    if not n_batches or lengths != [len(range(k, n_batches, n_shares)) for k in range(n_shares)]:
        raise StorageError(
            f"{out}: the shares {', '.join(path.name for path in paths)} do not make a whole: they have "
            f"{', '.join(map(str, lengths))} batches; run the same command again to complete them"
        )
    shares = [share for share in found if share is not None]  # those that have no batch come last
    header = _common_header(shares)
    batches = [batches_in(share) for share in shares]
    ends = [np.concatenate([[0], np.cumsum([size for _, size in own])]).astype(int) for own in batches]
    order = [(number % n_shares, number // n_shares) for number in range(n_batches)]
    spans = [(shares[k], int(ends[k][i]), int(ends[k][i + 1])) for k, i in order]
    if out.exists():
        raise StorageError(
            f"{out}: a file appeared there during the work, and is not overwritten; move it away and run the same "
            "command again: all examples are in its shares"
        )
    with atomic(out) as scratch:
        write_fishers(
            scratch,
            header,
            _coverage([share.json("coverage") for share in shares]),
            [list(batches[k][i]) for k, i in order],
            joined_data(spans),
        )


def remove_shares(out: Path, n_shares: int) -> None:
    """Remove the files of the shares."""
    for k in range(n_shares):
        share_path(out, (k, n_shares)).unlink(missing_ok=True)


def _common_header(shares: Sequence[Container]) -> dict[str, Any]:
    headers = []
    for share in shares:
        provenance = copy.deepcopy(share.json("provenance"))
        (provenance.get("options") or {}).pop("share", None)
        headers.append(
            {
                "kind": share.attributes["kind"],
                "parameters": share.json("parameters"),
                "provenance": provenance,
            }
        )
    for share, header in zip(shares[1:], headers[1:], strict=True):
        if header != headers[0]:
            theirs, ours = header["provenance"], headers[0]["provenance"]
            differing = [name for name in ours if theirs.get(name) != ours[name]] or ["parameters"]
            raise ResumeError(
                f"{share.path}: differs from {shares[0].path.name} in {', '.join(differing)}; every process must use "
                "the same model, data and options: remove the shares and start again"
            )
    return headers[0]


def _coverage(reports: Sequence[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Give, per parameter, the first share's line, or the first line that names a fallback."""
    slow = ("torch.func", "loop")
    return [next((line for line in lines if line["rule"] in slow), lines[0]) for lines in zip(*reports, strict=True)]


# ---- decomposition ---------------------------------------------------------------------------------------------


def decompose(
    fishers: Fishers,
    n_components: int,
    *,
    group: Processes | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
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
            any number of processes. As for :func:`npeff.decompose`, the caller removes the file.
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
    ours = {"checkpoint": checkpoint, "callback": callback, "progress": progress, "device": device}
    if group.size == 1:
        return decompose_alone(fishers, n_components, **ours, **options)  # type: ignore[arg-type]
    known = [one.name for one in fields(DecomposeOptions) if one.name not in (*WITHOUT_EFFECT, "published")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"options: {', '.join(unknown)} cannot be given to several processes")
    ours["progress"] = progress and group.rank == 0
    ours["callback"] = None if callback is None else _asked_once(callback, group)
    if torch.device(device) == torch.device("cuda"):
        ours["device"] = torch.device("cuda", torch.cuda.current_device())
    with ending_together(group):
        chosen = group.together(lambda: DecomposeOptions(n_components, **ours, **options))  # type: ignore[arg-type]
        problem = prepare(fishers, chosen, group)
        result = Search(problem).run()
        part = group.together(lambda: components_of(problem, result))
        return _joined(part, fishers, group)


def _joined(part: Components, fishers: Fishers, group: Processes) -> Components | None:
    """Join the components of each process's block into those of all examples, in process 0."""
    coefficients = group.collected(torch.from_numpy(part.coefficients))
    weights = None if part.row_weights is None else group.collected(torch.from_numpy(part.row_weights))
    if coefficients is None:
        return None
    return replace(
        part,
        coefficients=coefficients.numpy(),
        row_weights=None if weights is None else weights.numpy(),
        row_offsets=None if weights is None else np.asarray(fishers.row_offsets),
        **example_fields(example_arrays(fishers)),
    )


def _asked_once(callback: Callable[[Progress], Any], group: Processes) -> Callable[[Progress], bool]:
    """Make a callback that is called in process 0 alone, its answer known to all."""
    return lambda progress: bool(group.agreed(float(bool(group.rank == 0 and callback(progress)))))
