"""The numbers of a small decomposition of real digits, as they were when this test was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import npeff

STORED = Path(__file__).parent / "data" / "digits_components.npz"


def digits_components(kind: str) -> npeff.Components:
    """Components of 96 digits under a small network with fixed random weights."""
    images = torch.from_numpy(load_digits().data[:96].astype(np.float32) / 16)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    fishers = npeff.compute_fishers(model.eval(), images.split(32), kind=kind, progress=False)  # type: ignore[arg-type]
    return npeff.decompose(
        fishers, 6, seed=3, n_init=2, n_replacements=6, patience=4, max_iterations=150, progress=False
    )


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_components_of_digits_are_as_stored(kind: str) -> None:
    found = digits_components(kind)
    with np.load(STORED) as stored:
        assert found.loss == pytest.approx(float(stored[f"{kind}_loss"]), rel=1e-3)
        vectors = np.stack([found.vector(j) for j in range(found.n_components)])
        cosines = np.abs(np.sum(vectors * stored[f"{kind}_vectors"], axis=1))
        assert (cosines >= 0.999).all(), cosines
        np.testing.assert_allclose(found.coefficients, stored[f"{kind}_coefficients"], atol=0.01)
