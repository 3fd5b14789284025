"""Every kernel from several Python threads at once, with several threads each, while the instruction set changes.

Run by tests/sanitize.py under ThreadSanitizer. Uses numpy arrays and the native module alone, without torch, whose own
threads ThreadSanitizer knows nothing of.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np


def native() -> types.ModuleType:
    """``npeff._native`` without the rest of npeff, which imports torch."""
    folder = next(Path(entry) / "npeff" for entry in sys.path if list((Path(entry) / "npeff").glob("_native*.so")))
    package = types.ModuleType("npeff")
    package.__path__ = [str(folder)]
    sys.modules["npeff"] = package
    path = next(folder.glob("_native*.so"))
    spec = importlib.util.spec_from_file_location("npeff._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


N = native()
ROUNDS, CALLERS, THREADS = 6, 3, 3


def work(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 60_000)).astype(np.float32)
    filled = rng.random((64, 3000)) < 0.2
    indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
    indices = np.nonzero(filled)[1].astype(np.int32)
    values = rng.standard_normal(len(indices)).astype(np.float32)
    dense = rng.standard_normal((3000, 24)).astype(np.float32)
    a = rng.standard_normal((200, 40))
    gram, cross = a.T @ a, np.abs(rng.standard_normal((400, 40)))
    p, offsets = rng.standard_normal((6000, 12)).astype(np.float32), np.arange(0, 6001, 60)
    csr = {"indptr": indptr, "indices": indices, "values": values, "n_columns": 3000}
    plan = {"order": np.arange(6), "starts": np.arange(7)}
    zero = np.zeros(6, np.int64)
    for _ in range(ROUNDS):
        top, best = np.empty((6, 50), np.int64), np.empty((6, 50), np.float32)
        run("topk", x=x, indices=top, values=best, by_magnitude=True)
        selectors = N.Selectors(n_rows=6, k=50, keep_zeros=False)
        selectors.push(block=x, bases=zero, **plan, threads=THREADS)
        counts = np.empty(6, np.int64)
        selectors.finish(counts=counts, threads=THREADS)
        taken = np.empty(int(counts.sum()), np.int64), np.empty(int(counts.sum()), np.float32)
        selectors.take(indices=taken[0], values=taken[1], by_magnitude=True, threads=THREADS)
        assert (taken[0].reshape(6, 50) == top).all()
        matrix = run("Csr", **csr)
        out = np.empty((64, 24), np.float32)
        run("spmm", a=matrix, dense=dense, out=out)
        np.testing.assert_allclose(out, sparse(filled, values) @ dense, rtol=1e-3, atol=1e-3)
        turned = {"indptr_out": np.empty(3001, np.int64), "indices_out": np.empty(len(indices), np.int32)}
        run("csr_transpose", a=matrix, **turned, values_out=np.empty(len(indices), np.float32))
        k, names = np.zeros((64, 64), np.float32), np.empty(3000, np.int32)
        run("sparse_gram", a=matrix, names=names, k=k)
        run("to_dense", a=matrix, names=np.arange(3000, dtype=np.int32), first=0, out=np.empty((64, 3000), np.float32))
        run("fisher_norms", a=matrix, row_offsets=np.array([0, 20, 64]), out=np.empty(2))
        w, residual, status = np.zeros((400, 40)), np.full(400, np.inf), np.empty(2, np.int64)
        run("nnls", gram=gram, cross=cross, w=w, residual=residual, max_sweeps=20, tol=1e-8, kkt=True, status=status)
        run("nnls_exact", gram=gram, cross=cross, w=w, residual=residual, tol=1e-8, status=status)
        narrow = {"gram": gram.astype(np.float32), "cross": cross.astype(np.float32)}
        narrow |= {"w": np.zeros((400, 40), np.float32), "residual": np.full(400, np.inf, np.float32)}
        run("nnls", **narrow, max_sweeps=5, tol=0.0, kkt=False, status=status)
        run("cross", p=p, row_offsets=offsets, out=np.empty((100, 12), np.float32))
        sums = np.zeros((6, 64))
        run("sketch_rows", block=x, bases=zero, **plan, seed=1, copies=2, sums=sums)
        places = rng.integers(0, 128, 300).astype(np.int32)
        two_sided = {"row_places": places, "column_places": places[:200].copy(), "first": zero, "weight": 1.0}
        run("sketch_matrix", block=x, **two_sided, **plan, sums=sums)
        factors = {
            "delta": rng.standard_normal((6, 2, 3, 300)).astype(np.float32),
            "input": rng.standard_normal((6, 2, 200)).astype(np.float32),
            "delta_places": places,
            "input_places": places[:200].copy(),
        }
        run("sketch_outer", **factors, weight=1.0, sums=np.zeros((6, 3, 64)))
        products = {"gram": np.empty((6, 3, 3)), "size": np.empty((6, 1))}
        run("outer_gram", delta=factors["delta"], input=factors["input"], **products)
        image, gradient = np.ones((6, 4, 12, 12), np.float32), np.ones((6, 4, 10, 10), np.float32)
        made = np.empty((6, 1, 4, 36), np.float32)
        form = {"turns": 1, "groups": 1, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "channels": (0, 4)}
        run("convolution_gradients", inputs=image, delta=[gradient], **form, squared=False, out=made)
        assert (made == 100).all()


def run(name: str, /, **arguments: Any) -> Any:
    return getattr(N, name)(**arguments, threads=THREADS)


def sparse(filled: np.ndarray, values: np.ndarray) -> np.ndarray:
    dense = np.zeros(filled.shape, np.float32)
    dense[filled] = values
    return dense


def main() -> None:
    wanted = os.environ.get("NPEFF_KERNELS") or "base"
    assert N.use_isa(wanted)
    errors: list[BaseException] = []

    def watched(seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=watched, args=(seed,)) for seed in range(CALLERS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for name in ("base", wanted):
            N.use_isa(name)
        threads[0].join(0.01)
    if errors:
        raise errors[0]
    print(f"{CALLERS} callers of {THREADS} threads each, {ROUNDS} rounds of all kernels: {wanted}")


if __name__ == "__main__":
    main()
