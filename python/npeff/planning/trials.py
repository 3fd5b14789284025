"""Trials for a plan: run ``compute_fishers`` on the first batches, measure time and memory, and extrapolate.

With n examples, R rows, m parameters and C outputs a file holds ``8(n+1) + 4n + 4nC + 8n + 8n`` bytes of offsets,
norms, logits (of more than 1,024 classes 260n), labels and ids, and the rows: ``4·R·m`` exact, ``4·R·d`` sketched,
``8(R+1) + (4 + w)·E`` for E kept entries with indices of w = 4 bytes (8 beyond 2³¹ parameters); ``4·R²`` where only
inner products are kept.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.batches.batches import Batch
from npeff.batches.reading import read_batches
from npeff.decomposition.options import DENSE_RATE, POLISH_STEPS, SCATTER_RATE, SPARSE_RATE
from npeff.decomposition.subspace import DIMENSIONS, WHITENED_ROWS
from npeff.fishers.computation import compute_fishers
from npeff.fishers.fishers import Fishers
from npeff.fishers.options import Compression, GramOnly, Sketch, TopK
from npeff.fishers.rows import Kind, SparseRows
from npeff.models.devices import Peak, settled_bytes
from npeff.models.forward import OVER_CLASSES
from npeff.storage.writing import write_record

Array = npt.NDArray[Any]

TOP_KS = (1024, 8192, 65_536)
SKETCH_DS = (1024, 4096, 16_384)

EXACT_TRIAL_BYTES = 256 << 20
"""Exact rows of the first batches are computed for a trial only where they take no more than this."""

LONG_TRIAL = 5.0
"""Seconds of a trial from which on one trial stands for all sizes of its method."""

SKETCH_ERROR, TOP_K_ERROR = 0.1, 0.05
"""Errors of K up to which the components of exact rows came back (mean |cos| ≥ 0.99): see docs/sketch.md. Top-k needs
the smaller one: the entries that it leaves out are a bias, the error of a sketch is noise about the truth."""

ENOUGH_KEPT = 0.9
"""Share of the Fisher's norm from which on a larger k is not worth its bytes."""

STEPS_PER_ROOT = 280
"""Steps of a whole search per √r: searches that were measured took 220 to 400."""

SHARD_BYTES = 64 << 20
"""Bytes of Fishers that are held until a shard is written."""

PROBE_BYTES = 32 << 20
"""Bytes that the disk is timed with."""

GRAM_ROWS = 384
"""Rows whose inner products are compared with the exact ones."""


class _Watched(list[Any]):
    """Batches that note when each was asked for."""

    def __iter__(self) -> Iterator[Any]:
        self.asked: list[float] = []  # the first batch is looked at once before the work begins
        for batch in super().__iter__():
            self.asked.append(time.perf_counter())
            yield batch
        self.asked.append(time.perf_counter())


