"""Zero-shot reviews: SmolLM2 calls a sentence positive or negative. What do its components do, beside random ones?

The prediction is restricted to the two answers, so that a Fisher has one row, exact. As in benchmarks/perturbation.py:
components of some reviews are perturbed on others, whose Fishers are encoded; random directions of equal norm and of
equal Fisher norm stand beside them.

    python benchmarks/ground_truth/zero_shot.py --draws 3
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import npeff
from language import smollm2
from npeff.language import Places
from reviews import sentences
from table import Table, write

sys.path.append(str(Path(__file__).parents[1]))
from perturbation import lines

FORM = "Review: {}\nSentiment:"
ANSWERS = [" positive", " negative"]


def places(tokenizer: Any, rows: list[tuple[str, int]]) -> Places:
    """The last token of each prompt; label 1 is a positive review."""
    texts = [{"text": FORM.format(text), "answer": ANSWERS[1 - label]} for text, label in rows]
    return Places(tokenizer, texts, "last", answers=ANSWERS, label_column="answer", sort=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--longest", type=int, default=70, help="letters of a sentence, at most")
    parser.add_argument("--components", type=int, default=6)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--out", default="ground_truth_zero_shot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    every = [(text, label) for text, label in zip(*sentences(), strict=True) if 30 <= len(text) <= args.longest]
    finding, effects = Table(), []
    for seed in range(args.draws):
        rng = np.random.default_rng(seed)
        data = places(tokenizer, [every[i] for i in rng.permutation(len(every))[: 2 * args.examples]])
        compress = npeff.Sketch(2048, form="kronecker")
        both = npeff.compute_fishers(model, data, compress=compress, progress=False)
        half = rng.permutation(len(both)) < args.examples
        fishers, others = both[half], both[~half]
        components = npeff.decompose(fishers, args.components, seed=seed, progress=False)
        js = list(range(0, args.components, args.every))
        components = components.recover(model, data, js, progress=False)
        W = components.encode(others).coefficients.astype(np.float32)
        finding.add("", {
            "right": float((fishers.predictions == fishers.labels).mean()),
            "rows per Fisher": fishers.rows.n_rows / len(fishers),
            "relative loss": components.loss_curve[-1],
            "coefficients' mass on one answer, mean over components": float(np.mean([
                max(column[fishers.predictions == c].sum() for c in (0, 1)) / column.sum()
                for column in components.coefficients.T])),
        })  # fmt: skip
        fields = {name: getattr(others, name) for name in ("labels", "logits", "ids", "norms", "places")}
        elsewhere = replace(components, coefficients=W, row_weights=None, row_offsets=None, **fields)
        used = [j for j in js if (W[:, j] > 0).sum() >= 8]
        for effect in npeff.perturb_all(
            model, data, elsewhere, used, n_random=2, curve=0, top=args.examples // 4, n_resamples=200, seed=seed,
            progress=False,
        ):  # fmt: skip
            effects.append(effect)
            print(effect.table(), flush=True)
        write(args.out, "Zero-shot reviews: two answers", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed + 1} draws of {args.examples} "
            f"sentences of movie reviews and {args.examples} others; {args.components} components, of which numbers "
            f"{', '.join(map(str, js))} are perturbed on the others: the {args.examples // 4} with the largest "
            "coefficients against all. Component: median over components [bootstrap interval of the component in the "
            "middle]. Random: median over components and draws (range over all draws), 2 draws each.",
            "\n".join(lines("Components beside random directions", effects, seed + 1)).replace(" networks;", " draws;"),
        ], {"The Fishers": finding})  # fmt: skip


if __name__ == "__main__":
    main()
