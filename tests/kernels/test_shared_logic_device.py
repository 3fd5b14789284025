"""The way from a model on a device to stored Fishers, emulated on the processor; see emulated_device."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from device_cases import Words, same
from emulated_device import EmulatedCuda, emulated
from npeff.errors import ArgumentError, DataError, ModelError
from npeff.kernels import NonFiniteError, StreamingSketch, StreamingTopK, sketch, topk
from npeff.kernels.sketch import hadamard


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that is the processor."""
    with emulated(monkeypatch) as module:
        yield module


@pytest.fixture(scope="module")
def model() -> Words:
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (b, t), generator=generator) for b, t in ((9, 5), (7, 5), (9, 3))]


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("compress", [None, npeff.TopK(40), npeff.Sketch(64), npeff.Sketch(16, form="kronecker")])
def test_fishers(
    monkeypatch: pytest.MonkeyPatch, model: Words, data: list[torch.Tensor], tmp_path: Path, kind: Any, compress: Any
) -> None:
    """Selected, sketched and stored as on the processor."""
    if kind == "diagonal" and isinstance(compress, npeff.Sketch):
        pytest.skip("there are no such sketches")
    options: dict[str, Any] = {"kind": kind, "compress": compress, "progress": False}
    here = npeff.compute_fishers(model, data, **options)
    monkeypatch.setattr("npeff.gradients.blocks.TILE_ELEMENTS", 90)  # matrices come in several blocks
    with emulated(monkeypatch) as module:
        there = npeff.compute_fishers(model, data, **options, out=tmp_path / "f.h5")
    same(here, there, 2e-6)
    used = {"topk_push": isinstance(compress, npeff.TopK), "sketch_rows": isinstance(compress, npeff.Sketch)}
    assert {name: name in module.calls for name in used} == used


def test_two_sided_sketches_of_factors_and_of_products(device: EmulatedCuda) -> None:
    """Both ways to the same sketch, as on the processor."""
    generator = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(2, 5, 3, 24, generator=generator), torch.randn(2, 5, 20, generator=generator)
    for turned in (False, True):
        shape = (20, 24) if turned else (24, 20)
        order = "btrn,btk->brkn" if turned else "btrn,btk->brnk"
        products = torch.einsum(order, delta, inputs).reshape(6, -1)
        here = StreamingSketch(8, 32, 5)
        here.push_matrix(products.numpy(), 1000, shape, np.zeros(6, np.int64), np.arange(1, 7))
        want = here.finish()
        there = StreamingSketch(8, 32, 5)
        there.push_outer(delta, inputs, 1000, shape, slice(1, 7), turned)
        np.testing.assert_allclose(there.finish(), want, rtol=1e-5, atol=1e-5)
        middle = 7 * shape[1]
        there.push_matrix(products[:, :middle], 1000, shape, np.zeros(6, np.int64), np.arange(1, 7))
        there.push_matrix(products[:, middle:], 1000, shape, torch.full((6,), 7), np.arange(1, 7))
        np.testing.assert_allclose(there.finish(), want, rtol=1e-5, atol=1e-5)
    assert device.calls["sketch_matrix"] == 4 and device.calls["spmm"] == 4
    with pytest.raises(ArgumentError, match="first: expected rows"):
        there.push_matrix(products, 1000, shape, np.full(6, 1), np.arange(1, 7))


