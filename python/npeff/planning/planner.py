"""Before anything runs: what Fishers and their decomposition will take, and what to choose."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from npeff.batches.batches import check_data, read_batches
from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import Basis, Forward, Labels, Likelihood, TopK
from npeff.fishers.rows import Kind
from npeff.models.memory import available_bytes, parse_bytes
from npeff.planning.advice import advise
from npeff.planning.choices import TOP_KS, Trials, ways, weigh
from npeff.planning.estimate import Plan, Source
from npeff.planning.solving import dense_operation, step_seconds
from npeff.planning.trial import Trial, first_batches, writing


def plan(
    model: nn.Module,
    data: Iterable[Any],
    *,
    n_examples: int | None = None,
    kind: Kind | None = None,
    n_components: int = 64,
    memory: int | str | None = None,
    disk: int | str | None = None,
    batches: int = 4,
    folder: str | Path | None = None,
    basis: Basis = "reduced",
    rank: int | None = None,
    energy: float | None = None,
    min_prob: float | None = None,
    max_classes: int | None = None,
    labels: Labels = "expected",
    n_samples: int = 1,
    likelihood: Likelihood = "categorical",
    parameters: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Tell what the Fishers of a model and data, and their decomposition, will take.

    The first batches are computed for real, once per method of keeping them, and watched: clocks, memory, coverage,
    ranks, entries. Bytes follow from the counts. Data that can be iterated only once (a generator) loses those batches.

    Args:
        model: As for :func:`npeff.compute_fishers`.
        data: Likewise.
        n_examples: How many examples there will be; by default counted where that is cheap.
        kind: ``"low_rank"``, ``"diagonal"``, or None for both.
        n_components: Components of the decomposition.
        memory: Budget, ``"4GB"`` or bytes; by default four fifths of what is free.
        disk: Budget for the file; by default half of what is free in ``folder``: merging needs the file twice.
        batches: Batches of a trial, at least 2.
        folder: Where the file will be; the trials' files go there too. By default the system's temporary folder.
        basis: As for :func:`npeff.compute_fishers`, like all that follow.
        rank: Likewise.
        energy: Likewise.
        min_prob: Likewise.
        max_classes: Likewise.
        labels: Likewise.
        n_samples: Likewise.
        likelihood: Likewise.
        parameters: Likewise.
        forward: Likewise.
        device: Likewise.

    Returns:
        The plan.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: There are no batches, or they cannot be used.
        ModelError: The model has no per-example gradients as it stands.
    """
    for name, value, least in (
        ("n_examples", n_examples, 1),
        ("n_components", n_components, 1),
        ("batches", batches, 2),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    if kind is not None and kind not in get_args(Kind):
        raise ArgumentError(f"kind: expected 'low_rank', 'diagonal' or None for both, got {kind!r}")
    where = Path(tempfile.gettempdir()) if folder is None else Path(folder)
    if not where.is_dir():
        raise ArgumentError(f"folder: {where} is not a folder; name one that exists")
    room = available_bytes() * 4 // 5 if memory is None else parse_bytes(memory)
    space = shutil.disk_usage(where).free // 2 if disk is None else parse_bytes(disk, "disk")
    first, loading = first_batches(check_data(data), batches)
    if not first:
        raise DataError("data: it yielded no batches; pass a DataLoader or a list of batches")
    options: dict[str, Any] = {
        "basis": basis, "rank": rank, "energy": energy, "min_prob": min_prob, "max_classes": max_classes,
        "labels": labels, "n_samples": n_samples, "likelihood": likelihood, "parameters": parameters,
        "forward": forward, "device": device,
    }  # fmt: skip
    kinds: list[Kind] = ["low_rank", "diagonal"] if kind is None else [kind]
    trials = Trials(model, first, loading, kinds[0], options, where, n_components)
    main = trials.of(kinds[0], TopK(TOP_KS[-1]))
    source: Source = "given"
    if n_examples is None:
        n_examples, source = _count(data, first, main)
    to_disk = writing(main.header, main.n_parameters, where)
    choices = []
    for each in kinds:
        trial = trials.of(each, TopK(TOP_KS[-1]))
        solving = None
        if each == "low_rank":
            n_rows = max(1, round(float(trial.ranks.mean()) * n_examples))
            r = min(n_components, n_rows)
            solving = (r, room, (dense_operation(), step_seconds(n_examples, n_rows, r)))
        for compress in ways(each, main.n_parameters, int(trial.ranks.max(initial=1))):
            choices.append(weigh(trials, each, compress, n_examples, to_disk, solving))
    return Plan(
        model=type(model).__name__,
        n_parameters=main.n_parameters,
        n_examples=n_examples,
        examples_from=source,
        n_outputs=main.n_outputs,
        passes=float(main.passes.mean()),
        passes_vary=bool((main.passes != main.passes[0]).any()),
        coverage=main.coverage,
        batch_size=main.batch_size,
        trial_batches=len(first),
        one_off_seconds=trials.one_off.wall,
        seconds_per_example=main.per_example.wall,
        write_rate=1 / max(1e-12, to_disk.wall),
        process_bytes=trials.before,
        memory=room,
        disk=space,
        choices=choices,
        advice=advise(choices, room, space),
    )


def _count(data: Iterable[Any], first: Sequence[Any], trial: Trial) -> tuple[int, Source]:
    """How many examples the data holds.

    Raises:
        ArgumentError: It does not say.
    """
    if isinstance(data, list | tuple):
        return sum(batch.n_examples for batch in read_batches(data, torch.device("cpu"), True)), "counted"
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, Sized) and not getattr(data, "drop_last", False):
        return len(dataset), "counted"
    if isinstance(data, Sized):
        return max(1, round(len(data) * trial.batch_size)), "upper bound"
    if len(first) < 2:
        return len(trial.ranks), "counted"
    raise ArgumentError("n_examples: the data does not say how many batches it has; give the number of examples")
