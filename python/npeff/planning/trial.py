"""Real calls on the first batches: what one batch takes, what the beginning takes, what the disk takes."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.batches.batches import read_batches
from npeff.fishers.computation import compute_fishers
from npeff.fishers.factors import factorise, in_pieces
from npeff.fishers.fishers import FisherBlock, Fishers
from npeff.fishers.options import Compression, FisherOptions
from npeff.fishers.rows import DenseRows, Kind, SparseRows
from npeff.fishers.shards import FisherWriter
from npeff.gradients.engine import KEPT_BYTES
from npeff.planning.peak import Peak, settled_bytes
from npeff.planning.quality import largest_entries, unit_gram

SHARD_BYTES = 64 << 20
"""Bytes of Fishers that are held until a shard is written."""

PROBE_BYTES = 32 << 20
"""Bytes that the disk is timed with."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Timing:
    """Seconds by the wall clock, and of the processor."""

    wall: float
    cpu: float

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Timing) -> Timing:
        return Timing(max(0.0, self.wall - other.wall), max(0.0, self.cpu - other.cpu))

    def __mul__(self, factor: float) -> Timing:
        return Timing(self.wall * factor, self.cpu * factor)

    @classmethod
    def now(cls) -> Timing:
        """The clocks."""
        return cls(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Trial:
    """One call of ``compute_fishers`` on the first batches, taken apart.

    Attributes:
        ranks: ``(n,)`` int64 rows per example.
        passes: ``(n,)`` int64 backward passes that each example asks for.
        counts: ``(n,)`` int64 stored entries per example.
        kept: For ``TopK``, per asked k: median over examples of ‖stored Fisher‖ / ‖Fisher‖.
        columns: For ``TopK``, per asked k: how many parameters the first half of the examples keeps, and all of them.
        grams: Low-rank kind: :func:`~npeff.planning.quality.unit_gram`, for ``TopK`` per asked k, else under None.
        coverage: Per parameter, the gradient rule that serves it, and why.
        n_outputs: Logits per example.
        n_parameters: Selected parameters, m.
        header: ``kind``, ``parameters`` and ``provenance`` of the file.
        batch_size: Mean number of examples per batch.
        one_off: From the call to the end of the first batch, less a batch: digests, choice of rules, self-check.
        per_example: Of a later batch: loading, forward and backward passes, compression.
        working_bytes: Most memory held beyond what the process had before, finished rows not counted.
        device_bytes: Most CUDA memory allocated.
    """

    ranks: Array
    passes: Array
    counts: Array
    kept: dict[int, float]
    columns: dict[int, tuple[int, int]]
    grams: dict[int | None, Array]
    coverage: list[dict[str, str]]
    n_outputs: int
    n_parameters: int
    header: dict[str, Any]
    batch_size: float
    one_off: Timing
    per_example: Timing
    working_bytes: int
    device_bytes: int


class Watched:
    """Batches that remember when they were asked for."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self.asked: list[Timing] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self.asked = []  # the first batch is looked at before the work begins
        for batch in self._batches:
            self.asked.append(Timing.now())
            yield batch
        self.asked.append(Timing.now())


def first_batches(data: Iterable[Any], count: int) -> tuple[list[Any], Timing]:
    """The first batches, and what it takes to load one."""
    batches: list[Any] = []
    start = Timing.now()
    for batch in data:
        batches.append(batch)
        if len(batches) == count:
            break
    return batches, (Timing.now() - start) * (1 / max(1, len(batches)))


def run_trial(
    model: nn.Module,
    batches: Sequence[Any],
    loading: Timing,
    kind: Kind,
    compress: Compression | None,
    options: dict[str, Any],
    ks: Sequence[int] = (),
    folder: Path | None = None,
    loaded: int = 0,
    examine: Callable[[Fishers], object] | None = None,
) -> Trial:
    """Compute the Fishers of the batches as :func:`npeff.compute_fishers` would, watching clocks and memory.

    Args:
        model: The model.
        batches: The first batches; at least two tell a batch from the beginning.
        loading: Seconds to load one of them.
        kind: As for ``compute_fishers``.
        compress: Likewise.
        options: Its other arguments.
        ks: With ``TopK``: the smaller k whose share of the Fisher is wanted.
        folder: Where temporary files go.
        loaded: Bytes that a first run loads for good, and that this one found loaded.
        examine: Shown the Fishers, which are gone afterwards.
    """
    settled = settled_bytes()
    watched = Watched(batches)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        start = Timing.now()
        with Peak() as peak, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(TopK|Sketch)\(")  # sizes here are ours, not the reader's
            fishers = compute_fishers(
                model,
                watched,
                kind=kind,
                compress=compress,
                out=Path(scratch) / "trial.h5",
                progress=False,
                **options,
            )
        # asked[i] is when batch i was asked for: batch 0 before the rules are chosen, the others after a batch's work.
        asked = watched.asked
        sizes = _sizes(batches, options.get("forward") is not None)
        first, later = asked[1] - start, asked[-1] - asked[1]
        per_example = later * (1 / sum(sizes[1:])) if len(sizes) > 1 else first * (1 / sizes[0])
        sparse = isinstance(fishers.rows, SparseRows)
        kept = {k: _kept_share(fishers, k) for k in ks if sparse}
        stored = min(fishers.rows.nbytes, SHARD_BYTES)
        if examine is not None:
            examine(fishers)
        return Trial(
            ranks=np.array(fishers.ranks),
            passes=_passes(fishers, options),
            counts=_counts(fishers),
            kept=kept,
            columns={k: _kept_columns(fishers, k) for k in ks if sparse},
            grams={} if kind == "diagonal" else {k: unit_gram(fishers, k) for k in (ks if sparse else (None,))},
            coverage=fishers.coverage,
            n_outputs=int(fishers.logits.shape[1]),
            n_parameters=fishers.n_parameters,
            header={
                "kind": kind,
                "parameters": fishers.parameters.to_json(),
                "provenance": fishers.provenance,
            },
            batch_size=sum(sizes) / len(sizes),
            one_off=first - per_example * sizes[0],
            per_example=per_example + loading * (len(sizes) / sum(sizes)),
            working_bytes=max(0, peak.peak - settled + loaded - stored),
            device_bytes=peak.device,
        )


def _sizes(batches: Sequence[Any], any_layout: bool) -> list[int]:
    return [batch.n_examples for batch in read_batches(batches, torch.device("cpu"), any_layout)]


def _passes(fishers: Fishers, options: dict[str, Any]) -> Array:
    """Columns of the factor S per example: as many backward passes."""
    if fishers.kind == "low_rank":
        return np.array(fishers.ranks)
    chosen = FisherOptions(**{name: options[name] for name in FisherOptions.__dataclass_fields__ if name in options})
    if chosen.basis == "class" and chosen.min_prob is None and chosen.max_classes is None:
        chosen = replace(chosen, basis="reduced")
    if chosen.labels != "expected":
        return np.full(len(fishers), chosen.most_rows(fishers.logits.shape[1]))
    logits = torch.from_numpy(np.array(fishers.logits))
    pieces = in_pieces(logits, chosen, KEPT_BYTES)
    return np.concatenate([factorise(logits[some], chosen, None, fishers.ids[some]).counts.numpy() for some in pieces])


def _counts(fishers: Fishers) -> Array:
    rows, offsets = fishers.rows, np.asarray(fishers.row_offsets)
    if isinstance(rows, SparseRows):
        return np.diff(np.asarray(rows.indptr)[offsets]).astype(np.int64)
    return (np.diff(offsets) * rows.n_columns).astype(np.int64)


def _kept_columns(fishers: Fishers, k: int) -> tuple[int, int]:
    """Parameters with an entry among the k largest of some example: of the first half of the examples, and of all."""
    rows, seen, half = fishers.rows, np.zeros(fishers.n_parameters, bool), 0
    assert isinstance(rows, SparseRows)
    for i in range(len(fishers)):
        lo, hi = (int(rows.indptr[fishers.row_offsets[j]]) for j in (i, i + 1))
        values, indices = np.abs(rows.values[lo:hi]), rows.indices[lo:hi]
        seen[indices if k >= len(values) else indices[np.argpartition(values, len(values) - k)[-k:]]] = True
        if i + 1 == len(fishers) // 2:
            half = int(seen.sum())
    return half, int(seen.sum())


def _kept_share(fishers: Fishers, k: int) -> float:
    """Median over examples of ‖F restricted to its k largest entries‖ / ‖F‖; 1 where no Fisher is left."""
    rows = fishers.rows
    assert isinstance(rows, SparseRows)
    rows, shares = largest_entries(rows, np.asarray(fishers.row_offsets), k), []
    for i in np.flatnonzero(fishers.norms > 0):
        start, stop = int(fishers.row_offsets[i]), int(fishers.row_offsets[i + 1])
        own = rows.part(start, stop)
        norm = np.linalg.norm(own.values) if fishers.kind == "diagonal" else np.linalg.norm(own.gram(0, stop - start))
        shares.append(float(norm) / float(fishers.norms[i]))
    return float(np.median(shares)) if shares else 1.0


def writing(header: dict[str, Any], n_columns: int, folder: Path | None = None) -> Timing:
    """What a byte of Fishers takes to be written as a shard, merged into the file and removed.

    Args:
        header: Of the Fishers, for :class:`npeff.fishers.shards.FisherWriter`.
        n_columns: Width of the rows in the probe.
        folder: Where the file will be.
    """
    n_rows = max(1, PROBE_BYTES // (4 * n_columns))
    values = np.random.default_rng(0).random((n_rows, n_columns), np.float32)
    block = FisherBlock(
        rows=DenseRows(values),
        row_counts=np.ones(n_rows, np.int64),
        norms=np.ones(n_rows, np.float32),
        logits=np.zeros((n_rows, 2), np.float32),
        labels=np.zeros(n_rows, np.int64),
        ids=np.arange(n_rows),
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        start = Timing.now()
        with FisherWriter(Path(scratch) / "probe.h5", header) as writer:
            writer.append(block, "probe")
            writer.finish()
        return (Timing.now() - start) * (1 / values.nbytes)
