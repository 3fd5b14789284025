"""The blocks of the CUDA kernels, emulated on the processor in shuffled orders: the very source that devices run."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blocks
from kernel_cases import drawn_cuts, kinds, problem
from npeff.kernels import reference, spmm, topk
from sparse_cases import skewed, to_scipy

SEEDS = [0, 1, 2]
"""Orders of threads and blocks; 0: ascending."""


def bfloat16(x: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """The tensor, and the values as float32."""
    t = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16)
    return t, t.float().numpy()


def oracle(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    values, indices = reference.topk(torch.from_numpy(x), k, False)
    return values.numpy(), indices.numpy()


class Stream:
    def __init__(self, n: int, k: int, seed: int, keep_zeros: bool = False) -> None:
        self.n, self.k = n, k
        self.inner = blocks.Selectors(n, k, keep_zeros, seed)

    def push(self, x: np.ndarray, base: int | np.ndarray = 0, rows: np.ndarray | None = None) -> None:
        bases = np.full(len(x), base, np.int64) if isinstance(base, int) else base
        self.inner.push(x, bases, np.arange(len(x)) if rows is None else rows)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts, indices = np.empty(self.n, np.int64), np.empty((self.n, self.k), np.int64)
        values = np.empty((self.n, self.k), np.float32)
        self.inner.finish(counts, indices, values)
        return counts, indices, values


# Tiles of the scan are of 4096 entries, of the selection of 512 and 2048.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("cols", "k"), [(1, 1), (17, 5), (511, 100), (4096, 64), (4097, 4097), (9000, 300)])
def test_topk_equals_sorting(seed: int, cols: int, k: int) -> None:
    rng = np.random.default_rng(cols)
    x = np.stack(list(kinds(cols, rng).values())).astype(np.float32)
    stream = Stream(len(x), k, seed, keep_zeros=True)
    stream.push(x)
    counts, indices, values = stream.finish()
    assert (counts == k).all()
    expected, places = oracle(x, k)
    np.testing.assert_array_equal(indices, places)
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_topk_guesses_and_goes_back_on_them(seed: int) -> None:
    """Long rows: guesses that hold, that are too high, too low, and buffers that overflow."""
    n, k = 70_000, 300
    rng = np.random.default_rng(1)
    needle = np.full(n, 1e-3)
    needle[rng.choice(n, k // 2, replace=False)] = 5
    step = np.where(np.arange(n) % 49 == 0, 1.0, 0.0)
    front = np.where(np.arange(n) < 2 * k, np.arange(n), 0)
    rows = [needle, step, front, np.full(n, 2.0), np.sort(needle), rng.standard_normal(n), np.arange(n)]
    x = np.stack(rows).astype(np.float32)
    for cuts in ([0, n], [0, 1000, 40_000, n], [0, 35_000, n]):
        stream = Stream(len(x), k, seed)
        for a, b in pairwise(cuts):
            stream.push(x[:, a:b], a)
        counts, indices, values = stream.finish()
        expected, places = oracle(x, k)
        for row, count in enumerate(counts):
            nonzero = expected[row] != 0
            np.testing.assert_array_equal(indices[row, :count], places[row][nonzero])
            np.testing.assert_array_equal(values[row, :count], expected[row][nonzero])
            assert (indices[row, count:] == -1).all() and (values[row, count:] == 0).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_topk_blocks_in_any_order(data: st.DataObject) -> None:
    x, k, cuts = drawn_cuts(data)
    parts = data.draw(st.permutations(list(pairwise(cuts))), "order")
    stream = Stream(3, k, data.draw(st.integers(0, 99), "threads"))
    for a, b in parts:  # slices begin at any address
        stream.push(x[:, a:b], a + 10)
    counts, indices, _ = stream.finish()
    expected, places = oracle(x, k)
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(indices[row, :count], places[row][expected[row] != 0] + 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_topk_rows_feed_selectors_again_and_again(seed: int) -> None:
    rng = np.random.default_rng(4)
    stream = Stream(4, 6, seed)
    bases, rows = np.array([100, 0, 1000, 50, 500]), np.array([2, 0, 2, 0, 2])
    for _ in range(2):
        x = rng.standard_normal((5, 50)).astype(np.float32)
        stream.push(x, bases, rows)
        counts, indices, values = stream.finish()
        assert list(counts) == [6, 0, 6, 0]
        flat = np.zeros((2, 2000), np.float32)
        for row, (selector, base) in enumerate(zip(rows // 2, bases, strict=True)):
            flat[selector, base : base + 50] = x[row]
        expected, places = oracle(flat, 6)
        np.testing.assert_array_equal(indices[[0, 2]], places)
        np.testing.assert_array_equal(values[[0, 2]], expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cols", [40, 9001])
def test_topk_of_16_bits(seed: int, cols: int) -> None:
    x = np.random.default_rng(5).standard_normal((3, cols + 3)).astype(np.float32)
    half = x.astype(np.float16)
    bits, rounded = bfloat16(x)
    for given_, values in ((half, half.astype(np.float32)), (bits, rounded)):
        stream = Stream(3, 9, seed)
        stream.push(given_[:, 3:])
        _, indices, found = stream.finish()
        expected, places = oracle(np.ascontiguousarray(values[:, 3:]), 9)
        np.testing.assert_array_equal(indices, places)
        np.testing.assert_array_equal(found, expected)


def test_every_half_is_widened_rightly() -> None:
    """All 65 536 of them, each of them selected."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)[None]
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        stream = Stream(1, 1 << 16, 0, keep_zeros=True)
        stream.inner.push(x, np.zeros(1, np.int64), np.zeros(1, np.int64))
        _, indices, values = stream.finish()
        np.testing.assert_array_equal(indices[0], np.arange(1 << 16))
        np.testing.assert_array_equal(values, x.float())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_topk_never_misses_a_non_finite_value(seed: int, bad: float) -> None:
    x = np.random.default_rng(5).standard_normal((4, 5000)).astype(np.float32)
    x[2, 4997] = x[2, 4999] = x[3, 0] = bad
    stream = Stream(9, 2, seed)
    stream.push(x[:2], 0)
    stream.push(x, np.arange(4) * 10**10, np.array([8, 7, 6, 5]))
    stream.push(1e30 * x[:1], 5 * 10**10, np.array([6]))
    _, indices, values = stream.finish()
    assert list(np.nonzero(~np.isfinite(values).all(1))[0]) == [5, 6]
    np.testing.assert_array_equal(indices[6], 2 * 10**10 + np.array([4997, 4999]))
    np.testing.assert_array_equal(values[6], bad)


