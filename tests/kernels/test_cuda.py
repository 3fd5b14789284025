"""Every CUDA kernel against the processor's, at sizes that straddle blocks; streams, graphs, and the way end to end."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from kernel_cases import kinds, problem
from npeff.errors import ArgumentError, DataError
from npeff.kernels import (
    NonFiniteError,
    StreamingSketch,
    StreamingTopK,
    cross,
    csr_transpose,
    dispatch,
    fisher_norms,
    nnls,
    sketch,
    sparse_gram,
    spmm,
    spread_multiply,
    topk,
)
from npeff.kernels.sparse import Csr
from npeff.kernels.streams import BlockRows
from sparse_cases import skewed

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def kernels() -> None:
    reason = dispatch.cuda_reason(torch.device(DEVICE))
    if reason:
        pytest.skip(f"the CUDA kernels are not in use: {reason}")


def there(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE) for a in arrays]


@pytest.mark.parametrize(("cols", "k"), [(1, 1), (17, 5), (4095, 64), (4097, 4097), (70_001, 300), (1_000_003, 20_000)])
@pytest.mark.parametrize("order", ["index", "magnitude"])
def test_topk(cols: int, k: int, order: str) -> None:
    x = np.stack(list(kinds(cols, np.random.default_rng(cols)).values())).astype(np.float32)
    expected_values, expected_indices = topk(x, k, order)  # type: ignore[arg-type]
    for view in (there(x)[0], there(np.pad(x, ((0, 0), (3, 2))))[0][:, 3:-2]):
        values, indices = topk(view, k, order)  # type: ignore[arg-type]
        np.testing.assert_array_equal(indices.cpu(), expected_indices)
        assert values.cpu().numpy().tobytes() == expected_values.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_topk_of_other_floats(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, indices = topk(x.to(DEVICE), 700)
    expected_values, expected_indices = topk(x, 700)
    assert torch.equal(indices.cpu(), expected_indices) and torch.equal(values.cpu(), expected_values)


@pytest.mark.parametrize("rows", [None, np.array([1, 0, 1, 0])])
def test_streaming_topk(rows: np.ndarray | None) -> None:
    x = np.round(np.random.default_rng(0).standard_normal((4, 300_000)), 2).astype(np.float32)
    here, on_device = StreamingTopK(4, 5000), StreamingTopK(4, 5000)
    for _ in range(2):
        for a, b in pairwise([0, 1000, 1001, 120_000, 300_000]):
            base = a + np.arange(4) * 10**6
            here.push(x[:, a:b], base, rows)
            on_device.push(there(x[:, a:b])[0], base, rows)
        for one, other in zip(here.finish("magnitude"), on_device.finish("magnitude"), strict=True):
            np.testing.assert_array_equal(one, other)


def test_non_finite_values_are_named() -> None:
    x = torch.randn(4, 50_000, device=DEVICE)
    x[2, 49_997] = x[3, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"row 2 .* index 49997"):
        topk(x, 3)
    stream = StreamingTopK(4, 3)
    stream.push(x)
    with pytest.raises(NonFiniteError):
        stream.finish()
    stream.push(x[:2])
    assert list(stream.finish()[0]) == [3, 3, 0, 0]
    with pytest.raises(ArgumentError, match="rows: expected numbers"):
        stream.push(x, 0, np.array([0, 1, 2, 4]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (3, 7), (127, 8), (129, 33), (3000, 64), (500, 257)])
def test_nnls(dtype: type, n: int, r: int) -> None:
    gram, c, start = problem(n, r, dtype)
    here = nnls(gram, c, start, max_sweeps=3, tol=0)
    on_device = nnls(*there(gram, c, start), max_sweeps=3, tol=0)
    tolerance = 1e-4 if dtype is np.float32 else 1e-11
    np.testing.assert_allclose(on_device.w.cpu(), here.w, rtol=tolerance, atol=tolerance)
    assert on_device.kkt is not None
    np.testing.assert_allclose(on_device.kkt.cpu(), here.kkt, rtol=1e-2, atol=tolerance)
    exact = nnls(*there(gram, c), exact=True)
    assert exact.kkt is not None and exact.w.is_cuda and float(exact.kkt.max()) <= 1e-10
    c[n // 2, 0] = np.nan
    with pytest.raises(DataError, match=f"cross: row {n // 2}"):
        nnls(*there(gram, c))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("r", [1, 31, 32, 33, 128, 132, 257])
def test_sparse_products(dtype: type, r: int) -> None:
    csr = skewed(700, 900, dtype=dtype)
    dense = np.random.default_rng(r).standard_normal((900, r)).astype(np.float32)
    on_device, d = there(*csr), there(dense)[0]
    expected = spmm(csr[0], csr[1], csr[2].astype(np.float64), dense.astype(np.float64))
    first = spmm(*on_device, d)
    np.testing.assert_allclose(first.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, spmm(*on_device, d))
    for wide in (torch.float16, torch.bfloat16):
        rounded = d.to(wide)
        want = spmm(csr[0], csr[1], csr[2], rounded.float().cpu().numpy())
        np.testing.assert_allclose(spmm(*on_device, rounded).cpu(), want, rtol=1e-4, atol=1e-4)
    wide = spmm(on_device[0], on_device[1], on_device[2].double(), d.double())
    np.testing.assert_allclose(wide.cpu(), expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(csr_transpose(*csr, 900), csr_transpose(*on_device, 900), strict=True):
        np.testing.assert_array_equal(one, other.cpu())
    with pytest.raises(ArgumentError, match="indices"):
        spmm(on_device[0], on_device[1] + 900, on_device[2], d)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (63, 40), (65, 129), (200, 5000), (700, 900)])
def test_sparse_gram_and_norms(rows: int, columns: int) -> None:
    for dtype in (np.int32, np.int64):
        csr = skewed(rows, columns, rows, dtype)
        k = sparse_gram(*there(*csr), columns)
        np.testing.assert_allclose(k.cpu(), sparse_gram(*csr, columns), rtol=1e-4, atol=1e-3)
        assert torch.equal(k, k.T) and torch.equal(k, sparse_gram(*there(*csr), columns))
        offsets = np.unique(np.linspace(0, rows, 9).astype(np.int64))
        norms = fisher_norms(*there(*csr), columns, there(offsets)[0])
        np.testing.assert_allclose(norms.cpu(), fisher_norms(*csr, columns, offsets), rtol=1e-10)


@pytest.mark.parametrize("r", [1, 7, 64, 257])
def test_sums_over_examples(r: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 1000)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        p = torch.from_numpy(rng.standard_normal((offsets[-1], r))).to(dtype)
        w = torch.from_numpy(rng.random((1000, r))).to(dtype)
        o = there(offsets)[0]
        sums, products = cross(p.to(DEVICE), o), spread_multiply(w.to(DEVICE), p.to(DEVICE), o)
        host = torch.from_numpy(offsets)
        want = cross(p.double(), host)
        np.testing.assert_allclose(sums.cpu(), want, rtol=1e-5)
        np.testing.assert_allclose(products.cpu(), spread_multiply(w.double(), p.double(), host), rtol=1e-5)


@pytest.mark.parametrize("d", [16, 1024, 65_536])
@pytest.mark.parametrize("shape", [(3, 5), (4097, 1), (300, 384), (1000, 3001)])
def test_two_sided_sketch(d: int, shape: tuple[int, int]) -> None:
    """Blocks of matrices, and their factors; the same bits every time."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 4, 3, shape[0], generator=generator)
    inputs = torch.randn(2, 4, shape[1], generator=generator)
    products = torch.einsum("btrn,btk->brnk", delta, inputs).reshape(6, -1)
    here, cut = StreamingSketch(6, d, 3), shape[0] // 2 * shape[1]
    here.push_matrix(products, 50, shape, np.zeros(6, np.int64))
    want = here.finish()
    found = []
    for _ in range(2):
        on_device = StreamingSketch(6, d, 3)
        for part, first in ((products[:, :cut], 0), (products[:, cut:], shape[0] // 2)):
            if part.shape[1]:
                on_device.push_matrix(part.to(DEVICE), 50, shape, np.full(6, first))
        found.append(on_device.finish())
    np.testing.assert_array_equal(*found)
    by_factors = StreamingSketch(6, d, 3)
    by_factors.push_outer(delta.to(DEVICE), inputs.to(DEVICE), 50, shape, slice(0, 6))
    for one in (found[0], by_factors.finish()):
        np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("d", "nonzeros"), [(64, 1), (4096, 1), (1536, 4), (100_000, 1)])
def test_sketch(d: int, nonzeros: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 300_007)).astype(np.float32)
    rows = np.array([1, 0, 1])
    here = StreamingSketch(2, d, 9, nonzeros=nonzeros)
    results = []
    for _ in range(2):
        on_device = StreamingSketch(2, d, 9, nonzeros=nonzeros)
        for a, b in pairwise([0, 1001, 300_007]):
            on_device.push(there(x[:, a:b])[0], np.array([a, a, a + 10**9]), rows)
        results.append(torch.as_tensor(on_device.finish_there()))
    for a, b in pairwise([0, 1001, 300_007]):
        here.push(x[:, a:b], np.array([a, a, a + 10**9]), rows)
    np.testing.assert_allclose(results[0].cpu(), here.finish(), rtol=1e-4, atol=2e-3)
    assert torch.equal(*results)


