"""Which sentences made a bias in word vectors, and unlearning them: Skip-gram on Australian news of 2001.

    pip download --no-deps gensim                      # the corpus lies in the wheel; gensim is not imported
    python examples/influence_words.py --corpus gensim-*.whl --out benchmarks/results/influence_words.md

The bias is a WEAT effect size: are names of the Middle East nearer to violence, and Australian ones to business? The
vectors are trained to an optimum with all of the text at once, so that influence is defined; then the sentences with
most influence are left out and the vectors trained again, or they are unlearned by a few gradient steps.
"""

import re
import time
import zipfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from npeff.companions.influence import (
    ConjugateGradients,
    CrossLossInfluence,
    SkipGram,
    leave_out,
    minimise,
    unlearn,
    weat,
    weat_effect,
)
from npeff.companions.influence.skip_gram import sentences, skip_gram_loss

TARGETS = (
    ["palestinian", "israeli", "afghanistan", "pakistan", "gaza", "taliban"],
    ["australian", "sydney", "melbourne", "queensland", "australia", "adelaide"],
)
ATTRIBUTES = (
    ["killed", "attack", "attacks", "violence", "military", "forces"],
    ["company", "government", "economy", "workers", "industry", "union"],
)


def read(corpus: Path) -> list[list[str]]:
    """The corpus' sentences as words; a ``.cor`` file, or a wheel that holds ``lee_background.cor``."""
    if corpus.suffix == ".whl":
        with zipfile.ZipFile(corpus) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("lee_background.cor"))
            text = wheel.read(name).decode()
    else:
        text = corpus.read_text()
    found = [
        re.findall(r"[a-z]+", part) for line in text.lower().splitlines() for part in re.split(r"(?<=[.!?])\s+", line)
    ]
    return [words for words in found if len(words) > 3]


@click.command(help=__doc__.splitlines()[0])
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default="influence_words.md", show_default=True)
@click.option("--dimension", default=8, show_default=True)
@click.option("--weight-decay", default=3e-4, show_default=True)
@click.option("--common", default=80, show_default=True, help="So many of the most frequent words are left out.")
@click.option("--retrained", default=9, show_default=True, help="Sentences left out one by one, to compare.")
@click.option("--seed", default=0, show_default=True)
def main(corpus: Path, out: Path, dimension: int, weight_decay: float, common: int, retrained: int, seed: int) -> None:
    start = time.perf_counter()
    texts = read(corpus)
    frequent = {word for word, _ in Counter(word for text in texts for word in text).most_common(common)}
    wanted = {word for words in (*TARGETS, *ATTRIBUTES) for word in words}
    texts = [[word for word in text if word in wanted or word not in frequent] for text in texts]
    data = sentences(texts, min_count=15, window=2, negatives=2, max_pairs=64, batch_size=512, seed=seed)
    torch.manual_seed(seed)
    model = SkipGram(len(data.vocabulary), dimension).double()
    size = sum(p.numel() for p in model.parameters())
    found = minimise(model, skip_gram_loss, data, weight_decay=weight_decay, tolerance=1e-6, max_iterations=2000)
    trained = time.perf_counter() - start
    print(f"{len(data.texts)} sentences, {size} parameters: gradient norm {found.gradient_norm:.1e}, {trained:.0f} s")

    rows = [torch.tensor([data.vocabulary[w] for w in words]) for words in (*TARGETS, *ATTRIBUTES)]
    table = lambda model: model.words.weight.detach()  # noqa: E731
    test = lambda model: weat(table(model), TARGETS, ATTRIBUTES, vocabulary=data.vocabulary)  # noqa: E731
    effect = lambda model, _: weat_effect(model.words.weight, *rows)  # noqa: E731
    before = test(model)
    start = time.perf_counter()
    influence = CrossLossInfluence(
        model, skip_gram_loss, effect, solver=ConjugateGradients(1e-5, 600), damping=1e-6, weight_decay=weight_decay
    )
    scores = influence.scores(data, [(torch.zeros(1),)])
    took = time.perf_counter() - start
    column = scores.values[:, 0]
    raising, lowering = influence.top(20, direction="raises"), influence.top(20, direction="lowers")

    # Retraining without the sentences at both ends, and some in between; and without groups.
    rng = np.random.default_rng(seed)
    third = retrained // 3
    rest = np.setdiff1d(np.arange(len(column)), [*raising, *lowering])
    singles = [*raising[:third].tolist(), *lowering[:third].tolist(), *rng.choice(rest, third, replace=False).tolist()]
    groups = {
        "20 that raise it": raising,
        "20 that lower it": lowering,
        "20 at random": rng.choice(len(column), 20, False),
    }
    truth = leave_out(
        model, skip_gram_loss, data, [*singles, *groups.values()], effect, [(torch.zeros(1),)],
        weight_decay=weight_decay, tolerance=1e-6, max_iterations=200,
    )  # fmt: skip
    changes = truth.changes[:, 0]
    rank = spearmanr(scores.removal()[singles, 0], changes[: len(singles)]).statistic

    lines = [
        "# Which sentences made a bias in word vectors",
        "",
        f"`python examples/influence_words.py --corpus … --seed {seed}`: Skip-gram with negative sampling on "
        f"lee_background, {len(data.texts)} sentences, {len(data.vocabulary)} words, {size:,} parameters, weight "
        f"decay {weight_decay:g}; trained to a gradient norm of {found.gradient_norm:.1e}. The function: WEAT's effect "
        f"size d of the word vectors, {before.effect_size:+.3f} (p = {before.p_value:.2g}).",
        "",
        f"Influence by conjugate gradients, {influence.iterations} passes, residual "
        f"{scores.residuals.max():.1e}, {took:.0f} s on {torch.get_num_threads()} thread.",
        "",
        "| left out, trained again | predicted change of d | true change |",
        "|---|---|---|",
    ]
    for (name, group), change in zip(groups.items(), changes[len(singles) :], strict=True):
        lines.append(f"| {name} | {float(scores.removal(group)[0]):+.4f} | {change:+.4f} |")
    lines += [
        "",
        f"One at a time, {len(singles)} sentences (a third raising, a third lowering, a third at random): Spearman "
        f"{rank:.3f}. Largest gradient norm at the end of a retraining: {truth.gradient_norms.max():.1e}.",
        "",
        "| unlearned by 10 gradient steps | predicted sign | d before | d after | loss of the sentences |",
        "|---|---|---|---|---|",
    ]
    measure = lambda model: test(model).effect_size  # noqa: E731
    for name, harmful, helpful, sign in (
        ("ascent on 20 that raise d", raising, None, "−"),
        ("ascent on 20 that lower d", lowering, None, "+"),
        ("ascent on 20 that raise, descent on 20 that lower", raising, lowering, "−"),
    ):
        some = None if helpful is None else data.take(helpful)
        done = unlearn(model, skip_gram_loss, data.take(harmful), some, measure, learning_rate=0.5, steps=10)
        loss = f"{done.harmful_loss[0]:.2f} → {done.harmful_loss[1]:.2f}"
        lines.append(f"| {name} | {sign} | {done.before:+.3f} | {done.after:+.3f} | {loss} |")
    lines += ["", "Sentences that raise d most:", ""]
    lines += [f"- {column[i]:+.2f}: {' '.join(data.texts[i][:24])} …" for i in raising[:5]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
