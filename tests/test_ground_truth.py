"""Ground truth, small: measures against hand-made cases, and components against routes that are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "ground_truth"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmark scripts, importable."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def test_auc_is_the_area_under_the_roc_curve() -> None:
    from measures import auc

    rng = np.random.default_rng(0)
    label, score = rng.random(200) < 0.3, rng.integers(0, 9, 200)  # with ties
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
    assert auc(np.zeros(5, bool), np.arange(5)) == 0.5


def test_purity_and_coverage_of_hand_made_scores() -> None:
    from measures import best_auc, coverage, purity

    factor = np.repeat([0, 1], 30)
    mixed = np.tile([0.5, 0.4], 30)
    values = np.stack([np.where(factor == 0, 1.0, 0), np.where(factor == 1, 2.0, 0), mixed * 0.1], 1)
    np.testing.assert_allclose(purity(values, factor)[:2], 1)
    assert coverage(values, factor) == 1
    assert best_auc(values, factor) == 1
    blind = np.ones((60, 1)) + np.tile([0, 1], 30)[:, None]
    assert purity(blind, factor)[0] < 1
    assert coverage(blind, factor) == 0
    assert np.isnan(purity(np.zeros((60, 1)), factor)[0])  # an unused component has no top examples


def test_groups_join_parallel_vectors_and_their_number_is_stable() -> None:
    from measures import Scores, groups_of, stable_number

    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.normal(size=(12, 3)))[0].T
    vectors = np.repeat(axes, 4, 0) + 0.05 * rng.normal(size=(12, 12))
    groups = groups_of(vectors, 3)
    assert [len(set(groups[4 * i : 4 * i + 4])) for i in range(3)] == [1, 1, 1]
    owner = rng.integers(3, size=90)
    fits = []
    for _ in range(3):
        values = (owner[:, None] == np.repeat(np.arange(3), 4)) * rng.random((90, 12))
        fits.append(Scores(values, vectors + 0.02 * rng.normal(size=vectors.shape)))
    assert stable_number(fits, most=6) == 3


def test_components_keep_to_one_route() -> None:
    from measures import best_auc, groups_of, purity
    from methods import Subject, npeff_methods
    from routes import context, trained

    net, generator = trained("context", seed=0, epochs=8, examples=40_000)
    x, _, route = context(600, generator)
    subject = Subject(net, x, {})
    scores = npeff_methods(subject, 16, npeff={"starts": 2, "moves": 10})["npeff"](np.arange(600), 0)
    route = route.numpy()
    assert purity(scores.values, route).mean() > 0.95
    grouped = scores.grouped(groups_of(scores.vectors, 2))
    assert best_auc(grouped, route) > 0.85
    assert best_auc(subject.logits().softmax(1).numpy(), route) < 0.75  # the prediction does not tell


def test_baselines_score_every_example(monkeypatch) -> None:
    import methods
    from methods import Subject, baselines
    from routes import context, trained

    monkeypatch.setattr(methods, "AUTOENCODER_STEPS", 20)
    net, generator = trained("context", seed=0, epochs=1, examples=2000)
    x, _, _ = context(120, generator)
    subject = Subject(net, x, {"layer 1": net[1]})
    before = [p.clone() for p in net.parameters()]
    for name, fit in baselines(subject, 4).items():
        scores = fit(np.arange(0, 120, 2), 0)
        assert scores.values.shape[0] == 120, name
        assert scores.values.shape[1] == len(scores.vectors), name
        assert np.isfinite(scores.values).all(), name
    assert all((a == b).all() for a, b in zip(before, net.parameters(), strict=True))


def test_reviews_model_ignores_padding() -> None:
    import torch

    from reviews import ReviewModel

    torch.manual_seed(0)
    model = ReviewModel().eval()
    tokens = torch.zeros(2, 40, dtype=torch.long)
    tokens[:, :5] = torch.tensor([4, 9, 2, 7, 5])
    with torch.no_grad():
        logits = model(tokens)
        model.words.weight[0] = 3.0  # the padding's embedding
        torch.testing.assert_close(model(tokens), logits)
