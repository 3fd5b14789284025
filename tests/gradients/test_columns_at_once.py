"""Multilayer perceptrons: all cotangent columns in one backward pass, with the results of one pass each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.gradients import backward, engine


class Alone(torch.autograd.Function):
    """An operation that looks at its numbers, which it cannot for several columns at once."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        return slope * (1.0 if float(slope.abs().max()) < 1e30 else 0.5)


class Through(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Alone.apply(x)


def perceptron(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), *middle, nn.Linear(9, 5)).eval()


@pytest.fixture
def side_by_side(monkeypatch) -> list[bool]:
    """Whether the passes of each batch were made at once."""
    made: list[bool] = []
    real = backward.side_by_side  # counted: both ways give the same gradients

    def record(*arguments):
        found = real(*arguments)
        made.append(found is not None)
        return found

    monkeypatch.setattr(backward, "side_by_side", record)
    return made


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("middle, together", [(nn.ReLU(), True), (Through(), False)], ids=["relu", "refuses"])
def test_the_same_fishers_either_way(kind: str, middle: nn.Module, together: bool, side_by_side, monkeypatch) -> None:
    model, data = perceptron(middle), list(torch.randn(11, 6).split(4))
    fishers = npeff.compute_fishers(model, data, kind=kind, progress=False)
    assert side_by_side == [together] * 3
    monkeypatch.setattr(engine, "small_products", lambda rules: False)
    one_by_one = npeff.compute_fishers(model, data, kind=kind, progress=False)
    for i in range(11):
        np.testing.assert_allclose(fishers.dense(i), one_by_one.dense(i), rtol=1e-4, atol=1e-7)


def test_layers_with_many_rows_per_example_take_one_pass_a_column(side_by_side) -> None:
    torch.manual_seed(0)
    sequence = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)).eval()
    npeff.compute_fishers(sequence, [torch.randn(3, 5, 4)], progress=False)
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)).eval()
    npeff.compute_fishers(image, [torch.randn(3, 1, 5, 5)], progress=False)
    assert side_by_side == []
