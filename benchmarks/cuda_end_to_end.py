"""The parts of ``cuda_kernels.py`` that go from a model to components: Fishers of MiniLM, and a large decomposition.

Everything here takes the device as an argument, and the published algorithm the module of its arrays (CuPy, or numpy),
so that its answers can be checked where there is no device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import machine
import npeff
from npeff.fishers.rows import SparseRows
from npeff.fishers.scaling import scale
from npeff.models.parameters import Parameters


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- Fishers ------------------------------------------------------------------------------------------------------


def minilm(classes: int, share: float) -> nn.Module:
    """all-MiniLM-L6's architecture (22.7 M parameters) with random weights: times do not depend on them."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=max(100, int(30_522 * share)), hidden_size=384, num_hidden_layers=max(1, round(6 * share)),
        num_attention_heads=12, intermediate_size=1536, num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def logits_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(input_ids=batch).logits


def backward_passes(model: nn.Module, data: list[torch.Tensor], device: torch.device) -> None:
    """A forward pass and C − 1 backward passes to all parameters, for every batch; gradients are summed over it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in data:
        logits = logits_of(model, batch.to(device))
        for column in range(logits.shape[1] - 1):
            cotangent = torch.zeros_like(logits)
            cotangent[:, column] = 1
            torch.autograd.grad(logits, parameters, cotangent, retain_graph=True, allow_unused=True)
    synchronize(device)


def fishers_table(
    device: torch.device, folder: Path, share: float, rounds: int, classes: int = 3, length: int = 128
) -> list[str]:
    """Seconds of compute_fishers against C − 1 plain backward passes on the same batches, taking turns."""
    model = minilm(classes, share)
    generator = torch.Generator().manual_seed(0)
    words = model.config.vocab_size  # type: ignore[union-attr]
    data = [torch.randint(1, words, (32, length), generator=generator) for _ in range(max(2, int(16 * share)))]
    compressions = {"TopK(65 536)": npeff.TopK(65_536), "Sketch(4096)": npeff.Sketch(4096)}
    options: dict[str, Any] = {"forward": logits_of, "progress": False}
    few = [data[0][:2]]
    wanted = npeff.compute_fishers(model, few, **options)
    model = model.to(device)
    check_fishers(npeff.compute_fishers(model, few, **options), wanted)
    number = 0

    def ours(compress: Any) -> Callable[[], object]:
        def run() -> object:
            nonlocal number
            number += 1
            return npeff.compute_fishers(model, data, compress=compress, out=folder / f"{number}.h5", **options)

        return run

    sides: dict[str, Callable[[], object]] = {"plain": lambda: backward_passes(model, data, device)}
    sides |= {name: ours(compress) for name, compress in compressions.items()}
    times = machine.interleaved(sides, rounds)
    plain = machine.quartiles(times["plain"])[1]
    n = sum(len(batch) for batch in data)
    lines = [
        f"## Fishers of MiniLM's architecture: {n} examples of {length} tokens, {classes} classes, batches of 32",
        "",
        "Written to a file while they are computed. Checked first: exact Fishers of two examples are the processor's.",
        "",
        "| | median s | quartiles | examples/s | × the plain passes |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        low, middle, high = machine.quartiles(values)
        what = f"forward, {classes - 1} plain backward passes" if name == "plain" else f"compute_fishers, {name}"
        lines.append(f"| {what} | {middle:.3f} | {low:.3f} – {high:.3f} | {n / middle:,.0f} | {middle / plain:.2f} |")
    return [*lines, "", "Target: at most 1.3 × the plain passes.", ""]


def check_fishers(found: npeff.Fishers, wanted: npeff.Fishers) -> None:
    """The same Fishers ``AᵀA``: rows may differ by signs, so that inner products with a common vector are compared."""
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=2e-2)
    probe = rng.standard_normal(wanted.rows.n_columns).astype(np.float32)
    for i in range(len(wanted)):
        start, stop = int(wanted.row_offsets[i]), int(wanted.row_offsets[i + 1])
        one, other = (np.square(f.rows.dense(start, stop) @ probe).sum() for f in (found, wanted))
        assert abs(one - other) <= 2e-2 * abs(other), f"the Fisher of example {i} differs: {one} and {other}"


# ---- a decomposition ----------------------------------------------------------------------------------------------


def large_fishers(n: int, r: int, n_columns: int, entries: int, seed: int = 0) -> npeff.Fishers:
    """n examples of rank 2 whose rows are two of r sparse vectors each, and noise; ``entries`` numbers an example."""
    rng = np.random.default_rng(seed)
    each, noise = entries // 2 * 3 // 4, entries // 2 // 4
    supports = [np.sort(rng.choice(n_columns, each, replace=False)) for _ in range(r)]
    vectors = [rng.standard_normal(each).astype(np.float32) / np.sqrt(each) for _ in range(r)]
    indptr, indices, values = np.zeros(2 * n + 1, np.int64), [], []
    for row in range(2 * n):
        j = int(rng.integers(r))
        extra = rng.integers(0, n_columns, noise)
        columns = np.concatenate([supports[j], extra])
        numbers = np.concatenate([
            rng.uniform(0.5, 1.5) * vectors[j],
            (0.2 / np.sqrt(max(1, noise)) * rng.standard_normal(noise)).astype(np.float32),
        ])  # fmt: skip
        columns, first = np.unique(columns, return_index=True)
        indices.append(columns.astype(np.int32))
        values.append(numbers[first].astype(np.float32))
        indptr[row + 1] = indptr[row] + len(columns)
    rows = SparseRows(indptr, np.concatenate(indices), np.concatenate(values), n_columns)
    ones = np.ones(n, np.float32)
    return npeff.Fishers(
        kind="low_rank", rows=rows, row_offsets=np.arange(n + 1) * 2, norms=ones, logits=np.zeros((n, 3), np.float32),
        labels=np.zeros(n, np.int64), ids=np.arange(n), parameters=Parameters.of([("weight", (n_columns,))]),
    )  # fmt: skip


def published(xp: Any, A: Any, A_T: Any, W: Any, G: Any, rate: float, g_only: int, joint: int) -> tuple[Any, Any]:
    """The published algorithm's steps (Matena & Raffel 2023), for examples of two rows each; W and G afterwards.

    Args:
        xp: cupy, or numpy.
        A: ``(2n, m)`` CSR of cupyx (cuSPARSE), or of scipy.
        A_T: Its transpose, CSR.
        W: ``(n, r)``, where to start.
        G: ``(r, m)``.
        rate: Of the gradient steps on G.
        g_only: Steps before W moves.
        joint: Steps of both.
    """
    n, r = W.shape
    for step in range(g_only + joint):
        P, Q = A @ G.T, G @ G.T
        if step >= g_only:
            W = W * xp.square(P).reshape(n, 2, r).sum(1) / (W @ (Q * Q) + 1e-9)
        weighted = (P.reshape(n, 2, r) * W[:, None]).reshape(2 * n, r)
        G = G - 4 * rate * (((W.T @ W) * Q) @ G - (A_T @ weighted).T)
    return W, G


def relative_loss(xp: Any, A: Any, W: Any, G: Any, energy: float) -> float:
    """``Σ_i ‖F_i − Σ_j W_ij g_j g_jᵀ‖² / Σ_i ‖F_i‖²`` of examples of two rows each."""
    n, r = W.shape
    cross = xp.square((A @ G.T).astype(xp.float64)).reshape(n, 2, r).sum(1)
    W, Q = W.astype(xp.float64), (G @ G.T).astype(xp.float64)
    return float((energy - 2 * (W * cross).sum() + ((W.T @ W) * Q * Q).sum()) / energy)


def start(n: int, r: int, n_columns: int, seed: int) -> tuple[Any, Any]:
    """The published start, W and G, as numpy."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.rand(n, r, generator=generator)
    return W.numpy(), (torch.randn(r, n_columns, generator=generator) / (r * n_columns / 2) ** 0.5).numpy()


