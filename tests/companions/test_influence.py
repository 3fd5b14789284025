"""Influence against closed forms and dense oracles in float64; what must hold for every solver and batch size."""

import copy
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from influence_cases import N, batches, classifier_case, estimator, flat_gradient, margin, regression_case
from npeff.companions.influence import (
    ConjugateGradients,
    CrossLossInfluence,
    Scores,
    cross_entropy,
    squared_error,
)


def oracle(model, train_loss, train, test_loss, test, damping):
    """Scores by definition, example by example, and the Hessian row by row."""
    losses = torch.cat([train_loss(model, batch) for batch in train])
    gradient = flat_gradient(losses.mean(), model)
    hessian = torch.stack([flat_gradient(entry, model) for entry in gradient]).detach()
    hessian += damping * torch.eye(len(hessian), dtype=hessian.dtype)
    left = torch.stack([flat_gradient(loss, model).detach() for loss in losses])
    tests = torch.cat([test_loss(model, batch) for batch in test])
    right = torch.stack([flat_gradient(loss, model).detach() for loss in tests])
    return (-left @ torch.linalg.solve(hessian, right.T)).numpy(), hessian


@pytest.fixture
def regression():
    return regression_case()


@pytest.fixture
def classifier():
    return classifier_case()


# ---- the definition ----------------------------------------------------------------------------------------


def test_least_squares_equals_the_closed_form(regression):
    model, x, y, tx, ty = regression
    scores = CrossLossInfluence(model, squared_error, solver="exact", progress=False).scores(
        batches(x, y), batches(tx, ty, size=2)
    )
    residual, test_residual = (model(x) - y).detach(), (model(tx) - ty).detach()
    closed = -(residual * x) @ torch.linalg.inv(x.T @ x / N) @ (test_residual * tx).T
    np.testing.assert_allclose(scores.values, closed.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.test_values, test_residual.square().numpy()[:, 0] / 2)


def test_removal_is_minus_influence_over_n(regression):
    """Without example i least squares has a closed form too: −I/n is its first order, I/n·(1/(1−h)) all of it."""
    model, x, y, tx, ty = regression
    scores = CrossLossInfluence(
        model, squared_error, lambda m, b: m(b[0])[:, 0], solver="exact", progress=False
    ).scores([(x, y)], [(tx, ty)])
    inverse = torch.linalg.inv(x.T @ x)
    for i in (0, 7, N - 1):
        keep = torch.arange(N) != i
        theta = torch.linalg.lstsq(x[keep], y[keep]).solution
        change = (tx @ theta - model(tx)).detach().numpy()[:, 0]
        leverage = float(x[i] @ inverse @ x[i])
        np.testing.assert_allclose(scores.removal()[i] / (1 - leverage), change, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(scores.removal([i]), scores.removal()[i])


@pytest.mark.parametrize("size", [3, 40])
def test_exact_equals_the_dense_oracle_at_any_batch_size(classifier, size):
    model, _, test, x, y = classifier
    data = batches(x, y, size=size)
    expected, _ = oracle(model, cross_entropy, data, margin, test, 1e-2 + 1e-3)
    scores = estimator(model, solver="exact", damping=1e-3).scores(data, test)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    assert scores.n == 40 and (scores.residuals < 1e-10).all()


# ---- streaming ---------------------------------------------------------------------------------------------


def test_little_memory_gives_the_same_scores_in_groups(classifier):
    model, data, test, _, _ = classifier
    options = {"solver": ConjugateGradients(tolerance=1e-10), "damping": 1.0}
    whole = estimator(model, **options).scores(data, test)
    pieces = estimator(model, memory=20_000, **options).scores(data, test)
    np.testing.assert_allclose(pieces.values, whole.values, rtol=1e-6, atol=1e-8)


def test_float32_is_near_float64(classifier):
    model, data, test, _, _ = classifier
    expected = estimator(model, damping=0.1).scores(data, test).values
    single = copy.deepcopy(model).float()
    as_float = lambda some: [(x.float(), y) for x, y in some]  # noqa: E731
    found = estimator(single, damping=0.1).scores(as_float(data), as_float(test)).values
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("suffix", [".h5", ".csv"])
def test_scores_reach_the_disk(classifier, tmp_path, suffix):
    model, data, test, _, _ = classifier
    path = tmp_path / f"scores{suffix}"
    expected = estimator(model, solver="exact").scores(data, test)
    found = estimator(model, solver="exact").scores(data, test, out=path)
    np.testing.assert_allclose(found.values, expected.values)
    if suffix == ".h5":
        opened = Scores.load(path)
        np.testing.assert_array_equal(opened.values, found.values)
        assert opened.provenance["solver"] == "exact" and opened.n == 40
        np.testing.assert_array_equal(opened.top(3), expected.top(3))
        again = opened.save(tmp_path / "again.h5")
        np.testing.assert_array_equal(Scores.load(again).values, found.values)
    else:
        np.testing.assert_array_equal(np.loadtxt(path, delimiter=",", skiprows=1)[:, 1:], found.values)


def test_a_function_of_the_whole_batch_is_one_column(classifier):
    model, data, test, _, _ = classifier
    total = lambda model, batch: margin(model, batch).sum()  # noqa: E731
    each = estimator(model, solver="exact").scores(data, test).values
    whole = estimator(model, test_loss=total, solver="exact").scores(data, test)
    sizes = np.cumsum([0, *(len(batch[1]) for batch in test)])
    grouped = np.stack([each[:, a:b].sum(1) for a, b in pairwise(sizes)], 1)
    np.testing.assert_allclose(whole.values, grouped, rtol=1e-8, atol=1e-12)


def test_fit_on_a_sample_then_score_all(classifier):
    model, data, test, x, y = classifier
    fitted = estimator(model, solver="exact", damping=0.1, max_gradient=9.0).fit([(x[:20], y[:20])])
    scores = fitted.scores(data, test)
    assert scores.values.shape == (40, 6) and scores.n == 40, (
        "one of 40 examples is left out, not one of the sample's 20"
    )
    assert fitted.scores([(x[:5], y[:5])], test).n == 20
    np.testing.assert_allclose(scores.removal(), -scores.values / 40)
    np.testing.assert_allclose(scores.group([1, 2]), scores.values[[1, 2]].sum(0))


def test_the_model_is_left_as_it_was(classifier):
    model, data, test, _, _ = classifier
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    estimator(model, solver="ekfac", damping=0.1).scores(data, test)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    model[0].bias.requires_grad_(True)


def test_top_orders_and_signs():
    values = np.array([[1.0, -2.0], [-3.0, 0.5], [0.0, 0.0], [2.0, 2.0]])
    scores = Scores(values, np.zeros(2), np.zeros(2), n=4)
    assert scores.top(9, test=0).tolist() == [1, 3, 0]
    assert scores.top(9, test=0, direction="raises").tolist() == [3, 0]
    assert scores.top(9, direction="lowers").tolist() == [1, 0]
    assert scores.top(1, test=-1).tolist() == [0]
    assert scores.group([0, 1]).tolist() == [-2.0, -1.5]
    assert scores.group([]).tolist() == [0.0, 0.0]
    assert np.asarray(scores).shape == (4, 2) and len(scores) == 4


def test_a_converged_model_gives_no_warning(classifier):
    model, data, _, _, _ = classifier
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimator(model).fit(data)
    assert found.relative_gradient_norm < 1e-6
