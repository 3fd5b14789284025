"""Estimate what Fishers and their decomposition will take: passes, bytes, seconds; and say what to choose.

:func:`plan` computes the first batches for real with each way to keep Fishers (:class:`Trials`), counts what they
store, and scales the counts to all examples. :func:`_advice` picks a way that fits a budget.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from torch import nn

from npeff.batches.reading import check_data
from npeff.errors import ArgumentError, DataError, check_integer
from npeff.fishers.computation import compute_fishers
from npeff.fishers.options import Compression, GramOnly, Sketch, TopK
from npeff.fishers.rows import Kind
from npeff.gradients.eligibility import BLOCKS
from npeff.language.places import places_of
from npeff.models.devices import available_bytes, format_bytes, parse_bytes
from npeff.perturbation.effect import text_table
from npeff.planning.trials import SKETCH_DS, TOP_KS, Choice, Trials, choice_of
from npeff.short_repr import short_repr

__all__ = ["Plan", "plan"]

COVERAGE_LINES = 8
"""Parameters without a fast gradient rule that the table names."""

_NOT_PLANNED = {"model", "data", "kind", "compress", "out", "seed", "max_examples", "share", "memory", "progress"}


@dataclass(frozen=True)
class Advice:
    """A recommendation of one way to keep the Fishers.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        name: Name of the way; empty where nothing fits.
        reason: Why this one, with the numbers that decide.
        flags: Of ``npeff fishers``.
    """

    kind: str
    name: str
    reason: str
    flags: str


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a computation; ``str(plan)`` is a table for the terminal.

    Attributes:
        model: Its class.
        n_parameters: Selected parameters, m.
        n_examples: Examples that the numbers are for.
        examples_from: ``"given"``, ``"counted"``, ``"estimated"`` from the places in the batches tried, or an ``"upper
            bound"`` from the number of batches.
        n_outputs: Logits, C.
        n_components: Components of the decomposition, r.
        passes: Backward passes per example, mean over the trial's examples.
        passes_vary: Whether they differ between examples.
        coverage: Per parameter, the gradient rule that serves it, and why.
        batch_size: Examples per batch, mean over the trial.
        trial_batches: Batches that were computed.
        one_off_seconds: Start, choice of rules and self-check: once per run.
        seconds_per_example: After that, of the first kind asked for.
        write_rate: Bytes per second to disk, merging included.
        process_bytes: Held before: Python, torch, the model, the first batches.
        memory: Budget of memory in bytes.
        disk: Budget of disk in bytes.
        choices: The ways to keep the Fishers.
        advice: Recommended ones, each with its reason.
    """

    model: str
    n_parameters: int
    n_examples: int
    examples_from: str
    n_outputs: int
    n_components: int
    passes: float
    passes_vary: bool
    coverage: list[dict[str, str]]
    batch_size: float
    trial_batches: int
    one_off_seconds: float
    seconds_per_example: float
    write_rate: float
    process_bytes: int
    memory: int
    disk: int
    choices: list[Choice]
    advice: list[Advice]

    __repr__ = short_repr

    def to_json(self) -> str:
        """Write the plan as one JSON document."""
        described = asdict(self)
        for choice, own in zip(described["choices"], self.choices, strict=True):
            choice["compress"] = None if own.compress is None else {type(own.compress).__name__: choice["compress"]}
        return json.dumps(described, indent=1)

    def __str__(self) -> str:
        """Return the table."""
        return _table(self)


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
    **options: Any,
) -> Plan:
    """Estimate what the Fishers of a model and data, and their decomposition, will take.

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
        **options: Arguments of :func:`npeff.compute_fishers` that decide which rows there are, and how they are made:
            ``basis``, ``rank``, ``energy``, ``min_prob``, ``max_classes``, ``labels``, ``n_samples``, ``likelihood``,
            ``parameters``, ``forward``, ``device``.

    Returns:
        The plan.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: There are no batches, or they cannot be used.
        ModelError: The model has no per-example gradients as it stands.
        TypeError: ``options`` holds a name that is none of those.
    """
    for name in options:
        if name not in set(inspect.signature(compute_fishers).parameters) - _NOT_PLANNED:
            raise TypeError(f"plan() got an unexpected keyword argument {name!r}")
    for name, value, least in (
        ("n_examples", n_examples, 1),
        ("n_components", n_components, 1),
        ("batches", batches, 2),
    ):
        if value is not None:
            check_integer(name, value, least)
    if kind is not None and kind not in get_args(Kind):
        raise ArgumentError(f"kind: expected 'low_rank', 'diagonal' or None for both, got {kind!r}")
    where = Path(tempfile.gettempdir()) if folder is None else Path(folder)
    if not where.is_dir():
        raise ArgumentError(f"folder: {where} is not a folder; name one that exists")
    room = available_bytes() * 4 // 5 if memory is None else parse_bytes(memory)
    space = shutil.disk_usage(where).free // 2 if disk is None else parse_bytes(disk, "disk")
    if (places := places_of(data)) is not None:  # the trials are given single batches, without what these know
        places.check_model(model)
        options = {"parameters": BLOCKS} | options
    start, first = time.perf_counter(), []
    for batch in check_data(data):
        first.append(batch)
        if len(first) == batches:
            break
    if not first:
        raise DataError("data: it yielded no batches; pass a DataLoader or a list of batches")
    loading = (time.perf_counter() - start) / len(first)
    kinds: list[Kind] = ["low_rank", "diagonal"] if kind is None else [kind]
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        trials = Trials(model, first, loading, options, Path(scratch), kinds[0])
        mains = {each: trials.of(each, TopK(TOP_KS[-1])) for each in kinds}
        main, fishers, passes = mains[kinds[0]], mains[kinds[0]].fishers, trials.passes
        n, source = _count(data, len(first), trials) if n_examples is None else (n_examples, "given")
        choices = [
            choice_of(trials, mains[each], compress, n, n_components)
            for each in kinds
            for compress in _ways(each, fishers.n_parameters, int(passes.max(initial=1)))
        ]
        return Plan(
            model=type(model).__name__,
            n_parameters=fishers.n_parameters,
            n_examples=n,
            examples_from=source,
            n_outputs=int(fishers.logits.shape[1]),
            n_components=n_components,
            passes=float(passes.mean()),
            passes_vary=bool((passes != passes[0]).any()),
            coverage=fishers.coverage,
            batch_size=trials.batch_size,
            trial_batches=len(first),
            one_off_seconds=trials.one_off,
            seconds_per_example=main.per_example,
            write_rate=1 / max(1e-12, trials.seconds_per_byte),
            process_bytes=trials.before,
            memory=room,
            disk=space,
            choices=choices,
            advice=_advice(choices, room, space),
        )


