"""Exact top-k: one-shot and streaming, native against plain torch, ties and odd floats included."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_cases import drawn_cuts
from npeff.errors import ArgumentError, DataError
from npeff.kernels import NonFiniteError, StreamingTopK, available, dispatch, set_num_threads, topk, use

IMPLEMENTATIONS = available()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)
    set_num_threads(None)


def oracle(x: np.ndarray, k: int, order: str = "index") -> tuple[np.ndarray, np.ndarray]:
    """By sorting: descending |x|, then ascending index."""
    indices = np.argsort(-np.abs(x.astype(np.float64)), axis=1, kind="stable")[:, :k]
    if order == "index":
        indices = np.sort(indices, axis=1)
    return np.take_along_axis(x, indices, 1), indices


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def values_of(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    n = shape[0] * shape[1]
    x = {
        "normal": lambda: rng.standard_normal(n),
        "few distinct": lambda: rng.integers(-3, 4, n),
        "zeros": lambda: np.zeros(n),
        "signed zeros": lambda: np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "equal": lambda: np.where(rng.random(n) < 0.5, -2.5, 2.5),
        "ascending": lambda: np.arange(n) * 1e-3,
        "descending": lambda: np.arange(n)[::-1] * 1e-3,
        "denormal": lambda: rng.integers(-50, 50, n) * 1e-45,
        "heavy tail": lambda: rng.standard_cauchy(n) ** 3,
        "sparse": lambda: rng.standard_normal(n) * (rng.random(n) < 0.01),
    }[kind]()
    return x.astype(np.float32).reshape(shape)


KINDS = [
    "normal",
    "few distinct",
    "zeros",
    "signed zeros",
    "equal",
    "ascending",
    "descending",
    "denormal",
    "heavy tail",
    "sparse",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cols", "k"), [(1, 1), (15, 15), (16, 1), (17, 5), (64, 63), (4097, 100), (70_001, 300)])
def test_equals_sorting(implementation: str, kind: str, cols: int, k: int) -> None:
    x = values_of(kind, (3, cols), np.random.default_rng(cols + k))
    for order in ("index", "magnitude"):
        values, indices = topk(x, k, order)
        expected_values, expected_indices = oracle(x, k, order)
        np.testing.assert_array_equal(indices, expected_indices)
        assert same_bits(values, expected_values)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_split_among_threads(rows: int, threads: int) -> None:
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((rows, 600_000)), 2).astype(np.float32)  # many ties
    set_num_threads(threads)
    try:
        values, indices = topk(x, 20_000)
    finally:
        set_num_threads(None)
    expected_values, expected_indices = oracle(x, 20_000)
    np.testing.assert_array_equal(indices, expected_indices)
    assert same_bits(values, expected_values)


@pytest.mark.parametrize("threads", [1, 2])
def test_wrong_first_guess_costs_time_only(threads: int) -> None:
    """The sample sees large values only where few are, or misses all of them."""
    n, k = 400_000, 1000
    rng = np.random.default_rng(1)
    needle = np.full(n, 1e-3, np.float32)
    needle[rng.choice(n, k // 2, replace=False)] = 5
    step = np.where(np.arange(n) % 49 == 0, 1.0, 0.0).astype(np.float32)
    front = np.where(np.arange(n) < 2 * k, np.arange(n), 0).astype(np.float32)
    set_num_threads(threads)
    try:
        for row in (needle, step, front, np.sort(needle)):
            np.testing.assert_array_equal(topk(row[None], k)[1], oracle(row[None], k)[1])
    finally:
        set_num_threads(None)


def test_views_and_dtypes(implementation: str) -> None:
    base = torch.randn(40, 3000, generator=torch.Generator().manual_seed(2))
    for view in (base[3:7], base[::2, 100:2100], base[:, ::3], base.T[:, :7], base[1], base.requires_grad_()):
        values, indices = topk(view, 5)
        x = view.detach().reshape(-1, view.shape[-1]).numpy()
        expected_values, expected_indices = oracle(x, 5)
        np.testing.assert_array_equal(indices.numpy().reshape(-1, 5), expected_indices)
        np.testing.assert_array_equal(values.numpy().reshape(-1, 5), expected_values)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = base.detach()[:4].to(dtype)
        np.testing.assert_array_equal(topk(x, 9)[1].numpy(), oracle(x.float().numpy(), 9)[1])
    array = base.detach().numpy()[:4]
    array.flags.writeable = False
    for view in (array, array[:, ::-1], array[::-1], array.astype(">f4"), np.asfortranarray(array)):
        values, indices = topk(view, 7)
        assert isinstance(values, np.ndarray)
        np.testing.assert_array_equal(indices, oracle(np.ascontiguousarray(view, np.float32), 7)[1])


def stream(blocks: list[tuple[np.ndarray, int]], k: int, **options: bool) -> tuple[np.ndarray, ...]:
    selection = StreamingTopK(blocks[0][0].shape[0], k, **options)
    for block, base in blocks:
        selection.push(block, base)
    return selection.finish()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_in_any_order_equal_one_shot(data: st.DataObject) -> None:
    x, k, cuts = drawn_cuts(data)
    blocks = [(x[:, a:b], a + 10) for a, b in pairwise(cuts)]
    order = data.draw(st.permutations(range(len(blocks))), "order")
    use(data.draw(st.sampled_from(IMPLEMENTATIONS), "implementation"))
    try:
        counts, indices, values = stream([blocks[i] for i in order], k)
    finally:
        use(None)
    expected_values, expected_indices = oracle(x, k)
    for row, (a, b) in enumerate(zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True)):
        nonzero = expected_values[row] != 0  # the stream never keeps zeros
        np.testing.assert_array_equal(indices[a:b], expected_indices[row][nonzero] + 10)
        np.testing.assert_array_equal(values[a:b], expected_values[row][nonzero])


def test_long_stream_overflows_its_buffer(implementation: str) -> None:
    """More candidates than any buffer holds, from either side, with ties across blocks."""
    x = np.round(np.random.default_rng(3).standard_normal((2, 60_000)), 1).astype(np.float32)
    for blocks in (
        [(x[:, a : a + 5000], a) for a in range(0, 60_000, 5000)],
        [(x[:, a : a + 977], a) for a in range(0, 60_000, 977)],
    ):
        for order in (blocks, blocks[::-1]):
            counts, indices, _ = stream(order, 700)
            assert list(counts) == [700, 700]
            np.testing.assert_array_equal(indices.reshape(2, 700), oracle(x, 700)[1])


def test_rows_feed_selectors(implementation: str) -> None:
    """Several rows of a block in one selector, each at its own base; used again after finish."""
    rng = np.random.default_rng(4)
    selection = StreamingTopK(4, 6)
    for _ in range(2):
        x = rng.standard_normal((5, 50)).astype(np.float32)
        selection.push(torch.from_numpy(x), np.array([100, 0, 1000, 50, 500]), np.array([2, 0, 2, 0, 2]))
        counts, indices, values = selection.finish("magnitude")
        assert list(counts) == [6, 0, 6, 0]
        flat = np.zeros((2, 2000), np.float32)
        for row, (selector, base) in enumerate([(1, 100), (0, 0), (1, 1000), (0, 50), (1, 500)]):
            flat[selector, base : base + 50] = x[row]
        expected_values, expected_indices = oracle(flat, 6, "magnitude")
        np.testing.assert_array_equal(indices.reshape(2, 6), expected_indices)
        np.testing.assert_array_equal(values.reshape(2, 6), expected_values)


def test_keep_zeros(implementation: str) -> None:
    x = np.array([[0, 1, 0, -0.0]], np.float32)
    counts, indices, values = stream([(x, 0)], 3, keep_zeros=True)
    assert list(counts) == [3] and list(indices) == [0, 1, 2] and list(values) == [0, 1, 0]
    counts, indices, _ = stream([(x, 0)], 3)
    assert list(counts) == [1] and list(indices) == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cols", [40, 50_000])
def test_non_finite_is_named(implementation: str, bad: float, cols: int) -> None:
    x = np.random.default_rng(5).standard_normal((4, cols)).astype(np.float32)
    x[2, cols - 3] = x[2, cols - 1] = x[3, 0] = bad
    with pytest.raises(NonFiniteError, match=f"row 2 .* index {cols - 3}") as caught:
        topk(x, 2)
    assert (caught.value.row, caught.value.index) == (2, cols - 3)
    assert isinstance(caught.value, DataError)
    selection = StreamingTopK(9, 2)
    with pytest.raises(NonFiniteError) as caught:
        selection.push(x, np.arange(4) * 10**10, np.array([8, 7, 6, 5]))
    assert (caught.value.row, caught.value.index) == (2, 2 * 10**10 + cols - 3)
    selection.reset()
    selection.push(x[:2], 0)
    assert list(selection.finish()[0]) == [2, 2, *[0] * 7]


def test_empty() -> None:
    values, indices = topk(torch.empty(0, 5), 2)
    assert values.shape == indices.shape == (0, 2)
    selection = StreamingTopK(2, 3)
    selection.push(np.empty((2, 0), np.float32), 0)
    counts, indices_, values_ = selection.finish()
    assert list(counts) == [0, 0] and len(indices_) == len(values_) == 0
    assert len(StreamingTopK(0, 3).finish()[0]) == 0


def test_bad_arguments(implementation: str) -> None:
    x = np.zeros((2, 5), np.float32)
    for k in (0, 6, -1):
        with pytest.raises(ArgumentError, match=r"k: expected 1 … 5.*got"):
            topk(x, k)
    with pytest.raises(ArgumentError, match="x: expected float32"):
        topk(x.astype(np.int32), 1)
    with pytest.raises(ArgumentError, match="x: expected"):
        topk([[1.0]], 1)  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="order: expected"):
        topk(x, 1, "size")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="k: expected ≥ 1"):
        StreamingTopK(1, 0)
    selection = StreamingTopK(2, 3)
    with pytest.raises(ArgumentError, match="rows: expected"):
        selection.push(x, 0, np.array([0, 2]))
    with pytest.raises(ArgumentError, match="rows: expected shape"):
        selection.push(x, 0, np.array([0]))
    with pytest.raises(ArgumentError, match="base: expected"):
        selection.push(x, np.array([0, -1]))
    with pytest.raises(ArgumentError, match="block: expected at most 2 rows"):
        selection.push(np.zeros((3, 5), np.float32), 0)


def test_report_names_every_kernel(implementation: str) -> None:
    lines = [line for line in dispatch.report() if line.device == "cpu"]
    assert {line.kernel for line in lines} == set(dispatch.KERNELS)
    assert all(line.implementation == implementation for line in lines)
    assert all(line.reason for line in lines)  # use() asked for it


def test_rows_without_columns_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"x: expected at least one column to select from, got shape \(2, 0\)"):
        topk(np.zeros((2, 0), np.float32), 1)
