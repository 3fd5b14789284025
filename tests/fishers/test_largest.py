"""Selection from factors: outer products by themselves, and whole networks against their dense rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from npeff.fishers import topk_sink
from npeff.gradients.blocks import Pairs
from npeff.kernels import NonFiniteError, StreamingTopK, available, topk, use
from npeff.models.parameters import Parameters


@pytest.fixture(params=available())
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use(None)


def factors(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        return x.round()
    if kind == "sparse":
        return x * (torch.rand(shape, generator=generator) < 0.1)
    if kind == "tiny":
        return x * 1e-23
    return x * torch.randn(shape, generator=generator) ** 4 if kind == "heavy" else x


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "sparse", "heavy", "tiny"])
@pytest.mark.parametrize(("sizes", "k"), [((2, 3, 1, 1), 2), ((3, 2, 17, 31), 50), ((2, 2, 9, 4101), 300)])
def test_outer_products_equal_formed_ones(
    implementation: str, kind: str, turned: bool, sizes: tuple[int, int, int, int], k: int
) -> None:
    b, r, n, width = sizes
    generator = torch.Generator().manual_seed(n + k)
    m = 2 * n * width
    stream, expected = StreamingTopK(b + 1, k), torch.zeros(b, r, m)
    for offset in (n * width, 0):  # the second push finds a threshold
        delta, inputs = factors(kind, (b, r, n), generator), factors(kind, (b, width), generator)
        formed = delta[..., None] * inputs[:, None, None]
        formed = formed.mT if turned else formed
        expected[:, :, offset : offset + n * width] = formed.flatten(2)
        stream.push_outer(delta, inputs, 1, offset, m, turned)
        least = topk(expected.flatten(1), min(k, r * m), "magnitude")[0][:, -1].abs()
        assert (stream.thresholds()[1:] <= least.numpy()).all()
    counts, indices, values = stream.finish()
    assert counts[0] == 0
    best_values, best = topk(expected.flatten(1), min(k, r * m))
    start = 0
    for e, count in enumerate(counts[1:]):
        some = slice(start, start + count)
        kept = best_values[e] != 0
        np.testing.assert_array_equal(indices[some], best[e][kept])
        np.testing.assert_array_equal(values[some], best_values[e][kept])
        start += count


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_product_that_is_not_finite_is_named(implementation: str, bad: float) -> None:
    delta, inputs = torch.ones(3, 2, 5), torch.full((3, 7), 1e20)
    delta[1, 1, 2] = bad
    stream = StreamingTopK(3, 4)
    with pytest.raises(NonFiniteError) as caught:
        stream.push_outer(delta, inputs, 0, 10, 100)
    assert caught.value.index == 10 + 100 + 2 * 7


class Tokens(nn.Module):
    """Matrices that are used at every position, in both orientations; positions are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.turned = nn.Parameter(torch.randn(24, 20) / 5)
        self.last = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        hidden = torch.tanh(hidden.flatten(0, 1) @ self.turned).view(*x.shape[:2], -1)
        return self.last(hidden.mean(dim=1))


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    convolutions = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 2, groups=4),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    images = torch.randn(5, 2, 9, 9)
    convolutions(images)
    dense = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 4))
    return {
        "dense": (dense, torch.randn(5, 12)),
        "tokens": (Tokens(), torch.randn(5, 6, 12)),
        "convolutions": (convolutions, images),
    }


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("name", ["dense", "tokens", "convolutions"])
@pytest.mark.parametrize("k", [3, 40, 400])
def test_selected_from_factors_as_from_rows(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, k: int) -> None:
    monkeypatch.setattr(topk_sink, "_FEWEST", 0)  # private: rows so large that they pay would take long
    monkeypatch.setattr(topk_sink, "_SHARE", -1e3)
    model, inputs = networks()[name]
    options = {"kind": kind, "progress": False}
    whole = npeff.compute_fishers(model.eval(), [inputs], **options)
    kept = npeff.compute_fishers(model, [inputs], compress=npeff.TopK(k), **options)
    np.testing.assert_allclose(kept.norms, whole.norms, rtol=1e-5)
    for i in range(len(whole)):
        dense, found = np.atleast_2d(whole.dense(i)), np.atleast_2d(kept.dense(i))
        scale = np.abs(dense).max()
        assert np.count_nonzero(found) == min(k, np.count_nonzero(dense))
        assert np.abs((found - dense)[found != 0]).max() <= 1e-5 * scale
        least = np.sort(np.abs(dense), axis=None)[-np.count_nonzero(found)]
        assert np.abs(found[found != 0]).min() >= least - 1e-5 * scale


def test_inner_products_where_positions_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(2, 8, 3, 5, generator=generator)
    inputs = torch.randn(2, 1, 6, generator=generator).expand(-1, 8, -1) * 100
    delta[:, 4:] = -delta[:, :4] * (1 + 1e-3)  # almost nothing is left of large terms
    parameter = next(iter(Parameters.of([("w", torch.Size([5, 6]))])))
    gram = Pairs(parameter, slice(0, 2), delta, inputs, False).gram()
    rows = torch.einsum("btrn,btk->brnk", delta.double(), inputs.double()).flatten(2)
    exact = rows @ rows.mT
    assert float((gram - exact).abs().max()) < 1e-6 * float(exact.abs().max())
