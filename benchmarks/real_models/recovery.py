"""Vectors of SmolLM2 in parameter space: what one pass for many components costs, and what factors of low rank keep.

An example is the next word after 24 tokens of a news article; the Fishers are of the weights of the linear layers in
the transformer blocks, two rows each, sketched. Seconds are those of the processor on one thread, so that other work
counts little. The first number of ``--examples`` is measured with every rank, and its components become adapters; the
others with ``--rank`` alone. Writes ``results/real_recovery.md``.

    python benchmarks/real_models/recovery.py [--examples 64 256 1024]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
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
    "parameters": "blocks",
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


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


def kept_logits(model: Any, components: Any, j: int, scale: float, tokens: torch.Tensor, ranks: list[int]) -> list[str]:
    """Table rows: an adapter of each rank against the weights moved along the whole vector."""
    import peft

    def logits(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return next_word(network, (tokens, None)).double()

    base = logits(model)
    with npeff.applied(model, {name: scale * step for name, step in components.state_dict(j).items()}):
        pushed = logits(model)
    lines = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            share = components.to_peft(j, folder, model, rank=rank, scale=scale)
            adapted = peft.PeftModel.from_pretrained(model, folder).eval()
            got = logits(adapted)
            adapted.unload()
        far = float((got - pushed).norm() / (pushed - base).norm())
        lines.append(
            f"| {j} | {scale} | {kl(base, pushed):.4f} | {rank} | {share:.2%} | {far:.3f} | {kl(got, pushed):.2e} |"
        )
    return lines


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
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64], help="Their ranks.")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.1], help="How far adapters move.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = network()
    tokens = contexts(tokenizer, max(args.examples) + 16)
    held, tokens = tokens[:16], tokens[16:]
    table = Table(
        "# Vectors in parameter space: SmolLM2",
        "",
        f"`python benchmarks/real_models/{Path(__file__).name} --examples {' '.join(map(str, args.examples))}`",
        machine.description(),
        "",
        f"Examples of {CONTEXT} tokens, two rows each, of the weights of the linear layers in the transformer blocks "
        "(106 M parameters); seconds of the processor on one thread.",
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
            whole, seconds = timed(components.recover, model, batches, list(range(args.whole)))
            table.add(
                f"| {n} | {args.whole} components, whole | {seconds:.0f} | {seconds / of_fishers:.2f} | |",
            )
            adapters = [
                line
                for j in (0, args.whole - 1)
                for step in args.steps
                for line in kept_logits(model, whole, j, step, held, args.adapters)
            ]
            del whole
    table.add(
        "",
        "Adapters of components, on 16 other contexts: KL of the push, what an adapter of each rank keeps of ‖g‖², "
        "how far its logits are from those of the push (as a share of the push), and their KL.",
        "",
        "| component | step | KL of the push | rank | ‖g‖² kept | distance of logits | KL to the push |",
        "|---|---|---|---|---|---|---|",
        *adapters,
    )


if __name__ == "__main__":
    main()
