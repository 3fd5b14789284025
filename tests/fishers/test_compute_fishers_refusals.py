"""What compute_fishers must refuse: models, data and arguments that it cannot serve, each with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, DataError, ModelError
from npeff.fishers.options import TopK
from small_network import fishers_of, model, x

__all__ = ["model", "x"]  # fixtures


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d in training mode"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "track_running_stats"),
        (nn.Dropout(0.5), "Dropout is active"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    ],
)
def test_layers_without_per_example_gradients_are_refused(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ModelError, match=words) as caught:
        fishers_of(model, [torch.randn(3, 4)])
    assert "1 (" in str(caught.value)


def test_examples_that_influence_each_other_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - x.mean(dim=0))

    class Mixed(nn.Module):
        """The same logits alone and in the batch, but not the same gradients: only autograd can see it."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.power = nn.Linear(4, 3), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.exp(self.power)
            mean = y.mean(dim=0)
            return self.head(y + (mean - mean.detach()))

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + torch.rand(())

    x = torch.randn(5, 4)
    for influenced, words in (
        (Centred(), "influence each other"),
        (Mixed(), "influence each other"),
        (Noisy(), "deterministic"),
    ):
        with pytest.raises(ModelError, match=words):
            fishers_of(influenced, [x])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x - x.mean(0), "but not in a batch of twice itself: examples influence each other"),
        (
            lambda x: x + len(x),
            "others again in a batch of twice itself: examples influence each other by",
        ),
        (lambda x: x + torch.rand(()), "two passes over the same batch give different logits"),
        (lambda x: (x - 0.4 * x.mean(0)).bfloat16(), "computed in bfloat16: too much for rounding"),
    ],
)
def test_why_logits_depend_on_the_batch_is_told(change: Callable[[Tensor], Tensor], words: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    with torch.no_grad():
        head.weight.mul_(4)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        changed = change(x)
        return nn.functional.linear(changed, model.weight.to(changed.dtype), model.bias.to(changed.dtype))

    with pytest.raises(ModelError, match=words):
        fishers_of(head, [1 + 2 * torch.randn(5, 4)], forward=forward)


def test_a_forward_pass_hidden_from_autograd_is_refused(model: nn.Module, x: Tensor) -> None:
    def forward(m: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return m(batch)

    with pytest.raises(ModelError, match="no_grad"):
        fishers_of(model, [x], forward=forward)


def test_non_finite_values_are_named(model: nn.Module, x: Tensor) -> None:
    bad = x.clone()
    bad[7] = float("nan")
    with pytest.raises(DataError, match="example 7"):
        fishers_of(model, bad.split(3))
    with pytest.raises(DataError, match="example 7"):
        fishers_of(model, [bad])

    class Root(nn.Module):
        """Finite logits, infinite gradient where the input is zero."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))
            self.head = nn.Linear(4, 3)

        def forward(self, v: Tensor) -> Tensor:
            return self.head(torch.sqrt((v + self.shift).clamp_min(0)))

    v = torch.rand(6, 4) + 0.5
    v[4, 2] = 0.0
    for options in ({}, {"kind": "diagonal"}, {"compress": TopK(3)}):
        for size in (2, 6):
            with pytest.raises(DataError, match=r"example 4 .* shift\[2\]"):
                fishers_of(Root(), v.split(size), **options)


def test_a_perfectly_confident_example_is_kept_as_zero(model: nn.Module, x: Tensor) -> None:
    for options in ({}, {"compress": TopK(7)}, {"kind": "diagonal"}, {"energy": 0.9}):
        batch = x[:3]
        flagged = {"x": batch, "sure": torch.tensor([0.0, 2e3, 0.0])}
        fishers = fishers_of(
            model, [flagged], forward=lambda m, b: m(b["x"]) + b["sure"][:, None] * torch.eye(3)[0], **options
        )
        assert fishers.zero.tolist() == [False, True, False]
        assert not fishers.dense(1).any()


def test_model_changed_during_the_work(model: nn.Module, x: Tensor) -> None:
    def visible() -> Any:
        yield x
        with torch.no_grad():
            model[3].bias.add_(1)
        yield x

    def hidden() -> Any:
        yield x
        model[3].bias.data += 1
        yield x

    for data in (visible(), hidden()):
        with pytest.raises(ModelError, match="changed"):
            fishers_of(model, data)


def test_wrong_arguments(model: nn.Module, x: Tensor) -> None:
    for options, words in (
        ({"kind": "full"}, "kind"),
        ({"device": "nowhere"}, "device"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ArgumentError, match=words):
            fishers_of(model, [x], **options)
    with pytest.raises(ArgumentError, match="model"):
        fishers_of(lambda v: v, [x])
    with pytest.raises(ArgumentError, match="meta"):
        fishers_of(nn.Linear(2, 2, device="meta"), [x])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ArgumentError, match="one device"):
        fishers_of(mixed, [x])


def test_parameters_without_a_shape_are_refused(x: Tensor) -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    for patterns in (None, "1.weight"):
        with pytest.raises(ModelError, match=r"1\.weight, 1\.bias have no shape yet .* call the model once"):
            fishers_of(lazy, [x], parameters=patterns)
    lazy(x)
    assert len(fishers_of(lazy, [x])) == len(x)


class Spectral(nn.Module):
    """A complex parameter and an integer one, beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.filter = nn.Linear(4, 3), nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.steps = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

    def forward(self, v: Tensor) -> Tensor:
        return self.head(v) + (v.to(torch.complex64) @ self.filter).real


def test_complex_and_integer_parameters_are_told() -> None:
    fishers = fishers_of(Spectral(), [torch.randn(5, 4)])
    told = {line["parameter"]: (line["rule"], line["reason"]) for line in fishers.coverage}
    assert told["filter"][0] == told["steps"][0] == "left out"
    assert "complex" in told["filter"][1]
    assert "int64" in told["steps"][1]
    assert fishers.parameters.names == ("head.weight", "head.bias") or list(fishers.parameters.names) == [
        "head.weight",
        "head.bias",
    ]
    with pytest.raises(ArgumentError, match="filter: complex parameters have no Fisher"):
        fishers_of(Spectral(), [torch.randn(5, 4)], parameters="filter")
    with pytest.raises(ArgumentError, match=r"no floating-point parameters \(weight: complex"):
        fishers_of(nn.Linear(4, 3, dtype=torch.complex64), [torch.randn(5, 4)])


def test_quantised_modules_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ModelError, match=r"1 \(Linear is quantised, so no gradient .*before quantisation"):
        fishers_of(dynamic, [torch.randn(5, 4)])
    with pytest.raises(ModelError, match="is quantised"):
        fishers_of(torch.ao.quantization.quantize_dynamic(model[1:], {nn.Linear}), [torch.randn(5, 4)])


def test_parameters_in_float8_are_told() -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, v: Tensor) -> Tensor:
            return self.head(v * self.scale.float())

    fishers = fishers_of(Coarse(), [torch.randn(5, 4)])
    assert {line["parameter"]: line["rule"] for line in fishers.coverage}["scale"] == "left out"


def test_a_vocabulary_with_too_many_rows_by_energy_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"energy: .* rows per example .* rank= as well"):
        fishers_of(nn.Linear(2, 12_000), [torch.zeros(1, 2)], energy=0.95)
    with pytest.raises(ArgumentError, match=r"labels: 12,000 outputs .* labels='sampled'"):
        fishers_of(nn.Linear(2, 12_000), [torch.zeros(1, 2)], likelihood="gaussian")


def test_a_sigmoid_before_yes_no_questions_is_told(x: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Sigmoid())
    with pytest.warns(UserWarning, match=r"ends in a sigmoid, take that off"):
        fishers_of(model, [x], likelihood="bernoulli")
