"""Per-example Fishers and the largest entries of each, beside what people use today.

Networks: an MLP, two CNNs, a BERT on padded batches. Kinds: diagonal, low-rank. Sides, taking turns on one core: npeff;
BackPACK; torch.func's vmap(jacrev); nngeometry; opacus' per-example gradients; all but npeff followed by torch.topk. As
yardsticks the forward pass, and the C − 1 plain batched backward passes, which make no per-example gradient.

Before anything is timed, every side's selection is compared with the largest entries of a dense float64 Jacobian:
values to 1e-5 of the largest, none kept that is smaller than the k-th. npeff is timed over several batches less one,
which pays for the self-check and the digests of the weights; that is reported by itself. Peak memory: what a process of
its own grows by in a batch, once it is warm. Floors: the operations of the forward pass and of the C − 1 passes to the
layers' outputs, and the bytes of the rows read once, over rates measured in the same run. Writes
``results/fishers_<part>.md``.

    python benchmarks/fishers.py
    python benchmarks/fishers.py mlp cnn --rounds 3 --examples 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import machine
import npeff
from fisher_cases import CASES, UNTRAINED, Case, compute, mlp, transformer, wide_cnn
from fisher_peers import PEERS, Rows, plain_passes, select

OURS, KINDS = "npeff", ("diagonal", "low_rank")
CHECKED = (0, -1)
"""Examples of the batch that are compared with the dense answer."""
BATCHES = 4
PARTS = (*CASES, "growth")


def check(case: Case, kind: str, name: str, found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Compare flat indices and values with the dense float64 rows."""
    columns = case.columns("class" if name == "BackPACK, second order" else "reduced")
    for i in (i % case.n for i in CHECKED):
        exact = case.oracle(i, columns)
        exact = (exact.square().sum(dim=0) if kind == "diagonal" else exact).reshape(-1)
        index, values = found[i]
        scale = exact.abs().max()
        least = torch.topk(exact.abs(), case.k).values[-1]
        gap = float((exact[index] - values.double()).abs().max() / scale)
        short = float((least - exact[index].abs().min()) / scale)
        if len(index) != case.k or len(index.unique()) != case.k or gap > 1e-5 or short > 1e-5:
            raise AssertionError(f"{name}, {case.name}, {kind}: values off by {gap:.1e}, smallest kept by {short:.1e}")


