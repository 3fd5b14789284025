"""The subspace of the search: an orthonormal basis, the rows in it, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npeff.rows import DenseRows
from npeff.solver.spaces import GramSpace, SparseSpace
from npeff.solver.subspace import find_subspace


@pytest.mark.parametrize("shape", [(700, 3000), (1500, 600)], ids=["wide", "tall"])
@pytest.mark.parametrize("space", [SparseSpace, GramSpace])
@pytest.mark.parametrize("given", [0, 3])
def test_the_basis_is_orthonormal_and_holds_the_rows(shape: tuple[int, int], space: type, given: int) -> None:
    rng = np.random.default_rng(0)
    A = (rng.standard_normal((shape[0], 40)) @ rng.standard_normal((40, shape[1]))).astype(np.float32)
    A += 1e-3 * rng.standard_normal(shape).astype(np.float32)
    anchors = torch.from_numpy(A[:given] / np.linalg.norm(A[:given], axis=1, keepdims=True)) if given else None
    over = space(DenseRows(A), anchors) if space is GramSpace else space(DenseRows(A))
    embedded = None if anchors is None else over.embed(anchors)
    found = find_subspace(over, float(np.square(A).sum()), 8, torch.Generator().manual_seed(0), embedded)
    assert found is not None
    assert found.kept == pytest.approx(1, abs=1e-5)
    d = found.rows.shape[1]
    V = over.vectors(found.lift(torch.eye(d))).double().numpy()
    np.testing.assert_allclose(V @ V.T, np.eye(d), atol=2e-3)
    np.testing.assert_allclose(
        found.rows.numpy(), A.astype(np.float64) @ V.T, atol=2e-3 * np.linalg.norm(A, axis=1).max()
    )
    if given:
        assert anchors is not None and found.given is not None
        np.testing.assert_allclose(found.given.numpy() @ V, anchors.numpy(), atol=2e-3)
