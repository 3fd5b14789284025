"""The ways to keep Fishers, each with what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from npeff.fishers.fishers import Fishers
from npeff.fishers.options import Compression, GramOnly, Sketch, TopK
from npeff.fishers.rows import Kind
from npeff.planning.peak import settled_bytes
from npeff.planning.quality import gram_error
from npeff.planning.sizes import example_bytes, kept_entries, name_of, row_bytes
from npeff.planning.solving import Search, Solving, reckon, tried_search
from npeff.planning.trial import SHARD_BYTES, Timing, Trial, run_trial

TOP_KS = (1024, 8192, 65_536)
SKETCH_DS = (1024, 4096, 16_384)

EXACT_TRIAL_BYTES = 256 << 20
"""Exact rows of the first batches are computed for a trial where they take no more than this."""

LONG_TRIAL = 5.0
"""Seconds of a trial from which on one trial stands for all sizes of its method."""


@dataclass(frozen=True)
class Choice:
    """One way to keep the Fishers.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        compress: What is kept; None: everything.
        name: As the table calls it.
        disk_bytes: Of the file's arrays; merging needs as much again meanwhile. Exact for the ranks and entries seen.
        memory_bytes: Held while Fishers are written to a file, beyond the process with model and data.
        in_memory_bytes: Of the Fishers where no file is written.
        seconds: Expected, by the wall clock, the one-off part included.
        cpu_seconds: Likewise, of the processor.
        timed: The option whose real call was timed.
        kept: ‖stored Fisher‖ / ‖Fisher‖, median over the trial's examples; None where it was not measured.
        gram_error: ``‖K̂ − K‖ / ‖K‖`` on the trial's examples; None where it was not measured.
        decomposition: What its decomposition takes; None for the diagonal kind.
    """

    kind: Kind
    compress: Compression | None
    name: str
    disk_bytes: int
    memory_bytes: int
    in_memory_bytes: int
    seconds: float
    cpu_seconds: float
    timed: str
    kept: float | None
    gram_error: float | None
    decomposition: Solving | None


def ways(kind: Kind, n_parameters: int, most_rows: int) -> list[Compression | None]:
    """The options worth a line: none that keeps as much as all of it."""
    most = n_parameters * (most_rows if kind == "low_rank" else 1)
    found: list[Compression | None] = [None]
    if kind == "low_rank":
        found.append(GramOnly())
    found += [TopK(k) for k in TOP_KS if k < most]
    if kind == "low_rank":
        found += [Sketch(d) for d in SKETCH_DS if d < n_parameters]
    return found


class Trials:
    """Real calls on the first batches, each made once, when it is asked for.

    Args:
        model: The model.
        batches: The first batches.
        loading: Seconds to load one.
        kind: Of the first trial.
        options: Further arguments of ``compute_fishers``.
        folder: Where temporary files go.
        n_components: Of the decomposition that will follow.

    Attributes:
        search: How a search on the Fishers of the largest top-k went; once that trial was made.
        before: Bytes that the process held before the first trial.
        one_off: Seconds, once per run: start, choice of rules, self-check.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        loading: Timing,
        kind: Kind,
        options: dict[str, Any],
        folder: Path,
        n_components: int,
    ) -> None:
        self.search, self._n_components = Search(), n_components
        self._model, self._batches, self._loading = model, batches, loading
        self._options, self._folder = options, folder
        self.before = settled_bytes()
        # A small run first: libraries are loaded and caches filled once, which belongs to every real run.
        warm_up = run_trial(model, batches[:2], loading, kind, TopK(TOP_KS[0]), options, folder=folder)
        self.one_off, self._loaded = warm_up.one_off, max(0, settled_bytes() - self.before)
        self._done: dict[tuple[Kind, Compression | None], Trial] = {}

    def of(self, kind: Kind, compress: Compression | None) -> Trial:
        """The trial of one way."""
        key = (kind, compress)
        if key not in self._done:
            ks = TOP_KS if isinstance(compress, TopK) else ()
            examine = self._try_search if key == ("low_rank", TopK(TOP_KS[-1])) else None
            self._done[key] = run_trial(
                self._model, self._batches, self._loading, kind, compress, self._options, ks, self._folder,
                self._loaded, examine,
            )  # fmt: skip
        return self._done[key]

    def _try_search(self, fishers: Fishers) -> None:
        self.search = tried_search(fishers, self._n_components)

    def like(self, kind: Kind, compress: Compression | None) -> tuple[Compression | None, Trial]:
        """The trial that stands for a way, and whose it is: its own, or where trials are long one of its method."""
        largest = TopK(TOP_KS[-1])
        first = self.of(kind, largest)
        exact_bytes = 4 * int(first.ranks.sum()) * first.n_parameters
        if (compress is None and exact_bytes > EXACT_TRIAL_BYTES) or isinstance(compress, GramOnly):
            return largest, first
        if self._seconds(first) > LONG_TRIAL:
            compress = largest if isinstance(compress, TopK) else compress
            compress = Sketch(SKETCH_DS[1]) if isinstance(compress, Sketch) else compress
        return compress, self.of(kind, compress)

    def gram_error(self, compress: Compression | None) -> float | None:
        """The error of K in low-rank Fishers kept in a way; None where exact rows, or this way, were not tried."""
        if compress is None or isinstance(compress, GramOnly):
            return 0.0
        exact, found = self.like("low_rank", None), self.like("low_rank", compress)
        same = found[0] == compress or (isinstance(compress, TopK) and isinstance(found[0], TopK))
        if exact[0] is not None or not same:
            return None
        key = compress.k if isinstance(compress, TopK) else None
        return gram_error(found[1].grams[key], exact[1].grams[None]) if key in found[1].grams else None

    def _seconds(self, trial: Trial) -> float:
        return trial.one_off.cpu + trial.per_example.cpu * len(trial.ranks)


