"""Small kernels over many positions: gradients formed while the backward passes run, in place of keeping δ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from layer_cases import CASES, N
from npeff.gradients.rules.convolution import ConvolutionWeight
from oracles import dense_fishers, dense_jacobians

CONVOLUTIONS = [name for name in CASES if "conv" in name and "transposed" not in name and "Conv1D" not in name]


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_early_gradients_agree_with_the_dense_oracle(name: str, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(ConvolutionWeight, "_saves_memory", lambda self: True)
    model, x = CASES[name]()
    names = [parameter for parameter, _ in model.named_parameters()]
    exact = dense_fishers(*dense_jacobians(model, [x[i : i + 1] for i in range(N)], names))
    fishers = npeff.compute_fishers(model, x.split([4, 3]), kind=kind, progress=False)
    for i in range(N):
        found = fishers.dense(i).astype(np.float64)
        wanted = np.diag(exact[i]) if kind == "diagonal" else exact[i]
        found = found if kind == "diagonal" else found.T @ found
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_the_kernel_and_the_batched_product_agree(name: str, kind: str, monkeypatch) -> None:
    model, x = CASES[name]()
    found = []
    for longest in (0, 1 << 40):
        monkeypatch.setattr("npeff.gradients.rules.convolution.LONG_PATCH", longest)
        found.append(npeff.compute_fishers(model, x.split([4, 3]), kind=kind, progress=False))
    for i in range(N):
        a, b = (fishers.dense(i).astype(np.float64) for fishers in found)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_first_layers_are_formed_early_and_later_ones_are_not(monkeypatch) -> None:
    torch.manual_seed(0)
    early: dict[tuple[int, ...], bool] = {}
    asked = ConvolutionWeight._saves_memory  # private: both ways give the same Fishers, and only the memory differs

    def record(self: ConvolutionWeight) -> bool:
        early[tuple(self.use.value.shape)] = asked(self)
        return early[tuple(self.use.value.shape)]

    monkeypatch.setattr(ConvolutionWeight, "_saves_memory", record)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 14 * 14, 4),
    )  # fmt: skip
    npeff.compute_fishers(model, [torch.randn(3, 1, 28, 28)], compress=npeff.TopK(100), progress=False)
    assert early == {(16, 1, 3, 3): True, (16, 16, 3, 3): False}
