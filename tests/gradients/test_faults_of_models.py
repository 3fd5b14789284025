"""Faults of models that the first examples do not show: noise, state, influence in large batches, hooks."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npeff.errors import DataError, ModelError
from npeff.fishers.computation import compute_fishers
from npeff.fishers.options import GramOnly
from npeff.fishers.shards import FisherWriter

F = nn.functional


class Body(nn.Module):
    """Two layers; what happens between them is the case's."""

    def __init__(self, between: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.between, self.calls = nn.Linear(6, 5), nn.Linear(5, 3), between, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.between(self, torch.tanh(self.layer(x))))


def capacity(_: Body, y: Tensor) -> Tensor:
    """No more than four of a batch are served, the strongest."""
    strongest = y.detach().abs().sum(1).argsort(descending=True).argsort() < 4
    return y * strongest[:, None]


def overwritten(_: Body, y: Tensor) -> Tensor:
    return y.mul_(2).tanh_().mul_(y.detach())


CASES: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "dropout by a function": (lambda _, y: F.dropout(y, 0.01, training=True), "two passes .* dropout by a function"),
    "a layer that is seldom dropped": (lambda _, y: y * float(torch.rand(()) > 0.05), "two passes"),
    "state after ten calls": (lambda m, y: y * (1.0 if m.calls < 11 else 2.0), "keeps something from call to call"),
    "a mean of more than two, without gradient": (
        lambda _, y: y - float(len(y) > 2) * y.detach().mean(0),
        "has other logits (without half of the others|when it is alone)",
    ),
    "capacity": (capacity, "has other logits (without half of the others|when it is alone)"),
    "overwritten in place": (overwritten, "overwrites a tensor in place"),
}


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(30)]


@pytest.mark.parametrize("compress", [None, GramOnly()])
@pytest.mark.parametrize("name", CASES)
def test_faults_that_first_examples_hide(name: str, compress: Any) -> None:
    torch.manual_seed(1)
    between, message = CASES[name]
    with pytest.raises(ModelError, match=message):
        compute_fishers(Body(between), data(), compress=compress, progress=False)


def test_random_numbers_without_effect_are_allowed() -> None:
    torch.manual_seed(1)
    plain, drawing = (Body(between) for between in (lambda _, y: y, lambda _, y: y + 0 * torch.rand_like(y)))
    drawing.load_state_dict(plain.state_dict())
    one, other = (compute_fishers(model, data()[:3], progress=False) for model in (plain, drawing))
    assert (one.rows.values == other.rows.values).all()


def test_work_of_a_model_that_changed_meanwhile_is_dropped(tmp_path: Any) -> None:
    torch.manual_seed(1)
    out = tmp_path / "fishers.h5"
    for _ in range(2):  # a second call begins anew
        model = Body(lambda m, y: y * (1.0 if m.calls < 11 else 2.0))
        with pytest.raises(ModelError, match="keeps something"):
            compute_fishers(model, data(), out=out, progress=False)
        assert not out.exists()


FACTOR = ContextVar("FACTOR", default=1.0)
BY_SETTING: dict[str, Callable[[], bool]] = {
    "whether gradients are recorded": torch.is_grad_enabled,
    "a context variable": lambda: FACTOR.get() == 2.0,
    "the default device": lambda: torch.get_default_device() == torch.device("cpu:0"),
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
}


@pytest.mark.parametrize("setting", BY_SETTING)
def test_the_first_examples_are_called_again_under_the_same_settings(
    setting: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written on a thread, and torch and Python keep some settings per thread."""
    torch.manual_seed(1)
    monkeypatch.setattr("npeff.fishers.computation.FisherWriter", partial(FisherWriter, shard_bytes=1))
    model = Body(lambda _, y: y if BY_SETTING[setting]() else 3 * y)
    token = FACTOR.set(2.0)
    with torch.device("cpu:0"), torch.autocast("cpu", torch.bfloat16):
        assert len(compute_fishers(model, data()[:6], out=tmp_path / "fishers.h5", progress=False)) == 48
    FACTOR.reset(token)


def test_a_hook_that_changes_a_gradient_is_refused() -> None:
    torch.manual_seed(1)
    model = Body(lambda _, y: y)
    handle = model.layer.weight.register_hook(lambda g: g * 2)
    with pytest.raises(ModelError, match=re.escape("a hook on the gradient of layer.weight")):
        compute_fishers(model, data(), progress=False)
    handle.remove()
    model.layer.weight.register_hook(lambda g: None)  # one that only looks
    assert all(line["rule"] in ("linear", "bias") for line in compute_fishers(model, data(), progress=False).coverage)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    class Nested(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(torch.nested.as_nested_tensor([row[None] for row in x], layout=layout))
            return self.head(torch.nested.to_padded_tensor(y, 0.0)[:, 0])

    with pytest.raises(ModelError, match="nested tensors"):
        compute_fishers(Nested(lambda _, y: y), data(), progress=False)


def test_logits_of_another_number_than_in_the_batches_before() -> None:
    def growing(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        logits: Tensor = model(batch[0])
        return logits[:, :2] if len(batch[0]) == 5 else logits

    batches = [(x,) for x in (*data()[:2], data()[2][:5])]
    for compress in (None, GramOnly()):
        with pytest.raises(DataError, match="expected 3 of an example as in the batches before, got 2"):
            compute_fishers(Body(lambda _, y: y), batches, compress=compress, forward=growing, progress=False)


def test_places_in_some_batches_alone() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5))
    tokens = torch.randint(0, 7, (3, 4))
    batches = [(tokens, tokens % 5), (tokens[:, 0], torch.arange(3))]
    with pytest.raises(DataError, match="expected 5 of every place as in the batches before, got 5 of an example"):
        compute_fishers(model, batches, progress=False)
