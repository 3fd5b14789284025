"""Trust: components that come back, numbers of components that generalise, and what chance gives."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import npeff
from npeff.cli import run
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import GramRows, SparseRows
from npeff.trust import explained, match, null_model, select, shuffled, similarity, stability
from npeff.trust.stability import rand_index
from npeff.trust.validation import held_out_loss
from planted import fishers_of, planted, sparse
from small_network import model, x

__all__ = ["model", "x"]  # fixtures

QUICK = {"n_init": 2, "n_replacements": 10, "patience": 5, "max_iterations": 150}


def quick(fishers: Fishers, r: int, **options) -> npeff.Components:
    return npeff.decompose(fishers, r, progress=False, **{**QUICK, **options})


@pytest.fixture(scope="module")
def known() -> tuple[Fishers, npeff.Components]:
    fishers, _, _ = planted(160, 5, 80, noise=0.05, seed=3)
    return fishers, quick(fishers, 5)


@pytest.fixture(scope="module")
def diagonal() -> Fishers:
    rng = np.random.default_rng(0)
    H = rng.gamma(0.3, size=(4, 60)) * (rng.random((4, 60)) < 0.4)
    W = rng.gamma(1.0, size=(120, 4)) * (rng.random((120, 4)) < 0.6)
    return fishers_of(sparse((W @ H + 1e-9).astype(np.float32)), np.arange(121), "diagonal")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=40))
def test_rand_index_is_the_adjusted_rand_index(pairs) -> None:
    a, b = np.array(pairs).T
    assert rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)


def test_match_undoes_a_permutation(known) -> None:
    _, components = known
    order = np.array([3, 0, 4, 1, 2])
    permuted = replace(components, vectors=-components.vectors[order])
    partner, cosine = match(components, permuted)
    np.testing.assert_array_equal(order[partner], np.arange(5))
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    fewer = replace(components, vectors=components.vectors[:2], coefficients=components.coefficients[:, :2])
    assert sorted(match(components, fewer)[0].tolist()) == [-1, -1, -1, 0, 1]


def test_similarity_compares_on_common_columns(known) -> None:
    _, components = known
    m = components.n_parameters
    columns = np.arange(0, m, 2)
    fewer = replace(components, columns=columns, vectors=components.vectors[:, columns])
    expected = components.vectors[:, columns] @ components.vectors[:, columns].T
    norms = np.linalg.norm(components.vectors, axis=1), np.linalg.norm(components.vectors[:, columns], axis=1)
    for a, b, scale in ((components, components, 1.0), (fewer, fewer, 1.0)):
        np.testing.assert_allclose(np.diag(similarity(a, b)), scale, atol=1e-6)
    # The part of a vector outside the common columns counts in its norm only where it was kept.
    unit = components.vectors[:, columns] / norms[1][:, None]
    np.testing.assert_allclose(similarity(fewer, fewer), np.abs(unit @ unit.T), atol=1e-6)
    assert similarity(components, fewer).shape == expected.shape


def test_planted_components_come_back_from_halves(known) -> None:
    fishers, components = known
    found = stability(fishers, components, repeats=3, progress=False, **QUICK)
    assert found.cosines.shape == (3, 5)
    assert found.components.min() > 0.98
    assert set(found.strategies) == {2, 3, 4, 5}
    assert found.strategies[found.n_strategies] >= max(found.strategies.values()) - 0.05
    assert found.strategies[5] > 0.8  # five components, one strategy each
    json.dumps(found.to_json())


@pytest.mark.parametrize("judge", [stability, null_model])
def test_fishers_of_other_examples_are_refused(known, judge) -> None:
    fishers, components = known
    moved = replace(fishers, logits=fishers.logits.values + 1)
    for others in (fishers[np.arange(40)], replace(fishers, ids=fishers.ids + 1), moved):
        with pytest.raises(npeff.ArgumentError, match=f"those of the 160 examples .* got {len(others)} that are not"):
            judge(others, components, progress=False)


def test_inner_products_alone_say_the_same_as_rows(known) -> None:
    fishers, components = known
    A = fishers.rows.dense(0, fishers.rows.n_rows).astype(np.float64)
    about = {**fishers.provenance, "options": {"compress": {"method": "gram"}}}
    alone = replace(fishers, rows=GramRows((A @ A.T).astype(np.float32)), provenance=about)
    theirs = quick(alone, components.n_components)
    by_rows = stability(fishers, components, repeats=3, progress=False, **QUICK)
    by_products = stability(alone, theirs, repeats=3, progress=False, **QUICK)
    np.testing.assert_allclose(np.sort(by_products.cosines), np.sort(by_rows.cosines), atol=1e-3)
    assert by_products.strategies.keys() == by_rows.strategies.keys()
    for number, index in by_rows.strategies.items():
        assert by_products.strategies[number] == pytest.approx(index, abs=0.1)
    assert len(theirs.strategies(by_products.n_strategies).children) > 1
    with pytest.raises(npeff.ArgumentError, match="inner products alone"):
        stability(alone[np.arange(100)], theirs, progress=False)
    others = replace(alone, logits=alone.logits.values + 1)
    for use in (lambda: stability(others, theirs, progress=False), lambda: explained(theirs, others)):
        with pytest.raises(npeff.ArgumentError, match="expected those that the components were made from"):
            use()


def test_vectors_of_other_block_weights_are_compared_without_weights(known) -> None:
    fishers, components = known
    weighted = quick(fishers, 5, block_weights={"a.weight": 4.0})
    vectors = [np.stack([each.vector(j) for j in range(5)]).astype(np.float64) for each in (weighted, components)]
    np.testing.assert_allclose(similarity(weighted, components), np.abs(vectors[0] @ vectors[1].T), atol=1e-5)


def test_recovered_vectors_are_compared_with_others_without_weights(model, x) -> None:
    weights = {"0.*": 30.0}

    def components(compress, block_weights):
        options = {"compress": compress, "block_weights": block_weights, "progress": False}
        return quick(npeff.compute_fishers(model, [x], **options), 3)

    sketched = components(npeff.Sketch(64), weights).recover(model, [x], progress=False)
    for weighted in (components(npeff.TopK(100), weights), components(npeff.TopK(100), {"3.*": 5.0})):
        ours, theirs = (np.stack([each.vector(j) for j in range(3)]) for each in (sketched, weighted))
        np.testing.assert_allclose(similarity(sketched, weighted), np.abs(ours @ theirs.T), atol=1e-5)


def test_structureless_fishers_are_not_stable() -> None:
    rng = np.random.default_rng(1)
    fishers = fishers_of(sparse(rng.normal(size=(240, 60)).astype(np.float32)), np.arange(0, 241, 2))
    components = quick(fishers, 6)
    assert stability(fishers, components, repeats=2, progress=False, **QUICK).components.mean() < 0.9


def test_held_out_loss_chooses_the_planted_number() -> None:
    fishers, _, _ = planted(150, 4, 60, noise=0.35, seed=5)
    selection = select(fishers, [12, 2, 4], folds=3, progress=False, **QUICK)
    assert selection.n_components == (2, 4, 12)
    assert selection.chosen == 4
    assert (np.diff(selection.train) < 0).all()  # more components always fit the seen examples better
    assert selection.held_out.mean(0).argmin() == 1  # but not the unseen ones
    json.dumps(selection.to_json())


def test_held_out_loss_against_a_dense_oracle(known) -> None:
    """On all columns the halves' losses are those of two dense block-diagonal problems."""
    fishers, components = known
    subset = fishers[:7]
    side = np.random.default_rng(0).permutation(components.n_parameters) % 2
    losses = []
    for here in (0, 1):
        fit, judge = side == here, side != here
        energy = error = 0.0
        for i in range(len(subset)):
            A = subset.dense(i).astype(np.float64)
            A /= np.sqrt(np.linalg.norm(A @ A.T))
            G = components.vectors.astype(np.float64)
            F = [A[:, s].T @ A[:, s] for s in (fit, judge)]
            basis = [np.stack([np.outer(g[s], g[s]).ravel() for g in G], 1) for s in (fit, judge)]
            from scipy.optimize import nnls

            w, _ = nnls(basis[0], F[0].ravel())
            error += np.square(F[1].ravel() - basis[1] @ w).sum()
            energy += np.square(F[1]).sum()
        losses.append(error / energy)
    assert held_out_loss(components, subset, seed=0) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("form", ["dense", "sparse", "diagonal"])
