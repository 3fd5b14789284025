"""How the cost of the low-rank search grows with examples, parameters, rank and components; its floor.

Rows are random and sparse: what a step costs does not depend on their values. Three costs are measured: finding the
subspace, a step of the search in it, and a step of the polish over the rows. Used by ``low_rank_scale.py``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from npeff.decomposition.kinds import LowRank
from npeff.decomposition.spaces import RowSpace
from npeff.decomposition.subspace import DIMENSIONS, find_subspace
from npeff.fishers.rows import DenseRows, SparseRows
from npeff.fishers.scaling import ScaledRows


@dataclass(frozen=True)
class Size:
    """Examples, parameters, rows an example, entries an example, components."""

    n: int = 4000
    m: int = 114_314
    rank: int = 3
    k: int = 1024
    r: int = 32


SWEEPS: dict[str, list[Any]] = {
    "n": [2000, 4000, 8000, 16_000],
    "m": [30_000, 114_314, 450_000, 1_800_000],
    "rank": [1, 2, 4, 8],
    "r": [8, 16, 32, 64],
}


def random_rows(size: Size) -> SparseRows:
    """``n·rank`` rows with k/rank entries each, in columns that are not equally popular, as top-k leaves them."""
    rng, R, per = np.random.default_rng(0), size.n * size.rank, size.k // size.rank
    columns = np.minimum((size.m * rng.random((R, per)) ** 3).astype(np.int32), size.m - 1)
    columns.sort(axis=1)
    values = rng.standard_normal((R, per), np.float32) / np.float32(per**0.5)
    return SparseRows(np.arange(R + 1, dtype=np.int64) * per, columns.reshape(-1), values.reshape(-1), size.m)


def timed(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of the processor."""
    run()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return statistics.median(found)


def costs(size: Size) -> tuple[float, float, float]:
    """Seconds to find the subspace, of a search step, of a polish step."""
    rows, offsets = random_rows(size), np.arange(size.n + 1, dtype=np.int64) * size.rank
    scaled = ScaledRows(rows, offsets, None, np.ones(size.n), None)
    generator = torch.Generator().manual_seed(0)
    space = RowSpace(rows)
    began = time.process_time()
    # No random subspace holds random rows: asking for no energy makes it the one of the first size, as real rows do.
    subspace = find_subspace(space, 1e-9, size.r, generator)
    finding = time.process_time() - began
    assert subspace is not None
    fine = LowRank(space, scaled)
    inner = DenseRows(subspace.rows.numpy())
    coarse = LowRank(RowSpace(inner), replace(scaled, rows=inner))
    state = coarse.start(size.r, generator)
    search = timed(lambda: coarse.step(state))
    lifted = fine.from_vectors(subspace.to_full_space(state.coords), state.W)
    return finding, search, timed(lambda: fine.step(lifted), 3)


def machine_rates() -> tuple[float, float]:
    """Operations per second of a float32 product of this shape, bytes per second of a pass over memory; one core."""
    a, b = torch.randn(12_000, 256), torch.randn(256, 32)
    product = 2 * 12_000 * 256 * 32 / timed(lambda: a @ b, 15)
    big = torch.randn(64 << 20)
    return product, big.nbytes / timed(lambda: big.sum(), 5)


def floors(size: Size, rates: tuple[float, float]) -> tuple[float, float, float]:
    """Least seconds of each cost: operations over the product's rate, or bytes over the pass's, whichever is more."""
    R, d, r, entries = (
        size.n * size.rank,
        max(DIMENSIONS, 4 * size.r),
        size.r,
        size.n * (size.k // size.rank) * size.rank,
    )
    small = 2 * R * r**2 + 10 * size.n * r**2
    # Finding the subspace: five products of the rows with d vectors, an orthonormal basis of their span, turned once.
    operations = (
        10 * entries * d + 8 * R * d**2 + 2 * size.m * d**2,
        4 * R * d * r + small,
        4 * entries * r + small,
    )
    moved = (5 * (8 * entries + 4 * size.m * d), 2 * 4 * R * d, 2 * (8 * entries + 4 * size.m * r))
    return tuple(max(o / rates[0], b / rates[1]) for o, b in zip(operations, moved, strict=True))  # type: ignore[return-value]


def table(args: Any) -> list[str]:
    rates = machine_rates()
    lines = [
        f"Measured on this core: {rates[0] / 1e9:.0f} GFLOP/s in a product of 12,000 × 256 with 256 × 32, "
        f"{rates[1] / 1e9:.1f} GB/s in a pass over memory. Random sparse rows; unless varied: n = {Size.n:,}, "
        f"m = {Size.m:,}, rank {Size.rank}, {Size.k} entries an example, r = {Size.r}. “× floor”: over the larger of "
        "operations at that product's rate and bytes at that pass's.",
        "",
        "| varied | value | find subspace (s) | × floor | search step (ms) | × floor | polish step (ms) | × floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    exponents = ["", "| exponent of | find the subspace | search step | polish step |", "|---|---|---|---|"]
    for name, values in SWEEPS.items():
        points = []
        for value in values:
            size = replace(Size(), **{name: value})
            point, least = costs(size), floors(size, rates)
            points.append(point)
            over = [a / b for a, b in zip(point, least, strict=True)]
            lines.append(
                f"| {name} | {value:,} | {point[0]:.2f} | {over[0]:.1f} | {1e3 * point[1]:.1f} | {over[1]:.1f} | "
                f"{1e3 * point[2]:.0f} | {over[2]:.1f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
        slopes = [np.polyfit(np.log(values), np.log([p[i] for p in points]), 1)[0] for i in range(3)]
        exponents.append(f"| {name} | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")
    return lines + exponents
