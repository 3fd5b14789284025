"""Every CUDA kernel against its floor: bytes over the measured bandwidth, or operations over the measured rate.

Answers are checked first, against the processor's kernels or a product in float64 on a part of the problem. Times are
medians of single runs between device events, over inputs larger than the device's cache. Writes ``results/cuda.md``.

Then Fishers of MiniLM's architecture against C − 1 plain backward passes, and of a language model's against one and
bergson's projections (``cuda_fishers.py``); and a large decomposition against the published algorithm written with CuPy
(``cuda_end_to_end.py``).

    python benchmarks/cuda_kernels.py
    python benchmarks/cuda_kernels.py --parts kernels --families selection sketches --scale 0.1 --rounds 5 --profile
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import machine
from cuda_end_to_end import decomposition_table
from cuda_fishers import fishers_lines, language_lines
from npeff.kernels import (
    StreamingSketch,
    StreamingTopK,
    cross,
    dispatch,
    nnls,
    sketch,
    sparse_gram,
    spmm,
    spread_multiply,
    topk,
)
from npeff.kernels.sparse import DEVICE_DENSE_ABOVE, Csr
from npeff.kernels.streams import BlockRows

DEVICE = torch.device("cuda")
PARTS = ("kernels", "fishers", "language", "decomposition")


@dataclass
class Case:
    """One line of the table.

    Attributes:
        name: What runs, with its sizes.
        run: The work.
        bytes: Least traffic with device memory: inputs read once, outputs written once.
        operations: Multiply-adds times two.
    """

    name: str
    run: Callable[[], object]
    bytes: float
    operations: float = 0.0


def milliseconds(run: Callable[[], object], rounds: int) -> list[float]:
    run()
    times = []
    for _ in range(rounds):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return times


def ceilings(rounds: int) -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), and float32 operations per second of a large product."""
    source = torch.randn(1 << 29, device=DEVICE)
    copy = torch.empty_like(source)
    bandwidth = 8e3 * len(source) / statistics.median(milliseconds(lambda: copy.copy_(source), rounds))
    a = torch.randn(8192, 8192, device=DEVICE)
    rate = 2e3 * 8192**3 / statistics.median(milliseconds(lambda: a @ a, rounds))
    return bandwidth, rate


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu())
    assert error <= tolerance, f"{name}: relative error {error:.1e}"
    print(f"checked {name}: relative error {error:.1e}", flush=True)