def weigh(
    trials: Trials,
    kind: Kind,
    compress: Compression | None,
    n_examples: int,
    to_disk: Timing,
    solving: tuple[int, int, tuple[Timing, Timing]] | None,
) -> Choice:
    """What one way takes for so many examples.

    Args:
        trials: Real calls.
        kind: Form of the Fishers.
        compress: What is kept.
        n_examples: Examples.
        to_disk: Of a byte.
        solving: Components, memory allowed and rates of the decomposition; None: do not reckon with it.
    """
    main = trials.of(kind, TopK(TOP_KS[-1]))
    stand_in, trial = trials.like(kind, compress)
    m, share = main.n_parameters, n_examples / len(main.ranks)
    n_rows = max(1, round(int(main.ranks.sum()) * share))
    entries = _entries(main, compress, n_rows, share)
    rows = row_bytes(compress, n_rows, m, entries)
    total = rows + example_bytes(n_examples, main.n_outputs)
    took = trials.one_off + trial.per_example * n_examples + to_disk * total
    block = rows / n_examples * trial.batch_size
    held = rows if isinstance(compress, GramOnly) else min(rows, SHARD_BYTES + block)
    kept = main.kept.get(compress.k) if isinstance(compress, TopK) else None
    decomposition = None
    if solving is not None and kind == "low_rank":
        r, ceiling, rates = solving
        width = compress.d if isinstance(compress, Sketch) else min(m, entries)
        if isinstance(compress, TopK) and compress.k in main.columns:
            width = min(width, _columns(main.columns[compress.k], share))
        decomposition = reckon(
            compress, n_examples, n_rows, width, entries, rows, min(r, n_rows), ceiling, rates, trials.search, m
        )
    return Choice(
        kind=kind,
        compress=compress,
        name=name_of(compress),
        disk_bytes=total,
        memory_bytes=trial.working_bytes + int(held),
        in_memory_bytes=total,
        seconds=took.wall,
        cpu_seconds=took.cpu,
        timed=name_of(stand_in),
        kept=1.0 if compress is None or isinstance(compress, GramOnly) else kept,
        gram_error=trials.gram_error(compress) if kind == "low_rank" else None,
        decomposition=decomposition,
    )


def _columns(kept: tuple[int, int], share: float) -> int:
    """Parameters that all examples keep: as many more as the trial's second half added to its first (Heaps' law)."""
    half, whole = kept
    return round(whole * share ** math.log2(max(1.0, whole / max(1, half))))


def _entries(trial: Trial, compress: Compression | None, n_rows: int, share: float) -> int:
    if isinstance(compress, TopK):
        return round(kept_entries(trial.counts, compress.k) * share)
    return n_rows * (compress.d if isinstance(compress, Sketch) else trial.n_parameters)
