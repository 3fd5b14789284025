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

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.decomposition import NMF, MiniBatchNMF

import npeff
from low_rank import processor
from npeff import datasets, models
from npeff.solver.diagonal import SWEEPS, Diagonal
from npeff.solver.scaling import scale
from npeff.solver.spaces import SparseSpace


def matrix(n: int, k: int) -> tuple[npeff.Fishers, sp.csr_matrix]:
    torch.manual_seed(0)
    images, model = datasets.fashion_mnist(), models.fashion_cnn()
    models.train(model, images, epochs=2)
    fishers = npeff.compute_fishers(
        model.eval(), images, kind="diagonal", compress=npeff.TopK(k), max_examples=n, progress=False
    )
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "diagonal.md")
    args = parser.parse_args()
    fishers, X = matrix(args.examples, args.top_k)
    r = args.components
    rng = np.random.default_rng(0)
    mean = np.sqrt(X.mean() / r)
    W0 = (mean * np.abs(rng.normal(size=(X.shape[0], r)))).astype(np.float32)
    H0 = (mean * np.abs(rng.normal(size=(r, X.shape[1])))).astype(np.float32)
    print(f"{X.shape[0]} × {X.shape[1]}, {X.nnz:,} entries, r = {r}", flush=True)

    warnings.simplefilter("ignore")
    began = time.perf_counter()
    nmf = NMF(r, init="custom", solver="cd", max_iter=args.iterations, tol=1e-4)
    W = nmf.fit_transform(X, W=W0.copy(), H=H0.copy())
    sklearn_seconds = time.perf_counter() - began
    target = relative_loss(X, W, nmf.components_)
    print(f"scikit-learn: {target:.6f} in {sklearn_seconds:.1f} s, {nmf.n_iter_} iterations", flush=True)

    began = time.perf_counter()
    scaled = scale(fishers)
    form = Diagonal(SparseSpace(scaled.rows), scaled)
    state = form.from_vectors(torch.from_numpy(H0), torch.from_numpy(W0))
    state = form.solve_W(state, SWEEPS)  # W first, as scikit-learn does
    iterations = 0
    while state.loss > target and iterations < 2000:
        state, iterations = form.step(state), iterations + 1
    ours_seconds = time.perf_counter() - began
    ours = relative_loss(X, state.W.numpy(), state.coords.numpy())
    assert abs(ours - state.loss) < 1e-5, f"loss {state.loss} is {ours} when recomputed"
    print(f"npeff: {ours:.6f} in {ours_seconds:.1f} s, {iterations} iterations", flush=True)

    batches = minibatch_run(X, W0, H0, target, limit=sklearn_seconds)
    print(batches, flush=True)
    peer = torchnmf_run(X, W0, H0, target, limit=sklearn_seconds)
    print(peer, flush=True)
    text = "\n".join([
        "# Diagonal decomposition (NMF) from one start",
        "",
        f"`python {' '.join(['benchmarks/diagonal.py', *sys.argv[1:]])}` · diagonal Fishers of Fashion-MNIST, "
        f"{X.shape[0]:,} × {X.shape[1]:,}, {X.nnz:,} entries, r = {r}",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "",
        "| | loss | time (s) | iterations | times faster than scikit-learn |",
        "|---|---|---|---|---|",
        f"| scikit-learn NMF, coordinate descent | {target:.6f} | {sklearn_seconds:.1f} | {nmf.n_iter_} | 1 |",
        batches,
        f"| npeff | {ours:.6f} | {ours_seconds:.1f} | {iterations} | {sklearn_seconds / ours_seconds:.1f} |",
        peer,
        "",
    ])  # fmt: skip
    args.out.write_text(text)
    sys.stdout.write(text)


def minibatch_run(X: sp.csr_matrix, W0: np.ndarray, H0: np.ndarray, target: float, limit: float) -> str:
    """scikit-learn's online NMF, over more and more passes, each run from the start; a table row of the last."""
    loss, seconds, passes, spent = float("inf"), 0.0, 2, 0.0
    while loss > target and spent + 2.2 * seconds < limit:
        began = time.perf_counter()
        nmf = MiniBatchNMF(W0.shape[1], init="custom", batch_size=1024, max_iter=passes, tol=0, max_no_improvement=None)
        W = nmf.fit_transform(X, W=W0.copy(), H=H0.copy())
        seconds = time.perf_counter() - began
        spent += seconds
        loss, done, passes = relative_loss(X, W, nmf.components_), passes, 3 * passes
    note, ratio = (" (time limit)", "") if loss > target else ("", f"{limit / seconds:.1f}")
    return f"| scikit-learn MiniBatchNMF, {done} passes | {loss:.6f}{note} | {seconds:.1f} | {nmf.n_steps_} | {ratio} |"


def torchnmf_run(X: sp.csr_matrix, W0: np.ndarray, H0: np.ndarray, target: float, limit: float) -> str:
    """Multiplicative updates of torchnmf (its trainer for sparse targets), a table row."""
    try:
        from torchnmf.nmf import NMF as TorchNMF
    except ImportError as error:
        return f"| torchnmf | not installed ({error}) | | | |"
    coo = X.tocoo()
    V = torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, X.shape).coalesce()
    model = TorchNMF(W=torch.from_numpy(H0.T.copy()), H=torch.from_numpy(W0.copy()))
    seconds, iterations, loss = 0.0, 0, float("inf")
    while loss > target and seconds < limit:
        began = time.perf_counter()
        model.fit(V, beta=2, tol=0, max_iter=10)
        seconds += time.perf_counter() - began
        iterations += 10
        loss = relative_loss(X, model.H.detach().numpy(), model.W.detach().numpy().T)
    note = "" if loss <= target else " (time limit)"
    return f"| torchnmf, multiplicative updates | {loss:.6f}{note} | {seconds:.1f} | {iterations} | |"


if __name__ == "__main__":
    main()
