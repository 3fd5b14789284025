"""Ordinary models that were refused, or crashed: each against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from npeff.batches.reading import examples_at
from npeff.decomposition.decompose import decompose
from npeff.fishers.computation import compute_fishers
from npeff.fishers.options import GramOnly, TopK
from npeff.models.forward import call_model
from npeff.perturbation import perturb
from oracles import dense_fishers, dense_jacobians

N = 5
F = nn.functional


class Clip(nn.Module):
    """Two towers, cosine similarities with fixed classes, a temperature of no dimension used through exp."""

    def __init__(self, through: Callable[[Tensor], Tensor] = torch.exp) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(0.3))
        self.through = through
        self.register_buffer("classes", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        image = F.normalize(self.image(x), dim=-1)
        text = F.normalize(self.text(self.classes), dim=-1)
        return self.through(self.logit_scale) * image @ text.T + self.bias * x[:, :3]


class ZeroDim(nn.Module):
    """A parameter of no dimension in each place where it can stand."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(6, 3), use
        self.p = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        match self.use:
            case "mul":
                return h * self.p
            case "rmul":
                return self.p * h
            case "add":
                return h.square() + self.p * h + self.p
            case "sub":
                return self.p - h * self.p
            case "div":
                return h / self.p
            case "pow":
                return h.abs() ** self.p
            case "expand":
                return h * self.p.expand(3)
            case "view":
                return h * self.p.view(1, 1)
            case "where":
                return torch.where(h > 0, h, self.p * h)
            case "stack":
                return h * torch.stack([self.p, self.p * 2, self.p.exp()])
            case "residual":
                return h + self.p * torch.tanh(h)
            case "row":
                return torch.cat([h[:, :2] * self.p, h[:, 2:]], dim=1)
        raise AssertionError


class Kernel(nn.Module):
    """A convolution's kernel that is made of a parameter."""

    def __init__(
        self, make: Callable[[Tensor], Tensor], shape: tuple[int, ...], groups: int = 1, side: int = 6
    ) -> None:
        super().__init__()
        self.p, self.make, self.groups, self.side = nn.Parameter(torch.randn(shape) / 3), make, groups, side
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = F.conv2d(x.view(-1, 2, self.side, self.side), self.make(self.p), padding=1, groups=self.groups)
        return self.head(torch.tanh(made).mean((2, 3)))


class Flat(nn.Module):
    def __init__(self, *layers: nn.Module, size: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*layers), nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).flatten(1))


class Attention(nn.Module):
    """Biases of keys have a gradient of zero in theory."""

    def __init__(self, d: int = 8, compiled: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 3))
        self.compiled = compiled
        self.temperature = nn.Parameter(torch.zeros(1))

    def attend(self, x: Tensor) -> Tensor:
        score = self.q(x) @ self.k(x).mT / 3
        return torch.softmax(score + self.temperature.exp(), -1) @ self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.attend(x)).mean(1))


class Unruly(torch.autograd.Function):
    """An operation that no rule knows and vmap refuses, as a compiled layer is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, torch.einsum("bto,bti->oi", g, x), g.sum((0, 1))


class CompiledAttention(Attention):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (Unruly.apply(x, layer.weight, layer.bias) for layer in (self.q, self.k, self.v))
        return torch.softmax(q @ k.mT / 3 + self.temperature.exp(), -1) @ v


class Padded(nn.Module):
    """A TransformerEncoder with padding, and a mean over all positions, padded ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=ids == 0).mean(1))


def padded_ids() -> Tensor:
    ids = torch.randint(1, 9, (N, 6))
    for i, length in enumerate((6, 3, 5, 2, 4)):
        ids[i, length:] = 0
    return ids


def vectors() -> Tensor:
    return torch.randn(N, 6)


def images() -> Tensor:
    return torch.randn(N, 2 * 36)


def large_images() -> Tensor:
    return torch.randn(N, 2 * 900)


