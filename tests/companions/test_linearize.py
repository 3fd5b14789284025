"""The affine map of whole networks: what it claims, how it is asked for, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from linearize_cases import Call
from npeff import demo
from npeff.companions.linearize import linearize
from npeff.errors import ArgumentError, ModelError, OutOfMemoryError


class Block(nn.Module):
    """ResNet's basic block, with functional activations."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet18(nn.Module):
    """Its shape with few channels: a stem, four stages of two blocks, a mean over positions, a linear layer."""

    def __init__(self, width=4, channels=1, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(Block(a, b, 1 + (i > 0)), Block(b, b, 1)) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            y = stage(y)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def vgg_bn(width=4, channels=1, classes=10):
    """VGG-11 with batch normalisation, few channels, three poolings."""
    layers, inner = [], channels
    for size in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8):
        if size == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inner, size * width, 3, padding=1), nn.BatchNorm2d(size * width), nn.ReLU(True)]
            inner = size * width
    head = [nn.Flatten(), nn.Linear(inner * 1, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, classes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), *head)


NETWORKS = {"resnet": ResNet18, "vgg": vgg_bn}


def digits(n):
    return demo.digits().first(n).inputs


@pytest.fixture(scope="module", params=[f"{name} {state}" for name in NETWORKS for state in ("random", "trained")])
def network(request):
    name, state = request.param.split()
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if state == "trained":
        return demo.train(model, demo.digits().first(256), epochs=2, learning_rate=3e-3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_networks_are_their_maps(network, dtype, tolerance):
    model, x = network.to(dtype), digits(4).to(dtype)
    linear = linearize(model, x)
    with torch.no_grad():
        truth = model(x)
    assert linear.exact and linear.residual() <= tolerance
    total = linear.contributions().flatten(2).sum(-1) + sum(linear.bias_contributions().values())
    assert float((total - truth).abs().max() / truth.abs().max()) <= tolerance
    point = x.clone().requires_grad_()
    rows = [torch.autograd.grad(model(point)[:, k].sum(), point)[0] for k in range(10)]
    assert torch.allclose(linear.W, torch.stack(rows, 1), rtol=0, atol=tolerance * float(linear.W.abs().max()))
    assert float(linear.b.abs().max()) > 1e-3 * float(truth.abs().max())  # there is something to get wrong


def test_the_map_holds_as_long_as_the_pattern_does(network):
    model, x = network.double(), digits(2).double()
    # Blank corners are alike, and which of equal entries a pooling takes is any step's to change: not at this point.
    x = x + 0.1 * torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    linear = linearize(model, x)
    step = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    held = []
    for size in (1e-6, 1e-5, 1e-4, 1e-3, 1.0):
        z = x + size * step
        with torch.no_grad():
            gap = float((linear(z) - model(z)).abs().max() / model(z).abs().max())
        held.append(linear.same_pattern(z))
        assert gap <= 1e-12 or not held[-1]
    assert held[0] and not held[-1]


def test_b_is_not_the_difference():
    """A wrong b would show: the map at zero input is that of the frozen network, not of the network."""
    torch.manual_seed(1)
    model, x = demo.digits_cnn().double(), digits(3).double()
    linear = linearize(model, x)
    with torch.no_grad():
        assert not torch.allclose(linear.b, model(torch.zeros_like(x)), atol=1e-3)
    gates, y = [], x
    for layer in model:
        if isinstance(layer, nn.ReLU):
            gates.append((y > 0).double())
        y = layer(y)
    z, gates = torch.zeros_like(x), iter(gates)
    for layer in model:
        z = z * next(gates) if isinstance(layer, nn.ReLU) else layer(z)
    assert torch.allclose(linear.b, z, atol=1e-14)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 5), seed=st.integers(0, 1000), rows=st.integers(1, 12))
def test_a_batch_is_its_examples(n, seed, rows):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, rows)).double()
    x = torch.randn(n, 6, dtype=torch.float64)
    whole = linearize(model, x)
    assert whole.W.shape == (n, rows, 6) and whole.b.shape == whole.output.shape == (n, rows)
    for i in range(n):
        one, alone = linearize(model, x[i : i + 1]), linearize(model, x[i])
        assert alone.W.shape == (rows, 6) and alone.b.shape == (rows,)
        for ours in (one.W[0], alone.W):
            assert torch.allclose(whole.W[i], ours, atol=1e-14)
        biases = alone.bias_contributions()
        for name, part in whole.bias_contributions().items():
            assert torch.allclose(part[i], biases.get(name, torch.zeros(rows, dtype=x.dtype)), atol=1e-13)
    assert alone.matvec(x[0]).shape == (rows,) and alone.rmatvec(alone.b).shape == (6,)
    assert alone.contributions().shape == (rows, 6)


