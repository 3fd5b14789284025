"""Runs methods over seeds and writes what they reach, mean and spread, as a table."""

from __future__ import annotations

import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from measures import TOP, Scores, best_auc, coverage, purity
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


GROUPS = (
    "Groups: for NPEFF the strategies, `components.strategies()`, their number chosen without labels by stability; for "
    "the others average linkage on 1 − |cos| of their own vectors. The last column lets every method have the number "
    "of groups, 2 to 12, that the labels say is best."
)


def evaluate(
    fit: Fit,
    factor: np.ndarray,
    seed: int,
    questions: Callable[[Scores], dict[str, float]] | None = None,
    top: int = TOP,
) -> dict[str, float]:
    """Purity of the top examples, coverage and AUC of a method's components, and of its groups."""
    scores = fit(seed)
    pure = purity(scores.values, factor, top)
    measures = {
        "purity, mean": float(np.nanmean(pure)),
        "purity, worst": float(np.nanmin(pure)),
        "coverage": coverage(scores.values, factor, top),
        "AUC, best component": best_auc(scores.values, factor),
    }
    if scores.chosen is not None:
        measures["strategies"] = scores.chosen
        measures["AUC, best strategy"] = best_auc(scores.cuts[scores.chosen], factor)
    if scores.cuts:
        measures["AUC, best group of all cuts"] = max(best_auc(cut, factor) for cut in scores.cuts.values())
    return measures | (questions(scores) if questions else {})


def write(name: str, title: str, paragraphs: list[str], tables: dict[str, Table]) -> None:
    """``benchmarks/results/<name>.md``: what was run, on what, and what came out."""
    RESULTS.mkdir(exist_ok=True)
    arguments = [shlex.quote(Path(word).name if "/" in word else word) for word in sys.argv[1:]]
    lines = [
        f"# {title}",
        "",
        f"`python benchmarks/ground_truth/{Path(sys.argv[0]).name} {' '.join(arguments)}`".rstrip() + "  ",
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
