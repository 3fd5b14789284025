"""What ``npeff plan`` says beside what then happens: seconds, bytes on disk, peak memory, for three real models.

Plan and truth run in processes of their own, one after the other on the same core, which must do nothing else: seconds
are those of the clock on the wall. Writes ``results/plan.md``.

MiniLM needs what ``real_models/minilm.py`` needs, and its weights, or it trains them first.

    python benchmarks/plan.py
    python benchmarks/plan.py --models digits --examples 600
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data

WAYS = {
    "digits": [("low_rank", "top-k 8,192"), ("low_rank", "sketch 4,096"), ("diagonal", "top-k 8,192")],
    "fashion": [("low_rank", "top-k 8,192"), ("low_rank", "sketch 4,096"), ("diagonal", "top-k 8,192")],
    "minilm": [("low_rank", "top-k 8,192"), ("low_rank", "sketch 4,096"), ("diagonal", "top-k 8,192")],
}
EXAMPLES = {"digits": 1797, "fashion": 2000, "minilm": 320}


def digits() -> tuple[nn.Module, Any]:
    from npeff import demo

    data = demo.digits(batch_size=32)
    torch.manual_seed(0)
    return demo.train(demo.digits_cnn(), data.first(1200), epochs=4, learning_rate=3e-3), data


def fashion() -> tuple[nn.Module, Any]:
    from npeff import demo

    data = fashion_data.fashion_mnist("test", batch_size=32)
    torch.manual_seed(0)
    return demo.train(fashion_data.fashion_cnn(), data.first(2000), epochs=1, learning_rate=1e-3), data.first(2000)


def minilm() -> tuple[nn.Module, Any]:
    """The classifier of ``real_models/minilm.py`` on reviews that it was not trained on, in no order of length."""
    sys.path.insert(0, str(Path(__file__).parent / "real_models"))
    import minilm as script

    (work := Path(__file__).parent / "real_models" / "work").mkdir(exist_ok=True)
    model, (texts, labels) = script.fine_tuned(work), script.reviews()
    part = slice(script.TRAINED, script.TRAINED + EXAMPLES["minilm"])
    return model, script.Batches(texts[part], labels[part], by_length=False).batches


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "digits": digits,
    "fashion": fashion,
    "minilm": minilm,
}


def compression(name: str) -> Any:
    import npeff

    method, _, size = name.replace(",", "").rpartition(" ")
    return npeff.TopK(int(size)) if method == "top-k" else npeff.Sketch(int(size))


def planned(name: str, n: int, batches: int) -> dict[str, Any]:
    import npeff

    model, data = MODELS[name]()
    began = time.perf_counter()
    plan = npeff.plan(model, data, n_examples=n, n_components=16, batches=batches)
    print(plan, file=sys.stderr)
    document: dict[str, Any] = json.loads(plan.to_json())
    return document | {"took": time.perf_counter() - began}


def happened(name: str, n: int, kind: Any, way: str) -> dict[str, Any]:
    import npeff
    from npeff.models.devices import Peak
    from npeff.storage.container import open_container

    model, data = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "f.h5", time.perf_counter()
        with Peak() as peak:
            fishers = npeff.compute_fishers(
                model, data, kind=kind, compress=compression(way), max_examples=n, out=out, progress=False
            )
        found = {"seconds": time.perf_counter() - began, "memory": peak.peak - peak.before, "process": peak.peak}
        specs = open_container(out).specs.values()
        found |= {"bytes": sum(spec.nbytes for spec in specs if spec.dtype.kind != "S"), "file": out.stat().st_size}
        if kind == "low_rank" and way.startswith("top-k"):
            began = time.perf_counter()
            with Peak() as peak:
                course = npeff.decompose(fishers, 16, progress=False).provenance["course"]
            found |= {"decompose": time.perf_counter() - began, "decompose_memory": peak.peak - peak.before}
            found |= {"iterations": course["iterations"]}
    return found


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(model: str, what: str, expected: float, truth: float, unit: str, within: float = 0.25) -> str:
    off = expected / truth - 1
    mark = "" if abs(off) <= within else f" **beyond {within:.0%}**"
    return f"| {model} | {what} | {expected:,.2f} {unit} | {truth:,.2f} {unit} | {off:+.0%}{mark} |"


def report(models: list[str], examples: int | None, batches: int) -> str:
    table, notes = [], []
    for name in models:
        n = min(EXAMPLES[name], examples or EXAMPLES[name])
        plan = child("plan", name, str(n), str(batches))
        choices = {(choice["kind"], choice["name"]): choice for choice in plan["choices"]}
        notes.append(
            f"{name}: {plan['n_parameters']:,} parameters, {n} examples, {plan['passes']:g} passes; the plan itself "
            f"took {plan['took']:.1f} s on {plan['trial_batches']} batches."
        )
        for kind, way in WAYS[name]:
            expected, truth = choices[kind, way], child("run", name, str(n), kind, way)
            label = f"{kind}, {way}"
            table.append(row(name, f"{label}: Fishers", expected["seconds"], truth["seconds"], "s"))
            assert expected["disk_bytes"] > 0
            table.append(row(name, f"{label}: file", expected["disk_bytes"] / 1e6, truth["file"] / 1e6, "MB"))
            held = (plan["process_bytes"] + expected["memory_bytes"]) / 1e6
            table.append(row(name, f"{label}: peak memory of the process", held, truth["process"] / 1e6, "MB"))
            table.append(
                row(name, f"{label}: of that, work", expected["memory_bytes"] / 1e6, truth["memory"] / 1e6, "MB")
            )
            if "decompose" in truth:
                what = f"{label}: decompose r=16 ({truth['iterations']} steps), rough"
                table.append(row(name, what, expected["decompose_seconds"], truth["decompose"], "s", within=2.0))
                held = expected["decompose_bytes"] / 1e6
                table.append(row(name, f"{label}: decompose, work", held, truth["decompose_memory"] / 1e6, "MB"))
            print(table[-1], file=sys.stderr)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return "\n".join(
        [
            "# The plan beside the truth",
            "",
            f"`python benchmarks/plan.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
            "",
            f"{cpu}, one thread; torch {torch.__version__}, Python {platform.python_version()}. "
            "Memory is anonymous memory (mapped pages of files not counted). Load average at the end: "
            f"{os.getloadavg()[0]:.1f}.",
            "",
            *[f"- {note}" for note in notes],
            "",
            "| model | what | plan | truth | difference |",
            "|---|---|---|---|---|",
            *table,
            "",
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(1)
        what, name, n, *rest = sys.argv[2:]
        found = planned(name, int(n), int(rest[0])) if what == "plan" else happened(name, int(n), rest[0], rest[1])
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--examples", type=int, help="at most so many per model")
    parser.add_argument("--batches", type=int, default=4, help="of the plan's trials")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.md")
    args = parser.parse_args()
    text = report(args.models, args.examples, args.batches)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
