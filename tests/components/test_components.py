"""What components say: vectors, examples, classes, strategies, encodings, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import npeff
from decomposition_cases import QUICK, example_fishers
from npeff.fishers.rows import DenseRows
from planted import fishers_of, planted
from small_network import model, x

__all__ = ["model", "x"]  # fixtures


@pytest.fixture(scope="module", params=["low_rank", "diagonal"])
def fitted(request) -> tuple[npeff.Fishers, npeff.Components]:
    fishers = example_fishers(request.param, "sparse")
    return fishers, npeff.decompose(fishers, 5, **QUICK)


def test_vectors_are_unit_and_cut_into_parameters(fitted, tmp_path) -> None:
    fishers, components = fitted
    for j in (0, 4, -1):
        vector = components.vector(j)
        assert vector.shape == (fishers.n_parameters,) and vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        blocks = components.state_dict(j)
        assert [tuple(b.shape) for b in blocks.values()] == [p.shape for p in fishers.parameters]
        np.testing.assert_array_equal(torch.cat([b.flatten() for b in blocks.values()]).numpy(), vector)
        assert sum(components.block_energy(j).values()) == pytest.approx(1, abs=1e-5)
    path = components.save_state_dict(2, tmp_path / "g.safetensors")
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, components.state_dict(2)[name])
    with safe_open(path, "pt") as file:
        assert '"component": 2' in file.metadata()["npeff"]


def test_top_examples_are_the_largest_coefficients(fitted) -> None:
    _, components = fitted
    for j in range(5):
        top = components.top_examples(j, 7)
        assert len(top) == 7
        W = components.coefficients[:, j]
        assert (np.diff(W[top]) <= 0).all()
        assert W[top].min() >= np.delete(W, top).max()
    assert len(components.top_examples(0, 10_000)) == len(components.coefficients)
    assert len(components.top_examples(0, 0)) == 0


def test_class_distribution_weighs_by_coefficient(fitted) -> None:
    _, components = fitted
    shares = components.class_distribution(1)
    W = components.coefficients[:, 1].astype(np.float64)
    for c, share in enumerate(shares):
        assert share == pytest.approx(W[components.predictions == c].sum() / W.sum())
    assert shares.sum() == pytest.approx(1)


def test_encode_solves_to_optimality(fitted) -> None:
    fishers, components = fitted
    encoded = components.encode(fishers)
    assert encoded.kkt.max() <= 1e-6
    assert (encoded.coefficients >= 0).all()
    # W fully solved for the same vectors: the coefficients that the solver ends with are close, the loss is not higher.
    again = npeff.decompose(
        fishers, 5, init=(encoded.coefficients, np.stack([components.vector(j) for j in range(5)])),
        n_init=1, n_replacements=0, max_iterations=1, progress=False,
    )  # fmt: skip
    assert again.loss_curve[0] <= components.loss * (1 + 1e-5)
    assert np.abs(encoded.coefficients - components.coefficients).max() < 5e-3
    weights = np.ones(len(fishers))
    assert np.average(encoded.unexplained, weights=weights) == pytest.approx(again.loss_curve[0], rel=1e-3)


def test_encode_of_a_subset_is_the_subset_of_the_encoding(fitted) -> None:
    fishers, components = fitted
    chosen = np.array([11, 3, 20])
    np.testing.assert_allclose(
        components.encode(fishers[chosen]).coefficients, components.encode(fishers).coefficients[chosen], atol=1e-6
    )


WEIGHTS = {"0.*": 3.0, "3.*": 0.1}


def computed(model: torch.nn.Module, x: torch.Tensor, **options: object) -> npeff.Fishers:
    return npeff.compute_fishers(model, [x], progress=False, **options)


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_weights_of_the_fishers_do_not_change_what_they_are_encoded_as(model, x, kind) -> None:
    """Block weights belong to the components: those that other Fishers were computed with are undone."""
    plain, weighted = computed(model, x, kind=kind), computed(model, x, kind=kind, block_weights=WEIGHTS)
    for fishers in (plain, weighted):
        components = npeff.decompose(fishers, 3, **QUICK)
        encoded = [components.encode(other).coefficients for other in (plain, weighted)]
        np.testing.assert_allclose(encoded[0], encoded[1], atol=1e-5)
        expanded = [npeff.expand(components, other, 1, **QUICK) for other in (plain, weighted)]
        assert expanded[0].loss == pytest.approx(expanded[1].loss, rel=1e-3)


def test_sketches_of_other_weights_are_refused(model, x) -> None:
    plain, weighted = (computed(model, x, compress=npeff.Sketch(16), block_weights=w) for w in ("energy", WEIGHTS))
    with pytest.raises(npeff.ArgumentError, match="block weights of the components"):
        npeff.decompose(plain, 2, **QUICK).encode(weighted)
    with pytest.raises(npeff.ArgumentError, match="block weights of the components"):
        npeff.decompose(weighted, 2, **QUICK).encode(plain)


def test_fishers_of_another_model_or_likelihood_are_told(model, x) -> None:
    components = npeff.decompose(computed(model, x), 2, **QUICK)
    gaussian = computed(model, x, likelihood="gaussian")
    with pytest.warns(UserWarning, match="another likelihood"):
        components.encode(gaussian)
    model[3].weight.data[0, 0] += 1
    for use in (
        components.encode,
        lambda fishers: npeff.expand(components, fishers, 1, **QUICK),
        lambda fishers: npeff.trust.null_model(fishers, components, repeats=1, **QUICK),
    ):
        with pytest.warns(UserWarning, match="another model"):
            use(computed(model, x))


def test_arguments_of_other_types_are_named(fitted) -> None:
    fishers, components = fitted
    for use, match in (
        (lambda: components.encode(3), "fishers: expected Fishers, got int"),
        (lambda: npeff.expand(fishers, fishers, 1), "components: expected Components, got Fishers"),
        (lambda: components.vector(True), "j: expected a component"),
        (lambda: components.top_examples(0, 2.5), "k: expected an integer"),
        (lambda: components.strategies(True), "n: expected an integer"),
    ):
        with pytest.raises(npeff.ArgumentError, match=match):
            use()


def test_encode_finds_planted_coefficients_of_unseen_examples() -> None:
    fishers, _, W = planted(n=220, r=6, m=300, noise=0.02, seed=0)
    seen, unseen = fishers[:150], fishers[150:]
    components = npeff.decompose(seen, 6, progress=False)
    all_in_one = np.concatenate([components.encode(seen).coefficients, components.encode(unseen).coefficients])
    scaled = W / np.linalg.norm(W, axis=1, keepdims=True)
    order = [
        int(np.argmax([np.corrcoef(all_in_one[:150, k], scaled[:150, j])[0, 1] for k in range(6)])) for j in range(6)
    ]
    assert sorted(order) == list(range(6))
    for j, k in enumerate(order):
        assert np.corrcoef(all_in_one[150:, k], scaled[150:, j])[0, 1] > 0.98


def test_foreign_fishers_are_refused(fitted) -> None:
    fishers, components = fitted
    other = "diagonal" if fishers.kind == "low_rank" else "low_rank"
    with pytest.raises(npeff.ArgumentError, match=f"expected {fishers.kind} Fishers"):
        components.encode(example_fishers(other))
    with pytest.raises(npeff.ArgumentError, match="parameters of the components"):
        components.encode(example_fishers(fishers.kind, m=31))


def test_strategies_are_a_tree_over_all_components(fitted) -> None:
    _, components = fitted
    root = components.strategies()
    assert root.components == tuple(range(5))
    np.testing.assert_allclose(root.coefficient, components.coefficients.sum(1), rtol=1e-5)
    leaves = [node.components for node in root.walk() if not node.children]
    assert sorted(leaves) == [(j,) for j in range(5)]
    for node in root.walk():
        if node.children:
            assert sorted(j for child in node.children for j in child.components) == list(node.components)
    for n in range(1, 6):
        cut = components.strategies(n)
        assert len(cut) == n and tuple(cut) == cut.children
        assert sorted(j for group in cut for j in group.components) == list(range(5))
    leaf = next(node for node in root.walk() if not node.children)
    assert list(leaf) == [leaf] and len(leaf) == 1
    with pytest.raises(npeff.ArgumentError, match="n: expected"):
        components.strategies(6)


def test_strategies_join_what_is_alike() -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(40, 2)))[0].T
    G = np.repeat(directions, 3, 0) + 0.05 * rng.normal(size=(6, 40))
    rows = G[rng.integers(0, 6, 120)].astype(np.float32)
    components = npeff.decompose(fishers_of(DenseRows(rows), np.arange(121)), 6, **QUICK)
    sides = np.abs(components.vectors @ directions.T).argmax(1)
    for group in components.strategies(2).children:
        assert len({sides[j] for j in group.components}) == 1


def test_an_outlier_is_no_strategy() -> None:
    """Two routes of four components each, far apart among themselves, and one that hardly any example uses."""
    from npeff.components.strategies import strategy_tree

    similarity = np.full((9, 9), 0.02)
    similarity[:4, :4] = similarity[4:8, 4:8] = 0.3
    similarity[8, :8] = similarity[:8, 8] = [0.01] * 4 + [0.005] * 4
    np.fill_diagonal(similarity, 1)
    W = np.ones((10, 9), np.float32)
    W[:, 8] = 0.1
    groups = [group.components for group in strategy_tree(similarity, W, 2).children]
    assert groups == [(0, 1, 2, 3, 8), (4, 5, 6, 7)]
    by_itself = [group.components for group in strategy_tree(similarity, np.ones((10, 9), np.float32), 2).children]
    assert (8,) in by_itself  # with as many coefficients as the others it is a strategy
    assert [len(strategy_tree(similarity, W, n).children) for n in range(2, 10)] == list(range(2, 10))


def test_similar_are_those_that_respond_on_the_same_examples() -> None:
    from npeff.components.strategies import response_similarity

    for kind in ("low_rank", "diagonal"):
        components = npeff.decompose(example_fishers(kind), 4, **QUICK)
        W, V = components.coefficients.astype(np.float64), components.vectors.astype(np.float64)
        V = V / np.linalg.norm(V, axis=1, keepdims=True)
        E = W @ ((V @ V.T) ** 2 if kind == "low_rank" else V @ V.T)
        unit = E / np.linalg.norm(E, axis=0)
        np.testing.assert_allclose(response_similarity(components), unit.T @ unit, atol=1e-5)


def test_the_number_of_strategies_by_stability(fitted) -> None:
    fishers, components = fitted
    stable = npeff.trust.stability(fishers, components, repeats=2, **QUICK)
    assert 2 <= len(components.strategies(stable.n_strategies)) == stable.n_strategies <= 5


def test_file_round_trip(fitted, tmp_path) -> None:
    _, components = fitted
    loaded = npeff.load(components.save(tmp_path / "components.h5"))
    assert isinstance(loaded, npeff.Components)
    for name, array in components.to_arrays().items():
        np.testing.assert_array_equal(array, getattr(loaded, name))
    assert loaded.provenance["options"]["n_components"] == 5
    assert loaded.parameters == components.parameters and loaded.kind == components.kind


def test_bad_arguments_are_named(fitted) -> None:
    _, components = fitted
    for call in (components.vector, components.top_examples, components.class_distribution, components.state_dict):
        with pytest.raises(npeff.ArgumentError, match="j: expected a component below 5"):
            call(5)
    with pytest.raises(npeff.ArgumentError, match="k: expected"):
        components.top_examples(0, -1)
    with pytest.raises(npeff.ArgumentError, match="of: expected"):
        components.class_distribution(0, of="wishes")
    with pytest.raises(npeff.ArgumentError, match="n: expected an integer ≥ 1"):
        npeff.expand(components, fitted[0], 0)
    with pytest.raises(npeff.ArgumentError, match="block_weights"):
        npeff.expand(components, fitted[0], 1, block_weights="balanced")