@dataclass(frozen=True)
class Trial:
    """One call of ``compute_fishers`` on the first batches.

    Attributes:
        fishers: Mapped from a temporary file.
        seconds: All of it.
        one_off: Seconds from the call to the end of the first batch, less those of a batch.
        per_example: Seconds of a later batch: loading, forward and backward passes, compression.
        working_bytes: Most memory held beyond what the process had before; finished rows are not counted.
    """

    fishers: Fishers
    seconds: float
    one_off: float
    per_example: float
    working_bytes: int

    def largest(self, k: int, n: int | None = None) -> tuple[SparseRows, Array]:
        """Return the first n examples' rows, with all but the k largest entries of each set to 0, and their offsets."""
        offsets = np.asarray(self.fishers.row_offsets)[: None if n is None else n + 1]
        rows = self.fishers.rows.part(0, int(offsets[-1]))
        indptr, indices, values = (rows.arrays()[f"rows/{name}"] for name in ("indptr", "indices", "values"))  # of TopK
        values = np.array(values)
        for start, stop in pairwise(indptr[offsets]):
            own = values[int(start) : int(stop)]
            if k < len(own):
                own[np.argpartition(np.abs(own), len(own) - k)[: len(own) - k]] = 0
        return SparseRows(indptr, indices, values, rows.n_columns), offsets

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
        sequence_size: Mean number of examples per sequence where examples are places; otherwise 1.
        before: Bytes that the process held before the first trial.
        one_off: Seconds, once per run: start, choice of rules, self-check.
        passes: ``(n,)`` int64 backward passes per example.
        pace: Seconds per operation of a matrix product.
        seconds_per_byte: Of writing to the disk.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loading: float,
        options: dict[str, Any],
        folder: Path,
        kind: Kind,
    ) -> None:
        """Run a small trial: it loads libraries and fills caches, once, as every real run does.

        Its low-rank Fishers have a row for every backward pass. Those of the diagonal kind take, without a limit on the
        classes, the reduced basis, which is the smallest.

        Args:
            model: The model.
            batches: The first batches; at least two separate a batch's seconds from those of the start.
            loading: Seconds to load one of them.
            options: Further arguments of ``compute_fishers``.
            folder: Where temporary files go.
            kind: The kind whose passes are counted.
        """
        self._model, self._batches, self._folder, self._options = model, batches, folder, options
        read = list(self.read(batches))
        self._sizes = [batch.n_examples for batch in read]
        self.batch_size = sum(self._sizes) / len(self._sizes)
        self.sequence_size = sum(self._sizes) / sum(batch.n_sequences for batch in read)
        self._loading = loading / self.batch_size
        self.before, self._loaded = settled_bytes(), 0
        self.of = cache(self._run)
        reduced = kind == "diagonal" and all(options.get(name) is None for name in ("min_prob", "max_classes"))
        first = self._run("low_rank", TopK(1024), **({"basis": "reduced"} if reduced else {}))
        self.one_off, self.passes = first.one_off, np.asarray(first.fishers.ranks)
        self._loaded = max(0, settled_bytes() - self.before)
        self.pace, self.seconds_per_byte = _seconds_per_operation(), _seconds_per_byte(folder)

    def read(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Iterate over batches as ``compute_fishers`` reads them."""
        places = self._options.get("likelihood", "categorical") in OVER_CLASSES
        return read_batches(data, torch.device("cpu"), self._options.get("forward") is not None, places)

    def _run(self, kind: Kind, compress: Compression | None, **changed: Any) -> Trial:
        """Try one way, with some options changed."""
        settled, watched = settled_bytes(), _Watched(self._batches)
        sizes, start = self._sizes, time.perf_counter()
        with Peak() as peak, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(TopK|Sketch)\(")  # the user did not choose these sizes
            fishers = compute_fishers(
                self._model,
                watched,
                kind=kind,
                compress=compress,
                out=self._folder / f"{len(list(self._folder.iterdir()))}.h5",
                progress=False,
                **(self._options | changed),
            )
        # asked[i]: when batch i was asked for; batch 0 before the rules are chosen, the others after a batch's work.
        first, later = watched.asked[1] - start, watched.asked[-1] - watched.asked[1]
        per_example = later / sum(sizes[1:]) if len(sizes) > 1 else first / sizes[0]
        held = peak.peak - settled + self._loaded - min(fishers.rows.nbytes, SHARD_BYTES)
        one_off = max(0.0, first - per_example * sizes[0])
        return Trial(fishers, time.perf_counter() - start, one_off, per_example + self._loading, max(0, held))


def _seconds_per_byte(folder: Path) -> float:
    """Time how long a byte takes to be written twice: to a shard, and to the file that the shards are merged into."""
    values = np.random.default_rng(0).random(PROBE_BYTES // 4, np.float32)
    start = time.perf_counter()
    for name in ("shard", "whole"):
        write_record(folder / f"probe {name}", "probe", {"values": values}, {})
    return (time.perf_counter() - start) / values.nbytes


def _seconds_per_operation() -> float:
    """Time one multiplication or addition in a float32 matrix product on this machine: the best of several."""
    a, took = torch.randn(256, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a.T
        took.append(time.perf_counter() - start)
    return min(took) / (2 * 256 * 256 * 2048)


# ---- what the trials foretell -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One way to keep the Fishers.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        compress: What is kept; None: everything.
        name: Its name in the table.
        disk_bytes: Of the file's arrays, and of the Fishers in memory where no file is written; merging the shards
            needs as much disk again. Exact for the ranks and entries seen.
        memory_bytes: Held while Fishers are written to a file, beyond the process with model and data.
        seconds: Expected, the start included.
        timed: The way whose trial gave the seconds and the memory.
        kept: ‖stored Fisher‖ / ‖Fisher‖, median over the trial's examples; None where it was not measured.
        gram_error: ``‖K̂ − K‖ / ‖K‖`` on the trial's examples; None where it was not measured.
        decompose_bytes: Memory of a decomposition whose rows, or their inner products K, stay in memory, whichever is
            less; None for the diagonal kind.
        decompose_seconds: Rough, right within a factor of about three: operations of a usual decomposition over the
            pace of a matrix product here; the data decide how many steps the search takes. None likewise.
    """

    kind: Kind
    compress: Compression | None
    name: str
    disk_bytes: int
    memory_bytes: int
    seconds: float
    timed: str
    kept: float | None
    gram_error: float | None
    decompose_bytes: int | None
    decompose_seconds: float | None

    @property
    def most_memory(self) -> int:
        """Bytes of memory that the Fishers or their decomposition hold, whichever is more."""
        return max(self.memory_bytes, self.decompose_bytes or 0)

    @property
    def loss(self) -> tuple[float, str]:
        """The loss in units of what is tolerable (more than 1: not faithful), and the measurement in words."""
        sketch = isinstance(self.compress, Sketch)
        if self.gram_error is not None:
            told = f"on the trial's examples inner products of rows are off by {self.gram_error:.3f} of their size"
            return self.gram_error / (SKETCH_ERROR if sketch else TOP_K_ERROR), told
        if isinstance(self.compress, Sketch):
            spread = (2 / self.compress.d) ** 0.5
            told = f"inner products of sketches have a standard deviation of at most {spread:.1%} of the norms"
            return spread / SKETCH_ERROR, told
        kept = self.kept or 0.0
        return (1 - kept) / (1 - ENOUGH_KEPT), f"it keeps {kept:.2f} of the Fisher's norm"


def choice_of(trials: Trials, main: Trial, compress: Compression | None, n: int, n_components: int) -> Choice:
    """Estimate what one way takes for n examples.

    Where the first trial was long, only it and one sketch are tried, and stand for the others of their method. It
    stands, too, for exact rows that are too large to try and for inner products alone.

    Args:
        trials: Calls on the first batches.
        main: That of the largest top-k, of the kind wanted.
        compress: The way.
        n: Examples.
        n_components: Of the decomposition.
    """
    kind, m, share = main.fishers.kind, main.fishers.n_parameters, n / len(main.fishers)
    exact_bytes, long = 4 * main.fishers.rows.n_rows * m, main.seconds > LONG_TRIAL
    exact = trials.of(kind, None) if exact_bytes <= EXACT_TRIAL_BYTES else None
    R = max(1, round(main.fishers.rows.n_rows * share))
    trial, timed, error = main, f"top-k {TOP_KS[-1]:,}", None
    if isinstance(compress, TopK):
        name, kept, entries = f"top-k {compress.k:,}", main.kept(compress.k), round(main.entries(compress.k) * share)
        rows = 8 * (R + 1) + (8 if m <= np.iinfo(np.int32).max else 12) * entries
        error = None if exact is None else main.error_of_gram(exact, compress.k)
        trial, timed = (main, timed) if long else (trials.of(kind, compress), name)
    elif isinstance(compress, Sketch):
        tried = Sketch(SKETCH_DS[1]) if long else compress
        trial, timed = trials.of(kind, tried), f"sketch {tried.d:,}"
        name, kept, entries, rows = f"sketch {compress.d:,}", None, R * compress.d, 4 * R * compress.d
        error = None if exact is None or tried != compress else trial.error_of_gram(exact)
    elif isinstance(compress, GramOnly):
        name, kept, entries, rows, error = "Gram only", 1.0, 0, 4 * R * R, 0.0
    else:
        name, kept, entries, rows, error = "exact", 1.0, R * m, 4 * R * m, 0.0
        trial, timed = (main, timed) if exact is None else (exact, name)
    total = rows + 8 * (n + 1) + n * (4 + 8 + 8) + round(main.fishers.logits.nbytes * share)
    held = rows if isinstance(compress, GramOnly) else min(rows, SHARD_BYTES + rows / n * trials.batch_size)
    solving, operations = _decomposition(compress, n, R, entries, rows, n_components, m)
    low_rank = kind == "low_rank"
    return Choice(
        kind=kind,
        compress=compress,
        name=name,
        disk_bytes=total,
        memory_bytes=trial.working_bytes + int(held),
        seconds=trials.one_off + trial.per_example * n + trials.seconds_per_byte * total,
        timed=timed,
        kept=kept,
        gram_error=error if low_rank else None,
        decompose_bytes=solving if low_rank else None,
        decompose_seconds=operations * trials.pace if low_rank else None,
    )


def _decomposition(
    compress: Compression | None, n: int, R: int, entries: int, stored: int, r: int, m: int
) -> tuple[int, float]:
    """Count bytes and operations of a decomposition of R low-rank rows of n examples into r components.

    It holds P, W and copies of them, and the rows' coordinates in a subspace; then K, or the rows, those of top-k with
    their transpose, and a basis of the subspace over their columns. K is built once; a subspace and a polish take
    ``products`` products of vectors with K or the rows; the search's steps take place in the subspace.
    """
    r, sparse = min(r, R), isinstance(compress, TopK)
    most, dimensions, width = r + r // 2 + 8, max(DIMENSIONS, 4 * r), max(1, min(m, entries))
    width = compress.d if isinstance(compress, Sketch) else width
    held, counting = (2 * stored, stored + 8 * m) if sparse else (stored, 0)  # columns are counted first
    state = 24 * most * (R + n) + dimensions * (4 * R + max(4 * R, 16 * min(R, WHITENED_ROWS)))
    products = 5 * dimensions + 2 * POLISH_STEPS * r
    scattered = entries**2 / width * DENSE_RATE / SCATTER_RATE  # operations of K, by the pairs of entries in a column
    with_rows = 2.0 * entries * products * (DENSE_RATE / SPARSE_RATE if sparse else 1) + 4.0 * width * dimensions**2
    with_k = min(float(R**2 * width), scattered if sparse else math.inf) + 2.0 * R**2 * products
    search = STEPS_PER_ROOT * r**0.5 * (4.0 * R * dimensions * r + 10.0 * n * r**2)
    if isinstance(compress, GramOnly):
        return state + stored, 2.0 * R**2 * products + search
    least = min(4 * R**2 + held + 8 * r * width, held + max(8 * dimensions, 4 * dimensions + 24 * most) * width)
    return max(counting, state + least), min(with_k, with_rows) + search
