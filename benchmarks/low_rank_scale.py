"""The low-rank solver against the published algorithm as the examples grow: 2 000 to 60 000 images of Fashion-MNIST.

Both sides factorise the same Fishers (three rows each, top-k) on one core, in one process. Up to ``--finish`` examples
the published algorithm takes all of its 50 + 500 steps, at the best fixed rate of a sweep that is not counted, and ours
runs until it has that loss. Beyond, its time is measured seconds a step × 550 steps, called so in the table, and ours
runs until it has the loss that the published algorithm reached on the largest n that it finished. ``--part memory``:
all 60 000 in a process that may not allocate more than a limit. ``--part growth``: exponents of our cost, and the
floor. Losses are recomputed from rows, vectors and coefficients. Subnormal numbers count as zero on both sides: the
published algorithm makes them, and some processors are five times slower with them. Each part writes
``results/low_rank_scale_<part>.md``.

    python benchmarks/low_rank_scale.py --part compare      # needs Debian's dataset-fashion-mnist
    python benchmarks/low_rank_scale.py --part memory --top-k 2048
    python benchmarks/low_rank_scale.py --part growth
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import low_rank_growth
import npeff
from low_rank import processor, recomputed_loss
from npeff import demo
from npeff.decomposition.decompose import DivergedError
from npeff.models.devices import Peak

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data

HERE = Path(__file__).parent
STEPS = 550


def network(work: Path) -> torch.nn.Module:
    """The small CNN for Fashion-MNIST, trained once and kept."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, weights = fashion_data.fashion_cnn(), work / "fashion.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        demo.train(model, fashion_data.fashion_mnist(), epochs=2)
        torch.save(model.state_dict(), weights)
    return model.eval()


def fishers(n: int, args: argparse.Namespace) -> npeff.Fishers:
    """The Fishers of the first n training images, kept as a file."""
    out = args.work / f"low_rank_scale_{n}_{args.top_k}.h5"
    if out.exists():
        return npeff.load(out)
    options: dict[str, Any] = {"rank": 3, "compress": npeff.TopK(args.top_k), "max_examples": n, "out": out}
    return npeff.compute_fishers(network(args.work), fashion_data.fashion_mnist(), progress=False, **options)


def published(rows: npeff.Fishers, r: int, rate: float, g_only: int, joint: int) -> tuple[npeff.Components, float]:
    """Components, and seconds of the processor."""
    options = npeff.PublishedOptions(rate, g_only, joint, log_every=g_only + joint)
    began = time.process_time()
    found = npeff.decompose(rows, r, algorithm="published", published=options, progress=False)
    return found, time.process_time() - began


def best_rates(rows: npeff.Fishers, r: int) -> list[float]:
    """Rates from the best to the worst after 25 + 50 steps; the gradient grows with n, so rates are shares of 1/n."""
    losses = []
    for share in (2.5, 5.0, 10.0, 20.0):
        try:
            losses.append((published(rows, r, share / len(rows), 25, 50)[0].loss, share / len(rows)))
        except DivergedError:
            continue
    return [rate for loss, rate in sorted(losses) if np.isfinite(loss)]


def ours(rows: npeff.Fishers, r: int, target: float, **options: Any) -> tuple[npeff.Components, float]:
    """A search that ends when it has the loss; seconds of the processor, everything included."""
    began = time.process_time()
    found = npeff.decompose(rows, r, progress=False, callback=lambda p: p.best <= target, **options)
    seconds = time.process_time() - began
    again = recomputed_loss(found, rows)
    assert abs(again - found.loss) < 1e-5, f"loss {found.loss} is {again} when recomputed"
    assert found.loss <= target * (1 + 1e-4), f"loss {found.loss} is above {target}"
    return found, seconds