# Panels are of 8 coordinates; the emulated device has 3 · 1024 rows under way at a time.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (3, 7), (127, 8), (129, 9), (40, 33), (3 * 1024 + 40, 3)])
def test_nnls_equals_plain_descent(seed: int, dtype: type, n: int, r: int) -> None:
    gram, cross, start = problem(n, r, dtype)
    w, kkt = start.copy(), np.empty(n, dtype)
    bad, sweeps = blocks.nnls(gram, cross, w, kkt, 3, 0.0, seed)
    assert bad == -1 and 1 <= sweeps <= 3
    expected, _ = reference.nnls(torch.from_numpy(gram), torch.from_numpy(cross), torch.from_numpy(start.copy()), 3, 0)
    tolerance = 3e-5 if dtype is np.float32 else 1e-11
    np.testing.assert_allclose(w, expected, rtol=tolerance, atol=tolerance)
    residual = reference.kkt(torch.from_numpy(gram), torch.from_numpy(cross), torch.from_numpy(w))
    np.testing.assert_allclose(kkt, residual, rtol=1e-3, atol=tolerance)
    alone, one = start[:1].copy(), np.empty(1, dtype)  # rows do not influence each other, down to the last bit
    blocks.nnls(gram, cross[:1].copy(), alone, one, 3, 0.0, seed)
    np.testing.assert_array_equal(alone, w[:1])


