"""The cotangents S: S Sᵀ is the output's Fisher, also where probabilities are extreme."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.errors import ArgumentError, DataError
from npeff.fishers.factors import DENSE_CLASSES, factorise
from npeff.fishers.options import FisherOptions
from oracles import output_fisher

IDS = np.arange(100)


def square(logits: torch.Tensor, **options: object) -> np.ndarray:
    made = FisherOptions(**options)
    made.check()
    factors = factorise(logits, made, None, IDS[: len(logits)])
    s = (factors.columns * factors.scale[:, None, None]).numpy()
    return s @ s.transpose(0, 2, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 4),
    st.sampled_from(["reduced", "class"]),
    st.sampled_from([0.1, 1.0, 20.0, 300.0]),
    st.integers(0, 99),
)
def test_categorical_factors_are_exact(n_classes: int, n: int, basis: str, spread: float, seed: int) -> None:
    logits = spread * torch.randn(n, n_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got, exact = square(logits, basis=basis), output_fisher(logits.numpy())
    for mine, wanted in zip(got, exact, strict=True):
        # The oracle cancels 1 − p where p is nearly one: hence the absolute term.
        assert np.linalg.norm(mine - wanted) <= 1e-10 * np.linalg.norm(wanted) + 1e-15


@pytest.mark.parametrize("basis", ["reduced", "class"])
@pytest.mark.parametrize("gap", [40.0, 200.0, 700.0])
def test_confident_examples_keep_their_tail(basis: str, gap: float) -> None:
    logits = torch.tensor([[gap, 0.0, 0.0], [0.0, gap, 1.0]], dtype=torch.float64)
    factors = factorise(logits, FisherOptions(basis=basis), None, IDS[:2])
    np.testing.assert_allclose(factors.columns.square().sum(dim=(1, 2)), 1.0)
    # trace = Σ p(1−p) ≈ 2 · (tail probability)
    tail = np.array([2.0, 1 + np.e]) * 2
    np.testing.assert_allclose(np.log(factors.scale.numpy()) * 2, np.log(tail) - gap, rtol=1e-6)


def test_reduced_basis_counts_order_and_binary_case() -> None:
    logits = torch.tensor([[0.3, -0.4]])
    factors = factorise(logits, FisherOptions(), None, IDS[:1])
    assert factors.columns.shape == (1, 2, 1)
    p = torch.softmax(logits.double(), 1)[0, 0]
    np.testing.assert_allclose(
        factors.columns[0, :, 0] * factors.scale[0],
        torch.sqrt(p * (1 - p)) * torch.tensor([1.0, -1.0]).double(),
    )
    three = factorise(torch.tensor([[2.0, 1.0, 0.0]]), FisherOptions(), None, IDS[:1]).columns[0]
    assert three.shape == (3, 2)
    assert three[:, 0].norm() > three[:, 1].norm()
    assert abs(float(three[:, 0] @ three[:, 1])) < 1e-12
    assert all(three[three[:, j].abs().argmax(), j] > 0 for j in range(2))


def test_rank_and_energy_truncate() -> None:
    logits = torch.tensor([[0.0] * 6, [9.0, 4.0, 0, 0, 0, 0]])
    kept = factorise(logits, FisherOptions(rank=2), None, IDS[:2])
    assert kept.columns.shape == (2, 6, 2)
    whole = factorise(logits, FisherOptions(), None, IDS[:2])
    eigenvalues = (whole.columns * whole.scale[:, None, None]).square().sum(dim=1)
    for share in (0.2, 0.5, 0.9, 1.0):
        some = factorise(logits, FisherOptions(energy=share), None, IDS[:2])
        for i in range(2):
            cumulative = eigenvalues[i].cumsum(0) / eigenvalues[i].sum()
            assert int(some.counts[i]) == int((cumulative < share - 1e-12).sum()) + 1
            assert not some.columns[i, :, int(some.counts[i]) :].any()
    assert int(factorise(logits, FisherOptions(energy=0.9), None, IDS[:2]).counts.min()) == 1


@pytest.mark.parametrize("n_classes", [65, 300, 1000])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 0.1, 3.0, 30.0, 300.0])
def test_many_classes_have_the_leading_eigenvectors(n_classes: int, spread: float) -> None:
    """The secular equation against the dense eigendecomposition: equal and nearly equal probabilities included."""
    logits = spread * torch.randn(3, n_classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[0, 7:12] = logits[0, 3]  # ties
    factors = factorise(logits, FisherOptions(rank=9), None, IDS[:3])
    for i, exact in enumerate(output_fisher(logits.numpy())):
        s = (factors.columns[i] * factors.scale[i]).numpy()
        eigenvalues = np.linalg.eigvalsh(exact)[::-1][:9].clip(0)
        np.testing.assert_allclose(np.square(s).sum(0), eigenvalues, rtol=1e-9, atol=1e-14 * eigenvalues[0] + 1e-16)
        gram = s.T @ s
        scale = max(eigenvalues[0], 1e-300)
        assert np.abs(gram - np.diag(np.diag(gram))).max() <= 1e-10 * scale
        assert np.abs(exact @ s - s * np.square(s).sum(0)).max() <= 1e-10 * scale**1.5 + 1e-18


def test_more_columns_than_classes_with_a_probability() -> None:
    """A masked vocabulary: of the columns asked for, some are zero, and the others are not touched by that."""
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits[0, 10:], logits[1, ::3] = -1e9, -1e9
    for i, exact in enumerate(output_fisher(logits.numpy())):
        factors = factorise(logits[i : i + 1], FisherOptions(rank=20), None, IDS[:1])
        s = (factors.columns[0] * factors.scale[0]).numpy()
        eigenvalues = np.linalg.eigvalsh(exact)[::-1][:20].clip(0)
        np.testing.assert_allclose(np.square(s).sum(0), eigenvalues, rtol=1e-9, atol=1e-15)
        assert np.abs(exact @ s - s * np.square(s).sum(0)).max() <= 1e-12


def test_many_classes_truncate_by_energy() -> None:
    logits = 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for share in (0.3, 0.7, 0.95):
        factors = factorise(logits, FisherOptions(energy=share), None, IDS[:4])
        for i, exact in enumerate(output_fisher(logits.numpy())):
            kept = np.linalg.eigvalsh(exact)[::-1].cumsum() / np.trace(exact)
            assert int(factors.counts[i]) == int((kept < share - 1e-12).sum()) + 1
            s = (factors.columns[i] * factors.scale[i]).numpy()
            np.testing.assert_allclose(np.square(s).sum(), kept[int(factors.counts[i]) - 1] * np.trace(exact))


@pytest.mark.parametrize("basis", ["reduced", "class"])
def test_a_vocabulary_has_to_be_truncated(basis: str) -> None:
    logits = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ArgumentError, match="rank=" if basis == "reduced" else "max_classes="):
        factorise(logits, FisherOptions(basis=basis), None, IDS[:2])
    options = FisherOptions(basis=basis, **({"rank": 3} if basis == "reduced" else {"max_classes": 3}))
    assert factorise(logits, options, None, IDS[:2]).columns.shape == (2, 50_000, 3)


def test_class_basis_is_the_published_form_in_published_order() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.4, 0.4], [0.98, 0.01, 0.01]], dtype=torch.float64))
    p = logits.exp()
    natural = factorise(logits, FisherOptions(basis="class"), None, IDS[:3])
    literal = p.sqrt()[:, None, :] * (torch.eye(3) - p[:, :, None])
    np.testing.assert_allclose(natural.columns * natural.scale[:, None, None], literal, atol=1e-12)
    some = factorise(logits, FisherOptions(basis="class", min_prob=0.15, max_classes=2), None, IDS[:3])
    assert some.counts.tolist() == [2, 2, 1]
    got = some.columns * some.scale[:, None, None]
    for i, order in enumerate([[1, 2], [1, 2], [0]]):
        np.testing.assert_allclose(got[i, :, : len(order)], literal[i][:, order], atol=1e-12)
    only = factorise(torch.zeros(1, 4), FisherOptions(basis="class", min_prob=0.9), None, IDS[:1])
    assert only.counts.tolist() == [1]  # never none at all


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods(likelihood: str) -> None:
    logits = torch.tensor([[0.5, -2.0], [8.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(
        square(logits, likelihood=likelihood), output_fisher(logits.numpy(), likelihood), atol=1e-12
    )


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_sampled_labels_are_unbiased_and_depend_on_seed_and_id_alone(likelihood: str) -> None:
    logits = torch.tensor([[0.5, -1.0, 0.2], [2.0, 0.0, 0.0]], dtype=torch.float64)
    options = FisherOptions(labels="sampled", n_samples=40_000, likelihood=likelihood, seed=3)
    factors = factorise(logits, options, None, IDS[5:7])
    s = (factors.columns * factors.scale[:, None, None]).numpy()
    np.testing.assert_allclose(s @ s.transpose(0, 2, 1), output_fisher(logits.numpy(), likelihood), atol=0.03)
    alone = factorise(logits[1:], options, None, IDS[6:7])
    torch.testing.assert_close(alone.columns[0], factors.columns[1])
    other = factorise(
        logits[1:],
        FisherOptions(labels="sampled", n_samples=40_000, likelihood=likelihood, seed=4),
        None,
        IDS[6:7],
    )
    assert not torch.equal(other.columns, alone.columns)


def test_true_labels() -> None:
    logits = torch.tensor([[0.5, -1.0, 0.2], [2.0, 0.0, 0.0]], dtype=torch.float64)
    factors = factorise(logits, FisherOptions(labels="true"), torch.tensor([2, 0]), IDS[:2])
    wanted = torch.eye(3)[[2, 0]] - torch.softmax(logits, 1)
    np.testing.assert_allclose(factors.columns[:, :, 0] * factors.scale[:, None], wanted, atol=1e-12)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    regression = factorise(logits, FisherOptions(labels="true", likelihood="gaussian"), targets, IDS[:2])
    np.testing.assert_allclose(regression.columns[:, :, 0] * regression.scale[:, None], targets - logits, atol=1e-12)
    with pytest.raises(DataError, match="labels"):
        factorise(logits, FisherOptions(labels="true"), None, IDS[:2])
    with pytest.raises(DataError, match="example 41 has label 3"):
        factorise(logits, FisherOptions(labels="true"), torch.tensor([0, 3]), IDS[40:42])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"basis": "eigen"}, "basis"),
        ({"labels": "given"}, "labels"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"energy": 1.5}, "energy"),
        ({"energy": "0.9"}, "energy"),
        ({"min_prob": 0.1}, "min_prob"),
        ({"basis": "class", "rank": 2}, "rank"),
        ({"likelihood": "gaussian", "rank": 2}, "rank"),
        ({"n_samples": 3}, "n_samples"),
        ({"labels": "sampled", "n_samples": 0}, "n_samples"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        FisherOptions(**options).check()


def test_one_logit_needs_another_likelihood() -> None:
    with pytest.raises(ArgumentError, match="bernoulli"):
        factorise(torch.zeros(2, 1), FisherOptions(), None, IDS[:2])


@pytest.mark.parametrize("n_classes", [2, 5, DENSE_CLASSES + 1])
@pytest.mark.parametrize("options", [{"basis": "class"}, {}, {"rank": 1}, {"energy": 0.9}])
def test_probabilities_too_small_for_a_float64_of_full_precision(n_classes: int, options: dict[str, Any]) -> None:
    for gap in np.linspace(690, 750, 61):  # 1 − p goes through the subnormal numbers to 0
        logits = torch.zeros(1, n_classes, dtype=torch.float64)
        logits[0, 1] = gap
        found = factorise(logits, FisherOptions(**options), None, np.arange(1))
        assert bool(torch.isfinite(found.columns).all()) and 0 <= float(found.scale) < 1e-140