def selection(scale: float) -> Iterator[Case]:
    rows, columns, k, parts = 32, int(22_700_000 * scale), int(65_536 * scale), 12
    x = torch.randn(rows, columns, device=DEVICE)
    selectors = StreamingTopK(rows, k, keep_zeros=True)
    whole = BlockRows(np.zeros(rows, np.int64), None, rows)
    edges = [columns * p // parts for p in range(parts + 1)]
    plans = [BlockRows(np.full(rows, a), None, rows) for a in edges[:-1]]

    def one(block: Tensor) -> Tensor:
        selectors.push(block, whole)
        return torch.as_tensor(selectors.finish_there()[1])

    def stream() -> Tensor:
        for plan, a, b in zip(plans, edges, edges[1:], strict=False):
            selectors.push(x[:, a:b], plan)
        return torch.as_tensor(selectors.finish_there()[1])

    want = topk(x[:2].cpu(), k)[1]
    assert torch.equal(one(x)[:2].cpu(), want), "top-k differs"
    assert torch.equal(stream()[:2].cpu(), want), "streaming top-k differs"
    print("checked top-k: the same entries", flush=True)
    out = 12 * rows * k
    size = f"{rows} × {columns:,}, k = {k:,}"
    yield Case(f"top-k, {size}", lambda: one(x), 4 * x.numel() + out)
    yield Case(f"top-k in {parts} blocks, {size}", stream, 4 * x.numel() + out)
    half = x.bfloat16()
    yield Case(f"top-k of bfloat16, {size}", lambda: one(half), 2 * x.numel() + out)
    yield Case(f"torch.topk(x.abs(), k), {size}", lambda: torch.topk(x.abs(), k), 4 * x.numel() + out)


def sketches(scale: float) -> Iterator[Case]:
    rows, columns = 32, int(22_700_000 * scale)
    x = torch.randn(rows, columns, device=DEVICE)
    plan = BlockRows(np.zeros(rows, np.int64), None, rows)
    for d in (4096, 16_384):
        sums = StreamingSketch(rows, d)
        sums.push(x, plan)
        close(f"sketch d = {d}", torch.as_tensor(sums.finish_there())[:1], sketch(x[:1].cpu(), d), 1e-5)
        run = lambda sums=sums: (sums.push(x, plan), sums.finish_there())  # noqa: E731
        yield Case(f"sketch, {rows} × {columns:,}, d = {d:,}", run, 4 * x.numel() + 4 * rows * d)


def sparse(scale: float) -> Iterator[Case]:
    n_rows, n_columns, each, r = max(16, int(3000 * scale)), int(2_000_000 * scale), int(65_536 * scale), 256
    generator = torch.Generator(DEVICE).manual_seed(0)
    # A few columns that many rows share, and a long tail, as top-k rows have.
    raw = torch.rand(n_rows, each, generator=generator, device=DEVICE).pow(3).mul(n_columns).int()
    rows = [torch.unique(row) for row in raw]
    indptr = torch.tensor([0, *np.cumsum([len(row) for row in rows])], device=DEVICE)
    indices = torch.cat(rows)
    values = torch.randn(len(indices), generator=generator, device=DEVICE)
    dense = torch.randn(n_columns, r, generator=generator, device=DEVICE)
    nnz = len(indices)
    part = int(indptr[8])
    few = (indptr[:9].cpu(), indices[:part].cpu(), values[:part].cpu())
    sound = Csr(indptr, indices, values, n_columns)
    out = sound.times(dense)
    close("spmm", out[:8], spmm(*few[:2], few[2].double(), dense.double().cpu()), 1e-5)
    touched = min(nnz, n_columns) * 4 * r
    yield Case(
        f"spmm, {n_rows:,} × {n_columns:,}, {nnz:,} entries, r = {r}",
        lambda: sound.times(dense),
        8 * nnz + touched + 4 * out.numel(),
        2.0 * nnz * r,
    )
    matrix = torch.sparse_csr_tensor(indptr.int(), indices, values, (n_rows, n_columns))
    yield Case(
        "the same in torch (cuSPARSE)", lambda: matrix @ dense, 8 * nnz + touched + 4 * out.numel(), 2.0 * nnz * r
    )
    k = sparse_gram(indptr, indices, values, n_columns)
    close("sparse Gram", k[:8, :8], sparse_gram(*few, n_columns), 1e-4)

    def by_dense_products() -> Tensor:
        total = torch.zeros_like(k)
        owner = torch.repeat_interleave(torch.arange(n_rows, device=DEVICE), indptr.diff(), output_size=nnz)
        for start in range(0, n_columns, 65_536):
            part = torch.nonzero((indices >= start) & (indices < start + 65_536)).squeeze(1)
            stretch = torch.zeros(n_rows, min(65_536, n_columns - start), device=DEVICE)
            stretch[owner[part], indices[part].long() - start] = values[part]
            total.addmm_(stretch, stretch.T)
        return total

    counts = torch.bincount(indices.long(), minlength=n_columns).double()
    pairs = float(counts.square().sum())
    yield Case(
        f"sparse Gram, {n_rows:,} rows (columns in {DEVICE_DENSE_ABOVE:.0%} of the rows by dense products)",
        lambda: sparse_gram(indptr, indices, values, n_columns),
        8 * nnz + 4 * k.numel(),
        pairs,
    )
    yield Case("the same by dense products of stretches alone", by_dense_products, 8 * nnz + 4 * k.numel(), pairs)


def solver(scale: float) -> Iterator[Case]:
    n, r, sweeps = int(20_000 * scale), 256, 5
    g = torch.nn.functional.normalize(torch.randn(r, 300, device=DEVICE), dim=1)
    gram = (g @ g.T).square()
    c = torch.rand(n, r, device=DEVICE)

    def descend() -> torch.Tensor:
        return nnls(gram, c, max_sweeps=sweeps, tol=0.0, kkt=False).w

    close("nnls", descend()[:64], nnls(gram.cpu(), c[:64].cpu(), max_sweeps=sweeps, tol=0.0).w, 1e-4)
    yield Case(f"nnls, n = {n:,}, r = {r}, {sweeps} sweeps", descend, 12 * c.numel(), 2.0 * n * r * r * sweeps)
    offsets = torch.arange(0, 3 * 40 * n + 1, 3, device=DEVICE)
    p, weights = torch.randn(3 * 40 * n, r, device=DEVICE), torch.rand(40 * n, r, device=DEVICE)
    sums, products = cross(p, offsets), spread_multiply(weights, p, offsets)
    close("cross", sums[:9], cross(p[:27].cpu(), offsets[:10].cpu()), 1e-6)
    close("spread", products[:27], spread_multiply(weights[:9].cpu(), p[:27].cpu(), offsets[:10].cpu()), 1e-6)
    yield Case(f"cross, {len(p):,} rows, r = {r}", lambda: cross(p, offsets), 4 * (p.numel() + sums.numel()))
    yield Case(
        f"W∘P, {len(p):,} rows, r = {r}",
        lambda: spread_multiply(weights, p, offsets),
        4 * (2 * p.numel() + weights.numel()),
    )


def line(case: Case, times: list[float], bandwidth: float, rate: float) -> str:
    by_bytes, by_operations = 1e3 * case.bytes / bandwidth, 1e3 * case.operations / rate
    floor, kind = max((by_bytes, "bytes"), (by_operations, "operations"))
    low, _, high = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    return f"| {case.name} | {median:.3f} | {low:.3f} – {high:.3f} | {floor:.3f} ({kind}) | {floor / median:.0%} |"


FAMILIES = {"selection": selection, "sketches": sketches, "sparse": sparse, "solver": solver}


def kernels_table(scale: float, rounds: int, families: list[str], profile: bool) -> list[str]:
    bandwidth, rate = ceilings(rounds)
    text = [
        "## Kernels",
        "",
        f"Measured ceilings: copy {bandwidth / 1e12:.2f} TB/s (read + written), float32 product {rate / 1e12:.1f} "
        f"TFLOP/s. Medians of {rounds} runs. Target: top-k and sketch at 60 % of the floor's rate or more.",
        "",
        "| | median ms | quartiles | floor ms | of the floor's rate |",
        "|---|---|---|---|---|",
    ]
    for family in families:
        try:
            for case in FAMILIES[family](scale):
                text.append(line(case, milliseconds(case.run, rounds), bandwidth, rate))
                print(text[-1], flush=True)
                if profile:
                    machine.print_profile(case.name, case.run)
        except Exception as error:  # a family that fails must not lose the others' figures
            traceback.print_exc()
            text.append(f"| {family}: FAILED, {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | | |")
        torch.cuda.empty_cache()
    return [*text, ""]


def decomposition(scale: float, profile: bool) -> list[str]:
    try:
        import cupy
        from cupyx.scipy.sparse import csr_matrix
    except ImportError as error:
        return ["## Low-rank decomposition", "", f"Not run: the published algorithm needs CuPy ({error}).", ""]
    return decomposition_table(DEVICE, scale, cupy, csr_matrix, machine.print_profile if profile else None)


def absence() -> str:
    """Why nothing can be measured here; empty where something can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device that torch can use, and there is none here"
    return dispatch.cuda_reason(DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="of kernels")
    parser.add_argument("--profile", action="store_true", help="also print the time of every CUDA kernel")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full sizes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cuda.md")
    args = parser.parse_args()
    if reason := absence():
        print(f"benchmarks/cuda_kernels.py measures nothing: {reason}")
        return
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    text = [
        "# On a CUDA device",
        "",
        f"{device.name}, {device.multi_processor_count} multiprocessors; torch {torch.__version__}, "
        f"Python {platform.python_version()}. Answers are checked before anything is timed.",
        "",
        f"    python benchmarks/cuda_kernels.py --parts {' '.join(args.parts)} --scale {args.scale:g} "
        f"--rounds {args.rounds}",
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            for found in lines_of(part, args, Path(folder)):
                text.append(found)
                args.out.write_text("\n".join(text))  # line by line: what fails later loses nothing
                print(found, flush=True)


def lines_of(part: str, args: argparse.Namespace, folder: Path) -> Iterable[str]:
    """A part's table; if it fails, a line that says so."""
    rounds = max(3, args.rounds // 8)
    try:
        if part == "kernels":
            yield from kernels_table(args.scale, args.rounds, args.families, args.profile)
        elif part == "fishers":
            yield from fishers_lines(DEVICE, folder, args.scale, rounds, profile=args.profile)
        elif part == "language":
            yield from language_lines(DEVICE, args.scale, rounds, profile=args.profile)
        else:
            yield from decomposition(args.scale, args.profile)
    except Exception as error:
        traceback.print_exc()
        yield f"{part}: FAILED, {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
