"""The input behind a component: attributions that add up to what the component does to the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import npeff
from npeff import demo
from npeff.companions.linearize import attribute_component, attribute_top_examples
from npeff.errors import ArgumentError, DataError, ModelError


def network():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10))


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    data = demo.digits().first(24)
    model = demo.train(network(), data, epochs=10, learning_rate=1e-2)
    fishers = npeff.compute_fishers(model, data, compress=None, progress=False)
    components = npeff.decompose(fishers, 3, n_init=1, n_replacements=0, max_iterations=40, progress=False)
    return model, data, fishers, components


@pytest.mark.parametrize("magnitude", [None, 0.05, -0.2])
@pytest.mark.parametrize("output", [None, 4])
def test_maps_and_biases_sum_to_the_change(made, magnitude, output):
    trained, data, _, components = made
    model = network().double().eval()
    model.load_state_dict(trained.state_dict())
    x = data.inputs[components.top_examples(1, 6)].double()
    found = attribute_component(model, components, 1, x, magnitude, output)
    assert found.residual() <= 1e-9 and not found.frozen and found.maps.shape == x.shape
    moved = network().double().eval()
    steps = components.state_dict(1)
    moved.load_state_dict({k: v + found.magnitude * steps[k] for k, v in model.state_dict().items()})
    with torch.no_grad():
        difference = moved(x) - model(x)
        p = model(x).softmax(1)
    assert torch.allclose(found.outputs, difference, atol=1e-12)
    centred = difference - (p * difference).sum(1, keepdim=True)
    size = (p * centred.square()).sum(1).sqrt()
    assert torch.allclose(found.change, size if output is None else difference[:, output], atol=1e-9)


def test_vectors_are_recovered_where_they_are_needed(made):
    model, data, _, _ = made
    batches = [(data.inputs, data.labels)]
    components = npeff.decompose(
        npeff.compute_fishers(model, batches, compress=npeff.GramOnly(), progress=False),
        2, n_init=1, n_replacements=0, max_iterations=20, progress=False,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"the vector in parameter space is not known.*recover\(model, data"):
        attribute_component(model, components, 0, data.inputs[:2])
    found = attribute_component(model, components, 0, data.inputs[:2], 0.1, data=batches)
    assert components.not_recovered == [1]
    pixels = attribute_top_examples(model, components, batches, [1], k=2)
    assert components.not_recovered == [] and len(pixels) == 2
    again = attribute_component(model, components, 0, data.inputs[:2], 0.1)
    torch.testing.assert_close(again.maps, found.maps)


def test_single_precision_too(made):
    model, data, _, components = made
    found = attribute_component(model, components, 0, data.inputs[:8], 0.1)
    assert found.residual() <= 1e-3 and found.maps.dtype == torch.float32


def test_sensitivity_is_what_coefficients_are_fitted_to(made):
    """‖A_i g_j‖ with the rows of the Fishers themselves."""
    model, data, fishers, components = made
    found = attribute_component(model, components, 2, data.inputs[:10])
    for i in range(10):
        rows = torch.from_numpy(fishers.dense(i)).double()
        expected = (rows @ torch.from_numpy(components.vector(2)).double()).norm()
        assert torch.isclose(found.sensitivity[i].double(), expected, rtol=1e-3)


def test_the_change_is_the_sensitivity_for_small_steps(made):
    model, data, _, components = made
    double = network().double().eval()
    double.load_state_dict(model.state_dict())
    found = attribute_component(double, components, 0, data.inputs[:8].double(), 1e-6)
    assert torch.allclose(found.change / 1e-6, found.sensitivity, rtol=1e-3)


def test_the_default_magnitude(made):
    model, data, _, components = made
    found = attribute_component(model, components, 0, data.inputs[:16])
    predicted = 0.5 * found.magnitude**2 * found.sensitivity.double().square().mean()
    assert torch.isclose(predicted, torch.tensor(0.05, dtype=torch.float64), rtol=1e-5)


def test_forward_and_the_model_untouched(made):
    model, data, _, components = made
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = attribute_component(model, components, 1, data.inputs[:4], 0.1)
    other = attribute_component(
        model, components, 1, data.inputs[:4].flatten(1), 0.1, forward=lambda m, x: m(x.view(-1, 1, 8, 8))
    )
    assert torch.allclose(plain.maps.flatten(1), other.maps, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_smooth_models_are_refused_or_held(made):
    _, data, _, _ = made
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 10)).eval()
    fishers = npeff.compute_fishers(model, data.first(20), compress=None, progress=False)
    components = npeff.decompose(fishers, 2, n_init=1, n_replacements=0, max_iterations=20, progress=False)
    with pytest.raises(ModelError, match="not piecewise linear"):
        attribute_component(model, components, 0, data.inputs[:4])
    found = attribute_component(model, components, 0, data.inputs[:4], smooth="freeze")
    assert [item.operation for item in found.frozen] == ["gelu"] and found.residual() <= 1e-3


def test_bad_input(made):
    model, data, _, components = made
    with pytest.raises(ArgumentError, match=r"parameter 0.weight has shape .* the model has none of that name"):
        attribute_component(nn.Flatten(), components, 0, data.inputs[:2])
    with pytest.raises(ArgumentError, match=r"components: their parameter .* the model has \("):
        attribute_component(demo.digits_cnn(), components, 0, data.inputs[:2])
    with pytest.raises(ArgumentError, match="magnitude: expected a finite number other than 0, got 0"):
        attribute_component(model, components, 0, data.inputs[:2], 0)
    with pytest.raises(ArgumentError, match="j: expected a component below 3"):
        attribute_component(model, components, 3, data.inputs[:2])
    with pytest.raises(ArgumentError, match="output: expected a position below 10, got 10"):
        attribute_component(model, components, 0, data.inputs[:2], output=10)
    dead = network().eval()
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
    still = components.__class__(**{**vars(components), "vectors": 0 * components.vectors})
    with pytest.raises(DataError, match="component 0 does not move the outputs"):
        attribute_component(dead, still, 0, data.inputs[:2])


def test_fused_attention():
    """A transformer whose attention kernel has no second derivative."""
    torch.manual_seed(0)
    x, y = torch.randn(10, 5, 8), torch.arange(10) % 2
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 2))
    data = [(x, y)]
    fishers = npeff.compute_fishers(model.eval(), data, compress=None, progress=False)
    components = npeff.decompose(fishers, 2, n_init=1, n_replacements=0, max_iterations=20, progress=False)
    found = attribute_component(model, components, 0, x[:4], smooth="freeze")
    assert found.residual() <= 1e-3 and any(
        item.operation == "_softmax" or "softmax" in str(item) for item in found.frozen
    )


class Nested(nn.Module):
    """Gives its outputs as the only item of a tuple, with a third dimension."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x).unflatten(1, (5, 2)),)


def test_outputs_of_another_form(made):
    model, data, _, components = made
    renamed = Nested(model).eval()
    plain = attribute_component(model, components, 1, data.inputs[:4], 0.1)
    found = attribute_component(model, components, 1, data.inputs[:4], 0.1, forward=lambda m, x: renamed(x))
    torch.testing.assert_close(found.maps, plain.maps)
    torch.testing.assert_close(found.sensitivity, plain.sensitivity)
