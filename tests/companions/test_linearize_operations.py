"""Each operation alone, in float64: W is autograd's Jacobian, b is left at zero input, and the map holds nearby."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linearize_cases import Call
from npeff.companions.linearize import linearize


def images(seed=0):
    return torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MATRIX = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def check(model, x, tolerance=1e-12):
    """The three claims, and that W, b, F are consistent."""
    model = model.double().eval()
    with torch.no_grad():
        truth = model(x)
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)
    linear = linearize(model, x)
    shape = (len(x), -1, len(x), x[0].numel())
    W = torch.stack([jacobian.reshape(shape)[i, :, i] for i in range(len(x))]).reshape(len(x), -1, *x.shape[1:])
    assert linear.exact and torch.equal(linear.output, truth.reshape(len(x), -1))
    assert torch.allclose(linear.W, W, rtol=0, atol=tolerance)
    assert linear.residual() <= tolerance
    near = x + 1e-7 * images(1)[: len(x)].reshape(-1)[: x.numel()].reshape(x.shape)
    assert linear.same_pattern(near)
    with torch.no_grad():
        assert torch.allclose(linear(near), model(near).reshape(len(x), -1), rtol=0, atol=1e-11)
    assert torch.allclose(sum(linear.bias_contributions().values(), torch.zeros_like(linear.b)), linear.b, atol=1e-11)
    v = images(2)[: len(x)].reshape(x.shape)
    assert torch.allclose(linear.matvec(v), (linear.W * v[:, None]).flatten(2).sum(-1), atol=1e-11)
    c = torch.randn(linear.output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(linear.rmatvec(c), torch.einsum("nk,nk...->n...", c, linear.W), atol=1e-11)


LAYERS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)),
    "relu6": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Call(lambda x: F.relu6(9 * x))),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(4),
    "rrelu": nn.RReLU,
    "hardtanh": lambda: nn.Hardtanh(-0.4, 0.7),
    "hardsigmoid": lambda: nn.Sequential(Call(lambda x: 4 * x), nn.Hardsigmoid()),
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "threshold": lambda: nn.Threshold(0.3, -2.0),
    "dropout": nn.Dropout,
    "batch norm": lambda: nn.BatchNorm2d(4),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, 5, stride=2, padding=1)),
    "conv2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    "conv2d circular": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
    "conv2d reflect": lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2)),
    "transposed": lambda: nn.ConvTranspose2d(4, 2, 3, stride=2),
    "linear": lambda: nn.Linear(6, 3),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "max pool 1d": lambda: nn.Sequential(nn.Flatten(2), nn.MaxPool1d(4)),
    "max pool 3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool3d(2)),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool 1d": lambda: nn.Sequential(nn.Flatten(2), nn.AvgPool1d(4)),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d(4),
    "adaptive average to one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive average 1d": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(5)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(4),
    "adaptive max 1d": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveMaxPool1d(5)),
    "upsampled": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "shuffled": lambda: nn.PixelShuffle(2),
    "unfolded": lambda: nn.Unfold(2),
    "reflection": lambda: nn.ReflectionPad2d(2),
    "replication": lambda: nn.ReplicationPad2d(1),
}

FUNCTIONS = {
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "cat with a constant": lambda x: torch.cat([x, torch.ones_like(x), x], 1),
    "stack": lambda x: torch.stack([x, 2 * x], 1),
    "arithmetic": lambda x: (3 - x / 4) * 2 + x - 1,
    "indexing": lambda x: x[:, [2, 0, 2], 1:, ::2],
    "boolean indexing": lambda x: x[:, torch.tensor([True, False, True, True])],
    "gather": lambda x: x.gather(1, torch.tensor([1, 0]).view(1, 2, 1, 1).expand(len(x), 2, 6, 6)),
    "matmul": lambda x: MATRIX @ x.flatten(2),
    "einsum": lambda x: torch.einsum("nchw,cd->ndh", x, MATRIX),
    "sums": lambda x: x.mean((2, 3)) + x.sum((2, 3)) + x.flatten(2).cumsum(2)[..., 4],
    "layout": lambda x: x.permute(0, 3, 1, 2).flip(1).roll(1, 2).reshape(len(x), -1).view(len(x), 12, 12).mT,
    "channels last": lambda x: F.relu(x.to(memory_format=torch.channels_last)).flatten(1),
    "split": lambda x: x.split(2, 1)[1] - x.chunk(2, 1)[0] + x.unbind(1)[0][:, None],
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp_max(torch.tensor(0.3)),
    "maximum": lambda x: torch.maximum(x, -0.5 * x) + torch.minimum(x, torch.tensor(0.2, dtype=x.dtype)),
    "max": lambda x: x.max(1).values + x.amin((1,)) + x.amax((2, 3))[:, :1, None],
    "sorted": lambda x: x.sort(1).values[:, 1:] + x.topk(3, dim=1).values + x.median(1, keepdim=True).values,
    "where": lambda x: torch.where(x > 0.2, 3 * x, x - 1),
    "masked fill": lambda x: x.masked_fill(x < -0.3, 7.0),
    "signs": lambda x: x * torch.sign(x) + x.round() + (x > 0).to(x.dtype),
    "branch": lambda x: 2 * x if x.sum() > 0 else -x,
    "double": lambda x: x.float().double() * 0 + x,
    "detach": lambda x: x + 1,
    "one output": lambda x: x.flatten(1).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    torch.manual_seed(0)
    model = LAYERS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    # torch's own backward of hardsigmoid has 1/6 in single precision
    check(model, images(), tolerance=1e-7 if name == "hardsigmoid" else 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    check(Call(FUNCTIONS[name]), images())


def in_place_slices(x):
    out = torch.zeros(len(x), 3, 6, 6, dtype=x.dtype)
    out[:, 1] = x[:, 0]
    out[:, 2, 1:3] += 2
    out[:, 0] -= x[:, 3].relu()
    return out


def in_place_views(x):
    y = x * 1
    row = y[:, :, 0]
    flat = y.view(len(x), -1)
    row.mul_(3)  # y and flat see it
    flat[:, :5] = 1.0  # row and y see it
    return torch.cat([flat, y.flatten(1), row.flatten(1)], 1)


def in_place_transposed(x):
    y = x + 0
    y.transpose(1, 2)[:, 1].add_(x[:, :, 0]).clamp_(min=0)
    y[:, 2].copy_(y[:, 1])
    y[:, 3].zero_()
    y[:, 0, 0, 0].fill_(4.0)
    return y


def in_place_masked(x):
    y = x.clone()
    y[y > 0.5] = 0.5
    y.masked_fill_(y < -0.5, -0.5)
    return y


def overwritten_constant(x):
    shift = torch.full((4, 1, 1), 2.0, dtype=x.dtype)
    y = x + shift
    shift.add_(1)
    return y * 3 + shift


@pytest.mark.parametrize(
    "function", [in_place_slices, in_place_views, in_place_transposed, in_place_masked, overwritten_constant]
)
def test_writes_in_place(function):
    before = images()
    x = before.clone()
    check(Call(function), x)
    assert torch.equal(x, before)


def test_an_input_that_the_model_overwrites_is_left_alone():
    x = images()
    linear = linearize(Call(lambda x: x.relu_() + 1), x)
    assert torch.equal(x, images()) and torch.equal(linear.x, images())
    assert linear.residual() <= 1e-14


def test_ties_and_kinks_are_as_autograd_has_them():
    x = torch.tensor([[0.0, 1.0, 1.0, -2.0]], dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    for function in (
        torch.relu, F.relu6, F.hardtanh, lambda x: x.clamp(0, 1), torch.abs, lambda x: x.amax(1, True),
        lambda x: torch.maximum(x, x.flip(1)), lambda x: torch.minimum(x, 2 * x), lambda x: torch.maximum(x, one),
        lambda x: torch.fmax(x, x.flip(1)), lambda x: torch.fmin(one, x),
    ):  # fmt: skip
        linear = linearize(Call(function), x)
        jacobian = torch.autograd.functional.jacobian(function, x)[0, :, 0]
        assert torch.equal(linear.W[0], jacobian)


@pytest.mark.parametrize("function", [F.hardtanh, F.softshrink, F.hardsigmoid, lambda x: x.clamp(-1, 1)])
def test_the_pattern_tells_one_side_from_the_other(function):
    x = 5 + images().abs()
    linear = linearize(Call(function), x)
    assert linear.same_pattern(x + 0.5) and not linear.same_pattern(-x)
    assert not torch.allclose(linear(-x), function(-x).reshape(len(x), -1))
