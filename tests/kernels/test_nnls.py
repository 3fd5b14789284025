"""Non-negative least squares: native against plain torch, and scipy's solver on small problems."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls

from npeff.errors import ArgumentError, DataError
from npeff.kernels import available, nnls, reference, set_num_threads, use

IMPLEMENTATIONS = available()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)


def problem(
    n: int, r: int, seed: int = 0, density: float = 0.4, dtype: type = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """gram = (GGᵀ)∘² of unit vectors as in NPEFF, cross near the image of a sparse non-negative w."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((r, r + 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    gram = np.square(g @ g.T)
    w = rng.exponential(size=(n, r)) * (rng.random((n, r)) < density)
    cross = w @ gram + 0.1 * rng.standard_normal((n, r))
    return gram.astype(dtype), cross.astype(dtype)


def kkt(gram: np.ndarray, cross: np.ndarray, w: np.ndarray) -> np.ndarray:
    gradient = w.astype(np.float64) @ gram.astype(np.float64) - cross
    violation = np.where(w > 0, np.abs(gradient), np.maximum(-gradient, 0))
    scale = np.abs(cross).max(axis=1)
    return violation.max(axis=1) / np.where(scale > 0, scale, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (3, 2), (16, 12), (17, 16), (33, 17), (50, 31), (20, 65), (8, 130)])
