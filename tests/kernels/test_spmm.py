"""CSR times dense, the transpose, and the sums over examples' rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.errors import ArgumentError
from npeff.kernels import available, cross, csr_transpose, set_num_threads, spmm, spread_multiply, use
from sparse_cases import skewed, to_scipy

IMPLEMENTATIONS = available()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("r", [1, 3, 4, 8, 15, 16, 17, 33, 64, 127, 129, 145, 260])
def test_equals_scipy(implementation: str, dtype: type, r: int) -> None:
    csr = skewed(37, 90, dtype=dtype)
    dense = np.random.default_rng(r).standard_normal((90, r)).astype(np.float32)
    expected = to_scipy(csr, 90) @ dense
    np.testing.assert_allclose(spmm(*csr, dense), expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_columns(implementation: str) -> None:
    """Dense is larger than the cache, so it is taken by blocks; the same bits for any number of threads."""
    rng = np.random.default_rng(0)
    n_columns, r = 60_000, 24
    lengths = rng.integers(0, 3000, 40)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.concatenate([np.sort(rng.choice(n_columns, n, replace=False)) for n in lengths]).astype(np.int32)
    values = rng.standard_normal(len(indices)).astype(np.float32)
    dense = rng.standard_normal((n_columns, r)).astype(np.float32)
    expected = to_scipy((indptr, indices, values), n_columns) @ dense
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(spmm(indptr, indices, values, dense))
    set_num_threads(None)
    np.testing.assert_allclose(results[0], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    reverse = np.concatenate([np.arange(a, b)[::-1] for a, b in pairwise(indptr)])
    turned = spmm(indptr, indices[reverse], values[reverse], dense)
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("threads", [1, 3])
def test_transpose(implementation: str, dtype: type, threads: int) -> None:
    csr = skewed(700, 400, dtype=dtype)
    set_num_threads(threads)
    try:
        indptr, indices, values = csr_transpose(*csr, 400)
        back = csr_transpose(indptr, indices, values, 700)
    finally:
        set_num_threads(None)
    expected = to_scipy(csr, 400).T.tocsr()
    expected.sort_indices()
    np.testing.assert_array_equal(indptr, expected.indptr)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(values, expected.data.astype(np.float32))
    assert indices.dtype == dtype
    for original, again in zip(csr, back, strict=True):
        np.testing.assert_array_equal(original, again)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 12),
    columns=st.integers(1, 30),
    r=st.integers(1, 40),
    seed=st.integers(0, 1000),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_products_agree(rows: int, columns: int, r: int, seed: int, implementation: str) -> None:
    """⟨S, A·D⟩ = ⟨Aᵀ·S, D⟩ for any shapes."""
    csr = skewed(rows, columns, seed)
    rng = np.random.default_rng(seed)
    d, s = (
        rng.standard_normal((columns, r)).astype(np.float32),
        rng.standard_normal((rows, r)).astype(np.float32),
    )
    use(implementation)
    try:
        left = np.vdot(s, spmm(*csr, d))
        right = np.vdot(spmm(*csr_transpose(*csr, columns), s), d)
    finally:
        use(None)
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


def test_tensors_in_tensors_out(implementation: str) -> None:
    csr = skewed(20, 30, dtype=np.int64)
    tensors = [torch.from_numpy(x) for x in csr]
    dense = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    out = spmm(*tensors, dense)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), to_scipy(csr, 30) @ dense.numpy(), atol=1e-5)
    assert all(isinstance(x, torch.Tensor) for x in csr_transpose(*tensors, 30))


def test_float64(implementation: str) -> None:
    indptr, indices, values = skewed(20, 30)
    dense = np.random.default_rng(0).standard_normal((30, 5))
    wide = values.astype(np.float64)
    np.testing.assert_allclose(spmm(indptr, indices, wide, dense), to_scipy((indptr, indices, values), 30) @ dense)
    assert csr_transpose(indptr, indices, wide, 30)[2].dtype == np.float64
    assert cross(dense, np.array([0, 30])).dtype == np.float64


@pytest.mark.parametrize("r", [1, 7, 64])
def test_sums_over_examples(implementation: str, r: int) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([3, 0, 1, 9, 0, 2])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    p, w = rng.standard_normal((15, r)).astype(np.float32), rng.random((6, r)).astype(np.float32)
    expected = np.stack([np.square(p[a:b]).sum(0) for a, b in pairwise(offsets)])
    np.testing.assert_allclose(cross(p, offsets), expected, rtol=1e-6)
    np.testing.assert_array_equal(spread_multiply(w, p, offsets), np.repeat(w, counts, axis=0) * p)
    out = cross(torch.from_numpy(p), torch.from_numpy(offsets))
    assert isinstance(out, torch.Tensor) and out.shape == (6, r)
    for n, rank, width in ((5, 3, r), (15, 1, r), (5, 3, 0), (3, 0, r)):  # as many rows each
        rows, weights = p[: n * rank, :width], rng.random((n, width)).astype(np.float32)
        found = spread_multiply(weights, rows, np.arange(n + 1) * rank)
        np.testing.assert_array_equal(found, np.repeat(weights, rank, axis=0) * rows)


def test_bad_structure(implementation: str) -> None:
    indptr, indices, values = skewed(5, 9)
    dense = np.ones((9, 4), np.float32)
    with pytest.raises(ArgumentError, match=r"indices.*0 … 7"):
        spmm(indptr, np.full_like(indices, 8), values, dense[:8])
    with pytest.raises(ArgumentError, match="indices"):
        spmm(indptr, indices - 100, values, dense)
    with pytest.raises(ArgumentError, match="indptr"):
        spmm(indptr[::-1], indices, values, dense)
    with pytest.raises(ArgumentError, match="indptr"):
        csr_transpose(indptr + 1, indices, values, 9)
    with pytest.raises(ArgumentError, match="indptr"):
        spmm(np.array([0, len(indices) - 1]), indices, values, dense)
    with pytest.raises(ArgumentError, match="values: expected float32"):
        spmm(indptr, indices, values.astype(np.float64), dense)
    with pytest.raises(ArgumentError, match="indices: expected int32 or int64"):
        spmm(indptr, indices.astype(np.int16), values, dense)
    with pytest.raises(ArgumentError, match="row_offsets: expected to ascend"):
        cross(dense, np.array([0, 5, 3, 9]))
    with pytest.raises(ArgumentError, match="w: expected shape"):
        spread_multiply(dense, dense, np.array([0, 9]))