def selection(fishers: npeff.Fishers, m: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """npeff's rows as flat indices and values."""
    rows, found = fishers.rows, []
    assert isinstance(rows, npeff.fishers.rows.SparseRows)
    for i in range(len(fishers)):
        first, last = int(fishers.row_offsets[i]), int(fishers.row_offsets[i + 1])
        parts, values = [], []
        for row in range(first, last):
            entries = slice(int(rows.indptr[row]), int(rows.indptr[row + 1]))
            parts.append(torch.from_numpy(rows.indices[entries].astype("int64")) + (row - first) * m)
            values.append(torch.from_numpy(rows.values[entries].copy()))
        found.append((torch.cat(parts), torch.cat(values)))
    return found


def sides(case: Case, kind: str) -> tuple[dict[str, Rows], list[str]]:
    """Peers that can do this network, checked; and why others cannot."""
    found: dict[str, Rows] = {}
    missing = []
    for name, make in PEERS.items():
        try:
            rows = make(case, kind)
            picked = select(rows(), case.k)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            missing.append(f"{name}: {type(error).__name__}: {lines[0][:160] if lines else ''}")
            continue
        check(case, kind, name, picked)
        found[name] = rows
    return found, missing


def operations(case: Case) -> tuple[float, float]:
    """Floating-point operations: the forward pass with C − 1 passes to the layers' outputs; the C − 1 plain passes."""
    forward, passes = plain_passes(case)
    with FlopCounterMode(display=False) as counter:
        forward()
    once = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        passes()
    plain = counter.get_total_flops()
    n_columns = case.columns("reduced").shape[2]
    # Half of a plain pass's products make parameter gradients; each of the two costs about a forward pass.
    return once + max(plain - n_columns * once, 0), plain


def compare(case: Case, kind: str, args: argparse.Namespace, rates: list[float]) -> list[str]:
    check(case, kind, OURS, selection(compute(case, kind), case.m))
    peers, missing = sides(case, kind)
    forward, passes = plain_passes(case)
    gradients: dict[str, list[float]] = {name: [] for name in peers}

    def timed(name: str) -> Callable[[], object]:
        def run() -> None:
            start = time.perf_counter()
            pieces = peers[name]()
            gradients[name].append(time.perf_counter() - start)
            select(pieces, case.k)

        return run

    runs: dict[str, Callable[[], object]] = {
        "several": lambda: compute(case, kind, 1 + BATCHES),
        "one": lambda: compute(case, kind),
        "forward pass": forward,
        "plain backward passes": passes,
        **{name: timed(name) for name in peers},
    }
    for run in (*runs.values(),)[:4]:  # the peers are warm from being checked
        run()
    times = machine.interleaved(runs, args.rounds, args.seconds, fewest=3, warm_up=False)
    once, several = times.pop("one"), times.pop("several")
    times[OURS] = [(more - less) / BATCHES for more, less in zip(several, once, strict=False)]
    set_up = machine.quartiles(once)[1] - machine.quartiles(times[OURS])[1]
    medians = {name: machine.quartiles(values)[1] for name, values in times.items()}
    rates[:] = map(max, rates, machine.rates())  # the best so far: rates of the machine, not of its other work
    n_columns = case.columns("reduced").shape[2]
    rows_bytes = 4 * case.m * case.n * (1 if kind == "diagonal" else n_columns)
    needed, _ = operations(case)
    floor, read = needed / rates[0], rows_bytes / rates[1]
    ours, plain = medians[OURS], medians["plain backward passes"]
    lines = [
        f"## {case.name}: {kind.replace('_', '-')} Fishers and the {case.k:,} largest entries",
        "",
        f"{case.n} examples, {case.m:,} parameters, {n_columns} passes. Checked against float64.",
        "",
        "| | ms an example | quartiles | of it gradients | × npeff | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    peaks = {name: peak_of(case, kind, name) for name in (OURS, *peers)} if args.peaks else {}
    for name in (OURS, *peers, "plain backward passes", "forward pass"):
        low, middle, high = (1e3 * value / case.n for value in machine.quartiles(times[name]))
        share = f"{1e3 * machine.quartiles(gradients[name])[1] / case.n:.3f}" if name in peers else ""
        memory = f"{peaks[name] / 1e6:,.0f}" if name in peaks else ""
        label = f"{name} + torch.topk" if name in peers else name
        lines.append(
            f"| {label} | {middle:.3f} | {low:.3f} – {high:.3f} | {share} | {medians[name] / ours:.2f} | {memory} |"
        )
    lines += [
        "",
        f"- npeff takes {ours / plain:.2f}× the plain backward passes alone, "
        f"{ours / (plain + medians['forward pass']):.2f}× forward and plain backward passes. Once per run: "
        f"{1e3 * set_up:.0f} ms.",
        f"- Operations of the forward pass and of the passes to the layers' outputs: {1e3 * floor / case.n:.3f} ms an "
        f"example; npeff is at {ours / floor:.1f}× that. The rows read once: {1e3 * read / case.n:.3f} ms; "
        f"npeff is at {ours / read:.2f}×.",
        *(f"- Not run: {line}" for line in missing),
        "",
    ]
    print("\n".join(lines), flush=True)
    return lines


def peak_of(case: Case, kind: str, name: str) -> int:
    """Peak memory of one side in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--peak", json.dumps([case.name, case.n, kind, name])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def print_peak(name: str, n: int, kind: str, side: str) -> None:
    """Print the peak of one side; what a batch of one example loads and keeps is not counted, for any side."""

    def work(case: Case) -> Callable[[], object]:
        if side == OURS:
            return lambda: compute(case, kind)
        rows = PEERS[side](case, kind)
        return lambda: select(rows(), case.k)

    work(UNTRAINED[name](1))()
    run = work(UNTRAINED[name](n))
    print(machine.peak(run))


def growth(rounds: int) -> list[str]:
    """How npeff's time for a batch grows in n and in m, as the slope of log time over log size."""
    lines = ["| | sizes | ms | exponent |", "|---|---|---|---|"]
    ns = (16, 32, 64, 128)
    series: list[tuple[str, list[Case], Callable[[Case], float]]] = [
        ("mlp, n", [mlp(n, examples=0) for n in ns], lambda case: case.n),
        ("wide_cnn, n", [wide_cnn(n, 32, examples=0) for n in (8, 16, 32)], lambda case: case.n),
        ("transformer, n", [transformer(n) for n in (4, 8, 16)], lambda case: case.n),
        ("mlp, m", [mlp(32, width, examples=0) for width in (512, 1024, 2048)], lambda case: case.m),
        ("wide_cnn, m", [wide_cnn(8, width, examples=0) for width in (32, 64, 128)], lambda case: case.m),
        ("transformer, m", [transformer(8, hidden) for hidden in (128, 256, 512)], lambda case: case.m),
    ]
    for name, cases, size in series:
        for kind in KINDS:
            runs = {
                (i, batches): lambda case=case, kind=kind, batches=batches: compute(case, kind, batches)
                for i, case in enumerate(cases)
                for batches in (1, 3)
            }
            times = machine.interleaved(runs, rounds)
            medians = [
                machine.quartiles([(c - a) / 2 for a, c in zip(times[i, 1], times[i, 3], strict=True)])[1]
                for i in range(len(cases))
            ]
            sizes = [size(case) for case in cases]
            shown = ", ".join(f"{s:,}" for s in sizes)
            ms = ", ".join(f"{1e3 * value:.0f}" for value in medians)
            lines.append(f"| {name}, {kind} | {shown} | {ms} | {machine.exponent(sizes, medians):.2f} |")
            print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--examples", type=int, default=16, help="in a batch; the small CNN takes four times as many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="a side that took so long sits out further rounds")
    parser.add_argument("--no-peaks", dest="peaks", action="store_false")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = args.parts or list(PARTS)
    if not set(args.parts) <= set(PARTS):
        parser.error(f"PART: expected some of {', '.join(PARTS)}, got {' '.join(args.parts)}")
    if args.peak:
        print_peak(*json.loads(args.peak))
        return
    for part in args.parts:
        rates = list(machine.rates())
        if part == "growth":
            body = growth(3)
        else:
            n = args.examples * (4 if part == "cnn" else 1)
            body = [line for kind in KINDS for line in compare(CASES[part](n), kind, args, rates)]
        lines = [
            f"# Per-example Fishers: {part}",
            "",
            f"`python benchmarks/fishers.py {part} --examples {args.examples} --rounds {args.rounds} "
            f"--seconds {args.seconds:g}`",
            f"{machine.description()}; measured {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s.",
            "",
            *body,
        ]
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"fishers_{part}.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
