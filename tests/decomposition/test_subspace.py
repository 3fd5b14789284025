"""The subspace of the search: an orthonormal basis, the rows in it, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import npeff
from npeff.decomposition.spaces import GramSpace, RowSpace
from npeff.decomposition.subspace import find_subspace, widen
from npeff.fishers.rows import DenseRows
from planted import planted


@pytest.mark.parametrize("shape", [(700, 3000), (1500, 600)], ids=["wide", "tall"])
@pytest.mark.parametrize("space", [RowSpace, GramSpace])
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
    V = over.vectors(found.to_full_space(torch.eye(d))).double().numpy()
    np.testing.assert_allclose(V @ V.T, np.eye(d), atol=2e-3)
    np.testing.assert_allclose(
        found.rows.numpy(), A.astype(np.float64) @ V.T, atol=2e-3 * np.linalg.norm(A, axis=1).max()
    )
    if given:
        assert anchors is not None and found.given is not None
        np.testing.assert_allclose(found.given.numpy() @ V, anchors.numpy(), atol=2e-3)


@pytest.mark.parametrize("space", [RowSpace, GramSpace])
def test_a_widened_subspace_holds_the_vectors_as_well(space: type) -> None:
    rng = np.random.default_rng(1)
    A = (rng.standard_normal((600, 60)) @ rng.standard_normal((60, 900)) / 8).astype(np.float32)
    A += 0.1 * rng.standard_normal(A.shape).astype(np.float32)
    over = space(DenseRows(A))
    found = find_subspace(over, float(np.square(A).sum()), 8, torch.Generator().manual_seed(0))
    assert found is not None
    coords = over.random(5, torch.Generator().manual_seed(1))
    coords /= over.inner(coords, coords, over.project(coords)).diagonal().sqrt()[:, None]
    wider = widen(over, found, coords, over.project(coords))
    assert wider is not None
    subspace, inside = wider
    d = subspace.rows.shape[1]
    assert d == found.rows.shape[1] + 5
    V = over.vectors(subspace.to_full_space(torch.eye(d))).double().numpy()
    np.testing.assert_allclose(V @ V.T, np.eye(d), atol=2e-3)
    np.testing.assert_allclose(inside.numpy() @ V, over.vectors(coords).numpy(), atol=1e-4)
    np.testing.assert_allclose(subspace.rows.numpy(), A @ V.T, atol=0.02)
    assert widen(over, subspace, coords, over.project(coords)) is None


@pytest.mark.parametrize("space", ["rows", "gram"])
def test_the_polish_in_subspaces_ends_where_one_over_all_rows_does(monkeypatch, space: str) -> None:
    fishers, _, _ = planted(200, 6, 400, 0.3, 3)
    options = {"space": space, "n_init": 1, "n_replacements": 3, "progress": False, "tolerance": 1e-6}
    components = npeff.decompose(fishers, 6, **options)
    monkeypatch.setattr("npeff.decomposition.search.widen", lambda *arguments: None)
    plain = npeff.decompose(fishers, 6, **options)
    assert components.provenance["course"]["subspace"]["dimensions"] <= 256
    assert components.loss == pytest.approx(plain.loss, rel=1e-5)
    assert (np.diff(components.loss_curve) < 0).all()
    assert components.loss_curve[-1] == pytest.approx(components.loss, rel=1e-6)


def test_a_polish_that_is_stopped_leaves_sound_components() -> None:
    fishers, _, _ = planted(200, 6, 400, 0.3, 3)
    seen = []

    def stop(progress: npeff.Progress) -> bool:
        seen.append(progress.stage)
        return seen.count("polish") == 2

    components = npeff.decompose(
        fishers, 6, space="rows", n_init=1, n_replacements=1, progress=False, tolerance=1e-9, callback=stop
    )
    assert seen[-1] == "polish"
    assert components.vectors.shape == (6, 400)
    assert components.loss_curve[-1] == pytest.approx(components.loss, rel=1e-6)