def sequences() -> Tensor:
    return torch.randn(N, 4, 8)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "clip": (Clip, vectors),
    "clip squared": (lambda: Clip(torch.square), vectors),
    "clip clamped": (lambda: Clip(lambda s: s.exp().clamp(max=100)), vectors),
    **{
        f"no dimension: {use}": (lambda use=use: ZeroDim(use), vectors)
        for use in ["mul", "rmul", "add", "sub", "div", "pow", "expand", "view", "where", "stack", "residual", "row"]
    },
    "sliced kernel": (lambda: Kernel(lambda p: p[:4], (6, 2, 3, 3)), images),
    "kernel sliced inside": (lambda: Kernel(lambda p: p[:, :, 1:4, 1:4], (4, 2, 5, 5)), images),
    "kernel with steps": (lambda: Kernel(lambda p: p[::2, :, ::2], (8, 2, 5, 3)), images),
    "transposed kernel": (lambda: Kernel(lambda p: p.transpose(0, 1), (2, 4, 3, 3)), images),
    "kernel turned": (lambda: Kernel(lambda p: p.flip(2), (4, 2, 3, 3)), images),
    "kernel permuted": (lambda: Kernel(lambda p: p.permute(3, 2, 0, 1), (3, 3, 2, 4)), images),
    "kernel repeated": (lambda: Kernel(lambda p: p.repeat(2, 1, 1, 1), (2, 2, 3, 3)), images),
    "kernel expanded": (lambda: Kernel(lambda p: p.expand(4, 2, 3, 3), (4, 1, 3, 3)), images),
    "kernel of groups": (lambda: Kernel(lambda p: p[:, None], (4, 3, 3), groups=2), images),
    "kernel viewed": (lambda: Kernel(lambda p: p.view(4, 2, 3, 3), (8, 9)), images),
    "kernel normalised": (
        lambda: Kernel(lambda p: p / p.square().sum((1, 2, 3), True).sqrt(), (4, 2, 3, 3)),
        images,
    ),
    "kernel selected": (lambda: Kernel(lambda p: p[1], (2, 4, 2, 3, 3)), images),
    "sliced kernel, large image": (lambda: Kernel(lambda p: p[:4], (6, 2, 3, 3), side=30), large_images),
    "weight norm": (lambda: Flat(parametrizations.weight_norm(nn.Linear(6, 4)), size=4), vectors),
    "old weight norm": (lambda: Flat(nn.utils.weight_norm(nn.Linear(6, 4)), size=4), vectors),
    "weight norm, other dim": (lambda: Flat(parametrizations.weight_norm(nn.Linear(6, 4), dim=1), size=4), vectors),
    "weight norm, whole": (lambda: Flat(parametrizations.weight_norm(nn.Linear(6, 4), dim=None), size=4), vectors),
    "weight norm of a convolution": (
        lambda: Flat(nn.Unflatten(1, (2, 36)), parametrizations.weight_norm(nn.Conv1d(2, 3, 5)), size=96),
        images,
    ),
    "weight norm of a 2-D convolution": (
        lambda: Flat(nn.Unflatten(1, (2, 6, 6)), parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), size=48),
        images,
    ),
    "weight norm of a transposed convolution": (
        lambda: Flat(nn.Unflatten(1, (2, 36)), parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 3)), size=114),
        images,
    ),
    "spectral norm": (lambda: Flat(parametrizations.spectral_norm(nn.Linear(6, 4)), size=4), vectors),
    "orthogonal": (lambda: Flat(parametrizations.orthogonal(nn.Linear(6, 6)), size=6), vectors),
    "key biases": (Attention, sequences),
    "key biases, compiled": (CompiledAttention, sequences),
    "padding": (Padded, padded_ids),
}


def error(model: nn.Module, x: Tensor, batch: int, dtype: torch.dtype, **options: Any) -> float:
    x = x.to(dtype) if x.is_floating_point() else x
    data = [x[i : i + batch] for i in range(0, len(x), batch)]
    fishers = compute_fishers(model.to(dtype), data, progress=False, **options)
    names = [parameter.name for parameter in fishers.parameters]
    with torch.no_grad():
        model(x)  # the old weight norm keeps what its hook made, which cannot be copied with a graph
    truth = dense_fishers(*dense_jacobians(model, [x[i : i + 1] for i in range(len(x))], names))
    rows = [fishers.dense(i).astype(np.float64) for i in range(len(x))]
    return max(
        float(np.linalg.norm(r.T @ r - expected) / np.linalg.norm(expected))
        for r, expected in zip(rows, truth, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [N, 1])
@pytest.mark.parametrize("name", CASES)
def test_ordinary_models_are_right(name: str, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    assert error(make().eval(), inputs(), batch, dtype) < 2e-5


@pytest.mark.parametrize(
    "name",
    ["clip", "no dimension: mul", "no dimension: pow", "sliced kernel", "sliced kernel, large image", "weight norm"],
)
def test_ordinary_models_are_right_in_every_form(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make().eval(), inputs()
    exact = compute_fishers(model, [x], progress=False)
    rows = np.concatenate([exact.dense(i) for i in range(N)])
    whole, diagonal, gram = (
        compute_fishers(model, [x], progress=False, **options)
        for options in ({"compress": TopK(10**6)}, {"kind": "diagonal"}, {"compress": GramOnly()})
    )
    for i in range(N):
        np.testing.assert_allclose(whole.dense(i), exact.dense(i), atol=1e-6)
        np.testing.assert_allclose(diagonal.dense(i), (exact.dense(i) ** 2).sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gram.rows.values, rows @ rows.T, atol=1e-5)


@pytest.mark.parametrize("name", ["key biases", "key biases, compiled"])
def test_parameters_without_gradient_may_be_all_there_is(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name][0]().eval()
    fishers = compute_fishers(model, [sequences()], parameters="k.bias", progress=False)
    assert float(np.abs(fishers.norms).max()) < 1e-10


class Autocast(nn.Module):
    def __init__(self, dtype: torch.dtype, inner: nn.Module) -> None:
        super().__init__()
        self.dtype, self.inner = dtype, inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.inner(x).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "key biases", "key biases, compiled", "padding", "weight norm"])
def test_autocast_inside_the_model(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, x = make().eval(), inputs()
    fishers = compute_fishers(Autocast(dtype, model), [x], progress=False)
    plain = compute_fishers(model, [x], progress=False)
    for i in range(N):
        one, other = fishers.dense(i), plain.dense(i)
        np.testing.assert_allclose(one.T @ one, other.T @ other, atol=0.1 * float((other**2).sum()))


def test_a_padded_transformer_computes_the_same_where_no_gradients_are_recorded() -> None:
    torch.manual_seed(0)
    model, data = Padded().eval(), [padded_ids()]
    fishers = compute_fishers(model, data, progress=False)
    with torch.no_grad():
        np.testing.assert_allclose(call_model(model, None, examples_at(data, [1])[0]), fishers.logits[1:2], atol=1e-5)
    components = decompose(fishers, 2, n_init=1, n_replacements=0, progress=False)
    effect = perturb(model, data, components, 0, n_random=2, n_resamples=9, progress=False)
    assert effect.magnitude > 0