def _count(data: Iterable[Any], tried: int, trials: Trials) -> tuple[int, str]:
    """Count the examples of the data, and say how their number is known.

    Raises:
        ArgumentError: It does not say.
    """
    if (places := places_of(data)) is not None:
        return places.n_examples, "counted"
    if isinstance(data, list | tuple):
        return sum(batch.n_examples for batch in trials.read(data)), "counted"
    dataset = getattr(data, "dataset", None)
    if isinstance(dataset, Sized) and not getattr(data, "drop_last", False):
        n = len(dataset)
        return (n, "counted") if trials.sequence_size == 1 else (round(n * trials.sequence_size), "estimated")
    if isinstance(data, Sized):
        return max(1, round(len(data) * trials.batch_size)), "upper bound"
    if tried < 2:
        return round(trials.batch_size), "counted"
    raise ArgumentError("n_examples: the data does not say how many batches it has; give the number of examples")


def _ways(kind: Kind, n_parameters: int, most_rows: int) -> list[Compression | None]:
    """List the ways to keep Fishers, without compressions that would keep everything."""
    if kind == "diagonal":
        return [None, *(TopK(k) for k in TOP_KS if k < n_parameters)]
    top_ks = [TopK(k) for k in TOP_KS if k < n_parameters * most_rows]
    return [None, GramOnly(), *top_ks, *(Sketch(d) for d in SKETCH_DS if d < n_parameters)]


def _advice(choices: Sequence[Choice], memory: int, disk: int) -> list[Advice]:
    """Recommend one way per kind: the most faithful way that fits, and of equals the smallest.

    Exact rows where file and memory allow; then exact inner products alone; then the smallest top-k or sketch whose
    inner products were close enough to the exact ones in the trial, or, of the diagonal kind and where exact rows were
    too large to try, the smallest top-k that keeps nine tenths of the Fisher's norm and a sketch by its theory; then
    the closest one.
    """
    found = []
    for kind, group in groupby(choices, key=lambda choice: choice.kind):
        own = list(group)
        fitting = [choice for choice in own if choice.disk_bytes <= disk and choice.most_memory <= memory]
        least = min(own, key=lambda choice: choice.disk_bytes)
        nothing = (
            f"nothing fits into {format_bytes(memory)} of memory and {format_bytes(disk)} of disk; {least.name}, the "
            f"smallest, takes {format_bytes(least.most_memory)} and {format_bytes(least.disk_bytes)}: allow more, "
            "select parameters, or take fewer examples or passes (rank=, energy=)"
        )
        found.append(_pick(fitting) if fitting else Advice(kind, "", nothing, ""))
    return found


