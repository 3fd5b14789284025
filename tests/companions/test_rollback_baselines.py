"""The methods that rollback is compared with, against autograd and dense algebra."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from npeff.companions import rollback
from npeff.errors import ModelError

SCRIPTS = next(folder for folder in Path(__file__).parents if (folder / "benchmarks").is_dir()) / "benchmarks"
TARGET = np.array([2, 1, 7])


@pytest.fixture(scope="module")
def baselines():
    """The script beside the benchmark."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("rollback_baselines")
    sys.path.remove(str(SCRIPTS))


def fitted(model: rollback.FactorModel) -> tuple[rollback.FactorModel, rollback.Record]:
    rng = np.random.default_rng(0)
    examples = np.stack([rng.integers(9, size=30), rng.integers(3, size=30), rng.integers(9, size=30)], axis=1)
    record = rollback.fit(model, examples, rollback.Recipe(epochs=3, negatives=4), progress=False)
    return model, record


@pytest.fixture(scope="module")
def trained() -> tuple[rollback.FactorModel, rollback.Record]:
    return fitted(rollback.DistMult(9, 3, 4).double())


def test_gradient_products_are_autograds(trained, baselines) -> None:
    model, record = trained
    gradients = []
    for example in (TARGET, *record.examples[:5]):
        loss = -torch.log_softmax(model(example[None]), 1)[0, example[-1]]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.tables.values()))]))
    expected = [float(gradients[0] @ g) for g in gradients[1:]]  # −∇log P(target)·∇L: both are losses here
    found = baselines.GradientProducts(model, record).influence(TARGET, np.arange(5))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_influence_functions_solve_the_dense_system(baselines) -> None:
    model, record = fitted(rollback.ComplEx(9, 3, 3).double())
    method = baselines.InfluenceFunctions(model, record, damping=0.1, tolerance=1e-10)
    tables = list(model.tables)
    shapes = [model.tables[name].shape for name in tables]
    flat = torch.cat([model.tables[name].detach().flatten() for name in tables])

    def scores(vector: torch.Tensor, contexts: np.ndarray) -> torch.Tensor:
        parts = torch.split(vector, [s.numel() for s in shapes])
        E, R = (
            dict(zip(tables, parts, strict=True))[n].view(shapes[tables.index(n)]) for n in ("entities", "relations")
        )
        return model.query([E[contexts[:, 0]].T, R[contexts[:, 1]].T]).T @ E.T

    H = 0.1 * torch.eye(len(flat), dtype=torch.float64)
    gradients = []
    for example in record.examples:
        J = torch.func.jacrev(lambda v: scores(v, example[None])[0])(flat)  # noqa: B023
        p = torch.softmax(scores(flat, example[None])[0], 0)
        H += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / len(record)
        gradients.append(J.T @ (p - torch.eye(len(p), dtype=p.dtype)[example[-1]]))
    expected = torch.stack(gradients) @ torch.linalg.solve(H, gradients[4])
    found = method.influence(record.examples[4], np.arange(len(record)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-8)
    with pytest.raises(ModelError, match=r"conjugate gradients reached .* raise damping"):
        baselines.InfluenceFunctions(model, record, 1e-6, max_iterations=2).influence(record.examples[4])


def test_random_neighbours_are_reproducible(trained, baselines) -> None:
    model, record = trained
    found = [baselines.RandomNeighbours(model, record, seed).explain(TARGET, 5).positions for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
