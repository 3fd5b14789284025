"""An unlearning audit: SmolLM2 is made to forget some capitals. What else is lost, along which components? Mend it.

Forgetting: a few steps of gradient ascent on the answers, as unlearning methods begin. The damage: neighbours (capitals
that were to stay) and unrelated facts. The audit: components of the neighbours' Fishers in the damaged model; how much
of the change of the weights lies along each; mended along them within a tolerance on other text.

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

FORMS = ["The capital of {} is", "The capital city of {} is", "Everyone knows that the capital of {} is"]
UNSEEN_FORM = "I learned at school that the capital of {} is"
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


def trained(model: Any, prompts: Prompts, sign: int, until: Callable[[], bool], rate: float, most: int = 40) -> int:
    """Gradient steps on −sign · log p(answer) until a condition holds; the number of steps."""
    optimizer = torch.optim.SGD(weights(model).values(), rate)
    for step in range(most):
        if until():
            return step
        optimizer.zero_grad()
        for batch in prompts.batches:
            log_p = next_token(model, batch).log_softmax(-1)
            (-sign * log_p.gather(1, batch["labels"][:, None]).sum() / len(prompts)).backward()
        optimizer.step()
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--forgotten", type=int, default=6, help="capitals to forget")
    parser.add_argument("--below", type=float, default=0.1, help="mean probability of their answers, afterwards")
    parser.add_argument("--components", type=int, default=12)
    parser.add_argument("--out", default="ground_truth_unlearning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    news, table, shares = News(model, tokenizer), Table(), Table()
    base, original = news.perplexity(), {k: v.detach().clone() for k, v in weights(model).items()}
    for seed in range(args.first_draw, args.first_draw + args.draws):
        rng = np.random.default_rng(seed)
        known = Prompts(model, tokenizer, about([c for c in CAPITALS if c != "Egypt"], FORMS[:1], "Egypt")).right(0.3)
        countries = [str(c) for c in rng.permutation(sorted(p.factors["country"] for p in known))]
        gone, stay = countries[: args.forgotten], countries[args.forgotten :]
        some, others = stay[::2], stay[1::2]
        sets = {
            "forgotten": about(gone, FORMS, "Egypt"),
            "neighbours": about(some, FORMS, "Egypt"),
            "other neighbours, unseen form": about(others, [UNSEEN_FORM], "Egypt"),
            "unrelated facts": FACTS + [Prompt(f"The opposite of hot is cold. The opposite of {a} is", b, {})
                                        for a, b in list(OPPOSITES.items())[1:16]],
        }  # fmt: skip
        prompts = {name: Prompts(model, tokenizer, given) for name, given in sets.items()}

        def look(name: str, prompts: dict[str, Prompts] = prompts) -> None:
            row = {which: p.of(p.answers).mean() for which, p in prompts.items()}
            table.add(name, {**row, "perplexity / before": news.perplexity() / base})

        look("before")
        target, near = prompts["forgotten"], prompts["neighbours"]
        before = near.of(near.answers)
        steps = trained(model, target, -1, lambda p=target: p.of(p.answers).mean() < args.below, rate=3e-4)
        look("made to forget")
        change = {k: (v.detach() - original[k]) for k, v in weights(model).items()}
        damaged = {k: v.detach().clone() for k, v in weights(model).items()}
        fishers = near.fishers(energy=0.9, rank=2)
        components = npeff.decompose(fishers, args.components, seed=seed, progress=False)
        js = list(range(args.components))
        components = components.recover(model, near.batches, js, forward=next_token, progress=False)
        size, along = norm(change), []
        for j in js:
            vector = {k: torch.as_tensor(np.asarray(v)) for k, v in components.state_dict(j).items()}
            dot = sum(float((vector[k].reshape(v.shape).double() * v.double()).sum()) for k, v in change.items())
            along.append(abs(dot) / size)
        lost = before - near.of(near.answers)
        W = components.coefficients
        shares.add(f"draw {seed}, {steps} steps", {
            "|cos| of the change, largest": max(along), "median": float(np.median(along)),
            "correlation over components of |cos| and of the coefficients of what was lost":
                float(np.corrcoef(along, lost @ W / W.sum(0))[0, 1]),
        })  # fmt: skip
        mended = npeff.mend(
            model, near.batches, components, js, tolerance=0.02, forward=next_token, seed=seed, progress=False
        )
        with npeff.applied(model, mended.change):
            look("mended along the components")
            level = near.of(near.answers).mean()
        for share in (0.25, 0.5, 0.75):
            with torch.no_grad():
                for k, v in weights(model).items():
                    v.copy_(damaged[k] - share * change[k])
            look(f"{share:.0%} of the change undone")
        restore(model, damaged)
        trained(model, near, 1, lambda p=near, level=level: p.of(p.answers).mean() >= level, rate=3e-4)
        look("trained on the neighbours, to the same level")
        restore(model, original)
        write(args.out, "An unlearning audit", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed - args.first_draw + 1} draws of "
            f"{args.forgotten} capitals to forget; mean probabilities of the answers.",
        ], {"Probability of the answers": table, "Where the change lies": shares})  # fmt: skip


def restore(model: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in weights(model).items():
            parameter.copy_(values[name])


if __name__ == "__main__":
    main()
