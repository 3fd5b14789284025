"""What ``memory=`` holds: the ceiling asked for, and the most memory that was held beyond what was held before.

Every case runs in a process of its own, after a small run of the same kind that loads the libraries. Counted is
anonymous memory (``RssAnon``): pages of mapped files are the system's, which takes them back when it needs to. Writes
``results/memory.md``.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases sketch --ceilings 100 200
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import npeff
from machine import description
from npeff.fishers.rows import DenseRows, Rows, SparseRows
from npeff.models.devices import Peak, settled_bytes
from npeff.models.parameters import Parameters

R = 16


def fishers_of(rows: Rows, per_example: int, kind: str) -> npeff.Fishers:
    """Fishers around random rows."""
    n = rows.n_rows // per_example
    return npeff.Fishers(
        kind=kind,  # type: ignore[arg-type]
        rows=rows,
        row_offsets=np.arange(0, rows.n_rows + 1, per_example),
        norms=np.ones(n, np.float32),
        logits=np.zeros((n, 10), np.float32),
        labels=np.zeros(n, np.int64),
        ids=np.arange(n),
        parameters=Parameters.of([("weight", (rows.n_columns,))]),
    )


def dense(n_rows: int, width: int) -> DenseRows:
    """Low rank and noise, as Fishers have it."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((R, width), np.float32)
    rows = np.empty((n_rows, width), np.float32)
    for start in range(0, n_rows, 1000):
        part = rows[start : start + 1000]
        part[:] = rng.standard_normal((len(part), R), np.float32) @ basis
        part += rng.standard_normal(part.shape, np.float32)
    return DenseRows(rows)


