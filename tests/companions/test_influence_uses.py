"""What influence is for: clustering against retraining, components, word association, unlearning."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import npeff
from deep_clustering import deep_embedded_clustering, kl_loss, nll_loss, target_distribution
from npeff.companions.influence import (
    Coefficient,
    CrossLossInfluence,
    component_influence,
    cross_entropy,
    squared_error,
    unlearn,
)
from npeff.errors import ArgumentError, DataError
from retraining import leave_out, minimise
from word_vectors import SkipGram, sentences, skip_gram_loss, weat, weat_effect

# ---- retraining --------------------------------------------------------------------------------------------


def iris_clustering():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn for its iris data")
    torch.manual_seed(0)
    x, y = datasets.load_iris(return_X_y=True)
    x, y = torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(y)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    train, test = order[:110], order[110:]
    encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    decoder = nn.Linear(2, 4).double()
    model, targets = deep_embedded_clustering(
        encoder, decoder, x[train], 3, 2, weight_decay=1e-3, pretraining=60, rounds=3
    )
    votes = [torch.bincount(model(x[train][y[train] == c]).argmax(1), minlength=3).argmax() for c in range(3)]
    return model, [(x[train], targets)], [(x[test], torch.stack(votes)[y[test]])]


def test_iris_clustering_against_retraining():
    """KL trained, NLL asked about: −I/n ranks what leaving an example out does; gradient products do not."""
    model, train, test = iris_clustering()
    which = list(range(0, 110, 8))
    options = {"weight_decay": 1e-3, "progress": False}
    truth = leave_out(model, kl_loss, train, which, nll_loss, test, **options)
    assert truth.gradient_norms.max() < 1e-7
    rho = {}
    for solver in ("exact", "identity"):
        scores = CrossLossInfluence(model, kl_loss, nll_loss, solver=solver, damping=1e-6, **options).scores(
            train, test
        )
        predicted = scores.removal()[which]
        rho[solver] = np.mean([spearmanr(predicted[:, j], truth.changes[:, j]).statistic for j in range(40)])
    assert rho["exact"] >= 0.95
    assert rho["exact"] >= rho["identity"] + 0.3


def test_leaving_out_least_squares_is_exact_and_restores_the_model():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    assert minimise(model, squared_error, [(x[:8], y[:8]), (x[8:], y[8:])], tolerance=1e-10).gradient_norm < 1e-10
    before = copy.deepcopy(model.state_dict())
    found = leave_out(
        model, squared_error, [(x, y)], [3, [0, 5]], squared_error, [(x, y)], tolerance=1e-10, progress=False
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    full = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1)
    for row, group in enumerate(([3], [0, 5])):
        keep = [i for i in range(20) if i not in group]
        theta = torch.linalg.lstsq(full[keep], y[keep]).solution
        losses = (full @ theta - y).square()[:, 0] / 2
        np.testing.assert_allclose(found.changes[row], losses.numpy() - found.before, atol=1e-9)


def test_targets_sharpen_assignments():
    q = torch.softmax(torch.randn(30, 3, dtype=torch.float64), 1)
    p = target_distribution(q)
    torch.testing.assert_close(p.sum(1), torch.ones(30, dtype=torch.float64))
    assert (p.amax(1) >= q.amax(1)).float().mean() > 0.7


# ---- components --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_data():
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    minimise(model, cross_entropy, [(x, y)], weight_decay=1e-2, tolerance=1e-9)
    return model, [(x[:16], y[:16]), (x[16:], y[16:])], x, y


@pytest.fixture(scope="module", params=["low_rank", "diagonal"])
def decomposed(request, model_and_data):
    model, data, x, y = model_and_data
    fishers = npeff.compute_fishers(model, data, kind=request.param, progress=False)
    components = npeff.decompose(fishers, 4, n_init=1, n_replacements=0, progress=False)
    return model, data, x, y, components


def test_the_function_is_the_coefficient(decomposed):
    """Of exact Fishers its value is what encode() finds, and its gradient is the difference quotient's."""
    model, data, x, y, components = decomposed
    encoded = components.encode(npeff.compute_fishers(model, data, kind=components.kind, progress=False))
    for j in range(components.n_components):
        values = Coefficient(components, j)(model, (x, y))
        np.testing.assert_allclose(values.detach().numpy(), encoded.coefficients[:, j], atol=2e-5)
    j = int(encoded.coefficients.sum(0).argmax())
    best = int(encoded.coefficients[:, j].argmax())
    function, one = Coefficient(components, j), (x[best : best + 1], y[best : best + 1])
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(function(model, one)[0], parameters)
    moves = [torch.randn_like(p) for p in parameters]
    step, ends = 1e-5, []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, move in zip(moved.parameters(), moves, strict=True):
                p += sign * step * move
        ends.append(float(function(moved, one).detach()))
    expected = (ends[0] - ends[1]) / (2 * step)
    found = float(sum((g * move).sum() for g, move in zip(gradient, moves, strict=True)))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_influence_on_a_component_is_the_derivative_of_retraining(decomposed):
    """A little less weight on z, trained again: each coefficient moves by −weight·I/n."""
    model, data, x, y, components = decomposed
    j = int(components.coefficients.sum(0).argmax())
    estimator = CrossLossInfluence(model, cross_entropy, solver="exact", weight_decay=1e-2, progress=False)
    found = component_influence(estimator, components, j, data, data, k=3)
    np.testing.assert_allclose(found.scores.test_values, found.coefficients, atol=2e-5)
    assert set(found.made_by(30).tolist()) == set(np.flatnonzero(found.scores.values.sum(1) > 0).tolist())
    function = Coefficient(components, j)
    weighted = lambda model, batch: batch[2] * cross_entropy(model, batch[:2])  # noqa: E731
    less = 1e-3
    for z in (*found.made_by(2).tolist(), 5):
        weights = torch.ones(30, dtype=torch.float64)
        weights[z] -= less
        again = copy.deepcopy(model)
        minimise(again, weighted, [(x, y, weights)], weight_decay=1e-2, tolerance=1e-12)
        changed = function(again, (x[found.examples], y[found.examples])).detach().numpy() - found.scores.test_values
        expected = less * found.scores.removal()[z]
        np.testing.assert_allclose(changed, expected, atol=0.02 * np.abs(expected).max() + 1e-10)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("compress", [npeff.GramOnly(), npeff.Sketch(256)])