def time_to(fishers: npeff.Fishers, r: int, loss: float, device: torch.device) -> tuple[float, float]:
    """Seconds of decompose until its best loss is that low (or it ends), and that loss; building the space included."""
    began, reached = time.perf_counter(), [float("inf"), float("inf")]

    def watch(progress: Any) -> bool:
        if progress.best <= loss and reached[0] == float("inf"):
            reached[:] = [time.perf_counter() - began, progress.best]
        return reached[0] < float("inf")

    found = npeff.decompose(fishers, n_components=r, device=device, callback=watch, progress=False)
    return (time.perf_counter() - began, found.loss) if reached[0] == float("inf") else (reached[0], reached[1])


def decomposition_table(
    device: torch.device, share: float, xp: Any, csr: Callable[..., Any], rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
) -> list[str]:
    """Ours against the published algorithm at its best rate, to its final loss."""
    n, r, n_columns, entries = int(20_000 * share), max(4, int(256 * share)), int(1_000_000 * share), int(8192 * share)
    fishers = large_fishers(n, r, n_columns, entries)
    scaled = scale(fishers)
    rows = scaled.rows
    assert isinstance(rows, SparseRows)
    A = csr((xp.asarray(rows.values), xp.asarray(rows.indices), xp.asarray(rows.indptr)), shape=(2 * n, rows.n_columns))
    A_T = A.T.tocsr()
    energy = float(np.square(scaled.fisher_norms).sum())
    W, G = (xp.asarray(x) for x in start(n, r, rows.n_columns, 0))
    tried = {}
    for rate in rates:
        after = published(xp, A, A_T, W, G, rate, 50, 50)
        tried[rate] = relative_loss(xp, A, *after, energy)
    best = min((rate for rate in rates if np.isfinite(tried[rate])), key=lambda rate: tried[rate])
    synchronize(device)
    began = time.perf_counter()
    after = published(xp, A, A_T, W, G, best, 50, 500)
    synchronize(device)
    theirs, loss = time.perf_counter() - began, relative_loss(xp, A, *after, energy)
    del A, A_T, after, W, G
    seconds, reached = time_to(fishers, r, loss, device)
    return [
        f"## Low-rank decomposition: n = {n:,}, rank 2, r = {r}, {len(rows.values):,} entries, "
        f"{rows.n_columns:,} columns",
        "",
        f"The published algorithm's steps with {xp.__name__}, at the best of the rates {', '.join(map(str, rates))} "
        f"(found by 100 steps each, not counted): {best:g}. Ours: time to its final loss, building the space included.",
        "",
        "| | s | relative loss |",
        "|---|---|---|",
        f"| published, 50 + 500 steps | {theirs:.2f} | {loss:.6f} |",
        f"| npeff.decompose, until as low | {seconds:.2f} | {reached:.6f} |",
        "",
        f"{theirs / seconds:.1f} × as fast (target: 20), to {'an equal' if reached <= loss else 'A HIGHER'} loss.",
        "",
    ]
