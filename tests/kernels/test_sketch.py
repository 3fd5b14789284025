"""The sketch kernels: the same map everywhere, down to the bits; the error that theory promises."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.errors import ArgumentError, DataError
from npeff.kernels import (
    NonFiniteError,
    StreamingSketch,
    available,
    dispatch,
    reference,
    set_num_threads,
    sketch,
    sketch_csr,
    use,
)

IMPLEMENTATIONS = available()
KNOWN = {24: 1.0, 58: 4.0, 61: -2.0}
"""Buckets and values of the sketch in test_a_known_sketch_stays_what_it_is."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.int32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonzeros", [1, 2, 3, 4])
@pytest.mark.parametrize(("columns", "base"), [(1, 0), (15, 3), (16, 16), (33, 15), (5003, 37), (100, 2**40 + 5)])
def test_equals_the_matrix_of_the_map(implementation: str, nonzeros: int, columns: int, base: int) -> None:
    x, d = normal(3, columns), 96 * nonzeros
    expected = reference.sketch(x.astype(np.float64), d, 7, base, nonzeros)
    size = np.linalg.norm(x, axis=1).max()
    np.testing.assert_allclose(sketch(x, d, 7, base, nonzeros=nonzeros), expected, rtol=0, atol=1.2e-7 * size)


def test_all_implementations_and_threads_give_the_same_bits() -> None:
    x = normal(3, 40_011)
    found = []
    try:
        for name in IMPLEMENTATIONS:
            use(name)
            for threads in (1, 2, 3):
                set_num_threads(threads)
                found.append(sketch(x, 1024, 3, 5, nonzeros=2))
    finally:
        use(None)
        set_num_threads(None)
    for other in found[1:]:
        np.testing.assert_array_equal(bits(other), bits(found[0]))


def test_a_known_sketch_stays_what_it_is() -> None:
    """Files hold sketches: the map must never change under them."""
    x = np.zeros((1, 40), np.float32)
    x[0, [0, 17, 39]] = [1, 2, 4]
    found = sketch(x, 64, seed=2024, base=1000)[0]
    at = np.flatnonzero(found)
    assert dict(zip(at.tolist(), found[at].tolist(), strict=True)) == KNOWN


