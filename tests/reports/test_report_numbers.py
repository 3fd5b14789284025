"""What the pages say in numbers, against counting: groups, maps, relations, energies, selections."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.models.parameters import Parameters
from npeff.reports.layout import block_map, check_heads, head_map, layer_and_part, map_positions, silhouette, tree_of
from npeff.reports.summary import at_random, closest, coactivation, explained_shares, middle, summarise
from report_cases import PARAMETERS, components_of

RNG = np.random.default_rng(0)


def clustered(groups=3, each=5, n=60, noise=0.05, **changes):
    """Components in groups of nearly equal vectors, in shuffled order; and the group of each."""
    rng = np.random.default_rng(3)
    member = rng.permutation(np.repeat(np.arange(groups), each))
    centres = np.linalg.qr(rng.normal(size=(PARAMETERS.n_parameters, groups)))[0].T
    vectors = centres[member] + noise * rng.normal(size=(groups * each, PARAMETERS.n_parameters)) / 11
    return components_of(n=n, r=groups * each, vectors=vectors.astype(np.float32), **changes), member


def group_of_each(nodes, r):
    """The coloured strategy of every component."""
    groups = {node.components[0]: node.group for node in nodes if node.leaf}
    return [groups[j] for j in range(r)]


# ---- strategies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_number_of_strategies_is_found(groups):
    components, member = clustered(groups)
    nodes = tree_of(components, summarise(components, 4), 4)
    found = group_of_each(nodes, components.n_components)
    assert len(set(zip(found, member, strict=True))) == groups, "the groups planted, each once"


def test_tree_against_the_components_own():
    components, _ = clustered()
    nodes = tree_of(components, summarise(components, 4), 8)
    theirs = {s.components: s for s in components.strategies().walk()}
    assert len(nodes) == len(theirs)
    total = components.coefficients.sum(dtype=np.float64)
    for node in nodes:
        mine = theirs[tuple(sorted(node.components))]
        assert node.distance == pytest.approx(mine.distance)
        assert node.share == pytest.approx(mine.coefficient.sum() / total, rel=1e-4)
        if node.leaf:
            continue
        expected = mine.top_examples(8)
        assert [t.index for t in node.top] == [i for i in expected if mine.coefficient[i] > 0]
        np.testing.assert_allclose(
            [t.coefficient for t in node.top], mine.coefficient[expected][: len(node.top)], rtol=1e-5
        )
        assert node.profile.sum() == pytest.approx(1)
        right = components.predictions == components.labels
        assert node.accuracy == pytest.approx(np.average(right, weights=mine.coefficient), rel=1e-4)
        shares = [nodes[c].share for c in node.children]
        assert shares == sorted(shares, reverse=True)


def test_strategies_given():
    components, _ = clustered(4)
    summaries = summarise(components, 4)
    for given_ in (2, 4, components.strategies(4), components.strategies(7)):
        nodes = tree_of(components, summaries, 4, given_)
        found = set(group_of_each(nodes, components.n_components))
        assert found == set(range(given_ if isinstance(given_, int) else len(given_.children)))
    for wrong in (0, 21, "two", Strategy((0, 1), np.zeros(3)), components_of(r=3).strategies()):
        with pytest.raises(ArgumentError, match="strategies: expected"):
            tree_of(components, summaries, 4, wrong)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_trees_of_few(r):
    components = components_of(r=r)
    nodes = tree_of(components, summarise(components, 4), 4)
    assert len(nodes) == 2 * r - 1 and sorted(set(group_of_each(nodes, r)))[0] == 0


def test_deep_tree_needs_no_recursion():
    r = 1100
    leaves = [Strategy((j,), np.zeros(0)) for j in range(r)]
    root = leaves[0]
    for j in range(1, r):
        root = Strategy((*root.components, j), np.zeros(0), j / r, (root, leaves[j]))
    components = components_of(n=10, r=r)
    shares = [SimpleNamespace(j=j, share=1 / r) for j in range(r)]
    nodes = tree_of(components, shares, 2, root, np.eye(r))
    assert len(nodes) == 2 * r - 1
    assert nodes[0].top[0].coefficient == pytest.approx(components.coefficients.sum(1).max(), rel=1e-4)


def test_silhouette_against_the_definition():
    distances = np.abs(np.subtract.outer(*[RNG.normal(size=20)] * 2))
    labels = np.r_[RNG.integers(0, 4, 19), 4]
    values = []
    for i in range(20):
        others = np.arange(20) != i
        mean = {c: distances[i, others & (labels == c)].mean() for c in set(labels[others])}
        a = mean.pop(labels[i], None)
        values.append(0 if a is None else (min(mean.values()) - a) / max(a, min(mean.values())))
    member = (labels[:, None] == np.unique(labels)).astype(float)
    assert silhouette(distances, member) == pytest.approx(np.mean(values))


# ---- the map -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 3, 5, 6, 40])
def test_map_fills_the_unit_square(r):
    points = map_positions(1 - components_of(r=r, vectors=RNG.normal(size=(r, 122)).astype(np.float32)).cosines())
    assert points.shape == (r, 2) and np.isfinite(points).all()
    assert points.min() >= -1e-9 and points.max() <= 1 + 1e-9
    if r > 1:
        assert np.ptp(points, axis=0).max() == pytest.approx(1)


def test_neighbours_on_the_map_are_neighbours():
    components, member = clustered(4, 12)
    points = map_positions(1 - components.cosines())
    distances = np.linalg.norm(points[:, None] - points, axis=2) + 9 * np.eye(48)
    assert (member[distances.argmin(1)] == member).all()
    np.testing.assert_array_equal(points, map_positions(1 - components.cosines()))


def test_map_of_equal_components():
    assert np.isfinite(map_positions(np.zeros((9, 9)))).all()
    assert np.isfinite(map_positions(1 - np.eye(9))).all()


# ---- relations ---------------------------------------------------------------------------------------------


def test_coactivation_against_the_definition():
    W = components_of(n=50, r=6).coefficients.astype(np.float64)
    W[:, 2] = 0
    unit = W / np.maximum(np.linalg.norm(W, axis=0), 1e-30)
    expected = unit.T @ unit
    np.testing.assert_allclose(coactivation(W)[:2, :2], expected[:2, :2])
    assert (coactivation(W)[2] == 0).all()


def test_closest():
    similarity = np.array([[1, 0.5, 0.005, 0.9], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    assert closest(similarity, 0) == [(3, 0.9), (1, 0.5)]
    assert closest(similarity, 0, m=1) == [(3, 0.9)] and closest(similarity, 2) == []


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_explained_shares_against_the_residual(kind):
    scipy_optimize = pytest.importorskip("scipy.optimize")
    m, r, n = 8, 4, 12
    G = np.abs(RNG.normal(size=(r, m))) if kind == "diagonal" else RNG.normal(size=(r, m))
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    bases = np.stack([np.outer(g, g).ravel() if kind == "low_rank" else g for g in G], 1)
    A = RNG.normal(size=(n, 3, m))
    targets = [(a.T @ a).ravel() if kind == "low_rank" else np.square(a[0]) for a in A]
    targets = [f / np.linalg.norm(f) for f in targets]
    W = np.stack([scipy_optimize.nnls(bases, f)[0] for f in targets])
    left = np.array([np.square(f - bases @ w).sum() for f, w in zip(targets, W, strict=True)])
    shares = explained_shares(G, W, float(left.mean()), kind)
    np.testing.assert_allclose(shares, 1 - left, atol=1e-6)
    assert explained_shares(G, 1.5 * W, float(left.mean()), kind) is None, "no minimum: nothing is claimed"


# ---- which examples ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0, 2.0]), min_size=1, max_size=60), st.integers(1, 9))
@settings(deadline=None)
def test_middle_and_random_are_others_that_use_the_component(values, k):
    w = np.array(values)
    top = np.argsort(-w, kind="stable")[:k]
    top = top[w[top] > 0]
    between = middle(w, top, k)
    others = at_random(w, np.concatenate([top, between]), k, (0, 1))
    chosen = np.concatenate([top, between, others])
    assert len(set(chosen.tolist())) == len(chosen) and (w[chosen] > 0).all()
    assert (w[between] >= 0.1 * w.max()).all()
    for part in (between, others):
        assert len(part) <= k and (np.diff(w[part]) <= 0).all()
    np.testing.assert_array_equal(others, at_random(w, np.concatenate([top, between]), k, (0, 1)))


def test_middle_is_the_middle():
    w = np.linspace(1, 0.2, 41)
    np.testing.assert_array_equal(middle(w, np.arange(11), 4), [24, 25, 26, 27])


# ---- energies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3", "attention.self.query.weight"),
        ("layer1.0.conv1.weight", "layer1.0", "conv1.weight"),
        ("0.bias", "0", "bias"),
        ("head.weight", "head", "weight"),
        ("scale", "(model)", "scale"),
    ],
)
def test_places(name, row, column):
    assert layer_and_part(name) == (row, column)


def test_block_map_holds_all_energy():
    components = components_of()
    energy = components.block_energy(0)
    table = block_map(energy)
    assert table.rows[:2] == ("layer0", "layer1") and table.columns == ("weight", "bias")
    assert np.nansum(table.values) == pytest.approx(1) and np.isnan(table.values[0, 1])
    assert table.totals == pytest.approx(list(energy.values()))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("b.0.attn.q_proj.weight", (12, 5), 0),
        ("b.0.attn.k_proj.bias", (12,), 0),
        ("b.0.attn.out_proj.weight", (5, 12), 1),
        ("b.0.attn.in_proj_weight", (36, 5), 0),
        ("b.0.attn.c_attn.weight", (5, 36), 1),
        ("b.0.attn.c_proj.weight", (12, 5), 0),
        ("b.0.attention.output.dense.weight", (5, 12), 1),
    ],
)
def test_energy_of_a_head(name, shape, axis):
    parameters = Parameters.of([("embed.weight", (3, 3)), (name, shape)])
    block = np.zeros(shape)
    parts = block.shape[axis] // 12
    for part in range(parts):  # head 2 of 4, of 3 units each, in query, key and value alike
        np.moveaxis(block, axis, 0)[12 * part + 6 : 12 * part + 9] = 1.0
    vector = np.concatenate([np.ones(9), block.ravel()])
    vector /= np.linalg.norm(vector)
    table = head_map(parameters, vector, 4)
    assert table.rows == ("b.0",) and table.columns == ("0", "1", "2", "3")
    np.testing.assert_allclose(table.values, [[0, 0, 1 - 9 / (9 + block.sum()), 0]])


def test_heads_by_pattern_and_heads_that_fit_nothing():
    parameters = Parameters.of([("x.mix.weight", (6, 2)), ("x.k_proj.weight", (5, 2))])
    table = head_map(parameters, np.ones(22) / np.sqrt(22), {"x.mix.*": 3})
    np.testing.assert_allclose(table.values, [[4 / 22] * 3])
    check_heads(parameters, {"x.mix.*": 3})
    for wrong in (3, {"y": 2}):
        with pytest.raises(ArgumentError, match="heads: no parameter could be cut"):
            check_heads(parameters, wrong)
    for wrong in (0, "4", {}):
        with pytest.raises(ArgumentError, match="heads: expected a number"):
            check_heads(parameters, wrong)
