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
    for _ in range(ROUNDS):
        top, best = np.empty((6, 50), np.int64), np.empty((6, 50), np.float32)
        N.topk(x, top, best, True, THREADS)
        selectors = N.Selectors(6, 50, False)
        selectors.push(x, np.zeros(6, np.int64), None, THREADS)
        counts = np.empty(6, np.int64)
        selectors.finish(counts, THREADS)
        taken = np.empty(int(counts.sum()), np.int64), np.empty(int(counts.sum()), np.float32)
        selectors.take(*taken, True, THREADS)
        assert (taken[0].reshape(6, 50) == top).all()
        csr = N.Csr(indptr, indices, values, 3000, THREADS)
        out = np.empty((64, 24), np.float32)
        N.spmm(csr, dense, out, THREADS)
        np.testing.assert_allclose(out, sparse(filled, values) @ dense, rtol=1e-3, atol=1e-3)
        turned = np.empty(3001, np.int64), np.empty(len(indices), np.int32), np.empty(len(indices), np.float32)
        N.csr_transpose(csr, *turned, THREADS)
        k = np.zeros((64, 64), np.float32)
        N.gram_panel(csr, k, THREADS)
        N.gram_scatter(csr, k, THREADS)
        N.mirror(k, THREADS)
        N.column_counts(csr, np.empty(3000, np.int64), THREADS)
        names, starts = np.arange(3000, dtype=np.int32) - 1500, np.empty(65, np.int64)
        N.select_columns_indptr(csr, names, starts, THREADS)
        N.select_columns(csr, names, starts, np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32), THREADS)
        N.to_dense(csr, np.empty((64, 3000), np.float32), THREADS)
        N.fisher_norms(csr, np.array([0, 20, 64]), np.empty(2), THREADS)
        w, kkt = np.zeros((400, 40)), np.empty(400)
        N.nnls_f64(gram, cross, w, kkt, 20, 1e-8, THREADS)
        N.nnls_exact(gram, cross, w, kkt, 1e-8, THREADS)
        narrow = [y.astype(np.float32) for y in (gram, cross)]
        N.nnls_f32(*narrow, np.zeros((400, 40), np.float32), None, 5, 0.0, THREADS)
        N.cross(p, offsets, np.empty((100, 12), np.float32), THREADS)
        N.spread_multiply(np.ones((100, 12), np.float32), p, offsets, np.empty_like(p), THREADS)
        sums = np.zeros((6, 64))
        N.sketch_rows(x, np.zeros(6, np.int64), np.arange(6), 1, 2, sums, THREADS)
        N.sketch_csr(csr, 1, 2, np.zeros((64, 64)), THREADS)
        N.sketch_finish(sums, 0.5, np.empty((6, 64), np.float32), THREADS)
        places = np.empty(300, np.int32)
        N.sketch_places(1, 0, 0, 64, places)
        rows = np.arange(6)
        N.sketch_matrix(x, 200, places, places[:200].copy(), rows, np.zeros(6, np.int64), 1.0, sums, THREADS)
        delta = rng.standard_normal((6, 2, 3, 300)).astype(np.float32)
        inputs = rng.standard_normal((6, 2, 200)).astype(np.float32)
        N.sketch_outer(delta, inputs, places, places[:200].copy(), 1.0, np.zeros((6, 3, 64)), THREADS)
        image, gradient = np.ones((6, 4, 12, 12), np.float32), np.ones((6, 4, 10, 10), np.float32)
        made = np.empty((6, 1, 4, 36), np.float32)
        N.convolution_gradients(image, [gradient], 1, 1, (3, 3), (1, 1), (1, 1), (0, 4), False, made, THREADS)
        assert (made == 100).all()


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