def _pick(fitting: Sequence[Choice]) -> Advice:
    lossless = [choice for choice in fitting if choice.compress is None or isinstance(choice.compress, GramOnly)]
    faithful = [choice for choice in fitting if choice.loss[0] <= 1]
    if lossless:
        best = lossless[0]
        reason = "exact rows do not fit, their inner products do: nothing is lost to the solver"
        reason = "everything is kept" if best.compress is None else reason
    elif faithful:
        best = min(faithful, key=lambda choice: choice.disk_bytes)
        reason = f"the smallest that is faithful enough: {best.loss[1]}"
    else:
        best = min(fitting, key=lambda choice: choice.loss[0])
        reason = f"the most faithful that fits: {best.loss[1]}"
    flags = "--exact" if best.compress is None else "--gram-only"
    if isinstance(best.compress, TopK):
        flags = f"--top-k {best.compress.k}"
    elif isinstance(best.compress, Sketch):
        flags = f"--sketch {best.compress.d}"
        reason += "; vectors in parameter space take another pass (npeff recover, components.recover)"
    reason += f"; it takes {format_bytes(best.disk_bytes)} of disk and {format_bytes(best.memory_bytes)} of memory"
    return Advice(best.kind, best.name, reason, flags + (" --kind diagonal" if best.kind == "diagonal" else ""))


def _table(plan: Plan) -> str:
    """Write the plan as lines of at most about 110 characters."""
    how = {"upper bound": " at most", "estimated": " about"}.get(plan.examples_from, "")
    passes = f"{plan.passes:.1f} on average" if plan.passes_vary else f"{plan.passes:.0f}"
    lines = [
        f"{plan.model}: {plan.n_parameters:,} parameters, {plan.n_outputs} outputs;"
        f"{how} {plan.n_examples:,} examples in batches of {plan.batch_size:g}",
        f"backward passes per example: {passes}",
        *_coverage(plan),
        f"measured on {plan.trial_batches} batches: {_duration(plan.one_off_seconds)} once (start, self-check), "
        f"then {1e3 * plan.seconds_per_example:.3g} ms an example; disk {format_bytes(plan.write_rate)}/s",
        f"memory of the process before: {format_bytes(plan.process_bytes)}",
    ]
    for kind, choices in groupby(plan.choices, key=lambda choice: choice.kind):
        lines += ["", f"{kind} Fishers", *_lines(list(choices), plan.n_components)]
    lines += ["", f"within {format_bytes(plan.memory)} of memory and {format_bytes(plan.disk)} of disk:"]
    for advice in plan.advice:
        lines.append(f"  {advice.kind}: {advice.name or 'none'} — {advice.reason}")
        if advice.flags:
            lines.append(f"    npeff fishers … {advice.flags}")
    return "\n".join(lines)


def _coverage(plan: Plan) -> list[str]:
    rules = Counter(line["rule"] for line in plan.coverage)
    served = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
    slow = [line for line in plan.coverage if line["rule"] in ("torch.func", "loop", "zero", "left out")]
    lines = [f"  {line['parameter']}: {line['rule']} — {line['reason']}" for line in slow[:COVERAGE_LINES]]
    more = [f"  and {len(slow) - COVERAGE_LINES} more"] if len(slow) > COVERAGE_LINES else []
    return [f"gradient rules (parameters each serves): {served}", *lines, *more]


def _lines(choices: Sequence[Choice], n_components: int) -> list[str]:
    """Write the choices of one kind as a table, without columns that no choice fills."""
    table = []
    for choice in choices:
        row = {
            "": choice.name,
            "disk": format_bytes(choice.disk_bytes),
            "memory": format_bytes(choice.memory_bytes),
            "time": _duration(choice.seconds),
            "timed as": choice.timed,
            "norm kept": "" if choice.kept is None else f"{choice.kept:.2f}",
            "error of K": "" if choice.gram_error is None else f"{choice.gram_error:.3f}",
        }
        if choice.decompose_bytes is not None and choice.decompose_seconds is not None:
            row[f"decompose r={n_components}"] = format_bytes(choice.decompose_bytes)
            row["rough time"] = _duration(choice.decompose_seconds)
        table.append(row)
    heads = [head for head in table[0] if head == "" or any(row[head] for row in table)]
    cells = [heads, *([row[head] for head in heads] for row in table)]
    return [f"  {line}" for line in text_table(cells).splitlines()]


def _duration(seconds: float) -> str:
    """Write seconds as ``0.42 s``, ``12 min``, ``3.5 h`` or ``2.1 days``."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
