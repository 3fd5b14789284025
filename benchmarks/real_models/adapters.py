"""Components of SmolLM2 as LoRA adapters: what adapters of each rank keep of a direct push along the whole vector.

The Fishers are of the weights of the linear layers in the transformer blocks, on contexts of news articles
(``recovery.py``), two rows each. The weights are moved along a vector that was recovered whole, by ``--step`` of unit
length; an adapter of the largest rank is loaded with ``peft``, and cut to its first r directions for each smaller rank.
Logits are those of 16 other contexts. Writes ``results/real_adapters.md``.

    python benchmarks/real_models/adapters.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from recovery import CONTEXT, HOW, OPTIONS, contexts
from smollm2 import network, next_word

import npeff

sys.path.append(str(Path(__file__).parents[1]))
import machine


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return next_word(model, (tokens, None)).double()


@torch.no_grad()
def cut(adapted: Any, rank: int) -> float:
    """Cut every layer's adapter to its first ``rank`` directions; their squared norm, ``step`` included."""
    kept, factors = 0.0, dict(adapted.named_parameters())
    for name, factor in factors.items():
        if "lora_A" in name:  # rows are orthonormal, by descending singular value
            factor[rank:] = 0
            kept += float(factors[name.replace("lora_A", "lora_B")][:, :rank].double().square().sum())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4, 1])
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--component", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = network()
    tokens = contexts(tokenizer, args.examples + 16)
    batches = [(part, torch.full((len(part),), -1)) for part in tokens[: args.examples].split(16)]
    held, j = tokens[args.examples :], args.component
    fishers = npeff.compute_fishers(model, batches, **OPTIONS | {"parameters": "blocks"}, **HOW)
    components = npeff.decompose(fishers, args.components, n_init=1, progress=False).recover(model, batches, [j], **HOW)
    base = logits_of(model, held)
    with npeff.applied(model, components.state_dict(j), args.step):
        pushed = logits_of(model, held)
    lines = ["# Components as adapters: SmolLM2", "", f"`python benchmarks/real_models/{Path(__file__).name}`"]
    lines += [machine.description(), ""]
    lines += [
        f"Component {j} of {args.components}, of {args.examples} examples of {CONTEXT} tokens, two rows each, of the "
        f"linear layers in the transformer blocks. A push by {args.step} changes the logits of 16 other contexts by a "
        f"mean KL of {kl(base, pushed):.4f}. Of an adapter: the share of ‖g‖² that it keeps, how far its logits are "
        "from those of the push (as a share of what the push changes), and their mean KL.",
        "",
        "| rank | ‖g‖² kept | distance of logits | KL to the push |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        components.to_peft(j, folder, model, rank=max(args.ranks), scale=args.step)
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    for rank in sorted(args.ranks, reverse=True):
        share = cut(adapted, rank) / args.step**2
        got = logits_of(adapted, held)
        far = float((got - pushed).norm() / (pushed - base).norm())
        lines.append(f"| {rank} | {share:.2%} | {far:.4f} | {kl(got, pushed):.1e} |")
    print("\n".join(lines))
    (Path(__file__).parents[1] / "results" / "real_adapters.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
