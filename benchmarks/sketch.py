"""Sketches of per-example gradients: speed and error beside other projectors, and quality against size.

Speed and error: the rows are per-example Fisher rows of a trained network, repeated with random signs to the length
asked for. Every side projects the same rows to d numbers, in turns; before anything is timed, npeff's
result is compared with the float64 matrix of its map, and every peer's inner products must be unbiased to within their
noise. Error: root mean square of ``⟨Sx, Sy⟩ − ⟨x, y⟩`` over pairs of rows and seeds, over ``‖x‖‖y‖``; theory for npeff
allows ``√((1 + cos²)/d)``. Peers that are not installed are left out, visibly. TRAK's CUDA kernel needs a GPU.

Quality: Fishers of 1 500 digits by TopK(k), Sketch(d) and exactly; error of K, loss of the components judged on the
exact rows, and their match with the exact ones (mean |cos| under the best one-to-one matching, after recovery).
Writes ``results/sketch.md`` and ``results/sketch_quality.md``.

    python benchmarks/sketch.py
    python benchmarks/sketch.py speed --columns 262144 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import machine
import npeff
from npeff import demo
from npeff.components.components import statistics as least_squares
from npeff.fishers.scaling import scale
from npeff.kernels import nnls, reference, sketch

Projector = Callable[[torch.Tensor, int], np.ndarray]


def network(examples: int) -> tuple[torch.nn.Module, object]:
    torch.manual_seed(0)
    images, model = demo.digits(50), demo.digits_cnn()
    demo.train(model, images, epochs=6)
    return model.eval(), images


# ---- speed and error ------------------------------------------------------------------------------------------------


def projectors(columns: int, d: int) -> tuple[dict[str, Projector], list[str]]:
    """Sides that are here, and why others are not. A projector takes rows and a seed."""
    found: dict[str, Projector] = {
        f"npeff, {s} non-zero{'s' if s > 1 else ''}": lambda x, seed, s=s: sketch(x, d, seed, nonzeros=s).numpy()
        for s in (1, 2, 4)
    }
    missing = []
    try:
        from trak.projectors import BasicProjector, ProjectionType

        def trak(x: torch.Tensor, seed: int) -> np.ndarray:
            made = BasicProjector(columns, d, seed, ProjectionType.rademacher, device="cpu", dtype=torch.float32)
            return made.project(x, model_id=0).numpy() / np.sqrt(d)

        found["TRAK BasicProjector (dense Rademacher)"] = trak
    except Exception as error:
        missing.append(f"TRAK: {type(error).__name__}: {error}")
    try:
        from dattri.func.projection import BasicProjector as DattriProjector
        from dattri.func.projection import ProjectionType as DattriType

        def dattri(x: torch.Tensor, seed: int) -> np.ndarray:
            made = DattriProjector(columns, d, seed, DattriType.rademacher, device=torch.device("cpu"))
            return made.project(x, ensemble_id=0).numpy() / dattri_scale

        probe = torch.zeros(1, columns)
        probe[0, :1] = 1.0
        dattri_scale = 1.0
        dattri_scale = float(np.linalg.norm(dattri(probe, 0)))  # of a unit vector: whether it divides by √d itself
        found["dattri BasicProjector (dense Rademacher)"] = dattri
    except Exception as error:
        missing.append(f"dattri: {type(error).__name__}: {error}")
    missing.append("dattri / GraSS SJLT: its package `sjlt` compiles a CUDA extension, and runs on NVIDIA GPUs alone")

    def index_add(x: torch.Tensor, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        bucket = torch.randint(d, (columns,), generator=generator)
        sign = torch.randint(2, (columns,), generator=generator).float() * 2 - 1
        return x.new_zeros(len(x), d).index_add_(1, bucket, x * sign).numpy()

    found["torch index_add_ (count sketch)"] = index_add
    missing.append("TRAK CudaProjector: its kernel runs on NVIDIA GPUs alone")
    return found, missing


def relative_errors(project: Projector, x: torch.Tensor, seeds: int) -> np.ndarray:
    exact = (x.double() @ x.double().T).numpy()
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    above = np.triu_indices(len(x))
    errors = []
    for seed in range(seeds):
        y = project(x, seed).astype(np.float64)
        errors.append(((y @ y.T - exact) / size)[above])
    return np.stack(errors)


def speed(rows: torch.Tensor, columns: int, d: int, rounds: int) -> list[str]:
    repeats = -(-columns // rows.shape[1])
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, rows.shape, generator=generator) * 2 - 1 for _ in range(repeats)]
    x = torch.cat([rows * s for s in signs], 1)[:, :columns].contiguous()
    sides, missing = projectors(columns, d)
    few = x[:2, :4096].contiguous()
    gap = np.abs(sketch(few, d).numpy() - reference.sketch(few.double().numpy(), d, 0, 0, 1)).max()
    assert gap < 1e-5 * float(few.norm()), "npeff's sketch is not that of its matrix"
    exact = (x.double() @ x.double().T).numpy()
    cosine = exact / np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    bound = float(np.sqrt((1 + cosine[np.triu_indices(len(x))] ** 2).mean() / d))
    quality: dict[str, tuple[float, float]] = {}
    for name, side in list(sides.items()):
        try:
            errors = relative_errors(side, x, 2 if "Basic" in name else 12)
        except Exception as error:
            missing.append(f"{name}: {type(error).__name__}: {error}")
            del sides[name]
            continue
        rms = float(np.sqrt((errors**2).mean()))
        assert rms < 4 * bound, f"{name}: errors of {rms:.3g} where theory allows {bound:.3g}"
        quality[name] = rms, float(np.quantile(np.abs(errors), 0.999))
    times: dict[str, list[float]] = {"pass: x.sum()": []}
    for turn in range(rounds + 1):
        for name, side in {"pass: x.sum()": lambda x, seed: x.sum(), **sides}.items():
            if "Basic" in name and turn > 2:
                continue
            start = time.perf_counter()
            side(x, turn)
            if turn:
                times.setdefault(name, []).append(time.perf_counter() - start)
    gigabytes = 4 * x.numel() / 1e9
    floor = statistics.median(times["pass: x.sum()"])
    lines = [
        f"## {len(x)} rows × {columns:,} → {d}",
        "",
        f"Theory for a count sketch: at most {bound:.4f}.",
        "",
        "| | median ms | quartiles | GB/s of input | × the plain pass | error, rms | error, 99.9 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in times.items():
        low, m, high = machine.quartiles(values)
        errors_of = "| |" if name not in quality else f"{quality[name][0]:.4f} | {quality[name][1]:.4f} |"
        spread = f"{1e3 * low:.2f} – {1e3 * high:.2f}"
        lines.append(f"| {name} | {1e3 * m:.2f} | {spread} | {gigabytes / m:.2f} | {m / floor:.1f} | {errors_of}")
    return [*lines, "", *(f"- Not run: {line.splitlines()[0]}" for line in missing), ""]


# ---- quality against size -------------------------------------------------------------------------------------------


def judged(components: npeff.Components, vectors: np.ndarray, exact: npeff.Fishers) -> float:
    """Relative loss of given vectors on the exact rows, with coefficients solved for."""
    scaled = scale(exact)
    cross, gram = least_squares("low_rank", scaled, torch.from_numpy(vectors).double())
    w = nnls(gram, cross, exact=True).w
    const = float(np.square(scaled.fisher_norms).sum())
    return float(const - 2 * (w * cross).sum() + ((w.T @ w) * gram).sum()) / const


def quality(model: torch.nn.Module, images: object, examples: int, r: int) -> list[str]:
    options = {"rank": 3, "max_examples": examples, "progress": False}
    search = {"progress": False, "space": "gram", "seed": 0}
    exact = npeff.compute_fishers(model, images, **options)
    K = exact.rows.values.astype(np.float64) @ exact.rows.values.T
    best = npeff.decompose(exact, r, **search)
    again = npeff.decompose(exact, r, **{**search, "seed": 1})

    def match(vectors: np.ndarray) -> float:
        cosines = np.abs(vectors @ best.vectors.T)
        return float(cosines[linear_sum_assignment(-cosines)].mean())

    lines = [
        f"## Quality against size: {examples} digits, rank 3, {exact.n_parameters:,} parameters, r = {r}",
        "",
        "| rows kept as | bytes per example | error of K (Frobenius) | its own loss | loss on exact rows | match |",
        "|---|---|---|---|---|---|",
        f"| exact | {exact.rows.nbytes // examples:,} | 0 | {best.loss:.4f} | "
        f"{judged(best, best.vectors, exact):.4f} | 1 |",
        f"| exact, another seed of the search | | 0 | {again.loss:.4f} | {judged(again, again.vectors, exact):.4f} | "
        f"{match(again.vectors):.3f} |",
    ]
    sides = [npeff.TopK(k) for k in (256, 1024, 4096, 16384)]
    sides += [npeff.Sketch(d) for d in (256, 1024, 4096, 16384)]
    sides += [npeff.Sketch(1024, form="kronecker"), npeff.GramOnly()]
    for compress in sides:
        fishers = npeff.compute_fishers(model, images, compress=compress, **options)
        if isinstance(compress, npeff.GramOnly):
            found = fishers.rows.values.astype(np.float64)
        else:
            kept = fishers.rows.dense(0, fishers.rows.n_rows).astype(np.float64)
            found = kept @ kept.T
        error = np.linalg.norm(found - K) / np.linalg.norm(K)
        components = npeff.decompose(fishers, r, **search)
        if components.compression in ("sketch", "gram"):
            components = components.recover(model, images, progress=False)
        vectors = np.stack([components.vector(j) for j in range(r)])
        lines.append(
            f"| {compress} | {fishers.rows.nbytes // examples:,} | {error:.4f} | "
            f"{components.loss:.4f} | {judged(components, vectors, exact):.4f} | {match(vectors):.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="speed, quality; both by default")
    parser.add_argument("--columns", type=int, default=1 << 16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not set(args.parts) <= {"speed", "quality"}:
        parser.error(f"PART: expected speed or quality, got {' '.join(args.parts)}")
    model, images = network(args.examples)
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts or ("speed", "quality"):
        if part == "speed":
            rows = npeff.compute_fishers(model, images, rank=1, max_examples=args.rows, progress=False).rows.values
            options = f"--columns {args.columns} --rows {args.rows} --d {args.d} --rounds {args.rounds}"
            body = speed(torch.from_numpy(np.array(rows)), args.columns, args.d, args.rounds)
        else:
            options = f"--examples {args.examples} --components {args.components}"
            body = quality(model, images, args.examples, args.components)
        lines = [
            f"# Sketches: {part}",
            "",
            f"`python benchmarks/sketch.py {part} {options}`",
            machine.description(),
            "",
            *body,
        ]
        (args.out / ("sketch.md" if part == "speed" else "sketch_quality.md")).write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