def test_vectors_are_recovered_where_they_are_needed(model_and_data, compress):
    """Of inner products alone, or of sketches, influence recovers every component's vector."""
    model, data, _, _ = model_and_data
    fishers = npeff.compute_fishers(model, data, compress=compress, progress=False)
    components = npeff.decompose(fishers, 4, n_init=1, n_replacements=0, progress=False)
    with pytest.raises(ArgumentError, match="the vector in parameter space is not known"):
        Coefficient(components, 0)
    estimator = CrossLossInfluence(model, cross_entropy, solver="exact", weight_decay=1e-2, progress=False)
    j = int(components.coefficients.sum(0).argmax())
    found = component_influence(estimator, components, j, data, data, k=2)
    assert components.not_recovered == []
    # a sketch's coefficients are those of approximate inner products
    tolerance = 2e-5 if isinstance(compress, npeff.GramOnly) else 0.3
    np.testing.assert_allclose(found.scores.test_values, found.coefficients, atol=tolerance)


def test_a_fitted_estimator_serves_several_components(decomposed):
    model, data, _, _, components = decomposed
    estimator = CrossLossInfluence(model, cross_entropy, solver="exact", weight_decay=1e-2, progress=False)
    fitted = copy.copy(estimator).fit(data)
    for j in range(2):
        again = component_influence(fitted, components, j, data, data, k=2)
        alone = component_influence(estimator, components, j, data, data, k=2)
        np.testing.assert_allclose(again.scores.values, alone.scores.values, rtol=1e-9, atol=1e-15)


# ---- words -------------------------------------------------------------------------------------------------


def test_weat_by_hand():
    vectors = {
        "rose": [1, 0.1],
        "lily": [0.9, -0.1],
        "wasp": [0.1, 1],
        "ant": [-0.1, 0.9],
        "good": [1, 0],
        "bad": [0, 1],
    }
    found = weat(vectors, (["rose", "lily"], ["wasp", "ant"]), (["good"], ["bad"]))
    unit = {word: np.array(v) / np.linalg.norm(v) for word, v in vectors.items()}
    s = np.array([unit[w] @ unit["good"] - unit[w] @ unit["bad"] for w in ("rose", "lily", "wasp", "ant")])
    assert found.effect_size == pytest.approx((s[:2].mean() - s[2:].mean()) / s.std(ddof=1))
    np.testing.assert_allclose(found.associations, s)
    assert found.exact and found.p_value == pytest.approx(1 / 6)
    turned = weat(vectors, (["wasp", "ant"], ["rose", "lily"]), (["good"], ["bad"]))
    assert turned.effect_size == pytest.approx(-found.effect_size) and turned.p_value == 1.0
    rows = torch.tensor(list(vectors.values()), dtype=torch.float64)
    differentiable = weat_effect(rows, *(torch.tensor(t) for t in ([0, 1], [2, 3], [4], [5])))
    assert float(differentiable) == pytest.approx(found.effect_size)


