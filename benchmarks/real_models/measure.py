"""What the scripts on real models share: measured stages, seeds compared, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import npeff
from npeff import trust
from npeff.fishers.factors import factorise
from npeff.fishers.options import FisherOptions
from npeff.models.memory import Peak

HERE = Path(__file__).parent
T = TypeVar("T")


def arguments(description: str, **sizes: int) -> argparse.Namespace:
    """Sizes that a script can be run at, where its work is kept, and where its table goes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seeds", type=int, default=2, help="decompositions to compare")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="weights, Fishers and components stay here")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the tables")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class Measured:
    """Stages with their seconds of the processor and their most memory, kept beside the work they left.

    A stage that was measured before is run again (it finds its file), but not measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stages: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str, run: Callable[[], T], resumed: bool = False) -> T:
        """Run, and take down what it took; ``resumed`` work took more, earlier."""
        began, on_the_wall = time.process_time(), time.perf_counter()
        with Peak() as peak:
            result = run()
        found = {
            "seconds": time.process_time() - began,
            "wall": time.perf_counter() - on_the_wall,
            "memory": peak.peak - peak.before,
            "process": peak.peak,
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        self.stages.setdefault(name, found | ({"resumed": 1} if resumed else {}))
        self._path.write_text(json.dumps(self.stages, indent=1))
        print(f"{name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in found.items()), file=sys.stderr, flush=True)
        return result

    def said(self, name: str) -> str:
        """A stage for the table."""
        stage = self.stages[name]
        seconds = (
            "resumed once, seconds not known" if stage.get("resumed") else f"{stage['seconds']:,.0f} s of the processor"
        )
        return (
            f"{seconds}, {stage['memory'] / 1e9:.2f} GB beyond the "
            f"{(stage['process'] - stage['memory']) / 1e9:.2f} GB held before"
        )


def fishers_of(measured: Measured, path: Path, **options: Any) -> npeff.Fishers:
    """The Fishers, computed once."""
    options.setdefault("progress", False)
    return measured.stage(
        f"Fishers {path.stem}",
        lambda: npeff.load(path) if path.exists() else npeff.compute_fishers(out=path, **options),
        resumed=Path(f"{path}.parts").exists(),
    )


def decomposed(
    measured: Measured, fishers: npeff.Fishers, path: Path, args: argparse.Namespace, **options: Any
) -> list[npeff.Components]:
    """One decomposition per seed, computed once each."""

    def run(seed: int) -> npeff.Components:
        file = path.with_name(f"{path.stem}_{seed}.h5")
        if file.exists():
            return npeff.load(file)
        found = npeff.decompose(fishers, args.components, seed=seed, progress=False, **options)
        found.save(file)
        return found

    return [measured.stage(f"decompose, seed {seed}", lambda seed=seed: run(seed)) for seed in range(args.seeds)]


def summary(
    title: str,
    what: Sequence[tuple[str, str]],
    measured: Measured,
    fishers: npeff.Fishers,
    file: Path,
    components: Sequence[npeff.Components],
    held_out: npeff.Fishers | None = None,
) -> list[str]:
    """The head of a table: what was computed, what it took, how well it fits, how alike two seeds are."""
    stage, timed_on = measured.stages[f"Fishers {file.stem}"], len(fishers)
    if stage.get("resumed") and held_out is not None:
        stage, timed_on = measured.stages[f"Fishers {file.stem}_held_out"], len(held_out)
    ranks, first = fishers.ranks, components[0]
    lines = [f"# {title}", "", f"`{command()}`", "", machine(), "", "| | |", "|---|---|"]
    rows = list(what)
    rows += [
        ("Fishers", f"{len(fishers):,} of {fishers.n_parameters:,} parameters"),
        ("rows per example", f"{ranks.min()} to {ranks.max()}, mean {ranks.mean():.2f}"),
        (
            "time per example",
            f"{1e3 * stage['seconds'] / timed_on:,.0f} ms of the processor, over {timed_on:,} examples",
        ),
        ("Fishers, in all", measured.said(f"Fishers {file.stem}")),
        ("file", f"{file.stat().st_size / 1e6:,.0f} MB"),
    ]
    for seed, found in enumerate(components):
        course = found.provenance["course"]
        rows.append(
            (
                f"decompose, r = {found.n_components}, seed {seed}",
                f"loss {found.loss:.4f}; {course['iterations']} steps, space {course['space']}; "
                f"{measured.said(f'decompose, seed {seed}')}",
            )
        )
    rows.append(("explained share, median over examples", f"{np.nanmedian(trust.explained(first, fishers)):.3f}"))
    if held_out is not None:
        share = np.nanmedian(trust.explained(first, held_out))
        rows.append((f"the same on {len(held_out):,} examples held out", f"{share:.3f}"))
    if len(components) > 1:
        _, cosine = trust.match(components[0], components[1])
        rows.append(
            (
                "components of two seeds, matched |cos|",
                f"mean {cosine.mean():.3f}, median {np.median(cosine):.3f}, {np.mean(cosine > 0.9):.0%} above 0.9",
            )
        )
    largest = max(stage["resident"] for stage in measured.stages.values())
    rows.append(("largest resident size of the process", f"{largest / 1e9:.2f} GB"))
    return lines + [f"| {left} | {right} |" for left, right in rows] + [""]


def energy_kept(fishers: npeff.Fishers, logits: torch.Tensor | None = None) -> str:
    """Share of the trace of diag p − ppᵀ that the rows hold; of some examples' logits, where Fishers keep not all."""
    asked = fishers.provenance["options"]
    options = FisherOptions(rank=asked["rank"], energy=asked["energy"])
    logits = (torch.from_numpy(np.array(fishers.logits)) if logits is None else logits).double()
    factors = factorise(logits, options, None, fishers.ids[: len(logits)])
    held = factors.columns.square().sum(dim=(1, 2)) * factors.scale.square()
    p = torch.softmax(logits, 1)
    share = held / (p * (1 - p)).sum(1)
    return f"{share.median():.0%} of it, median over examples ({share.min():.0%} to {share.max():.0%})"


def command() -> str:
    script = Path(sys.argv[0]).resolve()
    return " ".join(["python", str(script.relative_to(HERE.parent.parent)), *sys.argv[1:]])


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return (
        f"{cpu}, {torch.get_num_threads()} thread; torch {torch.__version__}, Python {platform.python_version()}. "
        f"Seconds are those of the processor: the machine did other work too (load {os.getloadavg()[0]:.1f}). "
        "Memory is anonymous memory."
    )


def plain(text: str, length: int = 110) -> str:
    """A text on one line of a table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else text[: length - 1] + "…"
