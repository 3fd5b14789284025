"""Models that end in a softmax: refused as logits, and right as probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import npeff
from npeff.errors import ArgumentError, DataError
from small_network import fishers_of

C = 4
X = 2 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % C


def logits_of(scale: float = 1.0, outputs: int = C) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def with_softmax(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*model, nn.Softmax(1))


def dense_of_probabilities(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    """``Σ_y ∇p_y ∇p_yᵀ / p_y``: from the outputs themselves, in float64."""
    found = []
    for example in x.double():
        p = model.double()(example[None])[0]
        total = 0.0
        for value in p:
            gradient = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            flat = torch.cat([part.reshape(-1) for part in gradient])
            total = total + (torch.outer(flat, flat) / value if float(value) > 0 else 0.0)
        found.append(total.detach().numpy())
    return found


def test_fishers_of_probabilities_are_those_of_their_outputs() -> None:
    fishers = fishers_of(with_softmax(logits_of()), [(X, Y)], likelihood="probabilities")
    for i, expected in enumerate(dense_of_probabilities(with_softmax(logits_of()), X)):
        rows = fishers.dense(i).astype(np.float64)
        assert rows.shape[0] == C - 1
        np.testing.assert_allclose(rows.T @ rows, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"basis": "class"},
        {"rank": 2},
        {"energy": 0.9},
        {"basis": "class", "min_prob": 0.05},
        {"basis": "class", "max_classes": 2},
        {"labels": "sampled", "n_samples": 3},
        {"labels": "true"},
        {"kind": "diagonal"},
        {"kind": "diagonal", "memory": 2_000},
        {"compress": npeff.TopK(9)},
    ],
    ids=str,
)
def test_fishers_of_probabilities_are_those_of_the_logits(options: Any, scale: float) -> None:
    """Up to probabilities below 1e-17, whose gradients float32 still holds."""
    given = {"compress": npeff.TopK(9)} if "compress" in options else options
    expected = fishers_of(logits_of(scale), [(X, Y)], **given)
    found = fishers_of(with_softmax(logits_of(scale)), [(X, Y)], likelihood="probabilities", **given)
    for i in range(len(X)):
        one, two = expected.dense(i).astype(np.float64), found.dense(i).astype(np.float64)
        if "compress" not in options and expected.kind == "low_rank":
            one, two = one.T @ one, two.T @ two
        np.testing.assert_allclose(two, one, atol=2e-4 * np.abs(one).max())
    np.testing.assert_allclose(found.norms, expected.norms, rtol=2e-4)
    assert found.labels.tolist() == Y.tolist()
    assert found.provenance["options"]["likelihood"] == "probabilities"
    p = np.exp(np.asarray(found.logits, np.float64))
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


def test_probabilities_that_vanish_are_left_out() -> None:
    model = with_softmax(logits_of(300.0))
    assert float(model(X).detach().min()) == 0
    for basis in ("reduced", "class"):
        fishers = fishers_of(model, [X], likelihood="probabilities", basis=basis)
        expected = fishers_of(logits_of(300.0), [X], basis=basis)
        for i in range(len(X)):
            one, two = (f.dense(i).astype(np.float64) for f in (expected, fishers))
            assert np.isfinite(two).all()
            np.testing.assert_allclose(two.T @ two, one.T @ one, atol=1e-3 * max(1e-12, np.abs(one.T @ one).max()))


@pytest.mark.parametrize("outputs", [2, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_softmax_is_not_taken_for_logits(outputs: int, dtype: torch.dtype) -> None:
    model = with_softmax(logits_of(outputs=outputs)).to(dtype)
    for options in ({}, {"compress": npeff.GramOnly()}, {"kind": "diagonal"}):
        with pytest.raises(DataError, match="likelihood='probabilities', or take the softmax off"):
            fishers_of(model, [X.to(dtype)], **options)
    with pytest.raises(DataError, match="likelihood='probabilities'"):
        npeff.mean_fisher(model, [X.to(dtype)], progress=False)
    fishers_of(nn.Sequential(*model[:-1], nn.LogSoftmax(1)), [X.to(dtype)])  # these are logits
    shifted = fishers_of(model, [X.to(dtype)], forward=lambda m, x: m(x) + 1)
    assert len(shifted) == len(X)


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(DataError, match="likelihood: 'probabilities' are ≥ 0 and sum to 1"):
        fishers_of(logits_of(), [X], likelihood="probabilities")
    with pytest.raises(ArgumentError, match="likelihood: expected 'categorical' or 'probabilities'"):
        fishers_of(logits_of(), [X], likelihood="softmax")


def test_probabilities_all_the_way() -> None:
    """The same components, effects, traces, changes and mean Fishers as without the softmax."""
    data = [(X, Y), (X.flip(0) * 0.7, Y)]
    plain, soft = logits_of(), with_softmax(logits_of())
    fishers = [fishers_of(plain, data), fishers_of(soft, data, likelihood="probabilities")]
    models = (plain, soft)
    few: dict[str, Any] = {"n_init": 1, "n_replacements": 0, "max_iterations": 50, "progress": False}
    components = [npeff.decompose(f, 2, **few) for f in fishers]
    np.testing.assert_allclose(components[0].coefficients, components[1].coefficients, atol=1e-3)
    pairs = list(zip(models, components, strict=True))
    one, two = (npeff.perturb(model, data, c, 0, top=3, progress=False) for model, c in pairs)
    np.testing.assert_allclose(one.kl, two.kl, rtol=0.02, atol=1e-5)
    np.testing.assert_array_equal(one.flipped, two.flipped)
    repaired = [npeff.mend(model, data, c, 0, repair=[0, 1, 2, 3], progress=False) for model, c in pairs]
    assert repaired[0].repaired == pytest.approx(repaired[1].repaired)
    means = [npeff.mean_fisher(model, data, likelihood=likelihood, progress=False) for model, likelihood in
             zip(models, ("categorical", "probabilities"), strict=True)]  # fmt: skip
    for name, mean in means[0].items():
        np.testing.assert_allclose(mean, means[1][name], rtol=1e-3, atol=1e-9)
    sketched = npeff.decompose(fishers_of(soft, data, likelihood="probabilities", compress=npeff.Sketch(64)), 2, **few)
    assert sketched.recover(soft, data, progress=False).vectors.shape == (2, fishers[0].n_parameters)
    planned = npeff.plan(soft, data, likelihood="probabilities", kind="low_rank", n_components=2)
    assert planned.n_outputs == C
