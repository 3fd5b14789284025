"""Vectors of SmolLM2 in parameter space: what one pass for many components costs, and what factors of low rank keep.

An example is the next word after 24 tokens of a news article; the Fishers are of the weights in the transformer blocks,
two rows each, sketched. Seconds are those of the processor on one thread, so that other work counts little. Writes
``results/real_recovery.md``.

    python benchmarks/real_models/recovery.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smollm2 import network, next_word, package_folder

import npeff

CONTEXT = 24


def contexts(tokenizer: Any, n: int) -> torch.Tensor:
    """``(n, CONTEXT)`` tokens from the articles of gensim's lee_background."""
    text = (package_folder("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8")
    cut: list[list[int]] = []
    for article in text.splitlines():
        tokens = tokenizer(article)["input_ids"]
        cut += [tokens[i : i + CONTEXT] for i in range(0, len(tokens) - CONTEXT, CONTEXT)]
    return torch.tensor(cut[:n])


def timed(work: Any) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def kept_logits(model: Any, components: Any, j: int, scale: float, tokens: torch.Tensor, ranks: list[int]) -> list[str]:
    """Table rows: an adapter of each rank against the weights moved along the vector."""
    import peft

    def logits(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return next_word(network, (tokens, None)).double()

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--whole", type=int, default=8, help="Vectors recovered whole, of 425 MB each.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8, 16])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = network()
    tokens = contexts(tokenizer, args.examples + 16)
    batches = [(part, torch.full((len(part),), -1)) for part in tokens[: args.examples].split(16)]
    how: dict[str, Any] = {"forward": next_word, "progress": False}
    options: dict[str, Any] = {"compress": npeff.Sketch(4096, form="kronecker"), "rank": 2}
    options["parameters"] = "model.layers.*.weight"
    fishers, of_fishers = timed(lambda: npeff.compute_fishers(model, batches, **options, **how))
    search: dict[str, Any] = {"n_init": 1, "n_replacements": 0, "max_iterations": 30, "progress": False}
    components = npeff.decompose(fishers, args.components, **search)
    about = (
        f"{args.examples} examples of {CONTEXT} tokens, two rows each; {fishers.n_parameters / 1e6:.0f} M parameters"
    )
    lines = ["# Vectors in parameter space: SmolLM2", "", f"`{Path(__file__).name}`: {about}; one thread.", ""]
    lines += ["| work | processor seconds | share of ‖g‖² lost: median, most |", "|---|---|---|"]
    lines.append(f"| Fishers, sketched | {of_fishers:.0f} | |")
    for rank in args.ranks:
        found, seconds = timed(lambda rank=rank: components.recover(model, batches, rank=rank, **how))
        lost = found.factored_lost.sum(axis=1)
        lines.append(
            f"| {args.components} components, rank {rank} | {seconds:.0f} | {np.median(lost):.2%}, {lost.max():.2%} |"
        )
    js = list(range(args.whole))
    whole, seconds = timed(lambda: components.recover(model, batches, js, **how))
    lines += [f"| {args.whole} components, whole | {seconds:.0f} | |", ""]
    lines += [
        "Adapters of components, on 16 other contexts: KL of the push, what an adapter of each rank keeps of ‖g‖²,"
    ]
    lines += ["how far its logits are from those of the push (as a share of the push), and their KL.", ""]
    lines += ["| component | scale | KL of the push | rank | ‖g‖² kept | distance of logits | KL to the push |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for j in (0, args.whole - 1):
        lines += kept_logits(model, whole, j, 0.2, tokens[args.examples :], [1, 4, 16, 64])
    out = Path(__file__).parents[1] / "results" / "real_recovery.md"
    out.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
