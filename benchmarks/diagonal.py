"""The diagonal solver against scikit-learn's and torchnmf's NMF, on one sparse matrix, from one start.

The matrix holds diagonal Fishers of Fashion-MNIST images, unit norm per row, top-k. Every side starts from the same
W and H; losses are recomputed from W and H before anything is reported. Reported: the loss that scikit-learn's
coordinate descent ends with and its time; every side's time to that loss, or its loss when the same time is over.
Writes ``results/diagonal.md``.

    python benchmarks/diagonal.py                # needs Debian's dataset-fashion-mnist, scikit-learn, torchnmf
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import sklearn
import torch
from sklearn.decomposition import NMF, MiniBatchNMF

import npeff
from low_rank import processor
from low_rank_scale import network
from npeff.decomposition.kinds import Diagonal
from npeff.decomposition.spaces import RowSpace
from npeff.fishers.scaling import scale

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import fashion_data

HERE = Path(__file__).parent


def matrix(n: int, k: int, work: Path) -> tuple[npeff.Fishers, sp.csr_matrix]:
    options: dict[str, Any] = {"kind": "diagonal", "compress": npeff.TopK(k), "max_examples": n}
    fishers = npeff.compute_fishers(network(work), fashion_data.fashion_mnist(), progress=False, **options)
    rows = scale(fishers).rows
    return fishers, sp.csr_matrix((rows.values, rows.indices, rows.indptr), shape=(rows.n_rows, rows.n_columns))


def relative_loss(X: sp.csr_matrix, W: np.ndarray, H: np.ndarray) -> float:
    W, H = W.astype(np.float64), H.astype(np.float64)
    const = float(np.square(X.data.astype(np.float64)).sum())
    return (const - 2 * float((W * (X @ H.T)).sum()) + float(((W.T @ W) * (H @ H.T)).sum())) / const


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200, help="scikit-learn's max_iter")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE / "real_models" / "work", help="the trained network")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "diagonal.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # for every side: some processors are slow with subnormal numbers
    warnings.simplefilter("ignore")
    fishers, X = matrix(args.examples, args.top_k, args.work)
    print(f"{X.shape[0]} × {X.shape[1]}, {X.nnz:,} entries, r = {args.components}", flush=True)
    rows = []
    for start in range(args.starts):
        rows += one_start(fishers, X, args.components, args.iterations, start)
        text = "\n".join([
            "# Diagonal decomposition (NMF) from the same starts",
            "",
            f"`python {' '.join(['benchmarks/diagonal.py', *sys.argv[1:]])}` · diagonal Fishers of Fashion-MNIST, "
            f"{X.shape[0]:,} × {X.shape[1]:,}, {X.nnz:,} entries, r = {args.components}",
            f"{processor()}, {torch.get_num_threads()} thread, torch {torch.__version__}, scikit-learn "
            f"{sklearn.__version__}, Python {platform.python_version()}; seconds of the processor",
            "",
            "Every side ends when it has the loss that coordinate descent ends with, or when it has taken as long.",
            "",
            "| start | | loss | time (s) | iterations | times faster than coordinate descent |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ])  # fmt: skip
        args.out.write_text(text)  # after every start: a long run may be cut short
    sys.stdout.write(text)


def one_start(fishers: npeff.Fishers, X: sp.csr_matrix, r: int, sweeps: int, start: int) -> list[str]:
    """Table rows of all sides from one random start; the slower peers from the first start alone."""
    rng = np.random.default_rng(start)
    mean = np.sqrt(X.mean() / r)
    W0 = (mean * np.abs(rng.normal(size=(X.shape[0], r)))).astype(np.float32)
    H0 = (mean * np.abs(rng.normal(size=(r, X.shape[1])))).astype(np.float32)
    began = time.process_time()
    nmf = NMF(r, init="custom", solver="cd", max_iter=sweeps, tol=1e-4)
    W = nmf.fit_transform(X, W=W0.copy(), H=H0.copy())
    limit = time.process_time() - began
    target = relative_loss(X, W, nmf.components_)
    rows = [f"| {start} | scikit-learn NMF, coordinate descent | {target:.6f} | {limit:.1f} | {nmf.n_iter_} | 1 |"]

    began = time.process_time()
    scaled = scale(fishers)
    form = Diagonal(RowSpace(scaled.rows), scaled)
    state = form.from_vectors(torch.from_numpy(H0), torch.from_numpy(W0))
    state = form.solve_W(state, Diagonal.sweeps)  # W first, as scikit-learn does
    iterations = 0
    while state.loss > target and time.process_time() - began < limit:
        state, iterations = form.step(state), iterations + 1
    seconds = time.process_time() - began
    loss = relative_loss(X, state.W.numpy(), state.coords.numpy())
    assert abs(loss - state.loss) < 1e-5, f"loss {state.loss} is {loss} when recomputed"
    rows.append(row(start, "npeff", loss, target, seconds, iterations, limit))
    if start == 0:
        rows += [minibatch_run(X, W0, H0, target, limit), torchnmf_run(X, W0, H0, target, limit)]
    print("\n".join(rows), flush=True)
    return rows


def row(start: int, who: str, loss: float, target: float, seconds: float, iterations: int, limit: float) -> str:
    note, ratio = (" (time limit)", "") if loss > target * (1 + 1e-6) else ("", f"{limit / seconds:.1f}")
    return f"| {start} | {who} | {loss:.6f}{note} | {seconds:.1f} | {iterations} | {ratio} |"


def minibatch_run(X: sp.csr_matrix, W0: np.ndarray, H0: np.ndarray, target: float, limit: float) -> str:
    """scikit-learn's online NMF, over more and more passes, each run from the start; a table row of the last."""
    loss, seconds, passes, spent = float("inf"), 0.0, 2, 0.0
    while loss > target and spent + 2.2 * seconds < limit:
        began = time.process_time()
        nmf = MiniBatchNMF(W0.shape[1], init="custom", batch_size=1024, max_iter=passes, tol=0, max_no_improvement=None)
        W = nmf.fit_transform(X, W=W0.copy(), H=H0.copy())
        seconds = time.process_time() - began
        spent += seconds
        loss, done, passes = relative_loss(X, W, nmf.components_), passes, 3 * passes
    return row(0, f"scikit-learn MiniBatchNMF, {done} passes", loss, target, seconds, nmf.n_steps_, limit)


def torchnmf_run(X: sp.csr_matrix, W0: np.ndarray, H0: np.ndarray, target: float, limit: float) -> str:
    """Multiplicative updates of torchnmf (its trainer for sparse targets), a table row."""
    try:
        from torchnmf.nmf import NMF as TorchNMF
    except ImportError as error:
        return f"| 0 | torchnmf | not installed ({error}) | | | |"
    coo = X.tocoo()
    V = torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, X.shape).coalesce()
    model = TorchNMF(W=torch.from_numpy(H0.T.copy()), H=torch.from_numpy(W0.copy()))
    seconds, iterations, loss = 0.0, 0, float("inf")
    while loss > target and seconds < limit:
        began = time.process_time()
        model.fit(V, beta=2, tol=0, max_iter=10)
        seconds += time.process_time() - began
        iterations += 10
        loss = relative_loss(X, model.H.detach().numpy(), model.W.detach().numpy().T)
    return row(0, "torchnmf, multiplicative updates", loss, target, seconds, iterations, limit)


if __name__ == "__main__":
    main()