def test_weat_samples_where_partitions_are_many_and_random_vectors_are_not_significant():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(40, 8))
    found = [
        weat(table, (range(10), range(10, 20)), (range(20, 30), range(30, 40)), permutations=500, seed=s)
        for s in (0, 1)
    ]
    assert not found[0].exact and abs(found[0].p_value - found[1].p_value) < 0.1
    assert 0 < found[0].p_value < 1 and found[0].effect_size == found[1].effect_size


def test_counted_pairs_are_the_same_objective():
    """Mean over words of the counted loss = mean over sentences, with its gradient, and without some sentences."""
    rng = np.random.default_rng(1)
    texts = [[f"w{i}" for i in rng.choice(9, int(rng.integers(3, 7)))] for _ in range(12)]
    data = sentences(texts, min_count=1, window=2, negatives=2, batch_size=5)
    torch.manual_seed(0)
    model = SkipGram(len(data.vocabulary), 3).double()
    parameters = list(model.parameters())
    for without in ([], [0, 7]):
        kept = np.delete(np.arange(12), without)
        plain = torch.cat([skip_gram_loss(model, batch) for batch in data])[kept].sum() / 12
        (batch,) = data.counted(without)
        counted = skip_gram_loss(model, batch).mean()
        torch.testing.assert_close(counted, plain, rtol=1e-6, atol=0)
        pair = (torch.autograd.grad(value, parameters) for value in (counted, plain))
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)
    with pytest.raises(DataError, match="without: expected sentences 0 … 11, got"):
        data.counted([12])


def test_unlearning_moves_weat_the_way_influence_predicts():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(14)]
    texts = [[words[i] for i in rng.choice(14, 5, replace=False)] for _ in range(25)]
    texts += [["w0", "w8", "w1", "w8"], ["w2", "w9", "w3", "w9"]] * 3  # the association
    data = sentences(texts, min_count=1, window=2, negatives=2)
    torch.manual_seed(0)
    model = SkipGram(len(data.vocabulary), 3).double()
    found = minimise(model, skip_gram_loss, data, weight_decay=2e-2, tolerance=1e-8)
    assert found.gradient_norm < 1e-7
    rows = [torch.tensor([data.vocabulary[w] for w in group]) for group in (["w0", "w1"], ["w2", "w3"], ["w8"], ["w9"])]
    effect = lambda model, _: weat_effect(model.words.weight, *rows)  # noqa: E731
    influence = CrossLossInfluence(
        model, skip_gram_loss, effect, solver="exact", damping=1e-5, weight_decay=2e-2, progress=False
    )
    scores = influence.scores(data, [(torch.zeros(1),)])
    harmful = scores.top(4, direction="raises")
    truth = leave_out(
        model,
        skip_gram_loss,
        data,
        range(0, len(data.texts), 3),
        effect,
        [(torch.zeros(1),)],
        weight_decay=2e-2,
        progress=False,
    )
    assert spearmanr(scores.removal()[::3, 0], truth.changes[:, 0]).statistic > 0.8
    measure = lambda model: float(weat_effect(model.words.weight.detach(), *rows))  # noqa: E731
    before = copy.deepcopy(model.state_dict())
    forgot = unlearn(model, skip_gram_loss, data.take(harmful), None, measure, learning_rate=0.05, steps=5)
    assert forgot.after < forgot.before == pytest.approx(float(scores.test_values[0]))
    assert forgot.harmful_loss[1] > forgot.harmful_loss[0] and len(forgot.history) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    helpful = unlearn(model, skip_gram_loss, None, data.take(harmful), measure, learning_rate=0.05, steps=1)
    assert helpful.helpful_loss[1] < helpful.helpful_loss[0]
