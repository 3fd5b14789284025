"""Small networks with every kind of layer, for tests of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N = 7


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def flat(*layers: nn.Module, sample: Tensor, outputs: int = 3) -> nn.Module:
    """The layers, then a linear read-out of everything."""
    body = nn.Sequential(*layers, nn.Tanh(), nn.Flatten()).eval()
    return nn.Sequential(body, nn.Linear(body(sample).shape[1], outputs))


def images(*size: int) -> Tensor:
    return torch.randn(N, *size)


def tokens(length: int, vocabulary: int = 7) -> Tensor:
    return torch.randint(0, vocabulary, (N, length))


def settle(model: nn.Module) -> nn.Module:
    """Running statistics and affine parameters away from their defaults."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if (
            isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
            and module.weight is not None
        ):
            module.weight.data.uniform_(0.5, 1.5)
    return model


class Transformer(nn.Module):
    """Class token, learned and looked-up positions, attention in either layout."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Embedding(9, 4)
        self.learned = nn.Parameter(torch.randn(1, 9, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first, dropout=0.1)
        self.head = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.learned[:, : x.shape[1]]
        if not self.batch_first:
            return self.head(self.layer(x.transpose(0, 1))[0])
        return self.head(self.layer(x)[:, 0])


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4, add_bias_kv=False)
        self.query = nn.Parameter(torch.randn(2, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query.expand(len(x), 2, 4)
        return self.head(self.attend(queries, x, x * 2, need_weights=False)[0].flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.core = kind(4, 3, batch_first=batch_first)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.core(x if self.core.batch_first else x.transpose(0, 1))
        return self.head(out[:, -1] if self.core.batch_first else out[-1])


class Tied(nn.Module):
    """Embedding and read-out share a weight, which is also added functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).mean(dim=1)))


class Repeated(nn.Module):
    """One module twice, its weight once more functionally, a bias on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.layer(x)))
        x = torch.tanh(nn.functional.linear(x, self.layer.weight) * self.scale) - self.layer.bias
        return self.head(x)


class Odd(nn.Module):
    """Uses that no rule knows: a product of parameters, a matrix-vector product, a power."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(4, 2))
        self.right = nn.Parameter(torch.randn(2, 3))
        self.power = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() ** self.power) @ (self.left @ self.right)


class Branching(nn.Module):
    """Control flow that depends on the data: torch.func cannot vectorise it."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.rand(4) + 0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [row.abs() ** self.power if row.sum().item() > 0 else row * 2 for row in x]
        return self.head(torch.stack(rows))


class Experts(nn.Module):
    """Rows are routed: which ones an expert sees depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            mine = (x[:, 0] > 0) == bool(i)
            out[mine] = expert(x[mine])
        return out