def test_chosen_outputs():
    model, x = demo.digits_cnn().eval(), digits(3)
    every = linearize(model, x)
    for outputs, places in ((3, [3]), ([7, 2, 7], [7, 2, 7]), (-1, [9]), (range(4), [0, 1, 2, 3])):
        some = linearize(model, x, outputs)
        assert torch.allclose(some.W, every.W[:, places], atol=1e-6)
        assert torch.equal(some.output, every.output[:, places])


def test_weighted_outputs(network):
    model, x = network.double(), digits(3).double()
    linear = linearize(model, x)
    c = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(linear.contributions(c), torch.einsum("nk,nk...->n...", c, linear.contributions()))
    every = linear.bias_contributions()
    for name, part in linear.bias_contributions(c).items():
        assert torch.allclose(part, (c * every[name]).sum(1), atol=1e-12)
    alone = linearize(model, x[0][None], batched=False)
    for name, part in alone.bias_contributions(c[0]).items():
        assert part.dim() == 0 and torch.allclose(part, (c[0] * every[name][0]).sum(), atol=1e-12)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_biases_where_examples_do_not_come_first(n):
    """Sequences first: shapes alone mislead where there are as many positions as examples."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
            self.position = nn.Parameter(torch.randn(5, 1, 4))

        def forward(self, x):
            return self.second(F.relu(self.first(x.transpose(0, 1)) + self.position)).mean(0)

    torch.manual_seed(n)
    model, x = Net().double(), torch.randn(n, 5, 3, dtype=torch.float64)
    linear = linearize(model, x)
    for i in range(n):
        alone = linearize(model, x[i : i + 1]).bias_contributions()
        for name, part in linear.bias_contributions().items():
            assert torch.allclose(part[i], alone[name][0], atol=1e-13)


def test_rows_in_pieces(monkeypatch):
    from npeff.companions.linearize import linear_map

    model, x = demo.digits_cnn().eval(), digits(2)
    whole = linearize(model, x)
    monkeypatch.setattr(linear_map, "BUDGET", 1)
    pieces = linearize(model, x)
    assert len(list(pieces.rows())) == 10
    assert torch.allclose(pieces.W, whole.W, atol=1e-6)
    for name, part in pieces.bias_contributions().items():
        assert torch.allclose(part, whole.bias_contributions()[name], atol=1e-5)


def test_from_a_layer_onwards():
    torch.manual_seed(0)
    model = ResNet18().double().eval()
    x = digits(2).double()
    linear = linearize(model, x, at="stages.1")
    assert linear.x.shape == (2, 8, 4, 4) and linear.residual() <= 1e-12
    rest = nn.Sequential(model.stages[2], model.stages[3], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    behind = linearize(rest, linear.x)
    assert torch.allclose(linear.W, behind.W, atol=1e-12) and torch.allclose(linear.b, behind.b, atol=1e-12)
    assert linear.same_pattern(linear.x) and not linear.same_pattern(-linear.x)


def test_what_goes_past_the_layer_is_constant():
    torch.manual_seed(0)
    model = Block(2, 2, 1).double().eval()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    linear = linearize(model, x, at="bn2")
    assert linear.residual() <= 1e-12
    gate = (linear.output > 0).double()
    assert torch.allclose(linear.b, gate * x.flatten(1))
    assert torch.allclose(linear.W[0].reshape(18, 18), torch.diag(gate[0]))


def test_token_ids_from_the_embedding_onwards():
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    ids = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ArgumentError, match=r"token ids linearise from the embedding's output .* at='0'"):
        linearize(model, ids)
    linear = linearize(model, ids, at="0")
    assert linear.W.shape == (4, 3, 5, 6) and linear.residual() <= 1e-12


def test_models_of_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, a, b):
            return {"logits": F.relu(self.first(a) + self.second(b))}

    torch.manual_seed(0)
    model, a, b = Two().double(), torch.randn(2, 3).double(), torch.randn(2, 5).double()
    with pytest.raises(ArgumentError, match="x: expected a tensor, got tuple; with several inputs"):
        linearize(model, (a, b))
    with pytest.raises(ModelError, match="its output is dict, expected a float tensor"):
        linearize(model, (a, b), at="first")
    by_layer = linearize(model, {"a": a, "b": b}, at="first", forward=lambda m, x: m(**x)["logits"])
    by_input = linearize(model, a, forward=lambda m, x: m(x, b)["logits"])
    assert by_layer.residual() <= 1e-12 and by_input.residual() <= 1e-12
    assert torch.allclose(by_input.W, torch.einsum("nkh,hi->nki", by_layer.W, model.first.weight), atol=1e-12)


def test_nothing_of_the_model_changes():
    model, x = vgg_bn().eval(), digits(2)
    model[0].weight.requires_grad_(False)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
    linear = linearize(model, x)
    linear.W, linear.residual(), linear.bias_contributions()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor._version == before[name][1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_within_inference_mode():
    model, x = demo.digits_cnn().eval(), digits(2)
    with torch.inference_mode():
        linear = linearize(model, x)
        assert linear.residual() <= 1e-5


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = demo.digits_cnn().eval()
    assert linearize(model, digits(2)).residual() <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [lambda model, x: torch.jit.script(model), torch.jit.trace])
def test_models_without_python_code(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(2, 4).double()
    linear, plain = linearize(make(model, x), x), linearize(model, x)
    assert torch.allclose(linear.W, plain.W) and torch.allclose(linear.b, plain.b)
    with pytest.raises(ArgumentError, match="at: expected 'input' or the name of a layer"):
        linearize(make(model, x), x, at="0")


def test_weights_made_of_others():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)).double()
    assert linearize(nn.Sequential(layer, nn.ReLU()), torch.randn(2, 4).double()).residual() <= 1e-14


def test_a_model_that_changed_is_noticed():
    model, x = demo.digits_cnn().eval(), digits(2)
    linear = linearize(model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    for act in (lambda: linear.W, lambda: linear.b, lambda: linear.matvec(x), lambda: linear(x)):
        with pytest.raises(ModelError, match="its weights changed since it was linearised"):
            act()


def test_steps_known_to_keep_examples_apart():
    """Names and shapes tell that usual networks keep examples apart, and the gradients agree.

    Private names are read here, since a wrong answer costs time or a wrong refusal, and no number shows it.
    """
    torch.manual_seed(0)
    usual = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3), nn.Hardtanh(), nn.Linear(3, 2),
    ).eval()  # fmt: skip
    linear = linearize(usual, torch.rand(5, 1, 8, 8))
    assert linear._program.examples_apart(5) and not linear._program.examples_apart(4)
    linear._program.examples_apart = lambda n: False
    assert linear._independent, "and the gradients agree"

    for mix in (
        lambda x: x.view(2, 6).sum(0).view(2, 3),  # rows of other rows
        lambda x: x.t().reshape(4, 3),
        lambda x: x @ x.detach().t() @ x,
        lambda x: (x + x[:1]).relu(),
        lambda x: x.mean(0, keepdim=True) + x,
        lambda x: x[torch.tensor([1, 0, 3, 2])] * 2,
    ):
        function = type("Mixing", (nn.Module,), {"forward": lambda self, x, mix=mix: mix(x)})()
        found = linearize(function, torch.randn(4, 3), batched=None, smooth="freeze")
        assert not (found._program.examples_apart(4) and found._batched)


def test_examples_that_influence_each_other_are_refused():
    class Mixing(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    linear = linearize(Mixing(), torch.randn(4, 3))
    with pytest.raises(ModelError, match=r"examples influence each other.*batched=False"):
        linear.W  # noqa: B018
    whole = linearize(Mixing(), torch.randn(4, 3).double(), batched=False)
    assert whole.W.shape == (12, 4, 3) and whole.residual() <= 1e-12


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_any_example_that_reaches_another_is_seen(n):
    """One example's input in another's output, for every pair; and an RNN that takes the examples for a sequence."""

    def reaching(one, other):
        def function(x):
            y = x.relu()
            y[other] += x[one]
            return y

        return Call(function)

    x = torch.randn(n, 3)
    models = [reaching(i, j) for i in range(n) for j in range(n) if i != j]
    for model in (*models, Call(lambda x: x + x.roll(n - n // 2, 0))):
        with pytest.raises(ModelError, match="examples influence each other"):
            linearize(model, x).rmatvec(torch.ones(n, 3))
    network = nn.RNN(3, 2, nonlinearity="relu")
    sequence = Call(lambda x: network(x)[0])
    for weight in network.parameters():
        nn.init.constant_(weight, 0.1)
    x = x.abs()
    with pytest.raises(ModelError, match="examples influence each other"):
        linearize(sequence, x).rmatvec(torch.ones(n, 2))
    assert linearize(Call(lambda x: x[torch.arange(n)].relu()), x).rmatvec(torch.ones(n, 3)).shape == (n, 3)


def test_rows_of_very_many_outputs():
    linear = linearize(Call(lambda x: x.repeat(1, 200_000)), torch.ones(1, 3))
    rows = next(linear.rows())
    assert rows.shape[2] == 3 and torch.equal(rows[0, :3], torch.eye(3))


def test_too_little_memory_is_told_with_what_to_do():
    class Full(nn.Module):
        full = False

        def forward(self, x):
            return torch.empty(1 << 58) if self.full else x.relu()

    model, x = Full(), torch.ones(2, 3)
    linear = linearize(model, x)
    model.full = True
    for act in (lambda: linearize(model, x), lambda: linear.same_pattern(x)):
        with pytest.raises(OutOfMemoryError, match=r"^memory: .*the linear map of x .*; give fewer examples"):
            act()
