"""Which sentences made a bias in word vectors, and unlearning them: Skip-gram on Australian news of 2001.

    pip download --no-deps gensim                      # the corpus lies in the wheel; gensim is not imported
    python examples/influence_words.py --corpus gensim-*.whl --out benchmarks/results/influence_words.md

The bias is a WEAT effect size: are names of the Middle East nearer to violence, and Australian ones to business? The
vectors are trained to an optimum of the whole text, so that influence is defined. What influence predicts is then
compared with training again: without single sentences, without groups, and with a group unlearned by gradient steps.
"""

import copy
import dataclasses
import re
import zipfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from npeff.companions.influence import (
    ConjugateGradients,
    CrossLossInfluence,
    Identity,
    unlearn,
)
from retraining import minimise
from word_vectors import Sentences, SkipGram, sentences, skip_gram_loss, weat, weat_effect  # beside this file

TARGETS = (
    ["palestinian", "israeli", "afghanistan", "pakistan", "gaza", "taliban"],
    ["australian", "sydney", "melbourne", "queensland", "australia", "adelaide"],
)
ATTRIBUTES = (
    ["killed", "attack", "attacks", "violence", "military", "forces"],
    ["company", "government", "economy", "workers", "industry", "union"],
)
WINDOW, NEGATIVES, MIN_COUNT = 3, 2, 15
GROUPS = (10, 30, 100)
STEPS, RATE = 10, 2.0


def read(corpus: Path, common: int) -> list[list[str]]:
    """Sentences of a ``.cor`` file, or of a wheel that holds lee_background; the commonest words are left out."""
    if corpus.suffix == ".whl":
        with zipfile.ZipFile(corpus) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("lee_background.cor"))
            text = wheel.read(name).decode()
    else:
        text = corpus.read_text()
    lines = (part for line in text.lower().splitlines() for part in re.split(r"(?<=[.!?])\s+", line))
    found = [words for words in (re.findall(r"[a-z]+", line) for line in lines) if len(words) > 3]
    frequent = {word for word, _ in Counter(word for words in found for word in words).most_common(common)}
    wanted = {word for words in (*TARGETS, *ATTRIBUTES) for word in words}
    return [[word for word in words if word in wanted or word not in frequent] for words in found]


class Trained:
    """Word vectors at an optimum, and what they are asked."""

    def __init__(self, data: Sentences, dimension: int, weight_decay: float, seed: int) -> None:
        self.data, self.weight_decay = data, weight_decay
        self.rows = [torch.tensor([data.vocabulary[w] for w in words]) for words in (*TARGETS, *ATTRIBUTES)]
        torch.manual_seed(seed)
        self.model = SkipGram(len(data.vocabulary), dimension).double()
        self.minimum = self.fit(self.model)
        self.before = self.measure(self.model)

    def fit(self, model: SkipGram, without=()):
        counted = self.data.counted(without)
        return minimise(
            model, skip_gram_loss, counted, weight_decay=self.weight_decay, tolerance=1e-7, max_iterations=5000
        )

    def effect(self, model, _=None) -> torch.Tensor:
        return weat_effect(model.words.weight, *self.rows)

    def measure(self, model) -> float:
        return float(self.effect(model).detach())

    def influence(self, solver):
        """Scores of every sentence on d, ``(n, 1)``, and the passes over the pairs that they took."""
        estimator = CrossLossInfluence(
            self.model, skip_gram_loss, self.effect, solver=solver, damping=1e-7, weight_decay=self.weight_decay,
            progress=False,
        )  # fmt: skip
        found = estimator.fit(self.data.counted()).scores(self.data, [(torch.zeros(1),)])
        return dataclasses.replace(found, n=len(self.data.texts)), found.provenance["iterations"]  # n: of sentences

    def changed(self, without) -> float:
        """What training again without some sentences does to d: from this optimum to the new one."""
        again = copy.deepcopy(self.model)
        self.fit(again, without)
        return self.measure(again) - self.before


