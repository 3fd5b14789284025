"""10 000 × 100 influence scores on a network of 101 770 parameters: time, and memory of a process of its own.

Fashion-MNIST where it is installed, random images otherwise. Writes ``results/influence_scale.md``.

    python benchmarks/influence_scale.py
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from npeff.companions.influence import EKFAC, ConjugateGradients, CrossLossInfluence, cross_entropy
from npeff.companions.influence.losses import NAMED_OUTPUT_LOSSES, model_outputs
from npeff.errors import NpeffError
from topk import cpu_name  # beside this file

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data


def scale(solver: str) -> dict[str, float]:
    """10 000 × 100 scores on a network of 101 770 parameters; run in a process of its own, for its peak memory."""
    torch.manual_seed(0)
    try:
        train, test = (fashion_data.fashion_mnist(split).first(n) for split, n in (("train", 10_000), ("test", 100)))
        pairs = [(data.inputs.flatten(1), data.labels) for data in (train, test)]
    except NpeffError:  # the images are not installed: what it costs does not depend on them
        pairs = [(torch.randn(n, 784), torch.randint(0, 10, (n,))) for n in (10_000, 100)]
    (x, y), (tx, ty) = pairs
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    for step in range(600):
        part = torch.arange(step * 100, step * 100 + 100) % len(x)
        optimizer.zero_grad()
        cross_entropy(model, (x[part], y[part])).mean().backward()
        optimizer.step()
    data = [(x[i : i + 250], y[i : i + 250]) for i in range(0, len(x), 250)]
    chosen = {"ekfac": EKFAC(model_outputs, NAMED_OUTPUT_LOSSES["cross_entropy"]), "cg": ConjugateGradients(1e-2, 50)}[
        solver
    ]
    warnings.simplefilter("ignore")
    estimator = CrossLossInfluence(model, cross_entropy, solver=chosen, damping=1.0, progress=False)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    estimator.fit(data if solver == "ekfac" else data[:4])
    fitted = time.perf_counter()
    scores = estimator.scores(data, [(tx, ty)])
    end = time.perf_counter()
    assert scores.values.shape == (10_000, 100) and np.isfinite(scores.values).all()
    check(estimator, scores.values, (x, y), (tx, ty))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "fit": fitted - start,
        "score": end - fitted,
        "before": before / 1e6,
        "peak": peak / 1e6,
        "residual": float(scores.residuals.max()),
    }


def scale_lines() -> list[str]:
    lines = [
        "| solver | fit s | solve and score s | memory before GB | peak GB | largest residual |",
        "|---|---|---|---|---|---|",
    ]
    for solver, name in (("ekfac", "EK-FAC, H of 10 000 examples"), ("cg", "CG to 1e-2, H of 1 000 examples")):
        command = [sys.executable, __file__, "--one", solver]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        lines.append(
            f"| {name} | {found['fit']:.1f} | {found['score']:.1f} | {found['before']:.2f} | {found['peak']:.2f} | "
            f"{found['residual']:.1e} |"
        )
    return lines


def check(estimator: CrossLossInfluence, values: np.ndarray, train: tuple, test: tuple) -> None:
    """Two entries again, from the gradients by autograd and the fitted inverse."""
    parameters = list(estimator.model.parameters())

    def gradient(pair: tuple, i: int) -> torch.Tensor:
        loss = cross_entropy(estimator.model, (pair[0][i : i + 1], pair[1][i : i + 1]))[0]
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])

    solved = estimator.solve(torch.stack([gradient(test, j) for j in (0, 99)])).x
    for i, (row, j) in ((17, (0, 0)), (9_999, (1, 99))):
        expected = -float(gradient(train, i) @ solved[row])
        assert abs(values[i, j] - expected) <= 2e-3 * max(abs(expected), float(np.abs(values[:, j]).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "influence_scale.md")
    parser.add_argument("--one", choices=["ekfac", "cg"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(scale(args.one)))
        return
    lines = ["# 10 000 × 100 influence scores, 101 770 parameters", "", "`python benchmarks/influence_scale.py`", ""]
    lines += scale_lines()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines += [
        "",
        "Damping 1: the network is far from an optimum, its Hessian indefinite. Two scores were computed again by "
        "autograd and the same inverse, and agreed.",
    ]
    lines += ["", f"{cpu_name()}, {torch.get_num_threads()} threads; {versions}."]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
