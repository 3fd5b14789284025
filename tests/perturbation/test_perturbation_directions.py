"""Directions of components and strategies, and what rejection leaves of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.components.factored import slots
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.models.parameters import Parameters
from npeff.perturbation import direction
from npeff.perturbation.directions import ComponentDirections, random_direction, target_of
from perturbation_cases import batches, components_of, linear


@pytest.fixture(scope="module")
def components():
    return components_of(linear(), batches(30, 8))


def with_vectors(components, vectors, **changes):
    return replace(components, vectors=vectors.astype(np.float32), **changes)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0, 0.98))
def test_rejecting_the_span_leaves_the_orthogonal_part(seed, r, overlap):
    rng = np.random.default_rng(seed)
    base = components_of(linear(), batches(30, 8))
    G = (1 - overlap) * rng.normal(size=(r, 18)) + overlap * rng.normal(size=18)
    W = np.abs(rng.normal(size=(30, r))).astype(np.float32)
    found = ComponentDirections(with_vectors(base, G, coefficients=W))
    vector = found.combination([0], [1.0])
    left, rejection = found.reject(vector, [0], "span", None)
    others = G[1:].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(others @ left / np.linalg.norm(others, axis=1), 0, atol=1e-10)
    assert np.linalg.norm(left) == pytest.approx(1, abs=1e-12)
    Q, _ = np.linalg.qr(others.T)
    expected = vector - Q @ (Q.T @ vector)
    np.testing.assert_allclose(left * rejection.kept, expected, atol=1e-10)
    assert rejection.components == tuple(range(1, r))


def test_linearly_dependent_others_are_no_trouble(components):
    G = components.vectors.astype(np.float64).copy()
    G[2] = 2 * G[1] - G[3]
    found = ComponentDirections(with_vectors(components, G))
    left, _ = found.reject(found.combination([0], [1.0]), [0], "span", None)
    np.testing.assert_allclose(G[[1, 3]] @ left, 0, atol=1e-6)


def test_nothing_left_is_an_error(components):
    G = components.vectors.astype(np.float64).copy()
    G[0] = G[1] + G[2]
    found = ComponentDirections(with_vectors(components, G))
    with pytest.raises(ArgumentError, match="nothing is left"):
        found.reject(found.combination([0], [1.0]), [0], "span", None)


def test_the_sequential_form_is_the_published_one(components):
    rng = np.random.default_rng(0)
    G = rng.normal(size=(6, 18))
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    G[5] = G[0] + 0.05 * rng.normal(size=18)
    W = np.ones((30, 6), np.float32)
    found = ComponentDirections(with_vectors(components, G, coefficients=W))
    unit = G.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for max_sim in (0.1, 0.3, 1.0):
        expected = unit[0].copy()
        for k in range(1, 6):
            if abs(unit[k] @ unit[0]) <= max_sim:
                expected -= (expected @ unit[k]) * unit[k]
        expected /= np.linalg.norm(expected)
        left, rejection = found.reject(unit[0], [0], "sequential", max_sim)
        np.testing.assert_allclose(left, expected, atol=1e-12)
        assert (5 in rejection.components) == (max_sim == 1.0)
        limited, said = found.reject(unit[0], [0], "span", max_sim)
        np.testing.assert_allclose(unit[list(said.components)] @ limited, 0, atol=1e-10)
    chosen = found.reject(unit[0], [0], "sequential", None)[1].components
    assert chosen == found.reject(unit[0], [0], "sequential", 0.1)[1].components


def test_block_weights_are_undone_and_columns_scattered(components):
    columns = np.array([0, 2, 3, 7, 16])
    weights = {"0.weight": 4.0, "0.bias": 0.25}
    some = replace(components, vectors=components.vectors[:, columns], columns=columns, block_weights=weights)
    found = ComponentDirections(some)
    for j in range(4):
        (move,) = found.of_target(target_of(some, j), "each", None, None)
        np.testing.assert_allclose(move.vector, some.vector(j), atol=1e-6)
    left, _ = found.reject(found.combination([0], [1.0]), [0], "span", None)
    others = np.stack([some.vector(j) for j in (1, 2, 3)]).astype(np.float64)
    np.testing.assert_allclose(others @ found.full(left), 0, atol=1e-6)


def test_many_columns_in_chunks(monkeypatch):
    monkeypatch.setattr("npeff.perturbation.directions.CHUNK", 10)
    rng, m = np.random.default_rng(0), 1234
    base = components_of(linear(), batches(30, 8))
    G = rng.normal(size=(3, m))
    some = with_vectors(base, G, parameters=Parameters.of([("a", (m,))]), coefficients=base.coefficients[:, :3])
    found = ComponentDirections(some)
    unit = G.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(found.gram(range(3)), unit @ unit.T, atol=1e-12)
    left, _ = found.reject(found.combination([1], [1.0]), [1], "span", None)
    np.testing.assert_allclose(unit[[0, 2]] @ left, 0, atol=1e-12)


def test_a_strategys_principal_direction(components):
    group = Strategy((0, 1, 3), components.coefficients[:, [0, 1, 3]].sum(1))
    target = target_of(components, group)
    np.testing.assert_allclose(target.coefficient, components.coefficients[:, [0, 1, 3]].sum(1), rtol=1e-6)
    mass = components.coefficients[:, [0, 1, 3]].sum(0).astype(np.float64)
    mass /= mass.sum()
    np.testing.assert_allclose(target.shares, mass)
    G = components.vectors[[0, 1, 3]].astype(np.float64)
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh((G.T * mass) @ G)
    found = ComponentDirections(components)
    (move,) = found.of_target(target, "principal", None, None)
    assert abs(move.vector @ vectors[:, -1]) == pytest.approx(1, abs=1e-10)
    assert move.explained == pytest.approx(values[-1] / values.sum())
    flipped = with_vectors(components, components.vectors * np.array([[-1], [1], [1], [-1]]))
    (other,) = ComponentDirections(flipped).of_target(target, "principal", None, None)
    assert abs(other.vector @ move.vector) == pytest.approx(1, abs=1e-6)
    each = found.of_target(target, "each", None, None)
    assert [m.component for m in each] == [0, 1, 3]
    np.testing.assert_allclose([m.share for m in each], mass)
    (sum_,) = found.of_target(target, [1.0, 0.0, -2.0], None, None)
    expected = G[0] - 2 * G[2]
    np.testing.assert_allclose(sum_.vector, expected / np.linalg.norm(expected), atol=1e-7)
    rejected = found.of_target(target, "each", "span", None)
    assert all(m.rejection.components == (2,) for m in rejected)
    with pytest.raises(ArgumentError, match="a weight for each of the 3 components"):
        found.of_target(target, [1.0], None, None)


def test_direction_as_tensors(components):
    tensors = direction(components, 2)
    joined = np.concatenate([t.numpy().reshape(-1) for t in tensors.values()])
    np.testing.assert_allclose(joined, components.vector(2), atol=1e-6)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {p.name: p.shape for p in components.parameters}
    with pytest.raises(ArgumentError, match="one direction is asked for"):
        direction(components, 2, combine="each")
    with pytest.raises(ArgumentError, match="components: expected Components, got str"):
        direction("components.h5", 2)
    with pytest.raises(ArgumentError, match="low-rank"):
        direction(replace(components, kind="diagonal"), 2)


@pytest.mark.parametrize("j", [4, -5, 1.0, True, "0", Strategy((0, 9), np.zeros(30)), Strategy((0,), np.zeros(2))])
def test_targets_that_are_none(components, j):
    with pytest.raises(ArgumentError, match="j: "):
        target_of(components, j)


def test_zero_components_are_refused_and_left_out_of_groups(components):
    G = components.vectors.copy()
    G[1] = 0
    some = with_vectors(components, G)
    with pytest.raises(ArgumentError, match="component 1 is zero"):
        ComponentDirections(some).of_target(target_of(some, 1), "each", None, None)
    group = target_of(some, Strategy((0, 1), np.zeros(30)))
    (move,) = ComponentDirections(some).of_target(group, "each", None, None)
    assert (move.component, move.share) == (0, 1.0)
    left, rejection = ComponentDirections(some).reject(
        ComponentDirections(some).combination([0], [1.0]), [0], "span", None
    )
    assert rejection.components == (2, 3) and np.isfinite(left).all()


def test_random_directions_are_units_that_seed_and_number_decide():
    a, b = random_direction(1000, 3, 0), random_direction(1000, 3, 1)
    assert np.linalg.norm(a) == pytest.approx(1) and abs(a @ b) < 0.2
    np.testing.assert_array_equal(a, random_direction(1000, 3, 0))
    assert not np.array_equal(a, random_direction(1000, 4, 0))


def test_vectors_that_were_recovered(components):
    rng = np.random.default_rng(0)
    sketched = replace(
        components,
        vectors=rng.normal(size=(4, 7)).astype(np.float32),
        provenance={"fishers": {"options": {"compress": {"method": "sketch"}}}},
        recovered=np.array([1, 2]),
        recovered_vectors=components.vectors[[1, 2]],
    )
    (move,) = ComponentDirections(sketched).of_target(target_of(sketched, 2), "each", None, None)
    np.testing.assert_allclose(move.vector, components.vector(2), atol=1e-6)
    for j, reject in ((0, None), (1, "span")):
        with pytest.raises(ArgumentError, match="recover"):
            ComponentDirections(sketched).of_target(target_of(sketched, j), "each", reject, None)


@pytest.mark.parametrize("chunk", [1 << 16, 1])
def test_vectors_known_as_factors_are_made_piece_by_piece(components, monkeypatch, chunk):
    """A matrix, a vector and a matrix that is kept whole; pieces begin and end within rows."""
    monkeypatch.setattr("npeff.perturbation.directions.CHUNK", chunk)
    parameters = Parameters.of([("a", (9, 50)), ("b", (7,)), ("c", (2, 3)), ("d", (40, 6))])
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(4, sum(slot.numel for slot in slots(parameters, 2)))).astype(np.float32)
    for row in stored:
        for slot in slots(parameters, 2):
            if slot.rank is not None:  # the rows of right factors are orthonormal
                right = slot.factors(row)[1]
                right[:] = np.linalg.qr(right.T)[0].T
    factored = replace(
        components,
        vectors=rng.normal(size=(4, 7)).astype(np.float32),
        parameters=parameters,
        provenance={"fishers": {"options": {"compress": {"method": "sketch"}}}},
        rank=2,
        factored=np.arange(4),
        factored_vectors=stored,
        factored_lost=np.zeros((4, 4), np.float32),
    )
    whole = np.stack([factored.vector(j) for j in range(4)])
    for start, stop in ((0, 703), (3, 4), (49, 101), (445, 466), (699, 703), (5, 5)):
        part = factored.recovered_entries(1, slice(start, stop))
        np.testing.assert_allclose(
            part / np.linalg.norm(factored.recovered_entries(1, slice(None))), whole[1, start:stop], atol=1e-6
        )
    (move,) = ComponentDirections(factored).of_target(target_of(factored, 1), "each", "span", None)
    recovered = replace(factored, factored=None, rank=None, recovered=np.arange(4), recovered_vectors=whole)
    (expected,) = ComponentDirections(recovered).of_target(target_of(recovered, 1), "each", "span", None)
    np.testing.assert_allclose(move.vector, expected.vector, atol=1e-6)
    blocks = [left if right is None else left @ right for _, left, right in factored.blocks(1)]
    np.testing.assert_allclose(np.concatenate([block.reshape(-1) for block in blocks]), whole[1], atol=1e-6)
