"""Trials for a plan: ``compute_fishers`` on the first batches, with clocks and memory watched, and what it kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.batches.batches import read_batches
from npeff.fishers.computation import compute_fishers
from npeff.fishers.fishers import FisherBlock, Fishers
from npeff.fishers.options import Compression, TopK
from npeff.fishers.rows import DenseRows, Kind, SparseRows
from npeff.fishers.shards import FisherWriter
from npeff.models.forward import OVER_CLASSES
from npeff.models.memory import Peak, settled_bytes

Array = npt.NDArray[Any]

SHARD_BYTES = 64 << 20
"""Bytes of Fishers that are held until a shard is written."""

PROBE_BYTES = 32 << 20
"""Bytes that the disk is timed with."""

GRAM_ROWS = 384
"""Rows whose inner products are compared with the exact ones."""


def clock() -> Array:
    """Read the clocks: ``(2,)`` float64 seconds, of the wall and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


class _Watched(list[Any]):
    """Batches that note when each was asked for."""

    def __iter__(self) -> Iterator[Any]:
        self.asked: list[Array] = []  # the first batch is looked at once before the work begins
        for batch in super().__iter__():
            self.asked.append(clock())
            yield batch
        self.asked.append(clock())


@dataclass(frozen=True)
class Trial:
    """One call of ``compute_fishers`` on the first batches.

    Attributes:
        fishers: Mapped from a temporary file.
        seconds: All of it, of the processor.
        one_off: Seconds from the call to the end of the first batch, less those of a batch.
        per_example: Seconds of a later batch: loading, forward and backward passes, compression.
        working_bytes: Most memory held beyond what the process had before; finished rows are not counted.
    """

    fishers: Fishers
    seconds: float
    one_off: Array
    per_example: Array
    working_bytes: int

    def largest(self, k: int, n: int | None = None) -> tuple[SparseRows, Array]:
        """Return the first n examples' rows, with all but the k largest entries of each set to 0, and their offsets."""
        offsets, rows = np.asarray(self.fishers.row_offsets)[: None if n is None else n + 1], self.fishers.rows
        assert isinstance(rows, SparseRows), "a trial of TopK"
        rows = rows.part(0, int(offsets[-1]))
        values = np.array(rows.values)
        for start, stop in pairwise(rows.indptr[offsets]):
            own = values[int(start) : int(stop)]
            if k < len(own):
                own[np.argpartition(np.abs(own), len(own) - k)[: len(own) - k]] = 0
        return SparseRows(rows.indptr, rows.indices, values, rows.n_columns), offsets

    def entries(self, k: int) -> int:
        """Count the entries that ``TopK(k)`` keeps: exact zeros are never kept."""
        return int(np.count_nonzero(self.largest(k)[0].values))

    def kept(self, k: int) -> float:
        """Return the median over examples of ‖F restricted to its k largest entries‖ / ‖F‖; 1 where none is left."""
        (rows, offsets), norms, shares = self.largest(k), self.fishers.norms, []
        for i in np.flatnonzero(norms > 0):
            start, stop = int(offsets[i]), int(offsets[i + 1])
            own = rows.part(start, stop).values if self.fishers.kind == "diagonal" else rows.gram(start, stop)
            shares.append(float(np.linalg.norm(own)) / float(norms[i]))
        return float(np.median(shares)) if shares else 1.0

    def error_of_gram(self, exact: Trial, k: int | None = None) -> float | None:
        """Return ``‖K̂ − K‖ / ‖K‖`` of the first examples, beside exact rows; None where nothing compares.

        Args:
            exact: The trial of exact rows.
            k: Only the k largest entries of each example.
        """
        K, found = exact._unit_gram(), self._unit_gram(k)
        size = float(np.linalg.norm(K))
        return float(np.linalg.norm(found - K)) / size if found.shape == K.shape and size > 0 else None

    def _unit_gram(self, k: int | None = None) -> Array:
        """Return inner products ``(R, R)`` of the first R ≤ GRAM_ROWS rows, scaled to Fishers of norm 1."""
        n = max(1, int(np.searchsorted(np.asarray(self.fishers.row_offsets), GRAM_ROWS, side="right")) - 1)
        offsets = np.asarray(self.fishers.row_offsets)[: n + 1]
        R = int(offsets[-1])
        K = (self.fishers.rows if k is None else self.largest(k, n)[0]).gram(0, R)
        scale = np.zeros(R)
        for start, stop in pairwise(offsets):
            norm = np.linalg.norm(K[start:stop, start:stop])
            scale[start:stop] = norm**-0.5 if norm > 0 else 0.0
        return np.asarray(K * scale * scale[:, None])


