"""Runs methods over seeds and writes what they reach, mean and spread, as a table."""

from __future__ import annotations

import platform
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from measures import Scores, best_auc, coverage, groups_of, purity, stable_number
from methods import Fit

RESULTS = Path(__file__).parent.parent / "results"


class Table:
    """Measures by method, one value per seed."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, method: str, measures: dict[str, float]) -> None:
        for name, value in measures.items():
            self.values[method][name].append(value)
        print(f"{method:40s}", "  ".join(f"{name} {value:.2f}" for name, value in measures.items()), flush=True)

    def markdown(self) -> str:
        names = list(dict.fromkeys(name for row in self.values.values() for name in row))
        lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for method, row in self.values.items():
            cells = [_cell(row.get(name, [])) for name in names]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def evaluate(
    fit: Fit, n: int, factor: np.ndarray, seed: int, questions: Callable[[Scores], dict[str, float]] | None = None
) -> dict[str, float]:
    """Purity, coverage and AUC of a method's components, and of its groups; the number of groups by stability."""
    everyone = np.arange(n)
    whole = fit(everyone, seed)
    rng = np.random.default_rng(seed)
    parts = [fit(np.sort(rng.permutation(n)[: n // 2]), seed + 1 + k) for k in range(3)]
    groups = stable_number(parts, min(12, whole.values.shape[1]))
    grouped = whole.grouped(groups_of(whole.vectors, groups))
    pure = purity(whole.values, factor)
    measures = {
        "purity, mean": float(np.nanmean(pure)),
        "purity, worst": float(np.nanmin(pure)),
        "coverage": coverage(whole.values, factor),
        "AUC, best component": best_auc(whole.values, factor),
        "groups": groups,
        "AUC, best group": best_auc(grouped, factor),
    }
    return measures | (questions(whole) if questions else {})


def write(name: str, title: str, paragraphs: list[str], tables: dict[str, Table]) -> None:
    """``benchmarks/results/<name>.md``: what was run, on what, and what came out."""
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"# {title}",
        "",
        f"`python benchmarks/ground_truth/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`".rstrip() + "  ",
    ]
    lines += [
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "",
    ]
    lines += [line for paragraph in paragraphs for line in (paragraph, "")]
    for heading, table in tables.items():
        lines += [f"## {heading}", "", table.markdown(), ""]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
