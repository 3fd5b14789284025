"""K = A·Aᵀ of sparse rows: every way a column can go, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError
from npeff.kernels import available, set_num_threads, sparse_gram, use
from npeff.kernels import sparse_gram as exported
from npeff.kernels.sparse import check_csr
from sparse_cases import skewed, to_scipy

IMPLEMENTATIONS = available()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)


def check(csr: tuple[np.ndarray, np.ndarray, np.ndarray], n_columns: int) -> np.ndarray:
    k = sparse_gram(*csr, n_columns)
    a = to_scipy(csr, n_columns)
    np.testing.assert_allclose(k, (a @ a.T).toarray(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(k, k.T)
    return k


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (63, 40), (64, 300), (65, 700), (200, 129), (600, 900)])
def test_equals_dense(implementation: str, dtype: type, rows: int, columns: int) -> None:
    check(skewed(rows, columns, rows, dtype), columns)


@pytest.mark.parametrize("share", [0.004, 0.1, 0.9])
def test_all_columns_alike(share: float) -> None:
    """Only scattered, only panels, only dense."""
    rng = np.random.default_rng(0)
    mask = rng.random((300, 500)) < share
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64)
    indices = np.nonzero(mask)[1].astype(np.int32)
    check((indptr, indices, rng.standard_normal(len(indices)).astype(np.float32)), 500)


def test_many_columns_and_threads() -> None:
    """More columns than a panel holds; the same bits from any number of threads."""
    rng = np.random.default_rng(1)
    n_columns, lengths = 30_000, rng.integers(0, 6000, 150)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.concatenate([np.sort(rng.choice(n_columns, n, replace=False)) for n in lengths]).astype(np.int32)
    csr = (indptr, indices, rng.standard_normal(len(indices)).astype(np.float32))
    results = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        results.append(check(csr, n_columns))
    set_num_threads(None)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_empty_and_tensors(implementation: str) -> None:
    none = np.zeros(0, np.int32)
    assert sparse_gram(np.zeros(1, np.int64), none, none.astype(np.float32), 5).shape == (0, 0)
    np.testing.assert_array_equal(
        sparse_gram(np.zeros(4, np.int64), none, none.astype(np.float32), 5), np.zeros((3, 3))
    )
    tensors = [torch.from_numpy(x) for x in skewed(30, 20)]
    assert isinstance(sparse_gram(*tensors, 20), torch.Tensor)


def test_bad_structure(implementation: str) -> None:
    indptr, indices, values = skewed(5, 9)
    with pytest.raises(ArgumentError, match="indices"):
        sparse_gram(indptr, indices, values, int(indices.max()))
    with pytest.raises(ArgumentError, match="n_columns: expected"):
        sparse_gram(indptr, indices, values, -1)
    with pytest.raises(ArgumentError, match="indptr: expected"):
        check_csr(indptr[:0], indices, values)
    assert exported is sparse_gram