def test_shuffling_keeps_each_parameters_entries(known, diagonal, form) -> None:
    fishers = diagonal if form == "diagonal" else known[0]
    if form == "sparse":
        fishers = replace(fishers, rows=sparse(fishers.rows.dense(0, fishers.rows.n_rows)))
    mixed = shuffled(fishers, seed=2)
    before, after = (np.sort(np.abs(f.rows.dense(0, f.rows.n_rows)), axis=0) for f in (fishers, mixed))
    np.testing.assert_array_equal(before, after)
    assert not np.array_equal(fishers.rows.dense(0, 20), mixed.rows.dense(0, 20))
    assert type(mixed.rows) is type(fishers.rows)
    if isinstance(mixed.rows, SparseRows):
        starts = mixed.rows.indptr[1:-1]
        rising = np.diff(mixed.rows.indices) > 0
        rising[starts[(starts > 0) & (starts < len(mixed.rows.indices))] - 1] = True
        assert rising.all()  # columns ascend within every row
    np.testing.assert_array_equal(mixed.rows.dense(0, 20), shuffled(fishers, seed=2).rows.dense(0, 20))


def test_chance_fits_worse_than_planted_components(known) -> None:
    fishers, components = known
    null = null_model(fishers, components, repeats=2, progress=False, **QUICK)
    assert null.losses.min() > 3 * null.loss
    assert null.energies.shape == (2, 5)
    assert null.above.all()
    json.dumps(null.to_json())


