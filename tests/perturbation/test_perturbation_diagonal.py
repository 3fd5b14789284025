"""Diagonal components: the Fisher-weighted interpolation against numpy, its search, and the data's mean Fisher."""

import numpy as np
import pytest
import torch

import npeff
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, DataError
from npeff.perturbation import interpolation
from npeff.perturbation.outputs import divergence
from perturbation_cases import batches, components_of, deep, fishers_of, flat, same, state

QUICK = {"n_random": 0, "curve": 0, "n_resamples": 0, "progress": False, "top": 6}


@pytest.fixture(scope="module")
def case():
    model, data = deep(), batches(40, 16, classes=2)
    return model, data, components_of(model, data, kind="diagonal"), fishers_of(model, data)


def merged(theta, step, h, f, lam, floor):
    """The published merge, parameter by parameter: λ h against (1 − λ) max(f̄, floor)."""
    h, f = h / np.linalg.norm(h), np.maximum(f / np.linalg.norm(f), floor)
    return (lam * h * (theta + step) + (1 - lam) * f * theta) / (lam * h + (1 - lam) * f)


def gradient(model, data, top):
    """Of the summed −log p(ŷ|x) over examples, by autograd."""
    x = torch.cat([x for x, _ in data])[top]
    loss = -torch.log_softmax(model(x), 1).amax(1).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return np.concatenate([g.numpy().reshape(-1) for g in grads])


def outputs_at(model, data, theta):
    place, weights = 0, {}
    for name, p in model.named_parameters():
        weights[name] = torch.from_numpy(theta[place : place + p.numel()].reshape(p.shape))
        place += p.numel()
    with torch.no_grad():
        return torch.cat([torch.func.functional_call(model, weights, (x,)) for x, _ in data])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lam", [0.1, 0.9])
@pytest.mark.parametrize("given", [True, False])
def test_interpolation_against_the_published_merge(case, sign, lam, given):
    model, data, components, F = case
    f = np.einsum("nmm->nm", F).mean(0)
    h = components.vector(1).astype(np.float64)
    h /= np.linalg.norm(h)
    signs = np.sign(gradient(model, data, components.top_examples(1, 6)))
    theta, delta = flat(model), 0.2
    after = merged(theta, sign * delta * signs, h, f, lam, 1e-3)
    magnitude = np.linalg.norm(after - theta)
    before = state(model)
    effect = npeff.perturb(
        model, data, components, 1, magnitude=magnitude, sign=sign, lam=lam, floor=1e-3, fisher=f if given else None,
        **QUICK,
    )  # fmt: skip
    expected = divergence(outputs_at(model, data, after), outputs_at(model, data, theta), "categorical").numpy()
    np.testing.assert_allclose(effect.kl, expected, rtol=1e-4, atol=1e-12)
    (side,) = effect.sign_results
    assert side.lam == lam and side.step == pytest.approx(delta, rel=1e-5)
    assert same(before, state(model))
    np.testing.assert_allclose(theta + interpolation(h, f, lam, 1e-3) * sign * delta * signs, after, atol=1e-12)


def test_the_pair_that_moves_least_is_kept(case):
    model, data, components, _ = case
    effect = npeff.perturb(model, data, components, 0, target_kl=(0.05, 0.06), **QUICK)
    assert effect.reached and 0.05 <= effect.kl[effect.top].mean() <= 0.06
    effort = {}
    for side in effect.sign_results:
        effort.setdefault(side.lam, []).append(side.magnitude)
    assert sorted(effort) == [0.1, 0.3, 0.5, 0.7, 0.9] and all(len(v) == 2 for v in effort.values())
    (kept,) = [side for side in effect.sign_results if side.kept]
    assert np.mean(effort[kept.lam]) == min(np.mean(v) for v in effort.values())
    assert effect.sign == kept.sign and effect.magnitude == kept.magnitude and effect.kind == "diagonal"


def test_the_positive_sign_makes_predictions_less_certain(case):
    model, data, components, F = case
    found = npeff.perturb(model, data, components, 2, magnitude=1e-3, sign=1, lam=0.5, **QUICK)
    h, f = components.vector(2).astype(np.float64), np.einsum("nmm->nm", F).mean(0)
    top = components.top_examples(2, 6)
    rho = interpolation(h, f, 0.5) * np.sign(gradient(model, data, top))
    moved = flat(model) + 1e-3 * rho / np.linalg.norm(rho)
    certain = [torch.log_softmax(outputs_at(model, data, t), 1)[top].amax(1).mean() for t in (flat(model), moved)]
    assert certain[1] < certain[0] and (found.kl[found.top] > 0).all()