class Swapped(nn.Module):
    """Linear layers over positions that were folded into the batch, example-major and position-major."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = torch.tanh(self.first(x.reshape(b * t, d))).view(b, t, d).transpose(0, 1).reshape(t * b, d)
        return self.head(self.norm(torch.tanh(self.second(y))).view(t, b, d).mean(dim=0))


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(5, 4), nn.Tanh(), Lambda(lambda x: x.mean(dim=1)), Conv1D(3, 5))


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {}


def case(
    name: str,
    build: Callable[[], nn.Module] | None = None,
    inputs: Callable[[], Tensor] | None = None,
    layers: Any = None,
) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        x = inputs() if inputs else torch.randn(N, 4)
        return settle(build() if build else flat(*layers(), sample=x)).eval(), x

    CASES[name] = make


case("linear", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)))
case("linear without bias", lambda: nn.Linear(4, 3, bias=False))
case(
    "linear over sequences",
    layers=lambda: [nn.Linear(4, 3), nn.ReLU(inplace=True)],
    inputs=lambda: images(5, 4),
)
case("linear over 2 middle dims", layers=lambda: [nn.Linear(4, 3, bias=False)], inputs=lambda: images(2, 3, 4))
case(
    "linear, not contiguous",
    layers=lambda: [Lambda(lambda x: x.transpose(1, 2)), nn.Linear(4, 3)],
    inputs=lambda: images(4, 5),
)
case("conv1d", layers=lambda: [nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)], inputs=lambda: images(4, 9))
case(
    "conv2d",
    layers=lambda: [
        nn.Conv2d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, (3, 2), stride=(1, 2), padding=(1, 0)),
    ],
    inputs=lambda: images(2, 7, 7),
)
case(
    "conv2d same",
    layers=lambda: [nn.Conv2d(2, 3, 4, padding="same", dilation=2)],
    inputs=lambda: images(2, 7, 6),
)
case(
    "conv2d circular",
    layers=lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")],
    inputs=lambda: images(2, 5, 5),
)
case(
    "conv2d reflect, channels last",
    layers=lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")],
    inputs=lambda: images(2, 5, 5).to(memory_format=torch.channels_last),
)
case(
    "conv2d depthwise",
    layers=lambda: [nn.Conv2d(4, 8, 3, groups=4, bias=False)],
    inputs=lambda: images(4, 6, 6),
)
case(
    "conv3d",
    layers=lambda: [nn.Conv3d(2, 2, 2, stride=2, dilation=(1, 2, 1))],
    inputs=lambda: images(2, 4, 5, 4),
)
case(
    "conv2d over frames",
    layers=lambda: [
        Lambda(lambda x: x.flatten(0, 1)),
        nn.Conv2d(2, 4, 3, groups=2),
        Lambda(lambda x: x.unflatten(0, (-1, 3))),
    ],
    inputs=lambda: images(3, 2, 5, 5),
)
case("transposed conv", layers=lambda: [nn.ConvTranspose2d(2, 3, 3, stride=2)], inputs=lambda: images(2, 4, 4))
case("batch norm 1d", layers=lambda: [nn.Linear(4, 5), nn.BatchNorm1d(5)])
case("batch norm 2d", layers=lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], inputs=lambda: images(2, 5, 5))
case("batch norm 3d", layers=lambda: [nn.BatchNorm3d(2)], inputs=lambda: images(2, 3, 3, 3))
case("instance norm", layers=lambda: [nn.InstanceNorm2d(2, affine=True)], inputs=lambda: images(2, 4, 4))
case("layer norm", layers=lambda: [nn.Linear(4, 6), nn.LayerNorm(6)], inputs=lambda: images(3, 4))
case("layer norm 2 dims", layers=lambda: [nn.LayerNorm((3, 4))], inputs=lambda: images(2, 3, 4))
case("group norm", layers=lambda: [nn.GroupNorm(2, 4)], inputs=lambda: images(4, 3, 3))
case("rms norm", layers=lambda: [nn.Linear(4, 6), nn.RMSNorm(6)], inputs=lambda: images(3, 4))
case(
    "embedding",
    lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
    lambda: tokens(5),
)
case(
    "embedding, sparse gradients",
    lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3)),
    lambda: tokens(5),
)
case("embedding bag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)), lambda: tokens(5))
case("transformer", Transformer, lambda: tokens(5))
case("transformer, as long as the batch", Transformer, lambda: tokens(N))
case("transformer, one longer than the batch", Transformer, lambda: tokens(N - 1))
case("transformer, time first", lambda: Transformer(False), lambda: tokens(5))
case("transformer, time first, square", lambda: Transformer(False), lambda: tokens(N - 1))
case("cross attention", CrossAttention, lambda: images(5, 4))
case("lstm", lambda: Recurrent(nn.LSTM, True), lambda: images(4, 4))
case("gru, time first", lambda: Recurrent(nn.GRU, False), lambda: images(N, 4))
case("tied weights", Tied, lambda: tokens(4))
case("repeated module", Repeated)
case(
    "weight norm",
    lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
)
case(
    "spectral norm",
    lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
)
case("prelu", layers=lambda: [nn.Linear(4, 5), nn.PReLU(5)])
case("bilinear", lambda: nn.Sequential(Lambda(lambda x: x), nn.Linear(4, 4), BilinearPair()))
case("no rule", Odd)
case("control flow", Branching)
case("experts", Experts)
case("folded positions", Swapped, lambda: images(5, 4))
case("folded positions, square", Swapped, lambda: images(N, 4))
case("transformers' Conv1D", _conv1d, lambda: images(5, 4))


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, torch.sin(x))
