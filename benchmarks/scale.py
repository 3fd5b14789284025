"""The measured points of docs/scale: a step's seconds, memory and traffic as the rows grow, and over two processes.

Rows are random, as a sketch would leave them: the cost of a step does not depend on their values. Seconds are those of
the processor, so that two processes on one core compare with one. Writes ``results/scale.md``.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 3000 30000 --width 1024 --components 64
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.decomposition.kinds import LowRank
from npeff.decomposition.processes import LOCAL, Processes
from npeff.decomposition.spaces import RowSpace
from npeff.fishers.rows import DenseRows
from npeff.fishers.scaling import ScaledRows
from npeff.models.devices import Peak

RANK = 3
STEPS = 3


def rows_of(first: int, count: int, width: int) -> np.ndarray:
    """Rows ``first … first + count − 1`` of a matrix that does not depend on who asks."""
    rows = np.empty((count, width), np.float32)
    for block in range(first // 1000, -(-(first + count) // 1000)):
        drawn = np.random.default_rng(block).standard_normal((1000, width), np.float32) / np.float32(width**0.5)
        lo, hi = max(first, 1000 * block), min(first + count, 1000 * (block + 1))
        rows[lo - first : hi - first] = drawn[lo - 1000 * block : hi - 1000 * block]
    return rows


def steps(comm: Processes, first_row: int, count: int, width: int, r: int) -> dict[str, float]:
    """A process's part of a few steps: seconds a step, bytes held, numbers exchanged a step, and the loss."""
    n = count // RANK
    with Peak() as peak:
        rows = DenseRows(rows_of(first_row, count, width))
        scaled = ScaledRows(rows, np.arange(n + 1, dtype=np.int64) * RANK, None, np.ones(n), None)
        form = LowRank(RowSpace(scaled.rows, comm=comm), scaled)
        state = form.start(r, torch.Generator().manual_seed(0))
        state = form.step(state)
        before = comm.numbers_summed
        began = time.process_time()
        for _ in range(STEPS):
            state = form.step(state)
        seconds = (time.process_time() - began) / STEPS
    numbers = (comm.numbers_summed - before) / STEPS
    return {"seconds": seconds, "bytes": peak.peak - peak.before, "numbers": numbers, "loss": state.loss}


def worker(rank: int, size: int, port: int, total: int, width: int, r: int, pipe: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    cuts = [total // RANK * k // size * RANK for k in range(size + 1)]
    pipe.send(steps(Processes(), cuts[rank], cuts[rank + 1] - cuts[rank], width, r))
    torch.distributed.destroy_process_group()


def together(size: int, total: int, width: int, r: int) -> list[dict[str, float]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=worker, args=(rank, size, port, total, width, r, theirs), daemon=True).start()
        pipes.append(ours)
    return [pipe.recv() for pipe in pipes]


def operations(R: int, d: int, r: int) -> float:
    """Of a step: two products with the rows, one with M⁻¹, WᵀW twice, three sweeps over W."""
    n = R / RANK
    return 4 * R * d * r + 2 * R * r**2 + 4 * n * r**2 + 6 * n * r**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[3000, 9999, 30_000, 99_999])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    d, r = args.width, args.components
    table, points = [], []
    for total in args.rows:
        total -= total % RANK
        one = steps(LOCAL, 0, total, d, r)
        two = together(2, total, d, r)
        assert all(abs(part["loss"] - one["loss"]) < 1e-5 * one["loss"] for part in two), (
            "two processes differ from one"
        )
        assert all(part["numbers"] == r * (d + r) + 4 for part in two), "traffic differs from r(d + r)"
        formula = 4 * total * d + 4 * (r + r // 2 + 8) * 6 * (total + total // RANK)
        slowest = max(part["seconds"] for part in two)
        table.append(
            f"| {total:,} | {one['seconds']:.3f} | {operations(total, d, r) / one['seconds'] / 1e9:.1f} | "
            f"{one['bytes'] / 1e6:.0f} | {formula / 1e6:.0f} | {slowest:.3f} | {one['seconds'] / slowest:.2f} | "
            f"{two[0]['numbers']:,.0f} | {two[0]['loss'] / one['loss'] - 1:+.1e} |"
        )
        points.append((total, one["seconds"]))
        print(table[-1], file=sys.stderr)
    slope = np.polyfit(np.log([p[0] for p in points]), np.log([p[1] for p in points]), 1)[0] if len(points) > 1 else 1.0
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    text = "\n".join(
        [
            "# A step as the rows grow",
            "",
            f"`python benchmarks/scale.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
            "",
            f"{cpu}, one thread a process; torch {torch.__version__}, Python {platform.python_version()}; load "
            f"average at the end {os.getloadavg()[0]:.1f}. {RANK} rows an example, d = {d}, r = {r}; "
            "seconds of the processor.",
            "",
            "| rows | s a step | GFLOP/s | MB held | formula, at most | two processes: s a step, slower one | speed-up "
            "| numbers exchanged a step | loss, relative to one process |",
            "|---|---|---|---|---|---|---|---|---|",
            *table,
            "",
            f"- Seconds grow with the rows as R^{slope:.2f}.",
            f"- r(d + r) = {r * (d + r):,}; the other numbers are four scalars.",
            "",
        ]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
