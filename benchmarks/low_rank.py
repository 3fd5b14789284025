"""The low-rank solver against the published algorithm, on the Fishers of trained networks.

Both sides factorise the same file of Fishers on the same cores in one process, taking turns. The published algorithm
runs at its best learning rate out of a sweep (the sweep's time is not counted). Before anything is reported, the losses
are recomputed from the vectors and coefficients alone. Reported: the published loss after its 500 joint steps and its
time; our time to that loss, building the space included; both final losses; how well components of different seeds
match (mean |cos| under the best one-to-one matching). Subnormal numbers count as zero on both sides: the published
algorithm makes them, and some processors are five times slower with them. Writes ``results/low_rank_<data>.md``.

    python benchmarks/low_rank.py digits
    python benchmarks/low_rank.py fashion        # needs Debian's dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import npeff
from npeff import demo
from npeff.decomposition.decompose import DivergedError
from npeff.fishers.scaling import scale

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data

RATES = (1e-3, 3e-3, 1e-2)
SWEEP = npeff.PublishedOptions(g_only=50, joint=50)
FULL = npeff.PublishedOptions(g_only=50, joint=500)


def fishers_of(name: str) -> tuple[npeff.Fishers, int]:
    """The Fishers of 1 500 digits or 5 000 Fashion-MNIST images, rank 3, and the number of components."""
    torch.manual_seed(0)
    if name == "digits":
        images, model, epochs, n, compress, r = demo.digits(100), demo.digits_cnn(), 6, 1500, None, 32
    else:
        images, model, epochs, n, compress, r = (
            fashion_data.fashion_mnist(),
            fashion_data.fashion_cnn(),
            2,
            5000,
            npeff.TopK(2048),
            32,
        )
    demo.train(model, images, epochs=epochs)
    model.eval()
    began = time.perf_counter()
    fishers = npeff.compute_fishers(model, images, rank=3, compress=compress, max_examples=n, progress=False)
    print(f"{fishers} in {time.perf_counter() - began:.1f} s", flush=True)
    return fishers, r


def recomputed_loss(components: npeff.Components, fishers: npeff.Fishers) -> float:
    """L / Σ‖A_iA_iᵀ‖² in float64, from the stored rows, G and W."""
    scaled = scale(fishers)
    G, W = torch.from_numpy(components.vectors).double(), torch.from_numpy(components.coefficients).double()
    P = scaled.rows.project(G)
    offsets = torch.from_numpy(np.asarray(fishers.row_offsets))
    examples = torch.repeat_interleave(torch.arange(len(W)), offsets.diff())
    cross = torch.zeros_like(W).index_add_(0, examples, P.square())
    const = float(np.square(scaled.fisher_norms).sum())
    return float(const - 2 * (W * cross).sum() + ((W.T @ W) * (G @ G.T).square()).sum()) / const


def match(a: npeff.Components, b: npeff.Components) -> float:
    cosines = np.abs(a.vectors @ b.vectors.T)
    return float(cosines[linear_sum_assignment(-cosines)].mean())


def run(fishers: npeff.Fishers, r: int, **options: object) -> tuple[npeff.Components, float, list[tuple[float, float]]]:
    """Components, seconds in all, and (seconds since the call, best loss) after every iteration."""
    began = time.perf_counter()
    trace: list[tuple[float, float]] = []
    components = npeff.decompose(
        fishers,
        r,
        progress=False,
        callback=lambda p: trace.append((time.perf_counter() - began, p.best)) and None,
        **options,
    )
    seconds = time.perf_counter() - began
    again = recomputed_loss(components, fishers)
    assert abs(again - components.loss) < 1e-5, f"loss {components.loss} is {again} when recomputed"
    return components, seconds, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "fashion"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    torch.set_flush_denormal(True)
    fishers, r = fishers_of(args.data)

    sweep: dict[float, float] = {}
    for rate in RATES:
        options = npeff.PublishedOptions(rate, SWEEP.g_only, SWEEP.joint)
        try:
            sweep[rate] = npeff.decompose(fishers, r, algorithm="published", published=options, progress=False).loss
        except DivergedError:
            sweep[rate] = float("inf")
        print(f"published, rate {rate:g}: {sweep[rate]:.5f} after {SWEEP.joint} joint steps", flush=True)
    rates = sorted((loss, rate) for rate, loss in sweep.items() if np.isfinite(loss))

    published, ours = [], []
    for seed in range(args.seeds):
        for _, rate in rates:  # the best rate of the sweep that does not diverge later
            options = npeff.PublishedOptions(rate, FULL.g_only, FULL.joint)
            try:
                result = run(fishers, r, algorithm="published", published=options, seed=seed)
                break
            except DivergedError:
                continue
        published.append((*result, rate))
        print(f"published, seed {seed}, rate {rate:g}: {result[0].loss:.5f} in {result[1]:.1f} s", flush=True)
        ours.append(run(fishers, r, seed=seed))
        print(
            f"npeff, seed {seed}: {ours[-1][0].loss:.5f} in {ours[-1][1]:.1f} s, {ours[-1][0].provenance['course']}",
            flush=True,
        )
        text = table(args, fishers, r, sweep, published, ours)
        (args.out / f"low_rank_{args.data}.md").write_text(text)  # after every seed: a long run may be cut short
    sys.stdout.write(text)


def table(
    args: argparse.Namespace, fishers: npeff.Fishers, r: int, sweep: dict[float, float], published: list, ours: list
) -> str:
    lines = [
        f"# Low-rank decomposition, {args.data}",
        "",
        f"`python benchmarks/low_rank.py {' '.join(sys.argv[1:])}` · {fishers} · r = {r}",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "",
        f"Published rates, loss after {SWEEP.g_only} + {SWEEP.joint} steps: "
        + ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sweep.items()),
        "",
        "| seed | published loss, 500 joint steps | its time (s) | ours: time to that loss (s) | ratio | "
        "ours: final loss | ours: time in all (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for seed, ((p, p_seconds, _, rate), (c, seconds, trace)) in enumerate(zip(published, ours, strict=True)):
        reached = next((t for t, loss in trace if loss <= p.loss), float("nan"))
        ratios.append(p_seconds / reached)
        lines.append(
            f"| {seed} | {p.loss:.5f} (rate {rate:g}) | {p_seconds:.1f} | {reached:.1f} | "
            f"{p_seconds / reached:.1f}× | {c.loss:.5f} | {seconds:.1f} |"
        )
    lines += [
        "",
        f"Median ratio {statistics.median(ratios):.1f}×. Space: {ours[0][0].provenance['course']['space']} "
        f"({ours[0][0].provenance['course']['space_reason']}).",
    ]
    lines += ["", "| components of two seeds, mean abs. cosine | published | ours |", "|---|---|---|"]
    for a, b in itertools.combinations(range(len(ours)), 2):
        lines.append(
            f"| {a}, {b} | {match(published[a][0], published[b][0]):.3f} | {match(ours[a][0], ours[b][0]):.3f} |"
        )
    return "\n".join(lines) + "\n"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
