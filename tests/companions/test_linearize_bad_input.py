"""What ``linearize`` refuses, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linearize_cases import Call
from npeff.companions.linearize import linearize
from npeff.errors import ArgumentError, DataError, ModelError


class Strange(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.function(self.layer(x))


def twice(x):
    return x


@pytest.mark.parametrize(
    ("model", "arguments", "error", "words"),
    [
        (3, {}, ArgumentError, "model: expected a torch.nn.Module, got int"),
        (nn.Linear(4, 2), {"x": [1.0]}, ArgumentError, "x: expected a tensor, got list"),
        (nn.Linear(4, 2), {"x": torch.zeros(2, 5)}, ModelError, r"failed on \(2, 5\) float32: RuntimeError"),
        (nn.Linear(4, 2), {"x": torch.zeros(2, 4, dtype=torch.int64)}, ArgumentError, "expected floating point"),
        (nn.Linear(4, 2), {"x": torch.zeros(0, 4)}, DataError, "x: it is empty"),
        (nn.Linear(4, 2), {"x": torch.full((2, 4), torch.nan)}, DataError, "x: it has NaN"),
        (nn.Linear(4, 2), {"at": "layr"}, ArgumentError, "at: expected 'input' or the name of a layer, got 'layr'"),
        (Strange(twice), {"at": "layr"}, ArgumentError, "did you mean layer"),
        (nn.Linear(4, 2), {"outputs": 2}, ArgumentError, "outputs: expected positions below 2, got 2"),
        (nn.Linear(4, 2), {"outputs": []}, ArgumentError, "outputs: expected a position, or some, below 2"),
        (nn.Linear(4, 2), {"outputs": "1"}, ArgumentError, "outputs: expected a position"),
        (nn.Linear(4, 2), {"smooth": "yes"}, ArgumentError, "smooth: expected 'refuse' or 'freeze', got 'yes'"),
        (nn.BatchNorm1d(4), {}, ModelError, "BatchNorm1d in training mode normalises by the batch: call model.eval()"),
        (nn.Dropout(), {}, ModelError, "Dropout is active"),
        (Strange(F.dropout), {}, ModelError, r"the forward pass of Strange draws random numbers \(bernoulli_\)"),
        (
            Strange(lambda x: F.batch_norm(x, None, None, training=True)),
            {},
            ModelError,
            "Strange normalises by the batch, so that examples influence each other: call model.eval()",
        ),
        (Strange(lambda x: torch.from_numpy(x.numpy() * 2)), {}, ModelError, "does not depend .* numpy"),
        (Strange(lambda x: torch.ones(2, 3)), {}, ModelError, "its output does not depend on the input"),
        (Strange(lambda x: x > 0), {}, ModelError, r"its output is \(2, 4\) bool, expected a float tensor"),
        (Strange(lambda x: x / 0), {}, DataError, "its output at x is not finite"),
        (Strange(torch.linalg.qr), {}, ModelError, "computes linalg_qr, which has no affine form here"),
        (Strange(lambda x: (x.T @ x).inverse()), {"at": "layer"}, ModelError, "has no affine form here"),
        (Strange(lambda x: x.lerp(x, x)), {}, ModelError, "computes lerp, which has no affine form here"),
    ],
)
def test_what_is_refused(model, arguments, error, words):
    arguments = {"x": torch.rand(2, 4, generator=torch.Generator().manual_seed(0)), **arguments}
    with pytest.raises(error, match=words):
        linearize(model, **arguments)
    if isinstance(model, nn.Module):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda layer, x: layer(layer(x)), "runs more than once"),
        (lambda layer, x: x, "does not run when the model is called with x"),
    ],
)
def test_layers_that_cannot_be_the_start(function, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return function(self.layer, x)

    with pytest.raises(ArgumentError, match=words):
        linearize(Net(), torch.rand(2, 4), at="layer")


def test_complex_values_and_products_in_place_are_named():
    at = torch.tensor([[0, 1]] * 2)
    for function in (
        lambda x: x + torch.fft.irfft(torch.fft.rfft(x)),  # no constants
        lambda x: x + x.to(torch.complex64).real,
        lambda x: x.scatter(1, at, x, reduce="multiply"),
    ):
        with pytest.raises(ModelError, match="has no affine form here"):
            linearize(Call(function), torch.randn(2, 4), smooth="freeze")


def test_arguments_of_the_map():
    linear = linearize(nn.Linear(4, 2), torch.rand(3, 4))
    for act in (linear, linear.matvec, linear.rmatvec, linear.same_pattern):
        with pytest.raises(ArgumentError, match=r"expected a tensor of shape \(3, .\), got \(4,\)"):
            act(torch.rand(4))
    with pytest.raises(ArgumentError, match="got list"):
        linear.matvec([1.0])
    assert repr(linear) == "LinearMap((3, 4) → (3, 2), at 'input')"
