"""Moving weights along a direction, and back bit for bit."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import npeff
from npeff.batches.reading import read_batches
from npeff.errors import ArgumentError
from npeff.models.parameters import Parameters
from npeff.perturbation.evaluate import CheckedModel
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.weights import Weights, untouched
from perturbation_cases import batches, components_of, deep, same, state


def some_direction(model, seed=0, names=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if names is None or name in names
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=15)
@given(magnitude=st.floats(-1e4, 1e4), seed=st.integers(0, 100))
def test_applied_moves_and_restores_bit_for_bit(dtype, magnitude, seed):
    model = deep().to(dtype)
    before = state(model)
    direction = some_direction(model, seed)
    with npeff.applied(model, direction, magnitude) as moved:
        assert moved is model
        for name, p in model.named_parameters():
            wide = before["tensors"][name].to(torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(p.detach(), (wide + magnitude * direction[name].to(wide)).to(dtype))
    assert same(before, state(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("change", [npeff.applied, npeff.ablated])
def test_weights_come_back_after_any_exception_and_any_change_inside(error, change):
    model = deep()
    before = state(model)
    with pytest.raises(error), change(model, some_direction(model)):
        with torch.no_grad():
            model[0].weight.zero_()
        raise error
    assert same(before, state(model))


def test_an_interrupt_during_the_restoration_loses_nothing(monkeypatch):
    model = deep()
    before = state(model)
    weights = Weights(model)
    weights.move(some_direction(model), 1.0)
    real, calls = Weights._put_back, []  # private: the only moment between two weights

    def interrupted(self, key):
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, key)

    monkeypatch.setattr(Weights, "_put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.restore()
    assert same(before, state(model))


def test_nested_and_partial_directions():
    model = deep()
    before = state(model)
    with npeff.applied(model, some_direction(model, 1, ["0.weight"]), 2.0):
        inside = state(model)
        with npeff.applied(model, some_direction(model, 2), 3.0):
            assert not torch.equal(model[3].bias, before["tensors"]["3.bias"])
        assert same(inside, state(model))
        assert torch.equal(model[3].bias, before["tensors"]["3.bias"])
    assert same(before, state(model))


def test_a_compiled_model_moves_by_the_names_of_the_model_within():
    model = deep()
    before, direction = state(model), some_direction(model)
    compiled = torch.compile(model, backend="eager")
    with npeff.applied(model, direction, 0.5):
        expected = [p.detach().clone() for p in model.parameters()]
    prefixed = {f"_orig_mod.{name}": part for name, part in direction.items()}
    for named in (direction, prefixed):
        with npeff.applied(compiled, named, 0.5) as moved:
            assert moved is compiled and all(map(torch.equal, expected, model.parameters()))
    assert f"{len(direction)} tensors" in repr(npeff.Moved(compiled, direction))
    assert same(before, state(model))


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x).mean(1))


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_tied_weights_move_once_and_stay_tied(name):
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    direction = {name: torch.randn(7, 4)}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight += 0.5 * direction[name]
    assert twin.out.weight is twin.embed.weight
    before = state(model)
    with npeff.applied(model, direction, 0.5):
        torch.testing.assert_close(model(x), twin(x))
    assert same(before, state(model))
    torch.testing.assert_close(npeff.Moved(model, direction, 0.5)(x), twin(x))
    assert same(before, state(model))
    with (
        pytest.raises(ArgumentError, match="one tied tensor"),
        npeff.applied(model, {"embed.weight": torch.ones(7, 4), "out.weight": torch.ones(7, 4)}),
    ):
        pass


def test_tied_weights_are_ablated_as_one_tensor_by_any_of_their_names():
    torch.manual_seed(0)
    model = Tied().eval()
    g, h = torch.randn(2, 7, 4)
    theta, span = model.embed.weight.detach().clone().double().reshape(-1), torch.stack([g, h]).double().reshape(2, -1)
    for start in (torch.zeros(7, 4), torch.randn(7, 4)):
        learned = theta - start.double().reshape(-1)
        expected = theta - span.T @ torch.linalg.lstsq(span.T, learned[:, None]).solution[:, 0]
        origins = [None] if not start.any() else [{"embed.weight": start}, {"out.weight": start}]
        for origin in origins:
            with npeff.ablated(model, [{"embed.weight": g}, {"out.weight": h}], origin):
                torch.testing.assert_close(model.out.weight.double().reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_moved_leaves_the_parameters_alone_and_its_magnitude_learns():
    model, x = deep(), batches(9, 9)[0][0]
    direction, before = some_direction(model), state(model)
    with npeff.applied(model, direction, 0.3):
        expected = model(x)
    moved = npeff.Moved(model, direction, 0.3)
    assert moved.training == model.training and moved.model is model
    torch.testing.assert_close(moved(x), expected)
    moved.magnitude = torch.tensor(0.0)
    torch.testing.assert_close(moved(x), model(x))
    learned = npeff.Moved(model, direction, nn.Parameter(torch.tensor(0.3)))
    learned(x).sum().backward()
    step = 1e-6
    with npeff.applied(model, direction, 0.3 + step):
        ahead = model(x).sum()
    assert float(learned.magnitude.grad) == pytest.approx(float((ahead - expected.sum()).detach() / step), rel=1e-3)
    model.zero_grad(set_to_none=True)
    assert same(before, state(model))


def test_a_component_can_be_added_negated_and_ablated():
    model = deep()
    components = components_of(model, batches(20, 8, classes=2))
    g, theta = (
        components.vector(1).astype(np.float64),
        np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()]),
    )

    def weights():
        return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])

    direction = components.state_dict(1)
    with npeff.applied(model, direction, 0.5):
        np.testing.assert_allclose(weights(), theta + 0.5 * g, atol=1e-12)
    with npeff.applied(model, direction, -0.5):
        np.testing.assert_allclose(weights(), theta - 0.5 * g, atol=1e-12)
    with npeff.ablated(model, direction):
        np.testing.assert_allclose(weights() @ g, 0, atol=1e-7)
        np.testing.assert_allclose(weights(), theta - g * (g @ theta) / (g @ g), atol=1e-12)
    origin = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    with npeff.ablated(model, direction, origin):
        np.testing.assert_allclose(weights(), theta + 0.1 * g * g.sum() / (g @ g), atol=1e-12)
    both = [components.state_dict(0), components.state_dict(2)]
    with npeff.ablated(model, both):
        np.testing.assert_allclose(components.vectors[[0, 2]] @ weights(), 0, atol=1e-6)
    np.testing.assert_array_equal(weights(), theta)


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        ([1.0], "expected tensors by parameter name"),
        ({"absent": torch.ones(2)}, "the model has no parameter 'absent'"),
        ({"0.bias": torch.ones(3)}, "has shape \\(6,\\) in the model, got \\(3,\\)"),
        ({"0.bias": torch.full((6,), torch.nan)}, "not finite"),
        ({"0.bias": "large"}, "0.bias is no tensor of numbers"),
    ],
)
def test_directions_that_do_not_fit_are_refused(direction, words):
    model = deep()
    before = state(model)
    with pytest.raises(ArgumentError, match=words), npeff.applied(model, direction):
        pass
    with pytest.raises(ArgumentError, match=words):
        npeff.Moved(model, direction)
    assert same(before, state(model))


def test_magnitudes_and_empty_ablations_are_refused():
    model = deep()
    with pytest.raises(ArgumentError, match="model: expected a torch"), npeff.applied("model", some_direction(model)):
        pass
    with pytest.raises(ArgumentError, match="magnitude: expected a parameter of one element"):
        npeff.Moved(model, some_direction(model), nn.Parameter(torch.ones(2)))
    with (
        pytest.raises(ArgumentError, match="origin: expected tensors by"),
        npeff.ablated(model, some_direction(model), 3),
    ):
        pass
    with (
        pytest.raises(ArgumentError, match="magnitude: expected a finite number"),
        npeff.applied(model, some_direction(model), float("nan")),
    ):
        pass
    with pytest.raises(ArgumentError, match="nothing to remove"), npeff.ablated(model, {"0.bias": torch.zeros(6)}):
        pass
    with (
        pytest.raises(ArgumentError, match=r"origin: .*'0.bias' is missing"),
        npeff.ablated(model, {"0.bias": torch.ones(6)}, {}),
    ):
        pass


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    kept = model.weight.clone()
    with npeff.applied(model, {"weight": torch.ones(2, 3)}, 1.0):
        assert not torch.equal(model.weight, kept)
    assert torch.equal(model.weight, kept)


def test_buffers_and_modes_are_put_back():
    model = deep()
    before = state(model)
    with pytest.raises(RuntimeError), untouched(model):
        model.train()
        model(torch.randn(16, 5, dtype=torch.float64))
        model[1].running_mean = torch.zeros(6, dtype=torch.float64)
        raise RuntimeError
    assert same(before, state(model))


def test_rounding_of_half_precision_is_noticed():
    model = nn.Linear(50, 50).to(torch.bfloat16)
    weights = Weights(model)
    direction = {"weight": torch.randn(50, 50) / 50}
    assert weights.realised(direction, 1e-4) < 0.9
    assert Weights(model.float()).realised(direction, 1e-2) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_over_many_batches_do_not_lose_terms_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 3), torch.randn(400, 2, 8)

    def gradient(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        parameters = Parameters.of([(name, p.shape) for name, p in model.named_parameters()])
        checked = CheckedModel(model, parameters, torch.device("cpu"), None, "categorical", None)
        read = read_batches(list(inputs.to(dtype)), torch.device("cpu"), False, True)
        slices = [BatchSlice(b, torch.arange(2), np.arange(2 * i, 2 * i + 2)) for i, b in enumerate(read)]
        return checked.gradient(slices, lambda _, z: -torch.log_softmax(z.double(), 1)[:, 0].sum())[1]

    exact = gradient(copy.deepcopy(model).double(), torch.float64)
    for name, found in gradient(model.to(dtype), dtype).items():
        assert (found.double() - exact[name]).norm() < 0.01 * exact[name].norm()