@given(
    cuts=st.lists(st.integers(1, 299), max_size=5, unique=True),
    base=st.integers(0, 1000),
    others=st.integers(0, 3),
    nonzeros=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_any_cut_of_a_row_and_any_company_gives_the_same_bits(
    cuts: list[int], base: int, others: int, nonzeros: int
) -> None:
    x, y = normal(1, 300, seed=base), normal(3, 300, seed=base + 1)
    whole = sketch(x, 64, 1, base, nonzeros=nonzeros)
    stream = StreamingSketch(1 + others, 64, 1, nonzeros=nonzeros)
    edges = [0, *sorted(cuts), 300]
    for start, stop in pairwise(edges):
        stream.push(np.concatenate([y[:others, start:stop], x[:, start:stop]]), base + start)
    np.testing.assert_array_equal(bits(stream.finish()[others:]), bits(whole))


def test_rows_that_share_a_sketch_are_added(implementation: str) -> None:
    x = normal(6, 40)
    stream = StreamingSketch(2, 32, 5)
    base = np.array([0, 100, 40, 7, 3, 500], np.int64)
    stream.push(x, base, np.array([1, 0, 1, 1, 0, 1], np.int64))
    found = stream.finish()
    for target, mine in ((0, [1, 4]), (1, [0, 2, 3, 5])):
        expected = sum(reference.sketch(x[i : i + 1].astype(np.float64), 32, 5, int(base[i]), 1) for i in mine)
        np.testing.assert_allclose(found[target], expected[0], atol=1e-5)


def test_block_order_changes_nothing_beyond_rounding() -> None:
    x = normal(2, 4000)
    stream = StreamingSketch(2, 256, 0)
    for start in np.random.default_rng(0).permutation(np.arange(0, 4000, 100)):
        stream.push(x[:, start : start + 100], int(start))
    np.testing.assert_allclose(stream.finish(), sketch(x, 256), rtol=3e-7, atol=1e-7)


def test_sparse_rows_have_the_bits_of_dense_ones(implementation: str) -> None:
    rng = np.random.default_rng(3)
    x = normal(5, 700) * (rng.random((5, 700)) < 0.1)
    x[2] = 0
    filled = x != 0
    indptr = np.concatenate([[0], np.cumsum(filled.sum(1))]).astype(np.int64)
    for index in (np.int32, np.int64):
        found = sketch_csr(indptr, np.nonzero(filled)[1].astype(index), x[filled], 64, 9, nonzeros=2)
        np.testing.assert_array_equal(bits(found), bits(sketch(x, 64, 9, nonzeros=2)))


def test_views_dtypes_and_kinds() -> None:
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    for view in (x[2:5], x[::2, 3:200], x[:, ::3], x.T, x[1], x.double(), x.bfloat16(), x.requires_grad_()):
        found = sketch(view, 64)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.shape[-1] == 64
        plain = view.detach().float().numpy().reshape(-1, view.shape[-1]).astype(np.float64)
        np.testing.assert_allclose(found.numpy().reshape(-1, 64), reference.sketch(plain, 64, 0, 0, 1), atol=1e-5)
    assert isinstance(sketch(x.detach().numpy(), 64), np.ndarray)
    assert sketch(np.zeros((0, 10), np.float32), 32).shape == (0, 32)
    assert not sketch(np.zeros((2, 0), np.float32), 32).any()


def test_long_sums_are_exact_to_rounding() -> None:
    """A float32 sum of 10⁶ equal-signed terms a bucket would be off by 10⁻⁴."""
    x = np.full((1, 1 << 18), np.float32(0.1))
    x[0, 0] = 2**20
    expected = reference.sketch(x[:, ::1].astype(np.float64), 16, 0, 0, 1)
    np.testing.assert_array_equal(sketch(x, 16), expected.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_and_found(implementation: str, value: float) -> None:
    x = normal(3, 200)
    x[1, 77] = value
    with pytest.raises(DataError, match=r"row 1 .* index 177"):
        sketch(x, 32, base=100)
    with pytest.raises(DataError, match=r"row 2 .* index 1;"):
        sketch_csr(np.array([0, 1, 1, 3]), np.array([4, 0, 7]), np.array([1, value, value], np.float32), 32)


def test_sums_beyond_float32_are_refused(implementation: str) -> None:
    """Finite values whose sum is not: the index is that of the bucket."""
    sums = StreamingSketch(2, 16)
    sums.push_matrix(np.full((2, 64), 3e38, np.float32) * [[0], [1]], 0, (8, 8), np.zeros(2, np.int64))
    with pytest.raises(NonFiniteError, match="row 1 holds") as error:
        sums.finish()
    assert 0 <= error.value.index < 16
    assert not sums.finish().any()
    sums.push(np.full((2, 4), 3e38, np.float32))  # these are, but for their sum
    assert np.abs(sums.finish()).max() == np.float32(3e38)
    columns = 16 * np.arange(2000)
    with pytest.raises(NonFiniteError, match="row 0 holds"):
        sketch_csr(np.array([0, 2000]), columns, np.full(2000, 3e38, np.float32), 16)


def test_arguments_are_checked() -> None:
    x = normal(2, 20)
    for bad in ({"d": 0}, {"d": 17}, {"d": 32, "nonzeros": 3}, {"d": 32, "seed": -1}, {"d": 32.0}, {"d": True}):
        with pytest.raises(ArgumentError):
            sketch(x, **bad)
    stream = StreamingSketch(2, 32)
    with pytest.raises(ArgumentError, match="base"):
        stream.push(x, -1)
    with pytest.raises(ArgumentError, match="rows"):
        stream.push(x, 0, np.array([0, 2]))
    with pytest.raises(ArgumentError, match="block"):
        stream.push(normal(3, 20))
    with pytest.raises(ArgumentError, match="power of two"):
        StreamingSketch(2, 48).push_matrix(x, 0, (4, 5), np.zeros(2, np.int64))
    with pytest.raises(ArgumentError, match="first"):
        stream.push_matrix(x, 0, (4, 5), np.ones(2, np.int64))
    with pytest.raises(ArgumentError, match="delta"):
        stream.push_outer(torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 4), 0, (3, 4), slice(0, 2))


def test_the_native_kernels_check_what_would_break_memory() -> None:
    native = dispatch.native()
    if native is None:
        pytest.skip("no native module")
    zero, places = np.zeros(2, np.int64), np.zeros(4, np.int32)
    common = {
        "block": normal(2, 8),
        "order": np.arange(2),
        "starts": np.arange(3),
        "sums": np.zeros((2, 32)),
        "threads": 1,
    }
    rows = {**common, "bases": zero, "seed": 0, "copies": 1}
    matrix = {**common, "row_places": places, "column_places": places, "first": zero, "weight": 1.0}
    native.sketch_rows(**rows)
    native.sketch_matrix(**matrix)
    for call, change in (
        (native.sketch_rows, {"order": np.array([0, 2])}),
        (native.sketch_rows, {"order": np.array([-1, 0])}),
        (native.sketch_rows, {"starts": np.array([0, 3, 2])}),
        (native.sketch_rows, {"starts": np.array([0, 1, 1])}),
        (native.sketch_rows, {"bases": zero - 1}),
        (native.sketch_rows, {"copies": 3}),
        (native.sketch_matrix, {"row_places": places + 64}),
        (native.sketch_matrix, {"column_places": places - 1}),
        (native.sketch_matrix, {"first": zero + 3}),
        (native.sketch_matrix, {"order": np.array([0, 2])}),
    ):
        with pytest.raises(ArgumentError):
            call(**{**(rows if call == native.sketch_rows else matrix), **change})


# ---- two-sided maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("t", "d"), [(1, 64), (2, 32), (5, 16), (3, 1024), (70, 4096)])
def test_factors_and_their_products_have_one_sketch(implementation: str, turned: bool, t: int, d: int) -> None:
    delta = torch.from_numpy(normal(2, t, 3, 21))
    delta[1, t // 2 + 1 :, 2] = 0.0
    inputs = torch.from_numpy(normal(2, t, 34, seed=1))
    products = torch.einsum("btrn,btk->brnk", delta, inputs).flatten(0, 1)
    products = products.mT if turned else products
    shape = (34, 21) if turned else (21, 34)
    factored, whole, pieces = (StreamingSketch(7, d, 4) for _ in range(3))
    factored.push_outer(delta, inputs, 12345, shape, slice(1, 7), turned)
    rows = np.arange(1, 7)
    whole.push_matrix(products.reshape(6, -1), 12345, shape, np.zeros(6, np.int64), rows)
    for start in range(0, shape[0], 5):
        part = products[:, start : start + 5].reshape(6, -1)
        pieces.push_matrix(part, 12345, shape, np.full(6, start), rows)
    expected, size = whole.finish(), float(products.flatten(1).norm(dim=1).max())
    np.testing.assert_allclose(factored.finish(), expected, rtol=0, atol=3e-6 * size)
    np.testing.assert_array_equal(bits(pieces.finish()), bits(expected))
    assert not expected[0].any()


@pytest.mark.parametrize("t", [1, 2, 9])
def test_an_input_that_is_not_finite_shows_behind_a_place(implementation: str, t: int) -> None:
    """As in the products themselves, where 0 · ∞ is NaN, and as on a device."""
    delta, inputs = torch.ones(2, t, 3, 21), torch.ones(2, t, 34)
    delta[1, t // 2 :], inputs[1, t - 1, 5] = 0.0, float("inf")
    stream = StreamingSketch(6, 32, 4)
    stream.push_outer(delta, inputs, 12345, (21, 34), slice(0, 6))
    with pytest.raises(NonFiniteError) as error:
        stream.finish()
    assert error.value.row == 3


# ---- theory ---------------------------------------------------------------------------------------------------------


def errors(x: np.ndarray, y: np.ndarray, d: int, nonzeros: int, seeds: int) -> np.ndarray:
    """Errors of the sketched ⟨x, y⟩ over seeds."""
    pair = np.stack([x, y])
    found = np.array(
        [np.prod(sketch(pair, d, s, nonzeros=nonzeros).astype(np.float64), axis=0).sum() for s in range(seeds)]
    )
    return found - x.astype(np.float64) @ y


def shapes(n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, n))
    heavy = rng.standard_cauchy(n)
    runs = np.repeat(rng.standard_normal(n // 16), 16)
    return {
        "spread": (x, y),
        "alike": (x, x + 0.3 * y),
        "heavy": (heavy, heavy * rng.standard_normal(n)),
        "in blocks": (runs * (np.arange(n) % 64 < 16), runs),
        "neighbours": (np.where(np.arange(n) < 40, x, 0), np.where(np.arange(n) < 40, y, 0)),
    }


@pytest.mark.parametrize("kind", ["spread", "alike", "heavy", "in blocks", "neighbours"])
@pytest.mark.parametrize("nonzeros", [1, 2])
def test_inner_products_are_unbiased_with_the_variance_of_theory(kind: str, nonzeros: int) -> None:
    """``Var ≤ (‖x‖²‖y‖² + ⟨x,y⟩²)/d``, and the mean within its standard error, over 600 seeds.

    The mean square of N errors exceeds its expectation v by more than ``4v√(κ/N)`` with next to no chance, κ the
    kurtosis of the errors, which the sample supplies.
    """
    x, y = (v.astype(np.float32) for v in shapes(1600)[kind])
    d, seeds = 128, 600
    found = errors(x, y, d, nonzeros, seeds)
    bound = (float(x @ x) * float(y @ y) + float(x @ y) ** 2) / d
    variance = float(np.mean(found**2))
    spread = np.std(found**2) / np.sqrt(seeds)
    assert variance <= bound + 4 * spread
    assert abs(found.mean()) <= 4 * np.sqrt(bound / seeds)


def test_two_sided_maps_have_at_most_four_times_the_variance() -> None:
    rng = np.random.default_rng(0)
    delta, inputs = rng.standard_normal((2, 64)).astype(np.float32)
    x = np.outer(delta, inputs).reshape(1, -1)
    norm, d, found = float((x.astype(np.float64) ** 2).sum()), 128, []
    for seed in range(400):
        stream = StreamingSketch(1, d, seed)
        stream.push_matrix(x, 0, (64, 64), np.zeros(1, np.int64))
        found.append(float((stream.finish().astype(np.float64) ** 2).sum()) - norm)
    squares = np.square(found)
    assert squares.mean() <= 8 * norm**2 / d + 4 * squares.std() / 20
    assert abs(np.mean(found)) <= 4 * np.sqrt(8 * norm**2 / d / 400)


def test_seeds_and_places_are_different_maps() -> None:
    x = normal(1, 500)
    maps = [sketch(x, 64, s, b) for s, b in ((0, 0), (1, 0), (0, 16), (2**62, 0))]
    for i, one in enumerate(maps):
        for other in maps[:i]:
            cosine = float(one[0] @ other[0]) / np.linalg.norm(one) / np.linalg.norm(other)
            assert abs(cosine) < 0.6


def test_blocks_in_half_precision_are_converted(implementation: str) -> None:
    block = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for numbers in (block, block.float()):
        sketch = StreamingSketch(3, 16)
        sketch.push_matrix(numbers, 0, (6, 4), np.zeros(3, np.int64), np.arange(3))
        found.append(np.asarray(sketch.finish()))
    np.testing.assert_array_equal(*found)