@pytest.mark.parametrize("d", [1, 2, 16, 64, 256, 8192])
def test_walsh_hadamard(d: int) -> None:
    import scipy.linalg

    x = torch.randn(d, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if d <= 256:
        np.testing.assert_allclose(hadamard(x), scipy.linalg.hadamard(d) @ x.numpy(), atol=1e-11)
    torch.testing.assert_close(hadamard(hadamard(x)), d * x)


def test_streams_by_blocks(device: EmulatedCuda) -> None:
    """Bases as arrays and as tensors; 16-bit values; selectors that are used again."""
    x = torch.round(torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)), decimals=2)
    rows = np.array([1, 0, 1, 0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = x.to(dtype)
        here, there = StreamingTopK(2, 300), StreamingTopK(2, 300)
        sketched, expected = StreamingSketch(2, 64, 3), StreamingSketch(2, 64, 3)
        for _ in range(2):
            for a, b in pairwise([0, 1000, 1001, 5000]):
                base = a + np.arange(4) * 10**6
                given = torch.from_numpy(base) if a else base
                here.push(values[:, a:b].float().numpy(), base, rows)
                there.push(values[:, a:b], given, rows)
                expected.push(values[:, a:b].float().numpy(), base, rows)
                sketched.push(values[:, a:b], given, rows)
            for one, other in zip(here.finish("magnitude"), there.finish("magnitude"), strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_allclose(sketched.finish(), expected.finish(), atol=2e-4)
    with pytest.raises(ArgumentError, match="expected a CUDA tensor as before"):
        sketched.push(x[:2].numpy())


def test_functions_of_tensors(device: EmulatedCuda) -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(topk(x, 9)[1], torch.from_numpy(topk(x.numpy(), 9)[1]))
    np.testing.assert_allclose(sketch(x, 64, 3, 100), sketch(x.numpy(), 64, 3, 100), atol=1e-4)
    assert device.calls["topk_push"] == device.calls["sketch_rows"] == 1
    x[1, 77] = torch.nan
    for refuse in (lambda: topk(x, 9), lambda: sketch(x, 64, base=100)):
        with pytest.raises(NonFiniteError, match="row 1"):
            refuse()


class Explodes(nn.Module):
    """Its gradient, not its output, overflows on inputs that are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self.layer(x).square() * x.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("compress", [None, npeff.TopK(3), npeff.Sketch(16)])
@pytest.mark.parametrize("where", [2, 9, 11])
@pytest.mark.filterwarnings("ignore:Sketch")  # longer than the rows
def test_a_gradient_that_is_not_finite_is_named_later(
    device: EmulatedCuda, tmp_path: Path, compress: Any, where: int
) -> None:
    x = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) + 1
    x[where] = 0
    data = list(x.split(4))
    with pytest.raises(DataError, match=rf"example {where} has the gradient nan for layer\.(bias|weight)\[0"):
        npeff.compute_fishers(
            Explodes(), data, compress=compress, out=tmp_path / "f.h5", likelihood="gaussian", progress=False
        )


@pytest.mark.filterwarnings("ignore:overflow")  # of the norm
def test_norms_beyond_float32_are_refused(device: EmulatedCuda) -> None:
    """Finite gradients of 1e25: their Fisher has a norm of 1e50, by which the example would be scaled to nothing."""
    model = nn.Linear(3, 2)
    x = torch.full((5, 3), 1e25)
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(npeff.DataError, match="example 0 has the norm inf, beyond what float32 holds"):
        npeff.compute_fishers(model, [x, x], compress=npeff.TopK(8), likelihood="gaussian", progress=False)


def test_the_writers_error_comes_back_and_the_work_is_resumed(
    device: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, model: Words, data: list[torch.Tensor], tmp_path: Path
) -> None:
    from npeff.errors import StorageError
    from npeff.fishers.shards import FisherWriter

    append, calls = FisherWriter.append, 0

    def full(self: FisherWriter, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StorageError("the disk is full")
        append(self, *args)

    monkeypatch.setattr(FisherWriter, "append", full)
    options: dict[str, Any] = {"compress": npeff.TopK(40), "out": tmp_path / "f.h5", "progress": False}
    with pytest.raises(StorageError, match="the disk is full"):
        npeff.compute_fishers(model, data * 3, **options)
    monkeypatch.setattr(FisherWriter, "append", append)
    resumed = npeff.compute_fishers(model, data * 3, **options)
    same(npeff.compute_fishers(model, data * 3, compress=npeff.TopK(40), progress=False), resumed)


def test_a_model_that_changes_is_noticed_by_the_writers_thread(
    device: EmulatedCuda, monkeypatch: pytest.MonkeyPatch, data: list[torch.Tensor], tmp_path: Path
) -> None:
    from npeff.fishers.shards import FisherWriter

    assert FisherWriter.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(FisherWriter.__init__.__kwdefaults__, "shard_bytes", 1)
    changing = Words().eval()

    def batches() -> Any:
        yield data[0]
        changing.out.bias.data += 1  # no version counter tells
        yield from data

    with pytest.raises(ModelError, match=r"model: .*changed"):
        npeff.compute_fishers(changing, batches(), compress=npeff.TopK(40), out=tmp_path / "f.h5", progress=False)
