"""From a model on a device to components, where the device is not there; see fake_device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from device_cases import same, words_and_data
from emulated_device import kernels
from fake_device import FakeTensor, fake_device
from npeff.fishers.rows import DenseRows
from planted import fishers_of, planted, sparse


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    with fake_device(monkeypatch) as mode, kernels(monkeypatch, 1, ("cuda",)) as module:
        yield mode, module


def test_the_device_keeps_to_itself(device: Any) -> None:
    a, b = torch.ones(3, device="cuda"), torch.ones(3)
    assert isinstance(a, FakeTensor) and a.is_cuda and a.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="on one device"):
        a + b
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()
    assert (a + b.to("cuda")).cpu().numpy().tolist() == [2, 2, 2]
    assert not isinstance(a.cpu(), FakeTensor) and isinstance(b.to(a), FakeTensor)


@pytest.mark.parametrize("compress", [None, npeff.TopK(40), npeff.Sketch(64), npeff.Sketch(16, form="kronecker")])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_fishers(device: Any, tmp_path: Path, compress: Any, kind: Any) -> None:
    if kind == "diagonal" and isinstance(compress, npeff.Sketch):
        pytest.skip("there are no such sketches")
    model, data = words_and_data()
    options: dict[str, Any] = {"kind": kind, "compress": compress, "progress": False}
    here = npeff.compute_fishers(model, data, **options)
    model = model.to("cuda")
    assert isinstance(model.out.weight.data, FakeTensor)
    there = npeff.compute_fishers(model, data, **options, out=tmp_path / "f.h5")
    same(here, there, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "true"},
        {"labels": "sampled", "n_samples": 2},
        {"basis": "class", "min_prob": 0.1},
        {"energy": 0.9},
        {"likelihood": "bernoulli"},
        {"likelihood": "gaussian", "labels": "sampled"},
        {"compress": npeff.GramOnly()},
    ],
)
def test_options_of_fishers(device: Any, options: dict[str, Any]) -> None:
    """Labels, draws and bases, for a convolution, a norm and a parameter that torch.func serves."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 4)
    ).eval()
    data = [(torch.randn(5, 1, 6, 6), torch.arange(5) % 4) for _ in range(2)]
    if options.get("likelihood") == "bernoulli":
        data = [(x, torch.zeros(5, 4)) for x, _ in data]
    here = npeff.compute_fishers(model, data, progress=False, **options)
    there = npeff.compute_fishers(model.to("cuda"), data, progress=False, **options)
    np.testing.assert_allclose(there.norms, here.norms, rtol=1e-4)
    np.testing.assert_allclose(np.abs(there.rows.values), np.abs(here.rows.values), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compress", [None, npeff.TopK(40), npeff.Sketch(64), npeff.Sketch(16, form="kronecker")])
def test_tiles_are_not_waited_for(device: Any, monkeypatch: pytest.MonkeyPatch, compress: Any) -> None:
    """However many blocks a batch comes in, the device is waited for as often; exact rows are copied, in order."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4)).eval().to("cuda")
    monkeypatch.setattr("npeff.models.digests.model_digest", lambda model: "")  # made from time to time
    mode, waits, calls = device[0], [], []
    for elements in (1 << 20, 60):
        monkeypatch.setattr("npeff.gradients.blocks.TILE_ELEMENTS", elements)
        before, device[1].calls = len(mode.waits), {}
        npeff.compute_fishers(model, [torch.randn(8, 20)] * 2, compress=compress, progress=False)
        waits.append(len(mode.waits) - before)
        calls.append(sum(device[1].calls.values()))
    assert waits[0] == waits[1]
    assert compress is None or calls[1] > calls[0]


@pytest.mark.parametrize("space", ["gram", "rows", "streamed"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_decompositions(device: Any, space: Any, form: str, kind: Any) -> None:
    if (space, kind) == ("gram", "diagonal"):
        pytest.skip("the diagonal kind works on the rows")
    fishers, _, _ = planted(20, 4, 30, 0.05, 0)
    values = np.asarray(fishers.rows.values)
    offsets = fishers.row_offsets
    if kind == "diagonal":
        values, offsets = np.square(values).reshape(20, 4, -1).sum(1), np.arange(21)
    fishers = fishers_of(sparse(values) if form == "sparse" else DenseRows(values), offsets, kind)
    few: dict[str, Any] = {"n_init": 1, "max_iterations": 30, "progress": False}
    options: dict[str, Any] = {"n_components": 3, "space": space, "n_replacements": 1, **few}
    here = npeff.decompose(fishers, **options)
    there = npeff.decompose(fishers, **options, device="cuda")
    assert there.loss == pytest.approx(here.loss, abs=2e-3)
    more = npeff.expand(there, fishers, 1, space=space, n_replacements=1, device="cuda", **few)
    assert more.loss <= there.loss + 1e-3
    if space == "rows":
        published = npeff.PublishedOptions(learning_rate=1e-3, g_only=3, joint=4, log_every=7)
        options = {"n_components": 3, "algorithm": "published", "published": published, "progress": False}
        here, there = (npeff.decompose(fishers, **options, device=name) for name in ("cpu", "cuda"))
        assert there.loss == pytest.approx(here.loss, rel=1e-4)
