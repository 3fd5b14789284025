"""The example of parametric t-SNE: P against scikit-learn's, the divergence against its definition, the fit."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import squareform
from torch import nn

from npeff import demo
from npeff.errors import ArgumentError, DataError, ModelError

SCRIPTS = next(folder for folder in Path(__file__).parents if (folder / "examples").is_dir()) / "examples"


@pytest.fixture(scope="module")
def tsne():
    """The script beside the example."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("parametric_tsne")
    sys.path.remove(str(SCRIPTS))


def blobs(n=90, d=6, seed=0):
    generator = np.random.default_rng(seed)
    return (5 * generator.normal(size=(3, d))[np.arange(n) % 3] + generator.normal(size=(n, d))).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(8, 40),
    share=st.floats(0.1, 0.9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_every_row_has_the_perplexity(tsne, n, share, scale, seed):
    X = scale * torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    perplexity = 1 + share * (n - 3)
    p = tsne.conditional_probabilities(tsne.squared_distances(X), perplexity)
    entropy = -torch.special.xlogy(p, p).sum(1)
    assert torch.allclose(entropy.exp(), torch.tensor(perplexity, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(p.sum(1), torch.ones(n, dtype=torch.float64)) and not p.diagonal().any()


def test_outliers_and_duplicates(tsne):
    X = torch.cat([torch.zeros(20, 2), torch.ones(5, 2), torch.tensor([[1e4, 0.0]])]).double()
    p = tsne.conditional_probabilities(tsne.squared_distances(X), 3.0)
    assert bool(torch.isfinite(p).all()) and torch.allclose(p.sum(1), torch.ones(26, dtype=torch.float64))


def test_joint_probabilities_are_scikit_learns(tsne):
    manifold = pytest.importorskip("sklearn.manifold._t_sne")
    X = torch.from_numpy(blobs())
    ours = tsne.joint_probabilities(X, 12.0)
    distances = tsne.squared_distances(X.double()).numpy().astype(np.float32)
    theirs = squareform(manifold._joint_probabilities(distances, 12.0, 0))
    assert np.abs(ours.numpy() - theirs).max() <= 2e-5 * theirs.max()
    assert math.isclose(float(ours.sum()), 1.0, rel_tol=1e-12) and torch.equal(ours, ours.T)


def test_divergence_is_its_definition(tsne):
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    P = tsne.joint_probabilities(torch.randn(12, 4, generator=generator), 4.0)
    for degrees in (1.0, 2.5):
        q = (1 + torch.cdist(Y, Y) ** 2 / degrees) ** (-(degrees + 1) / 2)
        q.fill_diagonal_(0)
        q = q / q.sum()
        pairs = ~torch.eye(12, dtype=torch.bool)
        assert torch.allclose(tsne.divergence(P, Y, degrees), (P[pairs] * (P[pairs] / q[pairs]).log()).sum())
        assert torch.autograd.gradcheck(lambda Y, d=degrees: tsne.divergence(P, Y, d), Y.clone().requires_grad_())


def test_same_points_do_not_break_the_gradient(tsne):
    Y = torch.zeros(6, 2, requires_grad=True)
    P = tsne.joint_probabilities(torch.from_numpy(blobs(6)), 2.0).float()
    tsne.divergence(P, Y).backward()
    assert bool(torch.isfinite(Y.grad).all())


@pytest.fixture(scope="module")
def fitted(tsne):
    return tsne.ParametricTSNE(perplexity=10, epochs=60, batch_size=90, learning_rate=3e-3).fit(blobs())


def test_neighbours_stay_neighbours(fitted):
    assert fitted.loss_curve_[-1] == fitted.kl_divergence_ < 0.5 * fitted.loss_curve_[0]
    Y, labels = fitted.embedding_, np.arange(90) % 3
    distances = ((Y[:, None] - Y) ** 2).sum(-1) + 1e9 * np.eye(90)
    assert (labels[distances.argmin(1)] == labels).mean() >= 0.95


def test_new_examples(fitted):
    assert np.allclose(fitted.transform(blobs()), fitted.embedding_, atol=1e-5)
    near = fitted.transform(blobs()[:5] + 1e-4)
    assert np.abs(near - fitted.embedding_[:5]).max() < 0.1 * np.ptp(fitted.embedding_)


def test_coordinates_are_explained(fitted):
    X = torch.from_numpy(blobs()[:7])
    linear = fitted.explain(X)
    assert linear.W.shape == (7, 2, 6) and linear.residual() <= 1e-5
    assert np.allclose(linear.output.numpy(), fitted.embedding_[:7], atol=1e-5)
    assert torch.allclose(linear.contributions().sum(-1) + linear.b, linear.output, atol=1e-4)


def test_the_same_seed_gives_the_same_embedding(tsne):
    X = blobs()
    state = torch.random.get_rng_state()
    one, two, other = (
        tsne.ParametricTSNE(perplexity=5, epochs=3, batch_size=30, seed=seed).fit_transform(X) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, two) and not np.allclose(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_network_of_ones_own(tsne):
    images = demo.digits().first(60).inputs
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    fitted = tsne.ParametricTSNE(network, perplexity=5, epochs=2).fit(images)
    assert fitted.network_ is network and not network.training
    assert fitted.explain(images[:3]).contributions().shape == (3, 2, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"perplexity": 0.5}, "perplexity: expected a number ≥ 1, got 0.5"),
        ({"epochs": 0}, "epochs: expected a number ≥ 1"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0"),
        ({"batch_size": "all"}, "batch_size: expected a number ≥ 3, got 'all'"),
        ({"network": 3}, "network: expected a torch.nn.Module, got int"),
    ],
)
def test_options(tsne, arguments, words):
    with pytest.raises(ArgumentError, match=words):
        tsne.ParametricTSNE(**arguments)


def test_bad_data(tsne):
    with pytest.raises(ArgumentError, match="not fitted yet"):
        tsne.ParametricTSNE().transform(blobs())
    with pytest.raises(ArgumentError, match=r"perplexity: expected at most a third of a batch's examples \(30\)"):
        tsne.ParametricTSNE(perplexity=40).fit(blobs())
    with pytest.raises(ArgumentError, match="perplexity: expected 1 ≤ perplexity"):
        tsne.conditional_probabilities(torch.zeros(4, 4), 7)
    for X, words in (
        (np.array(["a", "b"]), "expected numbers"),
        (np.zeros(5), r"got shape \(5,\)"),
        (np.full((90, 3), np.nan), "NaN"),
    ):
        with pytest.raises(DataError, match=words):
            tsne.ParametricTSNE().fit(X)
    with pytest.raises(DataError, match=r"network: expected an embedding \(90, k\), got \(90, 6, 1\)"):
        tsne.ParametricTSNE(nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (6, 1))), perplexity=5).fit(blobs())
    with pytest.raises(ArgumentError, match="network: it has no parameters"):
        tsne.ParametricTSNE(nn.Flatten(), perplexity=5).fit(blobs())
    with pytest.raises(ModelError, match="not piecewise linear"):
        smooth = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2))
        tsne.ParametricTSNE(smooth, epochs=1, perplexity=5).fit(blobs()).explain(blobs())
