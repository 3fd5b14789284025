"""Vectors of SmolLM2 in parameter space: what one pass for many components costs, and what their factors lose.

An example is the next word after 24 tokens of a news article; the Fishers are of the weights in the transformer blocks,
norms included, two rows each, sketched. Seconds are those of the processor on one thread, so that other work counts
little. The first number of ``--examples`` is measured with every rank, the others with ``--rank`` alone. Writes
``results/real_recovery.md``.

    python benchmarks/real_models/recovery.py [--examples 64 256 1024]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from smollm2 import network, next_word

import npeff

sys.path.append(str(Path(__file__).parents[1]))
import machine
from language_model import news

T = TypeVar("T")

CONTEXT = 24
OPTIONS: dict[str, Any] = {
    "compress": npeff.Sketch(4096, form="kronecker"),
    "rank": 2,
    "parameters": "model.layers.*.weight",
}
HOW: dict[str, Any] = {"forward": next_word, "progress": False}


def contexts(tokenizer: Any, n: int) -> torch.Tensor:
    """``(n, CONTEXT)`` tokens from the articles."""
    cut: list[list[int]] = []
    for tokens in news(tokenizer):
        cut += [tokens[i : i + CONTEXT] for i in range(0, len(tokens) - CONTEXT, CONTEXT)]
    if len(cut) < n:
        raise SystemExit(f"the articles hold {len(cut)} contexts of {CONTEXT} tokens, {n} are needed")
    return torch.tensor(cut[:n])


def timed(work: Callable[..., T], *given: Any, **options: Any) -> tuple[T, float]:
    start = time.process_time()
    return work(*given, **options, **HOW), time.process_time() - start


class Table:
    """The lines of the file, printed as they come and written so far."""

    def __init__(self, *lines: str) -> None:
        self.lines: list[str] = []
        self.add(*lines)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        out = Path(__file__).parents[1] / "results" / "real_recovery.md"
        out.write_text("\n".join([*self.lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--whole", type=int, default=8, help="Vectors recovered whole, of 425 MB each.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = network()
    tokens = contexts(tokenizer, max(args.examples))
    table = Table(
        "# Vectors in parameter space: SmolLM2",
        "",
        f"`python benchmarks/real_models/{Path(__file__).name} --examples {' '.join(map(str, args.examples))}`",
        machine.description(),
        "",
        f"Examples of {CONTEXT} tokens, two rows each, of the weights in the transformer blocks (106 M parameters); "
        "seconds of the processor on one thread.",
        "",
        "| examples | work | seconds | of those of the Fishers | share of ‖g‖² lost: median, most |",
        "|---|---|---|---|---|",
    )
    for n in args.examples:
        first = n == args.examples[0]
        batches = [(part, torch.full((len(part),), -1)) for part in tokens[:n].split(16)]
        fishers, of_fishers = timed(npeff.compute_fishers, model, batches, **OPTIONS)
        table.add(f"| {n} | Fishers, sketched | {of_fishers:.0f} | 1 | |")
        search: dict[str, Any] = {"n_init": 1, "n_replacements": 0, "max_iterations": 30, "progress": False}
        components = npeff.decompose(fishers, args.components, **search)
        for rank in args.ranks if first else [args.rank]:
            found, seconds = timed(components.recover, model, batches, rank=rank)
            lost = found.factored_lost.sum(axis=1)
            del found
            table.add(
                f"| {n} | {args.components} components, rank {rank} | {seconds:.0f} | {seconds / of_fishers:.2f} "
                f"| {np.median(lost):.2%}, {lost.max():.2%} |"
            )
        if first:
            _, seconds = timed(components.recover, model, batches, list(range(args.whole)))
            table.add(
                f"| {n} | {args.whole} components, whole | {seconds:.0f} | {seconds / of_fishers:.2f} | |",
            )


if __name__ == "__main__":
    main()
