"""What it costs to check on a batch which rows belong to which example.

The same Fishers three ways, taking turns on one core: with the check on no batch but the first, on one in 16 as usual,
and on every batch, as for models that move rows by the values of a tensor. With all C − 1 columns, and with one
(``rank=1``), where the check's backward pass is the largest share. Before anything is timed, the three are compared.
Writes ``results/row_check.md``.

    python benchmarks/row_check.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import machine
import npeff
from fisher_cases import UNTRAINED, Case
from npeff.gradients import engine, selfcheck

EVERY = {"no further batch": 1 << 60, "one in 16": 16, "every batch": 1}


@contextmanager
def checking(every: int) -> Iterator[None]:
    """Within it, one batch in so many is checked."""
    with mock.patch.object(selfcheck, "EVERY", every), mock.patch.object(engine, "EVERY", every):
        yield


def fishers(case: Case, every: int, rank: int | None, batches: int) -> npeff.Fishers:
    """The Fishers of so many equal batches."""
    data = [case.inputs] * batches
    with checking(every):
        return npeff.compute_fishers(case.model, data, rank=rank, compress=npeff.TopK(case.k), progress=False)


def main() -> None:
    """Time the three ways of every network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(UNTRAINED))
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batches", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "row_check.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# What the check of rows costs",
        "",
        f"`python benchmarks/row_check.py {' '.join(arguments.names)} --examples {arguments.examples} --batches "
        f"{arguments.batches} --rounds {arguments.rounds}`",
        machine.description(),
        "",
        f"Milliseconds an example, median of {arguments.rounds} rounds over {arguments.batches} batches of "
        f"{arguments.examples}, the first one's cost included; ratios are medians of the rounds' ratios to the first.",
        "",
        "| network | columns | " + " | ".join(f"check on {name}" for name in EVERY) + " | ratios |",
        "|---|---|" + "---|" * (len(EVERY) + 1),
    ]
    for name in arguments.names:
        case = UNTRAINED[name](arguments.examples)
        for rank in (None, 1):
            found = [fishers(case, every, rank, 2) for every in EVERY.values()]
            for other in found[1:]:
                np.testing.assert_array_equal(found[0].rows.dense(0, 1), other.rows.dense(0, 1))
            sides: dict[str, Callable[[], object]] = {
                way: partial(fishers, case, every, rank, arguments.batches) for way, every in EVERY.items()
            }
            times = machine.interleaved(sides, arguments.rounds)
            count = arguments.batches * arguments.examples
            shown = [f"{1000 * statistics.median(seconds) / count:.3f}" for seconds in times.values()]
            base = times["no further batch"]
            ratios = [
                f"{statistics.median(s / b for s, b in zip(seconds, base, strict=True)):.3f}"
                for seconds in list(times.values())[1:]
            ]
            columns = found[0].rows.n_rows // len(found[0])
            lines.append(f"| {name} | {columns} | {' | '.join(shown)} | {', '.join(ratios)} |")
            print(lines[-1], flush=True)
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