def test_explained_is_the_share_that_the_loss_leaves(known) -> None:
    fishers, components = known
    shares = explained(components, fishers)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert 1 - shares.mean() == pytest.approx(components.loss, rel=1e-3)  # every Fisher has unit norm
    zeroed = replace(fishers, norms=np.where(np.arange(len(fishers)) == 3, 0, fishers.norms).astype(np.float32))
    assert np.isnan(explained(components, zeroed)[3])


def test_bad_arguments_are_named(known) -> None:
    fishers, components = known
    for call, name in (
        (lambda: stability(fishers, components, repeats=1), "repeats"),
        (lambda: stability(fishers, components, share=0), "share"),
        (lambda: stability(fishers, components, share="half"), "share"),
        (lambda: stability(fishers, components, most_strategies=0), "most_strategies"),
        (lambda: stability(fishers, components, seed=-1), "seed"),
        (lambda: select(fishers, []), "n_components"),
        (lambda: select(fishers, 3), "n_components"),
        (lambda: select(fishers, [1.5]), "n_components"),
        (lambda: select(fishers, [2], folds=1), "folds"),
        (lambda: select(fishers, [2], folds=2.5), "folds"),
        (lambda: null_model(fishers, components, repeats=0), "repeats"),
    ):
        with pytest.raises(npeff.ArgumentError, match=name):
            call()
    other = replace(components, kind="diagonal")
    with pytest.raises(npeff.ArgumentError, match="b"):
        similarity(components, other)


def test_command_line(known, tmp_path, capsys) -> None:
    fishers, components = known
    f, c, out = tmp_path / "f.h5", tmp_path / "c.h5", tmp_path / "trust.json"
    fishers.save(f)
    components.save(c)
    assert run(["trust", str(f), str(c), "--repeats", "2", "--shuffles", "1", "--out", str(out), "--quiet"]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"explained", "stability", "null"}
    assert "more than chance" in capsys.readouterr().out
    several = ["decompose", str(f), "--n-components", "2,5", "--out", str(tmp_path / "d.h5"), "--quiet"]
    several += ["--n-init", "1", "--n-replacements", "3", "--max-iterations", "100"]
    assert run(several) == 2
    assert "--select" in capsys.readouterr().err
    assert run([*several, "--select"]) == 0
    assert "← chosen" in capsys.readouterr().out
    assert npeff.load(tmp_path / "d.h5").n_components == 5
    assert run(["decompose", str(f), "--n-components", "0", "--out", str(tmp_path / "d.h5")]) == 2