def run(trained: Trained, singles: int, seed: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """For one seed: rows of the three tables, and sentences with the largest influence."""
    scores, passes = trained.influence(ConjugateGradients(1e-6, 3000))
    products, _ = trained.influence(Identity())
    removal = scores.removal()[:, 0]
    n = len(removal)
    rng = np.random.default_rng(seed)
    order = np.argsort(removal)
    third = singles // 3
    middle = rng.choice(order[third:-third], singles - 2 * third, replace=False)
    chosen = np.concatenate([order[:third], middle, order[-third:]])
    true = np.array([trained.changed([i]) for i in chosen.tolist()])
    alone = [
        spearmanr(removal[part], true[at]).statistic
        for part, at in ((chosen, slice(None)), (middle, slice(third, -third)))
    ]
    dot = spearmanr(products.removal()[chosen, 0], true).statistic
    slope = float((removal[chosen] * true).sum() / (removal[chosen] ** 2).sum())
    first = [
        f"| {seed} | {trained.before:+.3f} | {trained.minimum.gradient_norm:.0e} | {passes} | "
        f"{scores.residuals.max():.0e} | {alone[0]:.3f} | {alone[1]:.3f} | {dot:.3f} | {slope:.2f} |"
    ]
    second, predicted, measured = [], [], []
    for k in GROUPS:
        for name, group in (
            ("that raise d most", order[:k]),
            ("that lower d most", order[-k:]),
            ("at random", rng.choice(n, k, replace=False)),
        ):
            change = trained.changed(group)
            predicted.append(float(scores.removal(group)[0]))
            measured.append(change)
            second.append(f"| {seed} | {k} {name} | {predicted[-1]:+.4f} | {change:+.4f} |")
    second.append(f"| {seed} | *all nine: Pearson correlation* | | {pearsonr(predicted, measured).statistic:.3f} |")
    third_table = []
    for name, harmful, helpful, sign in (
        ("ascent on the 30 that raise d most", order[:30], None, "−"),
        ("ascent on the 30 that lower d most", order[-30:], None, "+"),
        ("ascent on those that raise, descent on those that lower", order[:30], order[-30:], "−"),
        ("ascent on 30 at random", rng.choice(n, 30, replace=False), None, "0"),
    ):
        some = None if helpful is None else trained.data.take(helpful)
        done = unlearn(
            trained.model, skip_gram_loss, trained.data.take(harmful), some, trained.measure,
            learning_rate=RATE, steps=STEPS,
        )  # fmt: skip
        loss = f"{done.harmful_loss[0]:.2f} → {done.harmful_loss[1]:.2f}"
        third_table.append(f"| {seed} | {name} | {sign} | {done.before:+.3f} | {done.after:+.3f} | {loss} |")
    told = [
        f"- {scores.values[i, 0]:+.2f}: {' '.join(trained.data.texts[i][:24])}"
        for direction in ("raises", "lowers")
        for i in scores.top(4, direction=direction)
    ]
    return first, second, third_table, told


@click.command(help=__doc__.splitlines()[0])
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default="influence_words.md", show_default=True)
@click.option("--dimension", default=8, show_default=True)
@click.option("--weight-decay", default=3e-4, show_default=True)
@click.option("--common", default=80, show_default=True, help="So many of the most frequent words are left out.")
@click.option("--singles", default=45, show_default=True, help="Sentences left out one by one, per seed.")
@click.option("--seeds", default=3, show_default=True)
def main(corpus: Path, out: Path, dimension: int, weight_decay: float, common: int, singles: int, seeds: int) -> None:
    torch.set_num_threads(1)
    data = sentences(
        read(corpus, common), min_count=MIN_COUNT, window=WINDOW, negatives=NEGATIVES, max_pairs=256, batch_size=256
    )
    tables: list[list[str]] = [[], [], [], []]
    for seed in range(seeds):
        trained = Trained(data, dimension, weight_decay, seed)
        for table, rows in zip(tables, run(trained, singles, seed), strict=True):
            table += rows
        test = weat(trained.model.words.weight, TARGETS, ATTRIBUTES, vocabulary=data.vocabulary)
        lines = [
            "# Which sentences made a bias in word vectors",
            "",
            f"`python examples/influence_words.py --corpus gensim-….whl --seeds {seed + 1} --singles {singles}`",
            "",
            f"Skip-gram with negative sampling on lee_background: {len(data.texts):,} sentences, "
            f"{len(data.vocabulary)} words that come {MIN_COUNT} times or more ({common} commonest left out), "
            f"window {WINDOW}, {NEGATIVES} negatives drawn once, {int((data.weight > 0).sum()):,} pairs; dimension "
            f"{dimension}, {sum(p.numel() for p in trained.model.parameters()):,} parameters, weight decay "
            f"{weight_decay:g}, damping 1e-7."
            f" A seed is another beginning, so another optimum. d is WEAT's effect size of the word vectors "
            f"(p = {test.p_value:.2g} for the last).",
            "",
            "## One sentence left out, trained again",
            "",
            f"{singles} sentences a seed: a third that raise d most, a third that lower it most, a third at random of "
            "the others. Spearman's correlation of −I/n with the true change of d; *product*: of gradient products. "
            "Slope: "
            "least squares of the true changes on −I/n.",
            "",
            "| seed | d | ‖∇J‖ | passes of CG | residual | Spearman | those at random | product | slope |",
            "|---|---|---|---|---|---|---|---|---|",
            *tables[0],
            "",
            "## Groups left out, trained again",
            "",
            "| seed | left out | predicted change of d | true change |",
            "|---|---|---|---|",
            *tables[1],
            "",
            f"## Unlearned by {STEPS} gradient steps",
            "",
            f"`unlearn` with learning rate {RATE:g}, no training afterwards.",
            "",
            "| seed | | predicted sign | d before | d after | loss of those climbed |",
            "|---|---|---|---|---|---|",
            *tables[2],
            "",
            "## Sentences with the largest influence, seed 0",
            "",
            *tables[3][:8],
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