def compare(args: argparse.Namespace) -> list[str]:
    lines = [
        "| n | rows × columns, entries | published: steps, rate | loss | time (s) | ours: loss | time (s) | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    target, share = float("inf"), 5.0
    for n in args.examples:
        rows = fishers(n, args)
        if n <= args.finish:
            for rate in best_rates(rows, args.components):
                try:
                    found, seconds = published(rows, args.components, rate, 50, 500)
                    break
                except DivergedError:
                    continue
            target, share = found.loss, rate * n
            again = recomputed_loss(found, rows)
            assert abs(again - target) < 1e-5, f"loss {target} is {again} when recomputed"
            theirs = f"550 run, {rate:.2g} | {target:.5f} | {seconds:.1f}"
        else:
            few = [published(rows, args.components, share / n, 0, steps)[1] for steps in (2, 12)]
            seconds = STEPS * (few[1] - few[0]) / 10
            theirs = f"10 run, 540 reckoned | not run: ours must reach {target:.5f} | {seconds:.0f} reckoned"
        found, mine = ours(rows, args.components, target)
        size = f"{rows.rows.n_rows:,} × {len(found.columns):,}, {rows.rows.nbytes / 8e6:.1f} million"
        lines.append(f"| {n:,} | {size} | {theirs} | {found.loss:.5f} | {mine:.1f} | {seconds / mine:.0f}× |")
        print(lines[-1], file=sys.stderr, flush=True)
        write(args, lines)
    return lines


def memory(args: argparse.Namespace) -> list[str]:
    """The largest n in processes of their own, under a limit; each starts from the same file."""
    n = max(args.examples)
    rows = fishers(n, args)
    stored = rows.rows.nbytes
    del rows
    lines = [
        f"{n:,} examples; the stored rows take {stored / 1e6:,.0f} MB. The limit, {args.megabytes} MB, is the system's "
        "(`RLIMIT_DATA`: what a process allocates; mapped files are no part of it). Ours: one start, four "
        "replacements, and a polish to a relative tolerance of 1e-4.",
        "",
        "| | outcome | most memory of the process (MB) | seconds |",
        "|---|---|---|---|",
    ]
    for who in ("published", "ours"):
        command = [sys.executable, __file__, "--part", who, "--examples", str(n), "--megabytes", str(args.megabytes)]
        command += ["--work", str(args.work), "--top-k", str(args.top_k), "--components", str(args.components)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip().splitlines()[-1]
        lines.append(said if said.startswith("|") else f"| {who} | {said[:120]} (status {done.returncode}) | | |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def limited(args: argparse.Namespace) -> None:
    """One side under the limit; prints a table row."""
    resource.setrlimit(resource.RLIMIT_DATA, (args.megabytes * 10**6,) * 2)
    rows = fishers(max(args.examples), args)
    began = time.process_time()
    with Peak() as peak:
        try:
            if args.part == "published":
                found, _ = published(rows, args.components, 5 / len(rows), 0, 2)
                said = f"2 steps, loss {found.loss:.4f}"
            else:
                allowed = args.megabytes * 10**6 - peak.before - (150 << 20)
                short: dict[str, Any] = {"n_init": 1, "n_replacements": 4, "tolerance": 1e-4}
                found = npeff.decompose(rows, args.components, memory=allowed, progress=False, **short)
                course = found.provenance["course"]
                said = f"finished: loss {found.loss:.5f}, {course['iterations']} steps, space {course['space']}"
        except (MemoryError, RuntimeError) as error:
            said = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    print(f"| {args.part} | {said} | {peak.peak / 1e6:,.0f} | {time.process_time() - began:.0f} |")


def write(args: argparse.Namespace, lines: list[str]) -> None:
    head = [
        f"# Low-rank decomposition as examples grow: {args.part}",
        "",
        f"`python {' '.join(['benchmarks/low_rank_scale.py', *sys.argv[1:]])}` · Fashion-MNIST, rank 3, top-k "
        f"{args.top_k:,}, r = {args.components}",
        f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}; seconds of the processor; load "
        f"average at the end {os.getloadavg()[0]:.1f}",
        "",
    ]
    args.out.mkdir(exist_ok=True)
    (args.out / f"low_rank_scale_{args.part}.md").write_text("\n".join([*head, *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["compare", "memory", "growth", "published", "ours"], required=True)
    parser.add_argument("--examples", type=int, nargs="+", default=[2000, 5000, 20_000, 60_000])
    parser.add_argument("--finish", type=int, default=5000, help="the published algorithm runs to its end up to here")
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--megabytes", type=int, default=2400)
    parser.add_argument("--work", type=Path, default=HERE / "real_models" / "work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.part in ("published", "ours"):
        limited(args)
        return
    part = {"compare": compare, "memory": memory, "growth": low_rank_growth.table}[args.part]
    write(args, part(args))


if __name__ == "__main__":
    main()
