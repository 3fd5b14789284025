"""In-context learning: what changes in SmolLM2 with 0, 1 and 4 demonstrations, and what makes it follow false ones?

A prompt is a list of words with their categories, and a last word without: "apple: fruit", "cat: animal", "pear:" →
fruit. In half of the prompts the demonstrations are swapped ("apple: animal"): a model that follows them answers
animal. Which components respond on swapped demonstrations, and does a push along one of them make the model follow, or
ignore, demonstrations of categories that the Fishers never saw?

    python benchmarks/ground_truth/in_context.py --draws 3
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import numpy as np
import torch

import npeff
from language import News, Prompt, Prompts, next_token, random_like, scaled, smollm2, step_for_kl
from measures import auc
from table import Table, write

TASKS = {
    task: tuple((side, words.split()) for side, words in sides.items())
    for task, sides in {
        "animal or fruit": {
            "animal": "cat dog horse cow lion tiger sheep wolf bear mouse goat pig",
            "fruit": "apple pear banana cherry grape lemon peach plum mango melon orange kiwi",
        },
        "city or country": {
            "city": "Paris London Berlin Rome Madrid Vienna Tokyo Moscow Cairo Boston Athens Chicago",
            "country": "France Spain Italy Japan Egypt Greece Canada Brazil Russia China India Norway",
        },
        "colour or number": {
            "colour": "red blue green yellow black white brown pink purple grey orange gold",
            "number": "one two three four five six seven eight nine ten eleven twelve",
        },
    }.items()
}
SHOTS = (0, 1, 4)


def drawn(seed: int, tasks: list[str], per_case: int) -> list[Prompt]:
    """Prompts of each task, number of demonstrations and truth; ``answer`` is the true category."""
    rng, prompts = np.random.default_rng(seed), []
    for task, shots, swapped, _ in product(tasks, SHOTS, (False, True), range(per_case)):
        if swapped and not shots:
            continue
        sides = TASKS[task]
        own = int(rng.integers(2))
        words = [list(rng.permutation(words)) for _, words in sides]
        asked = words[own].pop()
        order = rng.permutation([i % 2 for i in range(max(shots, 2))])[:shots] if shots > 1 else [own] * shots
        lines = [f"{words[side].pop()}: {sides[side ^ swapped][0]}" for side in order]
        text = "\n".join([*lines, f"{asked}:"])
        factors = {"task": task, "shots": shots, "swapped": swapped, "condition": f"{shots}{' swapped' * swapped}"}
        prompts.append(Prompt(text, sides[own][0], factors, sides[1 - own][0]))
    return prompts


def answers(prompts: Prompts) -> dict[str, tuple[float, float]]:
    """By condition, the mean probability of the true and of the swapped category."""
    log_p, condition = prompts.log_probabilities(), prompts.factor("condition")
    true, other = prompts.of(prompts.answers, log_p), prompts.of(prompts.others, log_p)
    return {str(c): (true[condition == c].mean(), other[condition == c].mean()) for c in sorted(set(condition))}


def follows(prompts: Prompts) -> float:
    """Share of the two categories' probability that goes to what swapped demonstrations say."""
    log_p, swapped = prompts.log_probabilities(), prompts.factor("swapped")
    true, other = prompts.of(prompts.answers, log_p), prompts.of(prompts.others, log_p)
    return float((other / (true + other))[swapped].mean())


def more(swapped: Prompts, vector: Any, step: float) -> int:
    """The sign of a small step after which swapped demonstrations are followed more."""
    sides = []
    for sign in (1, -1):
        with npeff.applied(swapped.model, vector, sign * step):
            sides.append(follows(swapped))
    return 1 if sides[0] > sides[1] else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--per-case", type=int, default=12)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--unseen", default="colour or number", choices=list(TASKS))
    parser.add_argument("--out", default="ground_truth_in_context")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    news, seen = News(model, tokenizer), [task for task in TASKS if task != args.unseen]
    base, behaviour, finding, pushing = news.perplexity(), Table(), Table(), Table()
    for seed in range(args.first_draw, args.first_draw + args.draws):
        here = Prompts(model, tokenizer, drawn(seed, seen, args.per_case))
        far = Prompts(model, tokenizer, drawn(seed + 1000, [args.unseen], args.per_case))
        for condition, (true, other) in answers(here).items():
            behaviour.add(f"{condition} demonstrations", {"the true category": true, "the other category": other})
        fishers = here.fishers(energy=0.9, rank=2)
        components = npeff.decompose(fishers, args.components, seed=seed, progress=False)
        condition, swapped, shots = (here.factor(name) for name in ("condition", "swapped", "shots"))
        W, told = components.coefficients, shots == 4
        by_swap = [auc(swapped[told], column[told]) for column in W.T]
        j = int(np.argmax(by_swap))
        finding.add("**NPEFF**, best component", {
            "swapped or true, 4 demonstrations, AUC": by_swap[j],
            "any demonstration, AUC": max(auc(shots > 0, s * c) for c in W.T for s in (1, -1)),
            "task, AUC": max(auc(here.factor("task") == seen[0], s * c) for c in W.T for s in (1, -1)),
        })  # fmt: skip
        means = {str(c): W[condition == c].mean(0) for c in sorted(set(condition))}
        strongest = {c: int(np.argmax(v)) for c, v in means.items()}
        print("strongest component by condition:", strongest, flush=True)
        recovered = components.recover(model, here.batches, [j], forward=next_token, progress=False)
        direction = {k: torch.as_tensor(np.asarray(v)) for k, v in recovered.state_dict(j).items()}
        some = Prompts(model, tokenizer, here.prompts[::4])
        before = some.log_probabilities()

        def at(vector: Any, step: float, some: Prompts = some, before: torch.Tensor = before) -> float:
            with npeff.applied(model, vector, step):
                return float((before.exp() * (before - some.log_probabilities())).sum(1).mean())

        def look(name: str, here: Prompts = here, far: Prompts = far) -> None:
            true = far.factor("condition") == "4"
            right = far.of(far.answers)[true].mean()
            pushing.add(name, {
                "follows swapped demonstrations": follows(here), "in an unseen task": follows(far),
                "unseen task, true demonstrations, right": right, "perplexity / before": news.perplexity() / base,
            })  # fmt: skip

        look("as it is")
        noise = random_like(direction, seed)
        swapped_ones = Prompts(model, tokenizer, [p for p in some.prompts if p.factors["swapped"]])
        direction, noise = (scaled(v, more(swapped_ones, v, s)) for v, s in ((direction, 0.02), (noise, 0.5)))
        for kl, sign in ((0.1, 1), (0.3, 1), (0.1, -1), (0.3, -1)):
            for name, vector, start in (("component", direction, 0.05), ("random", noise, 1.0)):
                step = step_for_kl(lambda s, vector=vector: at(vector, s), kl, start * sign)
                with npeff.applied(model, vector, step):
                    look(f"{name}, {'towards' if sign > 0 else 'away from'} them, KL {kl}")
        write(args.out, "In-context learning: true and swapped demonstrations", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed - args.first_draw + 1} draws of "
            f"{len(here)} prompts of {' and '.join(seen)}; unseen task: {args.unseen}; {args.components} components.",
        ], {"What the model answers": behaviour, "Finding": finding, "Moving along the component of swapped "
            "demonstrations": pushing})  # fmt: skip


if __name__ == "__main__":
    main()