def test_the_callers_stream_is_used() -> None:
    """Work on a side stream sees what that stream wrote before, without the device having been waited for."""
    stream = torch.cuda.Stream()
    x = torch.zeros(2000, 64, device=DEVICE)
    offsets = torch.arange(2001, device=DEVICE)
    cross(x, offsets)  # the offsets are known to be sound now
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2)
        out = cross(x, offsets)
    stream.synchronize()
    assert bool((out == 4).all())


def test_steps_can_be_captured_in_a_graph() -> None:
    gram, c, start = (t.float() for t in there(*problem(300, 24, np.float32)))
    w, residual = start.clone(), torch.full((300,), torch.inf, device=DEVICE)
    status = torch.empty(2, dtype=torch.int64, device=DEVICE)
    csr, k = there(*skewed(300, 500)), torch.zeros(300, 300, device=DEVICE)
    matrix = Csr(*csr, 500)
    dense, block = torch.randn(500, 24, device=DEVICE), torch.randn(4, 50_000, device=DEVICE)
    selection, sketches = StreamingTopK(4, 100), StreamingSketch(4, 256)
    rows = BlockRows(np.zeros(4, np.int64), None, 4)
    offsets = torch.arange(0, 301, 3, device=DEVICE)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        kernels = dispatch.on_device(torch.device(DEVICE))
        assert kernels is not None
        kernels("nnls", gram=gram, cross=c, w=w, residual=residual, max_sweeps=3, tol=0.0, kkt=False, status=status)
        out = matrix.times(dense)
        kernels("gram_panel", a=matrix.compiled(kernels), k=k)
        selection.push(block, rows)
        sketches.push(block, rows)
        return out, cross(out, offsets)

    rows.on(torch.device(DEVICE))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # the one that is captured: plans are made once per stream
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out, sums = step()
    selection.reset()
    sketches.reset()
    k.zero_()
    w.copy_(start)
    residual.fill_(torch.inf)
    block.normal_()
    dense.normal_()
    graph.replay()
    counts, indices, _ = (torch.as_tensor(x) for x in selection.finish_there())
    np.testing.assert_allclose(w.cpu(), nnls(gram.cpu(), c.cpu(), start.cpu(), max_sweeps=3, tol=0).w, atol=1e-4)
    np.testing.assert_allclose(out.cpu(), spmm(*(t.cpu() for t in csr), dense.cpu()), rtol=1e-4, atol=1e-4)
    assert torch.equal(indices.cpu(), topk(block.cpu(), 100)[1]) and bool((counts == 100).all())
    np.testing.assert_allclose(sketches.finish(), sketch(block.cpu(), 256), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(sums.cpu(), cross(out.cpu(), offsets.cpu()), rtol=1e-4)
    np.testing.assert_allclose(k.tril().cpu(), sparse_gram(*(t.cpu() for t in csr), 500).tril(), rtol=1e-4, atol=1e-3)


def test_cupy_arrays_go_in_and_come_out() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    x = cupy.random.standard_normal((3, 5000), dtype=cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        values, indices = topk(x * 2, 9)
        stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(indices), topk(cupy.asnumpy(x), 9)[1])
    csr = [cupy.from_dlpack(x) for x in there(*skewed(40, 60))]
    dense = cupy.random.standard_normal((60, 5), dtype=cupy.float32)
    np.testing.assert_allclose(cupy.asnumpy(spmm(*csr, dense)), spmm(*map(cupy.asnumpy, (*csr, dense))), atol=1e-4)
    assert isinstance(values, cupy.ndarray)
