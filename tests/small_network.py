"""The small network and the nine examples that the tests of compute_fishers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npeff.fishers.computation import compute_fishers
from oracles import dense_fishers, dense_jacobians

N = 9


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    body = [
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, outputs),
    ]
    return nn.Sequential(*body).eval()


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))


Y = torch.arange(N) % 3


def fishers_of(model: nn.Module, data: Any, **options: Any) -> Any:
    return compute_fishers(model, data, progress=False, **options)


def exact(model: nn.Module, x: Tensor, names: tuple[str, ...], likelihood: str = "categorical") -> np.ndarray:
    return dense_fishers(*dense_jacobians(model, [x[i : i + 1] for i in range(len(x))], names), likelihood)