def sparse(n_rows: int, k: int, width: int, positive: bool) -> SparseRows:
    """k entries per row, among columns of which some are much more frequent."""
    rng = np.random.default_rng(0)
    indices = np.sort((rng.random((n_rows, k)) ** 2 * (width // k)).astype(np.int64) + np.arange(k) * (width // k), 1)
    values = rng.standard_normal((n_rows, k), np.float32)
    indptr = np.arange(0, n_rows * k + 1, k)
    return SparseRows(
        indptr, indices.reshape(-1).astype(np.int32), (np.abs(values) if positive else values).reshape(-1), width
    )


DECOMPOSED = {
    "sketch": ("9 000 rows of a sketch, d = 4096", lambda s: fishers_of(dense(9_000 // s, 4096), 3, "low_rank")),
    "exact": ("2 400 dense rows of 30 000 parameters", lambda s: fishers_of(dense(2_400 // s, 30_000), 3, "low_rank")),
    "top-k": (
        "12 000 rows of 1 000 entries among 50 000 columns",
        lambda s: fishers_of(sparse(12_000 // s, 1_000, 50_000, False), 3, "low_rank"),
    ),
    "diagonal": (
        "12 000 examples of 1 000 entries among 50 000 columns",
        lambda s: fishers_of(sparse(12_000 // s, 1_000, 50_000, True), 1, "diagonal"),
    ),
}


def cnn() -> nn.Module:
    """A small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10),
    ).eval()  # fmt: skip


class Block(nn.Module):
    """A transformer encoder over 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


MODELS = {
    "CNN, 32 × 32": (cnn, (3, 32, 32)),
    "transformer, 64 positions": (lambda: Block().eval(), (64, 128)),
    "MLP of 2 million": (
        lambda: nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)),
        (1000,),
    ),
}
BATCH = 128


def batches(shape: tuple[int, ...], batch: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random inputs, made one batch at a time."""
    for k in range(count):
        yield torch.randn(batch, *shape, generator=torch.Generator().manual_seed(k)), torch.zeros(batch).long()


class Data:
    """Batches that can be read again."""

    def __init__(self, shape: tuple[int, ...], batch: int, count: int) -> None:
        self.given = shape, batch, count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return batches(*self.given)


def case(name: str, ceiling: int | None, folder: Path) -> dict[str, object]:
    """Run one case; bytes held beyond those before, or the refusal."""
    torch.set_num_threads(1)
    if name in DECOMPOSED:
        path = folder / f"{name}.h5"
        options = {"n_init": 1, "n_replacements": 2, "max_iterations": 15, "memory": ceiling, "progress": False}
        small = npeff.load(folder / f"{name}-small.h5")
        for space in ("rows", "streamed", *(("gram",) if name != "diagonal" else ())):
            npeff.decompose(small, 4, space=space, n_init=1, n_replacements=1, max_iterations=5, progress=False)
        fishers = npeff.load(path)
        before = settled_bytes()
        try:
            with Peak() as peak:
                found = npeff.decompose(fishers, R, **options)
        except npeff.ArgumentError as error:
            return {"refused": str(error)}
        result = sum(array.nbytes for array in (found.coefficients, found.vectors, found.logits))
        return {"held": peak.peak - before - result, "space": found.provenance["course"]["space"]}
    model, shape = MODELS[name][0](), MODELS[name][1]
    options = {"compress": npeff.TopK(1024), "memory": ceiling, "progress": False}
    npeff.compute_fishers(model, Data(shape, 4, 1), out=folder / "warm.h5", **options)
    (folder / "warm.h5").unlink()
    before = settled_bytes()
    with Peak() as peak:
        npeff.compute_fishers(model, Data(shape, BATCH, 2), out=folder / "f.h5", **options)
    size = (folder / "f.h5").stat().st_size
    (folder / "f.h5").unlink()
    batch = 4 * BATCH * int(np.prod(shape))
    parameters = 4 * sum(p.numel() for p in model.parameters())
    return {"held": peak.peak - before, "rows": size // 2, "batch": batch, "model": parameters}


def megabytes(value: object) -> str:
    """In MB."""
    return f"{int(value) / 1e6:,.0f}"  # type: ignore[call-overload]


def main() -> None:
    """Run the cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*DECOMPOSED, *MODELS], choices=[*DECOMPOSED, *MODELS])
    parser.add_argument("--ceilings", nargs="+", type=int, default=[80, 150, 300], help="in MB")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.md")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "BYTES", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, ceiling, folder = args.one
        print(json.dumps(case(name, int(ceiling) or None, Path(folder))))
        return
    found: dict[tuple[str, int], dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.cases:
            if name in DECOMPOSED:
                DECOMPOSED[name][1](1).save(Path(scratch) / f"{name}.h5")
                DECOMPOSED[name][1](40).save(Path(scratch) / f"{name}-small.h5")
            for ceiling in [*args.ceilings, 0]:
                command = [sys.executable, __file__, "--one", name, str(ceiling * 1_000_000), scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name, ceiling] = json.loads(done.stdout.splitlines()[-1])
                print(name, ceiling, found[name, ceiling], file=sys.stderr)
    lines = [
        "# What `memory=` holds",
        "",
        f"`python benchmarks/memory.py` · {description()}",
        "",
        "MB of anonymous memory beyond what the process held before, in a process of its own; mapped files are no part "
        "of it.",
        "",
        f"## decompose, {R} components",
        "",
        "| Fishers | allowed | space chosen | held at most |",
        "|---|---|---|---|",
    ]
    for name in args.cases:
        if name in DECOMPOSED:
            for ceiling in [*args.ceilings, 0]:
                it = found[name, ceiling]
                allowed = f"{ceiling}" if ceiling else "no limit"
                held = "refused" if "refused" in it else megabytes(it["held"])
                lines.append(f"| {DECOMPOSED[name][0]} | {allowed} | {it.get('space', '–')} | {held} |")
    lines += [
        "",
        f"## compute_fishers, two batches of {BATCH}, top-k 1 024, to a file",
        "",
        "| model | allowed | held at most | of it beyond the ceiling's cover: model · batch · its rows, twice |",
        "|---|---|---|---|",
    ]
    for name in args.cases:
        if name in MODELS:
            for ceiling in [*args.ceilings, 0]:
                it = found[name, ceiling]
                allowed = f"{ceiling}" if ceiling else "no limit"
                rest = " · ".join(megabytes(value) for value in (it["model"], it["batch"], 2 * int(it["rows"])))  # type: ignore[call-overload]
                lines.append(f"| {name} | {allowed} | {megabytes(it['held'])} | {rest} |")
    text = "\n".join(lines) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
