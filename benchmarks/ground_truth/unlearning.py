"""An unlearning audit: SmolLM2 is made to forget some capitals. What else is lost, along which components? Mend it.

Forgetting: a few steps of gradient ascent on the answers, as unlearning methods begin. The damage: neighbours (capitals
that were to stay) and unrelated facts. The audit: components of the neighbours' Fishers in the damaged model, as
factors of rank 8; how much of the change of the weights lies along them; this part undone; mended along them, within
a tolerance on unrelated facts and on the neighbours that are still right.

    python benchmarks/ground_truth/unlearning.py --draws 3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import npeff
from copying import CAPITALS, FACTS, OPPOSITES
from language import News, Prompt, Prompts, next_token, norm, smollm2
from table import Table, write

FORMS = ["The capital of {} is", "The capital city of {} is"]
Values = dict[str, torch.Tensor]
UNSEEN_FORM = "I learned at school that the capital of {} is"
RANK = 8  # of the components' factors
LEFT_OUT = ("embed_tokens", "norm", "lm_head")


def about(countries: list[str], forms: list[str], hint: str) -> list[Prompt]:
    """Prompts about capitals, after one fact that shows the form of the answer."""
    return [
        Prompt(f"The capital of {hint} is {CAPITALS[hint]}. {form.format(c)}", CAPITALS[c], {"country": c})
        for c in countries
        for form in forms
    ]


def weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The linear layers of the blocks."""
    return {name: p for name, p in model.named_parameters() if not any(word in name for word in LEFT_OUT)}


