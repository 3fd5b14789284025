"""What the decomposition of Fishers that do not exist yet will take.

Bytes follow from the shapes, as :func:`npeff.decomposition.space_choice.choose_space` counts them. Seconds are those of
real steps on random rows of the right shape, times the number of steps: half way (in the logarithm) between what a
search on the trial's own Fishers took and what searches have taken elsewhere. Few examples say little about many, so
the seconds are a guide and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from npeff.decomposition.low_rank import LowRank
from npeff.decomposition.space_choice import DENSE_RATE, GRAM_BYTES, POLISH_STEPS, SCATTER_RATE, SPARSE_RATE
from npeff.decomposition.spaces import RowSpace
from npeff.decomposition.subspace import DIMENSIONS
from npeff.fishers.compress import Compression, GramOnly, TopK
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows
from npeff.fishers.scaling import ScaledRows
from npeff.kernels.threads import threads_for
from npeff.planning.trial import Timing

STEPS_PER_ROOT = 280
"""Steps of a whole search (three starts, up to forty replacements) per √r: measured searches took 220 to 400."""

SEARCH_ROWS = 1200
"""Most rows of the trial that a search is tried on."""

PROBE_ROWS = 20_000
"""Most rows that steps are timed on; beyond, their time grows with the rows."""


@dataclass(frozen=True)
class Solving:
    """What a decomposition takes.

    Attributes:
        n_components: r.
        space: ``"gram"``, ``"rows"`` or ``"streamed"``.
        memory_bytes: Held by the decomposition at most.
        seconds: Expected, by the wall clock: a guide.
        cpu_seconds: Likewise, of the processor.
        reason: Why that space.
    """

    n_components: int
    space: str
    memory_bytes: int
    seconds: float
    cpu_seconds: float
    reason: str


def needed_bytes(
    compress: Compression | None, n_examples: int, n_rows: int, width: int, stored: int, r: int, n_parameters: int = 0
) -> dict[str, int]:
    """Bytes that a decomposition takes in each space that could serve it.

    Args:
        compress: How the rows are stored.
        n_examples: Examples.
        n_rows: Rows, R.
        width: Columns that hold entries.
        stored: Bytes of the rows as stored.
        r: Components.
        n_parameters: Of the model: where entries are sparse, a number for each is held while columns are counted.
    """
    most = r + r // 2 + 8  # a move adds up to r/4·√2 components before some are dropped
    state = 4 * most * 6 * (n_rows + n_examples)
    dimensions = max(DIMENSIONS, 4 * r)
    subspace = 16 * n_rows * dimensions
    # Over the rows: the subspace's basis, twice while it is made; later the basis, and coordinates in steps.
    wide = max(8 * dimensions, 4 * dimensions + 24 * most) * width
    if isinstance(compress, GramOnly):
        return {"gram": state + subspace + 4 * n_rows**2}
    held = stored * (2 if isinstance(compress, TopK) else 1)  # sparse rows and their transpose
    counting = stored + 8 * n_parameters if isinstance(compress, TopK) else 0
    return {
        "gram": max(counting, state + subspace + 4 * n_rows**2 + held + 8 * r * width),
        "rows": max(counting, state + subspace + wide + held),
        "streamed": max(counting, state + subspace + wide + (64 << 20)),
    }


def choose(
    compress: Compression | None, needs: dict[str, int], work: dict[str, float], n_rows: int, ceiling: int
) -> tuple[str, str]:
    """The space that ``space="auto"`` will most likely take, and why.

    Args:
        compress: How the rows are stored.
        needs: :func:`needed_bytes`.
        work: :func:`operations`.
        n_rows: Rows.
        ceiling: Memory allowed.
    """
    if "rows" not in needs:
        return "gram", "inner products are all there is"
    gram_fits, rows_fit = 4 * n_rows**2 <= GRAM_BYTES and needs["gram"] <= ceiling, needs["rows"] <= ceiling
    if gram_fits and (not rows_fit or work["gram"] < work["rows"]):
        return "gram", f"K of {n_rows:,} rows fits into memory" + (" and takes less time" if rows_fit else "")
    if rows_fit:
        return "rows", "the rows take less time than K" if gram_fits else "K does not fit into memory, the rows do"
    return "streamed", "neither K nor the rows fit into memory: they stream from disk"


def operations(compress: Compression | None, n_rows: int, width: int, entries: int, r: int) -> dict[str, float]:
    """What precedes and follows the search in its subspace, in operations of dense products, per space.

    Args:
        compress: How the rows are stored.
        n_rows: Rows.
        width: Columns that hold entries.
        entries: Entries stored.
        r: Components.
    """
    dimensions = max(DIMENSIONS, 4 * r)
    products, turning = 5 * dimensions + 2 * POLISH_STEPS * r, 4.0 * width * dimensions**2
    building = float(n_rows**2 * width)
    if isinstance(compress, GramOnly):
        building = 0.0
    elif isinstance(compress, TopK):
        building = min(building, entries**2 / max(1, width) * DENSE_RATE / SCATTER_RATE)
    rows = 2.0 * entries * products * (DENSE_RATE / SPARSE_RATE if isinstance(compress, TopK) else 1.0)
    return {"gram": building + 2.0 * n_rows**2 * products, "rows": rows + turning, "streamed": rows + turning}


def step_seconds(n_examples: int, n_rows: int, r: int) -> Timing:
    """Seconds of one step of the search: real steps on random rows in a subspace of the usual width."""
    n = max(2, min(n_examples, PROBE_ROWS * n_examples // max(1, n_rows)))
    per = max(1, round(n_rows / max(1, n_examples)))
    rng = np.random.default_rng(0)
    d = max(DIMENSIONS, 4 * r)
    rows = DenseRows(rng.standard_normal((n * per, d), np.float32))
    offsets = np.arange(n + 1, dtype=np.int64) * per
    scaled = ScaledRows(rows, offsets, None, np.ones(n), None)
    space = RowSpace(rows)
    form = LowRank(space, scaled)
    with threads_for(space.step_bytes):
        state = form.start(min(r, n * per), torch.Generator().manual_seed(0))
        return _timed(lambda: form.step(state)) * (n_examples / n)


@dataclass(frozen=True)
class Search:
    """How searches go.

    Attributes:
        steps_per_root: Steps per √r.
        overhead: What a step takes beside its arithmetic: replacements, and the time of small calls.
    """

    steps_per_root: float = STEPS_PER_ROOT
    overhead: Timing = field(default_factory=lambda: Timing(0.0, 0.0))


def tried_search(fishers: Fishers, n_components: int) -> Search:
    """A decomposition of the first examples of a trial, and what it says of a larger one.

    Args:
        fishers: Low-rank ones.
        n_components: Of the larger one; there are fewer here where there are less than four examples for each.
    """
    from npeff.decomposition.decompose import decompose

    offsets = np.asarray(fishers.row_offsets)
    n = int(np.searchsorted(offsets, SEARCH_ROWS, side="right")) - 1
    r = min(n_components, n // 4)
    if r < 2 or not (fishers.norms[:n] > 0).any():
        return Search()
    start = Timing.now()
    found = decompose(fishers[:n], r, progress=False)
    seconds, steps = found.seconds, max(1, found.provenance["course"]["iterations"])
    share = seconds["solving"] / max(1e-9, seconds["building"] + seconds["solving"])
    per_step = (Timing.now() - start) * (share / steps)
    overhead = per_step - step_seconds(n, int(offsets[n]), r)
    return Search((STEPS_PER_ROOT * steps / r**0.5) ** 0.5, overhead)


def _timed(run: Callable[[], object], repeats: int = 3) -> Timing:
    run()
    start = Timing.now()
    for _ in range(repeats):
        run()
    return (Timing.now() - start) * (1 / repeats)


def dense_operation() -> Timing:
    """Seconds of one operation of a float32 matrix product here."""
    a = torch.randn(512, 2048)
    return _timed(lambda: a @ a.T) * (1 / (2 * 512 * 512 * 2048))


def reckon(
    compress: Compression | None,
    n_examples: int,
    n_rows: int,
    width: int,
    entries: int,
    stored: int,
    r: int,
    ceiling: int,
    rates: tuple[Timing, Timing],
    search: Search,
    n_parameters: int,
) -> Solving:
    """Memory and expected time of one decomposition of low-rank Fishers.

    Args:
        compress: How the rows are stored.
        n_examples: Examples.
        n_rows: Rows.
        width: Columns that hold entries.
        entries: Entries stored.
        stored: Bytes of the rows.
        r: Components.
        ceiling: Memory allowed.
        rates: :func:`dense_operation`, and :func:`step_seconds` for these examples and r.
        search: :func:`tried_search`.
        n_parameters: Selected parameters of the model.
    """
    needs = needed_bytes(compress, n_examples, n_rows, width, stored, r, n_parameters)
    work = operations(compress, n_rows, width, entries, r)
    space, reason = choose(compress, needs, work, n_rows, ceiling)
    operation, step = rates
    took = operation * work[space] + (step + search.overhead) * (search.steps_per_root * r**0.5)
    return Solving(r, space, needs[space], took.wall, took.cpu, reason)