@pytest.mark.parametrize("seed", SEEDS)
def test_nnls_stops_and_names_bad_rows(seed: int) -> None:
    gram, cross, _ = problem(200, 12, np.float64)
    w, kkt = np.zeros_like(cross), np.empty(200)
    bad, sweeps = blocks.nnls(gram, cross, w, kkt, 5000, 1e-9, seed)
    assert bad == -1 and 1 < sweeps < 5000 and kkt.max() < 1e-8
    cross[150, 3], cross[77, 0] = np.nan, np.inf
    assert blocks.nnls(gram, cross, w, kkt, 2, 0.0, seed)[0] == 77


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("r", [1, 3, 4, 32, 33, 128, 132, 260])
def test_spmm(seed: int, dtype: type, r: int) -> None:
    for rows, columns in ((37, 90), (9, 700)):  # short rows, and rows that several warps share
        csr = skewed(rows, columns, dtype=dtype)
        dense = np.random.default_rng(r).standard_normal((columns, r)).astype(np.float32)
        out = np.full((rows, r), np.nan, np.float32)
        blocks.spmm(a=blocks.csr(*csr, columns), dense=dense, out=out, stream=seed)
        expected = to_scipy(csr, columns) @ dense.astype(np.float64)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        wide = np.full((rows, r), np.nan)
        double = blocks.csr(csr[0], csr[1], csr[2].astype(np.float64), columns)
        blocks.spmm(a=double, dense=dense.astype(np.float64), out=wide, stream=seed)
        np.testing.assert_allclose(wide, to_scipy(csr, columns) @ dense.astype(np.float64), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(spmm(*csr, dense), wide, rtol=1e-4, atol=1e-4)


# Tiles are of 64 rows, stretches of 128, windows of 128 columns.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (63, 40), (64, 127), (65, 129), (130, 700)])
def test_sparse_gram(seed: int, rows: int, columns: int) -> None:
    for dtype in (np.int32, np.int64):
        csr = skewed(rows, columns, rows, dtype)
        k = np.zeros((rows, rows), np.float32)
        blocks.gram(blocks.csr(*csr, columns), k, seed)
        a = to_scipy(csr, columns)
        np.testing.assert_allclose(k, (a @ a.T).toarray(), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(k, k.T)


def test_sparse_gram_skips_what_is_empty() -> None:
    """Columns far apart, by windows that begin where entries do; and sums onto what is there."""
    rng = np.random.default_rng(0)
    columns = np.sort(rng.choice(10**9, 60, replace=False))
    mask = rng.random((80, 60)) < 0.3
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    csr = (indptr, columns[np.nonzero(mask)[1]], rng.standard_normal(mask.sum()).astype(np.float32))
    k = np.ones((80, 80), np.float32)
    blocks.gram(blocks.csr(*csr, 10**9), k, 1)
    a = np.zeros((80, 60))
    a[mask] = csr[2]
    np.testing.assert_allclose(k, 1 + a @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("r", [1, 7, 64, 257])
def test_sums_over_examples(seed: int, r: int) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([3, 0, 1, 9, 0, 2])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for dtype in (np.float32, np.float64):
        p, out = rng.standard_normal((15, r)).astype(dtype), np.full((6, r), np.nan, dtype)
        blocks.cross(p=p, row_offsets=offsets, out=out, stream=seed)
        expected = np.stack([np.square(p[a:b].astype(np.float64)).sum(0) for a, b in pairwise(offsets)])
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_topk_on_the_processor_is_the_same() -> None:
    """One order and one guess for both: the same entries where everything ties."""
    x = np.random.default_rng(0).integers(-2, 3, (2, 40_000)).astype(np.float32)
    stream = Stream(2, 1000, 1, keep_zeros=True)
    stream.push(x)
    np.testing.assert_array_equal(stream.finish()[1], topk(x, 1000)[1])
