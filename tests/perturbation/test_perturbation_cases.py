"""Small models with components whose Fishers are known exactly, for the tests of perturbation and trace."""

from __future__ import annotations

import numpy as np

from perturbation_cases import batches, components_of, fishers_of, linear


def test_the_models_are_small_and_the_fishers_symmetric():
    data = batches(7, 4)
    F = fishers_of(linear(), data)
    assert F.shape == (7, 18, 18)
    np.testing.assert_allclose(F, F.transpose(0, 2, 1), atol=1e-12)
    assert len(components_of(linear(), data)) == 4