def test_a_strategy_is_the_weighted_sum(case):
    model, data, components, F = case
    W = components.coefficients[:, [0, 3]]
    effect = npeff.perturb(model, data, components, Strategy((0, 3), W.sum(1)), magnitude=0.1, sign=1, lam=0.3, **QUICK)
    mass = W.sum(0) / W.sum()
    h = mass[0] * components.vector(0) + mass[1] * components.vector(3)
    signs = np.sign(gradient(model, data, np.argsort(-W.sum(1), kind="stable")[:6]))
    rho = interpolation(h / np.linalg.norm(h), np.einsum("nmm->nm", F).mean(0), 0.3) * signs
    after = outputs_at(model, data, flat(model) + 0.1 * rho / np.linalg.norm(rho))
    expected = divergence(after, outputs_at(model, data, flat(model)), "categorical").numpy()
    np.testing.assert_allclose(effect.kl, expected, rtol=1e-4, atol=1e-12)
    assert effect.combine == "weighted sum"


def test_interpolation_properties():
    rng = np.random.default_rng(0)
    h, f = rng.random(50) * (rng.random(50) < 0.5), rng.random(50) * (rng.random(50) < 0.5)
    h /= np.linalg.norm(h)
    previous = np.zeros(50)
    for lam in (0.01, 0.2, 0.5, 0.99):
        rho = interpolation(h, f, lam)
        assert (rho >= 0).all() and (rho <= 1).all() and (rho[h == 0] == 0).all()
        assert (rho >= previous).all() and np.allclose(rho, interpolation(h, 7 * f, lam))
        previous = rho
    assert (interpolation(h, f, 0.5)[(h > 1e-3) & (f == 0)] > 0.99).all()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_mean_fisher_against_dense_ones(likelihood):
    model, data = deep(), batches(23, 8, classes=2)
    before = state(model)
    F = fishers_of(model, data, likelihood)
    found = npeff.mean_fisher(model, data, likelihood=likelihood, progress=False)
    joined = np.concatenate([t.numpy().reshape(-1) for t in found.values()])
    np.testing.assert_allclose(joined, np.einsum("nmm->nm", F).mean(0), rtol=1e-5, atol=1e-12)
    assert same(before, state(model))
    some = npeff.mean_fisher(model, data, likelihood=likelihood, parameters="3.*", max_examples=9, progress=False)
    assert list(some) == ["3.weight", "3.bias"]
    expected = np.einsum("nmm->nm", F[:9]).mean(0)[-14:]
    np.testing.assert_allclose(np.concatenate([t.numpy().reshape(-1) for t in some.values()]), expected, rtol=1e-5)


def test_mean_fisher_of_an_embedding_and_of_compute_fishers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    data = [torch.randint(9, (5, 3), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    stored = npeff.compute_fishers(model, data, kind="diagonal", progress=False)
    mean = np.mean([stored.dense(i) for i in range(15)], axis=0)
    found = npeff.mean_fisher(model, data, progress=False)
    joined = np.concatenate([t.numpy().reshape(-1) for t in found.values()])
    np.testing.assert_allclose(joined, mean, rtol=1e-4, atol=1e-9)


def test_what_is_refused(case):
    model, data, components, _ = case
    for fisher, words in (
        (np.ones(3), "expected tensors by name or shape"),
        (-np.ones(62), "finite values ≥ 0"),
        ({"0.weight": torch.ones(6, 5)}, "'0.bias' is missing"),
        ({p.name: torch.ones(1) for p in components.parameters}, "0.weight has shape"),
        ({p.name: "a" for p in components.parameters}, "fisher: expected numbers"),
        ([[1], [2, 3]], "fisher: expected numbers"),
    ):
        with pytest.raises(ArgumentError, match=words):
            npeff.perturb(model, data, components, 0, fisher=fisher, **QUICK)
    for options in (
        {"lam": 1.0}, {"lam": [0.5, "x"]}, {"lam": []}, {"reject": "span"}, {"floor": -1.0}, {"combine": "principal"},
        {"combine": [1.0]},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=next(iter(options))):
            npeff.perturb(model, data, components, 0, **{**QUICK, **options})
    with pytest.raises(DataError, match="it yielded no batches"):
        npeff.mean_fisher(model, [], progress=False)
    with pytest.raises(ArgumentError, match="max_examples"):
        npeff.mean_fisher(model, data, max_examples=0, progress=False)
    with pytest.raises(ArgumentError, match="lam: expected a number between 0 and 1"):
        interpolation(np.ones(3), np.ones(3), 2.0)
    with pytest.raises(ArgumentError, match="expected the same shape"):
        interpolation(np.ones(3), np.ones(4), 0.5)


def test_a_given_fisher_may_be_tensors_of_any_kind(case):
    model, data, components, F = case
    f = np.einsum("nmm->nm", F).mean(0)
    options = {"magnitude": 0.2, "sign": 1, "lam": 0.5, **QUICK}
    expected = npeff.perturb(model, data, components, 0, fisher=np.round(f, 3), **options)
    parts = components.parameters.unflatten(np.round(f, 3))
    learned = {name: torch.from_numpy(part.copy()).requires_grad_() for name, part in parts.items()}
    np.testing.assert_allclose(npeff.perturb(model, data, components, 0, fisher=learned, **options).kl, expected.kl)
    half = {name: torch.from_numpy(part.copy()).bfloat16() for name, part in parts.items()}
    found = npeff.perturb(model, data, components, 0, fisher=half, **options)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=0.1, atol=1e-6)
