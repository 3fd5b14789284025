"""Influence against retraining, beside the tools in use: rank correlation, size, time.

Deep embedded clustering is trained on KL to frozen targets, to its optimum; the test loss is the labels'
negative log-likelihood. Every training example (iris) or a sample of them (digits) is left out in turn and the
model trained again with the same loss. All methods run in one process on the same model, with the same damping.
Writes ``results/influence_iris.md`` and ``results/influence_digits.md``.

    pip install kronfluence dattri captum        # peers that are not installed are left out, and said so
    python benchmarks/influence.py
    python benchmarks/influence.py --only digits
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor, nn

from npeff.companions.influence import (
    EKFAC,
    ConjugateGradients,
    CrossLossInfluence,
    EmpiricalFisher,
    Exact,
    GaussNewton,
    Identity,
)
from topk import cpu_name  # beside this file

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from deep_clustering import deep_embedded_clustering, kl_loss, kl_of_kernels, nll_loss
from retraining import leave_out

TOLERANCE = 1e-8
"""Relative residual of conjugate gradients, ours and dattri's."""


@dataclass
class Case:
    """One trained model, and what its retrainings did."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    weight_decay: float
    damping: float
    left_out: np.ndarray
    changes: np.ndarray | None = None
    about: str = ""


def clustering_case(name: str, seed: int) -> Case:
    from sklearn.datasets import load_digits, load_iris

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    iris = name == "iris"
    x, y = (load_iris if iris else load_digits)(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / (x.std(0) if iris else x.std()), dtype=torch.float64)
    y = torch.tensor(y)
    order = torch.randperm(len(x), generator=generator)
    n, n_test, k = (110, 40, 3) if iris else (300, 60, 10)
    train, test = order[:n], order[n : n + n_test]
    width, hidden, d = (4, 5, 2) if iris else (64, 8, 4)
    encoder = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, d)).double()
    decoder = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, width)).double()
    decay = 1e-3
    model, targets = deep_embedded_clustering(encoder, decoder, x[train], k, d, weight_decay=decay, seed=seed)
    # Clusters get the labels that agree best with them: the test loss is about labels, training never saw one.
    table = np.zeros((k, k))
    np.add.at(table, (model(x[train]).argmax(1).numpy(), y[train].numpy()), 1)
    cluster_of = np.argsort(linear_sum_assignment(-table)[1])
    labels = torch.tensor(cluster_of)[y[test]]
    rng = np.random.default_rng(seed)
    left_out = np.arange(n) if iris else np.sort(rng.choice(n, 40, replace=False))
    m = sum(p.numel() for p in model.parameters())
    case = Case(name, model, (x[train], targets), (x[test], labels), decay, 1e-6, left_out)
    case.about = (
        f"{n} training and {n_test} test examples, {m} parameters, weight decay {decay:g}, damping {case.damping:g}"
    )
    return case


def kernels_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def ours(case: Case) -> dict[str, Callable[[], np.ndarray]]:
    def run(solver: object) -> Callable[[], np.ndarray]:
        def scores() -> np.ndarray:
            estimator = CrossLossInfluence(
                case.model,
                kl_loss,
                nll_loss,
                solver=solver,
                damping=case.damping,
                weight_decay=case.weight_decay,
                progress=False,
            )
            return estimator.scores([case.train], [case.test]).values

        return scores

    return {
        "npeff exact": run(Exact()),
        "npeff CG": run(ConjugateGradients(TOLERANCE, 5000)),
        "npeff Gauss–Newton": run(GaussNewton(kernels_of, kl_of_kernels)),
        "npeff EK-FAC (Gauss–Newton)": run(EKFAC(kernels_of, kl_of_kernels)),
        "npeff empirical Fisher": run(EmpiricalFisher()),
        "npeff gradient product": run(Identity()),
    }


def dattri_methods(case: Case) -> dict[str, Callable[[], np.ndarray]]:
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
    from dattri.task import AttributionTask

    def losses(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def mean(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
            return loss(lambda x: torch.func.functional_call(case.model, parameters, (x,)), data).mean()

        return mean

    task = AttributionTask(losses(kl_loss), case.model, case.model.state_dict(), target_func=losses(nll_loss))
    # One full batch: dattri inverts the Hessian of each batch on its own and adds the results.
    load = lambda pair: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), len(pair[0]))  # noqa: E731
    ridge = case.damping + case.weight_decay
    # Its tolerance is absolute and may never be met: as many steps as ours took, for the same accuracy.
    estimator = CrossLossInfluence(
        case.model, kl_loss, nll_loss, solver=ConjugateGradients(TOLERANCE, 5000), damping=case.damping,
        weight_decay=case.weight_decay, progress=False,
    )  # fmt: skip
    steps = estimator.scores([case.train], [case.test]).provenance["iterations"]

    def run(kind: type, **options: object) -> Callable[[], np.ndarray]:
        def scores() -> np.ndarray:
            attributor = kind(task, device="cpu", regularization=ridge, **options)
            attributor.cache(load(case.train))
            return -attributor.attribute(load(case.train), load(case.test)).detach().numpy()

        return scores

    return {
        "dattri explicit": run(IFAttributorExplicit),
        "dattri CG": run(IFAttributorCG, max_iter=steps, tol=TOLERANCE),
    }


def captum_methods(case: Case) -> dict[str, Callable[[], np.ndarray]]:
    from captum.influence import TracInCP

    def scores() -> np.ndarray:
        tracer = TracInCP(
            case.model,
            torch.utils.data.TensorDataset(*case.train),
            ["here"],
            checkpoints_load_func=lambda model, path: 1.0,
            loss_fn=lambda out, target: kl_of_kernels(out, (None, target)),
            test_loss_fn=lambda out, target: nn.functional.cross_entropy(out, target, reduction="none"),
            batch_size=len(case.train[0]),
        )
        return -tracer.influence(case.test).detach().numpy().T

    return {"captum TracInCP": scores}


def kronfluence_methods(case: Case) -> dict[str, Callable[[], np.ndarray]]:
    import copy
    import logging

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    logging.disable(logging.WARNING)

    class Clustering(Task):
        def compute_train_loss(self, batch, model, sample=False):
            out = model(batch[0])
            if not sample:
                return kl_of_kernels(out, batch).sum()
            drawn = torch.multinomial(torch.softmax(out.detach(), 1), 1)[:, 0]
            return nn.functional.cross_entropy(out, drawn, reduction="sum")

        def compute_measurement(self, batch, model):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def scores() -> np.ndarray:
        model = prepare_model(copy.deepcopy(case.model), Clustering())
        train, test = (torch.utils.data.TensorDataset(*pair) for pair in (case.train, case.test))
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer("case", model, Clustering(), cpu=True, output_dir=folder, disable_tqdm=True)
            wide = (
                "activation_covariance",
                "gradient_covariance",
                "per_sample_gradient",
                "eigendecomposition",
                "lambda",
            )
            factors = FactorArguments("ekfac", **{f"{name}_dtype": torch.float64 for name in wide})
            analyzer.fit_all_factors("f", train, per_device_batch_size=len(train), factor_args=factors)
            options = ScoreArguments(
                damping_factor=case.damping + case.weight_decay,
                score_dtype=torch.float64,
                per_sample_gradient_dtype=torch.float64,
                precondition_dtype=torch.float64,
            )
            analyzer.compute_pairwise_scores("s", "f", test, train, len(test), len(train), score_args=options)
            return -analyzer.load_pairwise_scores("s")["all_modules"].numpy().T

    return {"kronfluence EK-FAC": scores}


def methods_of(case: Case) -> tuple[dict[str, Callable[[], np.ndarray]], list[str]]:
    found, missing = ours(case), []
    for name, make in (("dattri", dattri_methods), ("captum", captum_methods), ("kronfluence", kronfluence_methods)):
        try:
            found |= make(case)
        except ImportError as error:
            missing.append(f"{name} is not installed ({error})")
    return found, missing


def compare(case: Case, rounds: int) -> tuple[list[str], list[str]]:
    """A table's lines: every method against retraining."""
    truth = leave_out(
        case.model, kl_loss, [case.train], case.left_out.tolist(), nll_loss, [case.test],
        weight_decay=case.weight_decay, tolerance=1e-9,
    )  # fmt: skip
    changes, n = truth.changes, len(case.train[0])
    methods, missing = methods_of(case)
    lines = ["| method | mean Spearman | lowest | slope | median CPU s | range |", "|---|---|---|---|---|---|"]
    tables: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {}
    slow: set[str] = set()  # once is enough for what takes longer than ten seconds
    for turn in range(rounds + 1):  # the first round warms up
        for name, run in methods.items():
            if turn and name in slow:
                continue
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tables[name] = run()
            if not turn and time.process_time() - start > 10:
                slow.add(name)
            if turn or name in slow:
                times.setdefault(name, []).append(time.process_time() - start)
    for name, table in tables.items():
        predicted = -table[case.left_out] / n
        ranks = [spearmanr(predicted[:, j], changes[:, j]).statistic for j in range(changes.shape[1])]
        slope = float((predicted * changes).sum() / (predicted**2).sum())
        took = times[name]
        lines.append(
            f"| {name} | {np.mean(ranks):.3f} | {min(ranks):.3f} | {slope:.3g} | {statistics.median(took):.3f} | "
            f"{min(took):.3f} – {max(took):.3f} |"
        )
    gap = np.abs(tables["npeff CG"] - tables["npeff exact"]).max() / np.abs(tables["npeff exact"]).max()
    notes = [
        f"{len(changes)} retrainings; largest gradient norm at the end of one {truth.gradient_norms.max():.1e}; CG "
        f"differs from exact by {gap:.1e} of the largest score.",
        *missing,
    ]
    return lines, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["iris", "digits"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else ["iris", "digits"]:
        case = clustering_case(name, args.seed)
        table, notes = compare(case, args.rounds)
        lines = [
            f"# Influence against retraining: {name}",
            "",
            f"`python benchmarks/influence.py --only {name} --rounds {args.rounds} --seed {args.seed}`",
            "",
            f"Deep embedded clustering, {case.about}; KL trained, the labels' NLL asked about.",
            "",
            *table,
            "",
            "Slope: least squares of the true changes on −I/n; 1 is the right scale. Times are processor "
            "time of one thread, in turns within rounds after a warm-up; what took over ten seconds then ran once.",
            *notes,
            "",
            f"{cpu_name()}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
            f"Python {platform.python_version()}.",
        ]
        (args.out / f"influence_{name}.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