def gradient(model: Any, prompts: Prompts) -> Values:
    """Of the mean log p of the answers."""
    for batch in prompts.batches:
        log_p = next_token(model, batch).log_softmax(-1)
        (log_p.gather(1, batch["labels"][:, None]).sum() / len(prompts)).backward()
    found = {name: p.grad for name, p in weights(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def trained(model: Any, prompts: Prompts, sign: int, until: Callable[[], bool], rate: float, most: int = 24) -> int:
    """Gradient steps on −sign · log p(answer) until a condition holds; the number of steps."""
    for step in range(most):
        if until():
            return step
        slopes = gradient(model, prompts)
        with torch.no_grad():
            for name, parameter in weights(model).items():
                parameter.add_(slopes[name], alpha=sign * rate)
    return most


def moved(model: Any, origin: Values, change: Values, share: float) -> None:
    """Set the weights to θ₀ + share · change."""
    with torch.no_grad():
        for name, parameter in weights(model).items():
            parameter.copy_(origin[name] + share * change[name])


def part_along(components: npeff.Components, change: Values) -> tuple[np.ndarray, Values]:
    """Cosines of a change of the weights with each component, and its projection onto their span, from factors."""
    r = components.n_components
    gram, products = np.zeros((r, r)), np.zeros(r)
    for blocks in zip(*map(components.blocks, range(r)), strict=True):
        for j, (parameter, left, right) in enumerate(blocks):
            products[j] += np.sum((left.T @ change[parameter.name].numpy()) * right, dtype=np.float64)
            for k, (_, other_left, other_right) in enumerate(blocks):
                gram[j, k] += np.sum((left.T @ other_left) * (right @ other_right.T), dtype=np.float64)
    weight = np.linalg.pinv(gram, rcond=1e-6, hermitian=True) @ products
    part = {name: torch.zeros_like(value) for name, value in change.items()}
    for j in range(r):
        for parameter, left, right in components.blocks(j):
            part[parameter.name].addmm_(torch.from_numpy(left), torch.from_numpy(right), alpha=float(weight[j]))
    return products / norm(change), part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--forgotten", type=int, default=5, help="capitals to forget")
    parser.add_argument("--below", type=float, default=0.1, help="mean probability of their answers, afterwards")
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=3, help="of the repair, per weight of what is kept")
    parser.add_argument("--out", default="ground_truth_unlearning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    news, table, shares = News(model, tokenizer, articles=4), Table(), Table()
    base, original = news.perplexity(), {k: v.detach().clone() for k, v in weights(model).items()}
    known = Prompts(model, tokenizer, about([c for c in CAPITALS if c != "Egypt"], FORMS[:1], "Egypt")).right(0.3)
    for seed in range(args.first_draw, args.first_draw + args.draws):
        rng = np.random.default_rng(seed)
        countries = [str(c) for c in rng.permutation(sorted(p.factors["country"] for p in known))]
        gone, stay = countries[: args.forgotten], countries[args.forgotten :]
        opposites = [Prompt(f"The opposite of hot is cold. The opposite of {a} is", b, {})
                     for a, b in list(OPPOSITES.items())[1:11]]  # fmt: skip
        prompts = {
            name: Prompts(model, tokenizer, given)
            for name, given in {
                "forgotten": about(gone, FORMS, "Egypt"),
                "neighbours": about(stay[::2], FORMS, "Egypt"),
                "other neighbours, unseen form": about(stay[1::2], [UNSEEN_FORM], "Egypt"),
                "unrelated facts": FACTS,
                "opposites": opposites,
            }.items()
        }

        def look(name: str, prompts: dict[str, Prompts] = prompts) -> None:
            row = {which: p.of(p.answers).mean() for which, p in prompts.items()}
            table.add(name, {**row, "perplexity / before": news.perplexity() / base})

        look("before")
        target, near, facts = prompts["forgotten"], prompts["neighbours"], prompts["unrelated facts"]
        before = near.of(near.answers)
        steps = trained(model, target, -1, lambda p=target: p.of(p.answers).mean() < args.below, rate=3e-4)
        look("made to forget")
        change = {k: (v.detach() - original[k]) for k, v in weights(model).items()}
        components = npeff.decompose(near.fishers(energy=0.9, rank=2), args.components, seed=seed, progress=False)
        components = components.recover(model, near.batches, rank=RANK, forward=next_token, progress=False)
        cosines, part = part_along(components, change)
        slopes = gradient(model, near)
        slope = sum(float((slopes[k] * v).sum()) for k, v in change.items())
        lost = before - near.of(near.answers)
        W = components.coefficients
        shares.add(f"draw {seed}, {steps} steps", {
            "share of the change's square in the components' span": (norm(part) / norm(change)) ** 2,
            "largest cosine of one": np.abs(cosines).max(), "median cosine": np.median(np.abs(cosines)),
            "correlation of cosines with what the components' examples lost":
                np.corrcoef(np.abs(cosines), lost @ W / np.maximum(W.sum(0), 1e-12))[0, 1],
            "cosine of the gradient of the neighbours' answers": abs(slope) / norm(slopes) / norm(change),
            "held by the factors": float(1 - components.factored_lost.sum(1).mean()),
        })  # fmt: skip
        with npeff.applied(model, part, -1.0):
            look("the change's part along the components undone")
        with npeff.applied(model, slopes, -slope / norm(slopes) ** 2):
            look("the change's part along that gradient undone")
        del part, slopes
        wrong = np.flatnonzero(near.log_probabilities().argmax(1).numpy() != near.answers)
        mended = npeff.mend(
            model, near.batches + facts.batches, components, range(args.components), repair=wrong, tolerance=0.1,
            iterations=args.iterations, forward=next_token, seed=seed, progress=False,
        )  # fmt: skip
        print(mended, flush=True)
        with npeff.applied(model, mended.change):
            look("mended along the components")
            level = near.of(near.answers).mean()
        del mended
        for share in (0.25, 0.5, 0.75):
            moved(model, original, change, 1 - share)
            look(f"{share:.0%} of the change undone")
        moved(model, original, change, 1.0)
        trained(model, near, 1, lambda p=near, level=level: p.of(p.answers).mean() >= level, rate=3e-4, most=12)
        look("trained on the neighbours, to the same level")
        moved(model, original, change, 0.0)
        write(args.out, "An unlearning audit", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed - args.first_draw + 1} draws of "
            f"{args.forgotten} capitals to forget; {args.components} components of the neighbours; mean probabilities "
            "of the answers. Cosines are absolute values.",
        ], {"Probability of the answers": table, "Where the change lies": shares})  # fmt: skip


if __name__ == "__main__":
    main()