def test_sweeps_equal_plain_descent(implementation: str, dtype: type, n: int, r: int) -> None:
    gram, cross = problem(n, r, dtype=dtype)
    start = np.random.default_rng(1).standard_normal((n, r)).astype(dtype)  # negative entries count as 0
    result = nnls(gram, cross, start, max_sweeps=3, tol=0)
    expected, _ = reference.nnls(torch.from_numpy(gram), torch.from_numpy(cross), torch.from_numpy(start), 3, 0)
    tolerance = 2e-5 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(result.w, expected, rtol=tolerance, atol=tolerance)
    assert result.kkt is not None and result.w.dtype == dtype
    np.testing.assert_allclose(result.kkt, kkt(gram, cross, result.w), rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("r", [1, 5, 16, 40])
def test_exact_equals_scipy(implementation: str, dtype: type, r: int) -> None:
    gram, cross = problem(6, r, dtype=dtype)
    result = nnls(gram, cross, exact=True)
    assert result.kkt is not None and result.w.dtype == np.float64
    assert result.kkt.max() <= 1e-10
    assert kkt(gram, cross, result.w).max() <= 1e-10
    root = np.linalg.cholesky(gram.astype(np.float64))
    for row, c in zip(result.w, cross.astype(np.float64), strict=True):
        expected, _ = scipy_nnls(root.T, np.linalg.solve(root, c))
        np.testing.assert_allclose(row, expected, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 20),
    r=st.integers(1, 24),
    rank=st.integers(1, 24),
    seed=st.integers(0, 2**32 - 1),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_exact_reaches_the_optimum_of_singular_problems(
    n: int, r: int, rank: int, seed: int, implementation: str
) -> None:
    """Duplicate and zero components, any rank, any scale."""
    rng = np.random.default_rng(seed)
    h = np.abs(rng.standard_normal((r, rank))) * rng.integers(0, 2, (r, 1))  # zero components
    h[rng.integers(0, r)] = h[rng.integers(0, r)]  # a duplicate
    h *= 10.0 ** rng.integers(-3, 3)
    gram, cross = h @ h.T, np.abs(rng.standard_normal((n, rank))) @ h.T
    use(implementation)
    try:
        result = nnls(gram, cross, exact=True, max_sweeps=int(rng.integers(0, 20)))
    finally:
        use(None)
    assert (result.w >= 0).all() and np.isfinite(result.w).all()
    assert (result.w[:, np.diag(gram) == 0] == 0).all()
    assert result.kkt is not None and (result.kkt <= 1e-8).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sweeps=st.integers(1, 8), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_objective_never_rises(seed: int, sweeps: int, implementation: str) -> None:
    gram, cross = problem(9, 14, seed)
    w = np.abs(np.random.default_rng(seed).standard_normal(cross.shape))
    use(implementation)
    try:
        objectives = []
        for _ in range(sweeps + 1):
            objectives.append(0.5 * np.einsum("ij,jk,ik->i", w, gram, w) - (w * cross).sum(1))
            w = nnls(gram, cross, w, max_sweeps=1, tol=0, kkt=False).w
    finally:
        use(None)
    assert (np.diff(objectives, axis=0) <= 1e-12 * (1 + np.abs(objectives[0]))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_is_swept_once_whatever_the_tolerance(implementation: str, dtype: type) -> None:
    gram, cross = np.array([[2, 1], [1, 2]], dtype), np.array([[1, 2], [3, 1]], dtype)
    for tol in (1e3, 1e300, np.inf):
        result = nnls(gram, cross, tol=tol)
        assert result.sweeps == 1
        np.testing.assert_allclose(result.w, [[0.5, 0.75], [1.5, 0]])


@pytest.mark.parametrize("exact", [False, True])
def test_any_batch_is_the_same_to_the_bit(exact: bool) -> None:
    gram, cross = problem(53, 20, dtype=np.float32)
    whole = nnls(gram, cross, max_sweeps=7, tol=1e-3, exact=exact)
    for threads in (1, 3):
        set_num_threads(threads)
        try:
            for size in (1, 5, 16, 40):
                parts = [
                    nnls(gram, cross[a : a + size], max_sweeps=7, tol=1e-3, exact=exact) for a in range(0, 53, size)
                ]
                np.testing.assert_array_equal(np.concatenate([part.w for part in parts]), whole.w)
        finally:
            set_num_threads(None)


def test_instruction_sets_agree() -> None:
    gram, cross = problem(40, 50)
    results = []
    for name in IMPLEMENTATIONS:
        use(name)
        results.append(nnls(gram, cross, max_sweeps=50).w)
    use(None)
    for w in results:
        np.testing.assert_allclose(w, results[0], atol=1e-9)


def test_tensors_and_views(implementation: str) -> None:
    gram, cross = problem(10, 8, dtype=np.float32)
    t = torch.from_numpy(cross).requires_grad_()
    expected = nnls(gram, cross).w
    result = nnls(torch.from_numpy(gram), t)
    assert isinstance(result.w, torch.Tensor) and isinstance(result.kkt, torch.Tensor)
    np.testing.assert_array_equal(result.w.numpy(), expected)
    strided = np.asfortranarray(cross)
    np.testing.assert_array_equal(nnls(gram, strided).w, expected)
    read_only = cross.copy()
    read_only.flags.writeable = False
    start = np.ones_like(cross)
    np.testing.assert_allclose(nnls(gram, read_only, start).w, expected, atol=1e-4)
    assert (start == 1).all()
    assert nnls(gram, cross, kkt=False).kkt is None


def test_zero_rows_and_negative_cross(implementation: str) -> None:
    gram, _ = problem(1, 6)
    cross = np.array([[0.0] * 6, [-1.0] * 6])
    for exact in (False, True):
        result = nnls(gram, cross, np.ones((2, 6)), exact=exact, max_sweeps=1000)
        assert result.kkt is not None and (result.kkt <= 1e-9).all()
        np.testing.assert_allclose(result.w, 0, atol=1e-8)
    assert nnls(gram, np.empty((0, 6))).w.shape == (0, 6)
    assert nnls(np.empty((0, 0)), np.empty((3, 0))).w.shape == (3, 0)


def test_bad_input(implementation: str) -> None:
    gram, cross = problem(20, 4)
    cross[7, 2] = np.nan
    for exact in (False, True):
        with pytest.raises(DataError, match="cross: row 7"):
            nnls(gram, cross, exact=exact)
    cross[7, 2] = 0
    with pytest.raises(DataError, match="gram: expected finite"):
        nnls(np.full((4, 4), np.inf), cross)
    with pytest.raises(ArgumentError, match=r"gram: expected shape \(3, 3\)"):
        nnls(gram[:, :3], cross)
    with pytest.raises(ArgumentError, match=r"cross: expected shape \(any, 4\)"):
        nnls(gram, cross[:, :3])
    with pytest.raises(ArgumentError, match="cross: expected float64, got float32"):
        nnls(gram, cross.astype(np.float32))
    with pytest.raises(ArgumentError, match="w0: expected shape"):
        nnls(gram, cross, cross[:3])
    with pytest.raises(ArgumentError, match="max_sweeps: expected"):
        nnls(gram, cross, max_sweeps=-1)
    with pytest.raises(ArgumentError, match="tol: expected"):
        nnls(gram, cross, tol=-1)