class Trials:
    """Calls of ``compute_fishers`` on the first batches; each is made once, when it is asked for.

    Attributes:
        batch_size: Mean number of examples per batch.
        before: Bytes that the process held before the first trial.
        one_off: Seconds, once per run: start, choice of rules, self-check.
        pace: Seconds per operation of a matrix product.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], loading: Array, options: dict[str, Any], folder: Path
    ) -> None:
        """Run a small trial: it loads libraries and fills caches, once, as every real run does.

        Args:
            model: The model.
            batches: The first batches; at least two separate a batch's seconds from those of the start.
            loading: Seconds to load one of them.
            options: Further arguments of ``compute_fishers``.
            folder: Where temporary files go.
        """
        self._model, self._batches, self._folder, self._options = model, batches, folder, options
        any_layout = options.get("forward") is not None
        places = options.get("likelihood", "categorical") in OVER_CLASSES
        self._sizes = [batch.n_examples for batch in read_batches(batches, torch.device("cpu"), any_layout, places)]
        self.batch_size = sum(self._sizes) / len(self._sizes)
        self._loading = loading / self.batch_size
        self.before, self._loaded = settled_bytes(), 0
        self.of = cache(self._run)
        self.one_off = self._run("low_rank", TopK(1024), 2).one_off
        self._loaded = max(0, settled_bytes() - self.before)
        self.pace = _seconds_per_operation()

    def passes_of_diagonal(self) -> Array:
        """Count the backward passes per example of diagonal Fishers: ``(n,)`` int64, the rows of low-rank ones.

        Without a limit on the classes they take the reduced basis, which is the smallest.
        """
        limited = any(self._options.get(name) is not None for name in ("min_prob", "max_classes"))
        changed = {} if limited else {"basis": "reduced"}
        return np.asarray(self._run("low_rank", TopK(1024), None, changed).fishers.ranks)

    def _run(
        self, kind: Kind, compress: Compression | None, count: int | None = None, changed: dict[str, Any] | None = None
    ) -> Trial:
        """Try one way on the first ``count`` batches, with some options changed."""
        settled, watched = settled_bytes(), _Watched(self._batches[:count])
        sizes, start = self._sizes[:count], clock()
        with Peak() as peak, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(TopK|Sketch)\(")  # the user did not choose these sizes
            fishers = compute_fishers(
                self._model,
                watched,
                kind=kind,
                compress=compress,
                out=self._folder / f"{len(list(self._folder.iterdir()))}.h5",
                progress=False,
                **(self._options | (changed or {})),
            )
        # asked[i]: when batch i was asked for; batch 0 before the rules are chosen, the others after a batch's work.
        first, later = watched.asked[1] - start, watched.asked[-1] - watched.asked[1]
        per_example = later / sum(sizes[1:]) if len(sizes) > 1 else first / sizes[0]
        held = peak.peak - settled + self._loaded - min(fishers.rows.nbytes, SHARD_BYTES)
        one_off = np.maximum(0, first - per_example * sizes[0])
        return Trial(fishers, float((clock() - start)[1]), one_off, per_example + self._loading, max(0, held))


def write_seconds(like: Fishers, folder: Path) -> Array:
    """Time how long a byte of Fishers takes to be written as a shard, merged into the file and removed.

    Args:
        like: Fishers with the parameters and options of the probe.
        folder: Where.
    """
    n = max(1, PROBE_BYTES // (4 * like.n_parameters))
    values = np.random.default_rng(0).random((n, like.n_parameters), np.float32)
    ones, ids = np.ones(n, np.int64), np.arange(n)
    block = FisherBlock(DenseRows(values), ones, np.ones(n, np.float32), np.zeros((n, 2), np.float32), ones, ids)
    header = {"kind": like.kind, "parameters": like.parameters.to_json(), "provenance": like.provenance}
    start = clock()
    with FisherWriter(folder / "probe.h5", header) as writer:
        writer.append(block, "probe")
        writer.finish()
    return (clock() - start) / values.nbytes


def _seconds_per_operation() -> float:
    """Time one multiplication or addition in a float32 matrix product on this machine: the best of several."""
    a, took = torch.randn(256, 2048), []
    for _ in range(5):
        start = clock()
        a @ a.T
        took.append(float((clock() - start)[0]))
    return min(took) / (2 * 256 * 256 * 2048)
