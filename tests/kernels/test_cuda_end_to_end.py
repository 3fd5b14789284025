"""From a model on a device to components on it: as on the processor, waiting for nothing, on the caller's stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from device_cases import same, words_and_data
from npeff.fishers.computation import SINKS
from npeff.fishers.factors import Factors
from npeff.fishers.options import FisherOptions
from npeff.fishers.sinks import Sink, SketchSink
from npeff.gradients.blocks import Block, Pairs
from npeff.kernels import StreamingSketch, StreamingTopK, cross, csr_transpose, dispatch, spmm, spread_multiply
from npeff.models.parameters import Parameters
from planted import fishers_of, planted, sparse
from sparse_cases import skewed

pytestmark = pytest.mark.gpu
COMPRESSIONS = [None, npeff.TopK(300), npeff.Sketch(64), npeff.Sketch(16, form="kronecker")]


@pytest.fixture(autouse=True)
def kernels() -> None:
    reason = dispatch.cuda_reason(torch.device("cuda"))
    if reason:
        pytest.skip(f"the CUDA kernels are not in use: {reason}")


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_fishers(tmp_path: Path, compress: Any, kind: Any, side_stream: bool) -> None:
    if kind == "diagonal" and isinstance(compress, npeff.Sketch):
        pytest.skip("there are no such sketches")
    model, data = words_and_data()
    options: dict[str, Any] = {"kind": kind, "compress": compress, "progress": False}
    here = npeff.compute_fishers(model, data, **options)
    with torch.cuda.stream(torch.cuda.Stream() if side_stream else torch.cuda.current_stream()):
        there = npeff.compute_fishers(model.cuda(), data, **options, out=tmp_path / "f.h5")
    np.testing.assert_allclose(there.norms, here.norms, rtol=1e-3)
    if not isinstance(compress, npeff.TopK):  # entries near the threshold may change places
        return
    for i in range(len(here)):
        np.testing.assert_allclose(there.dense(i), here.dense(i), rtol=1e-2, atol=1e-4)


def test_the_same_bits_every_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 4)).eval().cuda()
    data = [torch.randn(16, 20) for _ in range(3)]
    for compress in COMPRESSIONS:
        found = [npeff.compute_fishers(model, data, compress=compress, progress=False) for _ in range(2)]
        same(*found)


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_blocks_are_collected_without_waiting(compress: Any) -> None:
    """Every block form: whole, with runs whose places lie on the device, and as factors."""
    parameters = Parameters.of([("table.weight", (50, 12)), ("layer.weight", (24, 20))])
    table, layer = parameters.named("table.weight"), parameters.named("layer.weight")
    columns = torch.ones(8, 4, 3, device="cuda", dtype=torch.float64)
    factors = Factors(columns, torch.ones(8, device="cuda", dtype=torch.float64), torch.full((8,), 3, device="cuda"))
    runs = torch.randn(8, 3, 5, 12, device="cuda")
    starts = torch.arange(5, device="cuda").expand(8, 5) * 12
    pairs = Pairs(
        layer, slice(0, 8), torch.randn(8, 2, 3, 24, device="cuda"), torch.randn(8, 2, 20, device="cuda"), False
    )
    logits = torch.zeros(8, 4, device="cuda")
    for attempt in range(2):  # the first one makes plans and workspaces
        sink = SINKS[type(compress)](parameters, factors, np.arange(8), FisherOptions(compress=compress), at_once=False)
        if attempt == 0:
            _add(sink, table, runs, starts, pairs)
            numbers, made = sink.finish(logits)
        else:
            with waiting_forbidden():
                _add(sink, table, runs, starts, pairs)
                numbers, made = sink.finish(logits)
        norms, counts, scale, _ = numbers.wait()
        rows = made(counts, scale)
        assert (counts == 3).all() and np.isfinite(norms).all() and rows.n_rows == 24


def _add(sink: Sink, table: Any, runs: torch.Tensor, starts: torch.Tensor, pairs: Pairs) -> None:
    sink.add(Block(table, slice(0, 8), runs, starts))
    sink.add(pairs if isinstance(sink, SketchSink) else pairs.formed())


def test_streams_and_products_wait_for_nothing() -> None:
    x, rows = torch.randn(4, 70_000, device="cuda"), np.array([1, 0, 1, 0])
    selection, sketches = StreamingTopK(2, 300), StreamingSketch(2, 64)
    csr = [torch.from_numpy(a).cuda() for a in skewed(300, 500)]
    dense, offsets = torch.randn(500, 24, device="cuda"), torch.arange(0, 301, 3, device="cuda")
    p, w = torch.randn(300, 24, device="cuda"), torch.rand(100, 24, device="cuda")

    def step() -> None:
        selection.push(x, np.arange(4) * 10**6, rows)
        sketches.push(x, np.arange(4) * 10**6, rows)
        spmm(*csr, dense)
        cross(p, offsets)
        spread_multiply(w, p, offsets)
        csr_transpose(*csr, 500)

    step()
    with waiting_forbidden():
        step()
        later = selection.finish_later(), sketches.finish_later()
    assert len(later[0]()[1]) == 600 and later[1]().shape == (2, 64)


@pytest.mark.parametrize("space", ["gram", "rows", "streamed"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("memory", [None, "12MB"])
def test_decompositions(space: Any, form: str, dtype: Any, memory: str | None) -> None:
    fishers, _, _ = planted(60, 4, 50, 0.05, 0)
    if form == "sparse":
        fishers = fishers_of(sparse(np.asarray(fishers.rows.values)), fishers.row_offsets)
    options: dict[str, Any] = {"n_components": 4, "space": space, "dtype": dtype, "progress": False}
    here = npeff.decompose(fishers, **options)
    there = npeff.decompose(fishers, **options, device="cuda", memory=memory)
    assert there.loss == pytest.approx(here.loss, abs=1e-4)
    more = npeff.expand(there, fishers, 1, space=space, dtype=dtype, progress=False, device="cuda")
    assert more.loss <= there.loss + 1e-4


def test_the_published_algorithm_and_the_diagonal_kind() -> None:
    fishers, _, _ = planted(60, 4, 50, 0.05, 0)
    published = npeff.PublishedOptions(g_only=5, joint=20)
    options: dict[str, Any] = {"n_components": 4, "algorithm": "published", "published": published, "progress": False}
    here, there = (npeff.decompose(fishers, **options, device=device) for device in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    values = np.square(np.asarray(fishers.rows.values)).reshape(60, 4, -1).sum(1)
    diagonal = fishers_of(sparse(values), np.arange(61), "diagonal")
    here, there = (npeff.decompose(diagonal, n_components=4, progress=False, device=d) for d in ("cpu", "cuda"))
    assert there.loss == pytest.approx(here.loss, abs=1e-3)
