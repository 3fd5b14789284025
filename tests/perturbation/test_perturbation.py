"""The effect of moving along a component, against dense Fishers; and what must hold whatever the model."""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import npeff
from npeff.components.factored import slots
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, DataError, ModelError
from npeff.models.parameters import Parameters
from npeff.perturbation.directions import random_direction
from npeff.perturbation.effect import CONTROLS
from npeff.perturbation.figures import FIGURES, Interval, interval
from npeff.perturbation.outputs import correct, curvature, divergence, flipped
from npeff.perturbation.steps import find_step
from perturbation_cases import batches, components_of, deep, fishers_of, flat, linear, same, state

QUICK = {"n_random": 0, "curve": 0, "n_resamples": 0, "progress": False, "top": 5}


@pytest.fixture(scope="module")
def case():
    """A linear-softmax model, its data, components and dense Fishers."""
    model, data = linear(), batches(40, 16)
    return model, data, components_of(model, data), fishers_of(model, data)


# ---- closed forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_kl_is_half_the_squared_step_times_the_fisher(likelihood, sign):
    model, data = linear(), batches(40, 16)
    components, F = components_of(model, data, likelihood=likelihood), fishers_of(model, data, likelihood)
    g = components.vector(2).astype(np.float64)
    g /= np.linalg.norm(g)
    along = np.einsum("m,nmk,k->n", g, F, g)
    effect = npeff.perturb(model, data, components, 2, magnitude=1e-4, sign=sign, **QUICK)
    np.testing.assert_allclose(effect.kl, 0.5e-8 * along, rtol=2e-3)
    assert effect.details["fisher_norm"] == pytest.approx(along.mean(), rel=1e-6)
    assert effect.details["fisher_norm_found_by"] == "forward mode"
    top = along[effect.top].mean() / along.mean()
    assert effect.local_ratio == pytest.approx(top, rel=1e-6)
    assert effect.ratio == pytest.approx(top, rel=2e-3)
    assert (effect.sign, effect.magnitude, effect.target_kl) == (sign, 1e-4, None)


def test_divergences_against_their_definitions():
    generator = torch.Generator().manual_seed(0)
    new, old = (3 * torch.randn(20, 4, generator=generator) for _ in range(2))
    p, q = (np.exp(x.double().numpy()) for x in (new, old))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(divergence(new, old, "categorical"), (p * np.log(p / q)).sum(1))
    p, q = (1 / (1 + np.exp(-x.double().numpy())) for x in (new, old))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1)
    np.testing.assert_allclose(divergence(new, old, "bernoulli"), expected)
    expected = 0.5 * (new.double() - old.double()).square().sum(1)
    np.testing.assert_allclose(divergence(new, old, "gaussian"), expected)
    for likelihood in ("categorical", "bernoulli", "gaussian"):
        assert (divergence(old, old, likelihood) == 0).all()
        step = 1e-4 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
        twice = 2 * divergence(old.double() + step, old.double(), likelihood)
        torch.testing.assert_close(curvature(old, step, likelihood), twice, rtol=1e-2, atol=0)
    certain = torch.tensor([[800.0, 0.0]])
    assert math.isfinite(float(divergence(certain, torch.tensor([[0.0, 0.0]]), "categorical")))


def test_flips_and_accuracy():
    old, new = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert flipped(new, old, "categorical").tolist() == [1, 0]
    assert flipped(new - 0.5, old - 0.5, "bernoulli").tolist() == [0.5, 0]
    assert flipped(new, old, "gaussian").isnan().all()
    right = correct(new, torch.tensor([1, -1]), "categorical")
    assert right[0] == 1 and right[1].isnan()
    assert correct(new[:, :1] + 1, torch.tensor([1, 0]), "bernoulli").tolist() == [1, 0]
    assert correct(new, torch.tensor([1, 0]), "bernoulli").isnan().all()


class NoForwardMode(torch.autograd.Function):
    """An identity that torch has no forward derivative of."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Opaque(nn.Sequential):
    """A model that only central differences can see through."""

    def forward(self, x):
        return NoForwardMode.apply(super().forward(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-3)])
def test_central_differences_where_there_is_no_forward_mode(dtype, tolerance):
    plain = deep()
    data = batches(30, 8, classes=2)
    components, F = components_of(plain, data), fishers_of(plain, data)
    model = Opaque(*plain).eval().to(dtype)
    data = [(x.to(dtype), y) for x, y in data]
    before = state(model)
    effect = npeff.perturb(model, data, components, 0, magnitude=1e-3, **QUICK)
    g = components.vector(0).astype(np.float64)
    along = np.einsum("m,nmk,k->n", g, F, g)
    assert effect.details["fisher_norm_found_by"] == "central differences"
    assert effect.details["fisher_norm"] == pytest.approx(along.mean(), rel=tolerance)
    assert same(before, state(model))


# ---- magnitudes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1e-4, 0.02, 0.1, 0.7, (0.2, 0.3)])
def test_the_wanted_kl_is_reached(case, target):
    model, data, components, _ = case
    effect = npeff.perturb(model, data, components, 1, target_kl=target, **QUICK)
    low, high = target if isinstance(target, tuple) else (0.98 * target, 1.02 * target)
    assert effect.reached and effect.target_kl == pytest.approx((low, high))
    assert len(effect.sign_results) == 2 and {side.sign for side in effect.sign_results} == {1, -1}
    for side in effect.sign_results:
        assert low * (1 - 1e-6) <= side.kl_top <= high * (1 + 1e-6)
        alone = npeff.perturb(model, data, components, 1, magnitude=side.magnitude, sign=side.sign, **QUICK)
        assert alone.kl[alone.top].mean() == pytest.approx(side.kl_top)
        assert alone.ratio == pytest.approx(side.ratio)
    assert effect.ratio == max(side.ratio for side in effect.sign_results)
    assert [side.kept for side in effect.sign_results] == [side.sign == effect.sign for side in effect.sign_results]


@pytest.mark.parametrize(
    "curve",
    [
        lambda x: x**2,
        lambda x: 1e-9 * x**4,
        lambda x: x**0.2,
        lambda x: math.inf if x > 0.9 else x**2,
        lambda x: 0.0 if x < 3 else (x - 3) ** 2,
        lambda x: 5 * math.sin(x) ** 2,
    ],
)
@pytest.mark.parametrize("start", [1e-6, 0.1, 1e4])
def test_search_for_a_magnitude(curve, start):
    tried = []
    found = find_step(lambda x: tried.append(x) or curve(x), (0.098, 0.102), start, 1e9)
    assert found.reached and 0.098 <= curve(found.magnitude) <= 0.102 and found.kl == curve(found.magnitude)
    assert len(tried) < 100


@pytest.mark.parametrize("curve", [lambda x: 0.05 * x / (1 + x), lambda x: 0.0, lambda x: 0.0 if x < 2 else 7.0])
def test_search_says_when_there_is_no_such_magnitude(curve):
    found = find_step(curve, (0.098, 0.102), 0.01, 1e6)
    assert not found.reached and found.kl == curve(found.magnitude) and math.isfinite(found.magnitude)


def test_a_magnitude_beyond_all_bounds_is_refused(case):
    model, data, components, _ = case
    before = state(model)
    with pytest.raises(ArgumentError, match="not finite at 1e\\+308"):
        npeff.perturb(model, data, components, 1, magnitude=1e308, **QUICK)
    assert same(before, state(model))


# ---- controls ------------------------------------------------------------------------------------------------


def test_random_controls_are_as_long_in_the_norm_that_they_name(case):
    model, data, components, F = case
    options = {**QUICK, "n_random": 4, "seed": 7}
    effect = npeff.perturb(model, data, components, 0, target_kl=1e-6, **options)
    g = components.vector(0).astype(np.float64)
    mean = F[effect.baseline].mean(0)
    theta = flat(model)
    for name, control in effect.controls.items():
        assert set(effect.controls) == set(CONTROLS) and control.magnitudes.shape == (4,)
        for draw, size in enumerate(control.magnitudes):
            v = random_direction(18, 7, draw)
            if name == "equal_norm":
                assert size == pytest.approx(effect.magnitude)
            elif name == "equal_fisher_norm":
                assert size**2 * (v @ mean @ v) == pytest.approx(effect.magnitude**2 * (g @ mean @ g), rel=1e-6)
            else:
                for p in components.parameters:
                    v[p.slice] *= np.linalg.norm(g[p.slice]) / np.linalg.norm(v[p.slice])
                assert np.linalg.norm(v) == pytest.approx(1, abs=1e-6)
            half = 0.5 * size**2 * np.einsum("m,nmk,k->n", v, F, v)
            assert control.values["ratio"][draw] == pytest.approx(half[effect.top].mean() / half.mean(), rel=0.03)
    np.testing.assert_array_equal(theta, flat(model))
    values = effect.controls["equal_norm"].values["ratio"]
    assert effect.controls["equal_norm"].share_at_least("ratio", values.max()) == pytest.approx(2 / 5)
    assert effect.ratio > values.mean(), "a component acts on its own examples more than a random direction does"


def test_the_seed_decides_everything_drawn(case):
    model, data, components, _ = case
    options = {**QUICK, "n_random": 2, "n_resamples": 50, "baseline": 20}
    one, two, other = (npeff.perturb(model, data, components, 0, seed=s, **options).to_json() for s in (1, 1, 2))
    assert (one == two and one["baseline"] != other["baseline"]) or one["ids"] != other["ids"]


# ---- figures -------------------------------------------------------------------------------------------------


def test_figures_are_what_they_say(case):
    model, data, components, _ = case
    effect = npeff.perturb(model, data, components, 3, target_kl=0.5, **{**QUICK, "n_resamples": 200, "curve": 3})
    c, kl = effect.coefficient, effect.kl
    np.testing.assert_allclose(c, components.coefficients[:, 3], rtol=1e-6)
    assert set(effect.top) == set(components.top_examples(3, 5).tolist())
    assert len(effect.baseline) == 40 and set(effect.disjoint).isdisjoint(effect.top)
    assert (c[effect.disjoint] <= 0.01 * c[effect.top].mean()).all() and len(effect.disjoint) > 3
    value = {name: interval.value for name, interval in effect.figures.items()}
    assert set(value) == set(FIGURES)
    assert value["ratio"] == pytest.approx(kl[effect.top].mean() / kl.mean())
    assert value["disjoint_ratio"] == pytest.approx(kl[effect.top].mean() / kl[effect.disjoint].mean())
    relative = kl / components.norms
    assert value["normalised_ratio"] == pytest.approx(relative[effect.top].mean() / relative.mean())
    assert value["normalised_rank_correlation"] == pytest.approx(spearmanr(relative, c).statistic)
    with npeff.applied(model, components.state_dict(3), effect.sign * effect.magnitude):
        after = torch.cat([model(x).argmax(1) for x, _ in data])
    before, labels = torch.cat([model(x).argmax(1) for x, _ in data]), torch.cat([y for _, y in data])
    flips = (after != before).double().numpy()
    assert value["flipped_baseline"] == pytest.approx(flips[effect.baseline].mean())
    assert value["flipped_top"] == pytest.approx(flips[effect.top].mean())
    assert effect.accuracy["all"] == pytest.approx([float((p == labels).double().mean()) for p in (before, after)])
    with npeff.applied(model, components.state_dict(3), effect.sign * effect.magnitude), torch.no_grad():
        p = torch.cat([model(x).softmax(1) for x, _ in data])[torch.arange(40), labels].numpy()
    assert value["label_top"] == pytest.approx(p[effect.top].mean(), rel=1e-5)
    assert value["label_baseline"] == pytest.approx(p[effect.baseline].mean(), rel=1e-5)
    right = (after == labels).double().numpy()
    assert effect.accuracy["top"][1] == pytest.approx(right[effect.top].mean())
    assert math.isnan(value.pop("perplexity_ratio"))  # there was no unrelated data
    for figure in map(effect.figures.get, value):
        assert figure.low - 1e-12 <= figure.high
    ratio = effect.figures["ratio"]
    assert ratio.low < ratio.value < ratio.high
    assert effect.curve.top.shape == (2, 3) and (np.diff(effect.curve.top, axis=1) > 0).all()
    kept = [side.sign for side in effect.sign_results].index(effect.sign)
    np.testing.assert_allclose(effect.curve.magnitudes[kept], effect.magnitude * np.geomspace(0.25, 2, 3))


def test_intervals_cover():
    rng = np.random.default_rng(0)
    hits = sum(
        i.low <= 1.0 <= i.high
        for i in (interval(np.mean, rng.exponential(size=60), levels=(0.95, 300, 0)) for _ in range(100))
    )
    assert 84 <= hits <= 100
    assert interval(np.mean, np.full(3, 2.0), levels=(0.95, 99, 0)) == Interval(2.0, 2.0, 2.0)
    assert np.isnan(interval(np.mean, np.array([np.nan])).value)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_figures_of_one_example_of_ties_and_of_unknown_labels(likelihood):
    """Top and baseline that are one and the same example; equal coefficients; labels of −1; a plain computation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1 if likelihood == "bernoulli" else 3)).double().eval()
    data = [(x, torch.where(y == 2, -1, y)) for x, y in batches(12, 5)]
    components = components_of(model, data, likelihood=likelihood)
    tied = components.coefficients.copy()
    tied[:, 0] = [0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0, 0.001, 0, 0.5, 0]
    components = replace(components, coefficients=tied, norms=np.where(np.arange(12) == 3, 0, components.norms))
    options = {**QUICK, "magnitude": 0.8, "sign": 1}
    effect = npeff.perturb(model, data, components, 0, **{**options, "top": 4, "n_resamples": 20})
    assert effect.ids[effect.top].tolist() == [0, 2, 4, 6], "of equal coefficients the first"
    assert effect.disjoint.tolist() == [1, 3, 5, 7, 8, 9, 11], "at most 1 % of the top's mean"
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        before = model(x)
        with npeff.applied(model, components.state_dict(0), 0.8):
            after = model(x)
    if likelihood == "bernoulli":
        before, after = (torch.cat([torch.zeros_like(z), z], 1) for z in (before, after))
    p, q = before.softmax(1), after.softmax(1)
    kl = (q * (q.log() - p.log())).sum(1) if likelihood != "gaussian" else (after - before).square().sum(1) / 2
    np.testing.assert_allclose(effect.kl, kl, rtol=1e-6)
    known = (labels >= 0).numpy()
    own, moved = (of[torch.arange(12), labels.clamp_min(0)].numpy() for of in (p, q))
    right = [(of.argmax(1) == labels).numpy()[known].mean() for of in (before, after)]
    if likelihood == "gaussian":
        assert np.isnan(effect.label_after).all() and np.isnan(effect.flipped).all()
        assert np.isnan(effect.accuracy["all"]).all() and not effect.predictions
    else:
        np.testing.assert_allclose(effect.label_before, np.where(known, own, np.nan), rtol=1e-6)
        np.testing.assert_allclose(effect.label_after, np.where(known, moved, np.nan), rtol=1e-6)
        assert effect.figures["label_baseline"].value == pytest.approx(moved[known].mean())
        assert effect.figures["flipped_baseline"].value == pytest.approx(
            float((before.argmax(1) != after.argmax(1)).double().mean())
        )
        assert effect.accuracy["all"] == pytest.approx(right)
    relative = np.delete(kl.numpy() / components.norms.clip(1e-30), 3)  # a Fisher that vanished has no such figure
    expected = spearmanr(relative, np.delete(tied[:, 0], 3)).statistic
    assert effect.figures["normalised_rank_correlation"].value == pytest.approx(expected)
    one = npeff.perturb(model, data, components, 0, **{**options, "top": [4], "baseline": [4], "n_resamples": 20})
    assert (one.ids.tolist(), one.ratio, one.disjoint.tolist()) == ([4], 1.0, [])
    assert math.isnan(one.figures["disjoint_ratio"].value) and math.isnan(one.figures["ratio"].low)
    assert math.isnan(one.figures["normalised_rank_correlation"].value), "too few examples to rank"
    both = npeff.perturb(model, data, components, 0, **{**options, "top": [4, 1], "baseline": [1, 4, 7]})
    assert both.ratio == pytest.approx(float(kl[[1, 4]].mean() / kl[[1, 4, 7]].mean())), "they may overlap"


def test_unrelated_data_of_a_yes_or_no_question_and_of_outputs_without_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1)).double().eval()
    data = [(x, y) for x, y in batches(12, 5, classes=2)]
    components = components_of(model, data, likelihood="bernoulli")
    effect = npeff.perturb(model, data, components, 0, magnitude=0.3, sign=1, unrelated=data, **QUICK)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        expected = torch.nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y.double())
    assert effect.perplexity[0] == pytest.approx(float(expected.exp()))
    with pytest.raises(DataError, match="unrelated: perplexity is of classes, and 1 gaussian outputs are none"):
        npeff.perturb(model, data, components, 0, magnitude=0.3, unrelated=data, likelihood="gaussian", **QUICK)


def test_json_holds_everything_and_the_table_shows_it(case, tmp_path):
    model, data, components, _ = case
    effect = npeff.perturb(model, data, components, -1, top=5, n_random=2, curve=2, n_resamples=20, progress=False)
    content = json.loads(effect.save(tmp_path / "effect.json").read_text())
    assert content == effect.to_json()
    assert content["figures"]["ratio"]["value"] == pytest.approx(effect.ratio)
    assert len(content["kl"]) == len(content["ids"]) == 40 and len(content["curve"]["top"][0]) == 2
    assert content["components"] == [3] and content["controls"]["equal_norm"]["values"]["ratio"]
    table = effect.table()
    for what in (*CONTROLS.values(), "component 3", FIGURES["ratio"], FIGURES["flipped_top"]):
        assert what in table
    assert "component 3" in repr(effect) and "equal_norm" in repr(effect)


def test_unlabelled_data_and_unlogged_components(case):
    model, data, components, _ = case
    blank = replace(components, labels=np.full(40, -1), logits=np.zeros((40, 0), np.float32))
    effect = npeff.perturb(model, [x for x, _ in data], blank, 0, **QUICK)
    assert all(math.isnan(value) for pair in effect.accuracy.values() for value in pair)
    assert effect.to_json()["accuracy"]["all"] == [None, None] and "accuracy" not in effect.table()
    assert effect.ratio > 1


# ---- strategies ----------------------------------------------------------------------------------------------


def test_a_strategy_taken_each_is_the_average_of_its_members(case):
    model, data, components, _ = case
    group = Strategy((0, 2), components.coefficients[:, [0, 2]].sum(1))
    options = {**QUICK, "magnitude": 0.3, "sign": 1}
    effect = npeff.perturb(model, data, components, group, **options)
    top = group.top_examples(5)
    single = [npeff.perturb(model, data, components, j, **{**options, "top": top}) for j in (0, 2)]
    mass = components.coefficients[:, [0, 2]].sum(0)
    mass = mass / mass.sum()
    np.testing.assert_allclose(effect.kl, mass[0] * single[0].kl + mass[1] * single[1].kl)
    assert (effect.components, effect.combine, effect.sign, len(effect.sign_results)) == ((0, 2), "each", 0, 2)
    assert set(effect.top) == set(top.tolist())
    told = f"j: this strategy is the root of a tree: all {components.n_components} components are used"
    for call in (npeff.perturb, npeff.trace):
        with pytest.warns(UserWarning, match=told):
            call(model, data, components, components.strategies(2), magnitude=0.3, progress=False)
    whole = components.strategies(1)
    principal = npeff.perturb(model, data, components, whole, combine="principal", **QUICK)
    assert principal.reached and principal.combine == "principal" and len(principal.sign_results) == 2
    assert 0 < principal.details["directions"][0]["explained"] <= 1


def factored_and_whole(model, data, r, rank=1):
    """Components known as random factors, and the same as whole vectors."""
    base = components_of(model, data, r)
    parameters, rng = base.parameters, np.random.default_rng(0)
    laid = slots(parameters, rank)
    stored = rng.normal(size=(r, sum(slot.numel for slot in laid))).astype(np.float32)
    for row in stored:
        for slot in laid:
            if slot.rank is not None:  # the rows of right factors are orthonormal
                right = slot.factors(row)[1]
                right[:] = np.linalg.qr(right.T)[0].T
    sketch = {"fishers": {"options": {"compress": {"method": "sketch"}}}}
    lost = np.zeros((r, len(parameters)), np.float32)
    factored = replace(
        base, provenance=sketch, rank=rank, factored=np.arange(r), factored_vectors=stored, factored_lost=lost
    )
    vectors = np.stack([factored.vector(j) for j in range(r)])
    return factored, replace(base, provenance=sketch, recovered=np.arange(r), recovered_vectors=vectors)


def test_vectors_known_as_factors_move_as_whole_ones_do():
    model, data = deep(), batches(30, 8, classes=2)
    factored, whole = factored_and_whole(model, data, 4)
    options = {"top": 8, "n_random": 2, "curve": 2, "n_resamples": 0, "progress": False}
    for j, more in ((1, {}), (Strategy((0, 3), factored.coefficients[:, [0, 3]].sum(1)), {"reject": "span"})):
        found, expected = (npeff.perturb(model, data, c, j, **options, **more) for c in (factored, whole))
        np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-4)
        np.testing.assert_allclose(found.curve.top, expected.curve.top, rtol=1e-4)
        for name, control in found.controls.items():
            np.testing.assert_allclose(control.values["ratio"], expected.controls[name].values["ratio"], rtol=1e-4)
        traces = [
            npeff.trace(model, data, c, j, top=8, n_resamples=0, progress=False, **more) for c in (factored, whole)
        ]
        np.testing.assert_allclose(traces[0].kl_alone, traces[1].kl_alone, rtol=1e-4, atol=1e-12)


def test_a_strategys_directions_are_in_memory_one_at_a_time(monkeypatch):
    monkeypatch.setattr("npeff.perturbation.directions.CHUNK", 100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2)).eval()
    data = [(x.float(), y) for x, y in batches(12, 12, classes=2)]
    parameters = Parameters.of((name, tuple(p.shape)) for name, p in model.named_parameters())
    small = components_of(linear(), batches(12, 12), 10)
    rng, lost = np.random.default_rng(0), np.zeros((10, len(parameters)), np.float32)
    stored = rng.normal(size=(10, sum(slot.numel for slot in slots(parameters, 2)))).astype(np.float32)
    components = replace(
        small, parameters=parameters, rank=2, factored=np.arange(10), factored_vectors=stored, factored_lost=lost,
        provenance={"fishers": {"options": {"compress": {"method": "sketch"}}}}, logits=np.zeros((12, 0), np.float32),
    )  # fmt: skip
    group = Strategy(tuple(range(10)), components.coefficients.sum(1))
    options = {"top": 4, "baseline": 12, "n_random": 1, "curve": 2, "n_resamples": 0, "progress": False}
    npeff.perturb(model, data, components, 0, **options)  # what is imported on the way does not count
    tracemalloc.start()
    try:
        effect = npeff.perturb(model, data, components, group, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(effect.details["directions"]) == 10
    assert peak < 4 * 8 * parameters.n_parameters, "float64 vectors of all parameters"


def test_rejection_reaches_the_measurement(case):
    model, data, components, _ = case
    effect = npeff.perturb(model, data, components, 0, reject="span", magnitude=0.1, sign=1, **QUICK)
    moved = npeff.perturbation.direction(components, 0, reject="span")
    with npeff.applied(model, moved, 0.1), torch.no_grad():
        after = torch.cat([model(x) for x, _ in data])
    with torch.no_grad():
        before = torch.cat([model(x) for x, _ in data])
    np.testing.assert_allclose(effect.kl, divergence(after, before, "categorical").numpy(), rtol=1e-4)
    rejection = effect.to_json()["details"]["directions"][0]["rejection"]
    assert rejection["components"] == [1, 2, 3] and 0 < rejection["kept"] < 1


# ---- the model is left alone ---------------------------------------------------------------------------------


class Counting(nn.Module):
    """Changes a buffer in every forward pass, and fails in one of them."""

    def __init__(self, inner, error=None, at=-1):
        super().__init__()
        self.inner, self.error, self.at = inner, error, at
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.total = 0

    def forward(self, x):
        self.calls += 1
        self.total += 1
        if self.total == self.at:
            raise self.error
        return self.inner(x)


def counted(components):
    named = [(f"inner.{p.name}", p.shape) for p in components.parameters]
    return replace(components, parameters=type(components.parameters).of(named))


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("at", [1, 5, 14, 40])
def test_the_model_is_as_it_was_after_any_failure(error, at):
    inner, data = deep(), batches(30, 8, classes=2)
    inner[0].bias.requires_grad_(False)
    model = Counting(inner, error, at).eval()
    components = counted(components_of(inner, data))
    before = state(model)
    options = {**QUICK, "n_random": 2, "curve": 2}
    with pytest.raises(ModelError if isinstance(error, RuntimeError) else type(error)):
        npeff.perturb(model, data, components, 0, **options)
    assert same(before, state(model))


def test_the_model_is_as_it_was_afterwards_even_its_counters():
    inner, data = deep(torch.float32), batches(30, 8, torch.float32, classes=2)
    model = Counting(inner).eval()
    model.inner.training = True  # a container's mode that matters to nobody
    components = counted(components_of(deep(), batches(30, 8, classes=2)))
    before = state(model)
    npeff.perturb(model, data, components, 0, **{**QUICK, "n_random": 1})
    assert same(before, state(model)) and model.total > 10 and int(model.calls) == 0
    with torch.no_grad():
        assert torch.equal(inner(data[0][0]), inner(data[0][0]))


def test_float32_agrees_with_float64(case):
    _, _, components, _ = case
    options = {**QUICK, "magnitude": 0.5, "sign": 1}
    wide = npeff.perturb(linear(), batches(40, 16), components, 0, **options)
    narrow = npeff.perturb(linear(torch.float32), batches(40, 16, torch.float32), components, 0, **options)
    np.testing.assert_allclose(narrow.kl, wide.kl, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_any_batch_size_gives_the_same(case, size):
    model, data, components, _ = case
    options = {**QUICK, "n_random": 1, "baseline": 25}
    expected = npeff.perturb(model, data, components, 2, **options)
    found = npeff.perturb(model, batches(40, size), components, 2, **options)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=1e-6)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_many_components_with_one_reading(case):
    model, data, components, _ = case
    readings = []

    class Data:
        def __iter__(self):
            readings.append(1)
            return iter(data)

    effects = npeff.perturb_all(model, Data(), components, **QUICK)
    assert [e.components for e in effects] == [(0,), (1,), (2,), (3,)] and len(readings) == 1
    alone = npeff.perturb(model, data, components, 2, **QUICK)
    np.testing.assert_allclose(effects[2].kl, alone.kl)
    idle = components.coefficients.copy()
    idle[:, 1] = 0
    some = npeff.perturb_all(model, data, replace(components, coefficients=idle), **QUICK)
    assert [e.components for e in some] == [(0,), (2,), (3,)]


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"magnitude": 0}, "magnitude: expected a finite number > 0"),
        ({"target_kl": -1}, "target_kl"),
        ({"target_kl": (0.2, 0.1)}, "target_kl"),
        ({"sign": 2}, "sign"),
        ({"reject": "all"}, "reject"),
        ({"max_sim": 0.1}, "max_sim: it belongs to reject"),
        ({"combine": "sum"}, "combine"),
        ({"combine": [1, 2]}, "combine: expected a weight for each of the 1 components"),
        ({"combine": ["a"]}, "combine: expected numbers"),
        ({"prompts": 3.5}, "prompts: expected a list of texts"),
        ({"lam": 0.5}, "diagonal"),
        ({"top": 0}, "top"),
        ({"top": [40]}, "top: expected indices below 40"),
        ({"top": [0.5]}, "top"),
        ({"top": [[1], [2, 3]]}, "top: expected a number of examples"),
        ({"baseline": 0}, "baseline"),
        ({"baseline": "some"}, "baseline"),
        ({"baseline": [-1]}, "baseline"),
        ({"n_random": -1}, "n_random"),
        ({"confidence": 1.0}, "confidence"),
        ({"curve": 1.5}, "curve"),
        ({"seed": -1}, "seed"),
        ({"forward": 3}, "forward"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_options_that_mean_nothing(case, options, words):
    model, data, components, _ = case
    with pytest.raises(ArgumentError, match=words):
        npeff.perturb(model, data, components, 0, **{**QUICK, **options})


def test_other_arguments_that_do_not_go_together(case):
    model, data, components, _ = case
    with pytest.raises(ArgumentError, match="components: expected Components"):
        npeff.perturb(model, data, "components.h5", 0, **QUICK)
    with pytest.raises(ArgumentError, match="model: expected a torch"):
        npeff.perturb("model", data, components, 0, **QUICK)
    with pytest.raises(ArgumentError, match=r"a parameter '0.weight', which Linear has not"):
        npeff.perturb(nn.Linear(5, 3).double(), data, components, 0, **QUICK)
    with pytest.raises(ArgumentError, match=r"0.weight has shape \(4, 5\), expected \(3, 5\)"):
        npeff.perturb(nn.Sequential(nn.Linear(5, 4)).double(), data, components, 0, **QUICK)
    idle = replace(components, coefficients=np.zeros((40, 4), np.float32))
    with pytest.raises(ArgumentError, match="no example has a coefficient"):
        npeff.perturb(model, data, idle, 0, **QUICK)
    with pytest.raises(ArgumentError, match="there is no such option"):
        npeff.perturb_all(model, data, components, [0], speed=3)
    with pytest.raises(ArgumentError, match="which: expected a list of components"):
        npeff.perturb_all(model, data, components, 3, **QUICK)
    training = nn.Sequential(linear()[0], nn.Dropout()).train()
    with pytest.raises(ModelError, match="eval"):
        npeff.perturb(training, data, components, 0, **QUICK)


def test_data_that_is_not_that_of_the_fishers(case):
    model, data, components, _ = case
    with pytest.raises(DataError, match="expected an example at position 16, but it ends after 16"):
        npeff.perturb(model, data[:1], components, 0, **QUICK)
    with pytest.raises(DataError, match="generator may be used up"):
        npeff.perturb(model, iter([]), components, 0, **QUICK)
    known = {"fishers": {"options": {}, "model_digest": npeff.models.parameters.model_digest(model)}}
    stamped = replace(components, provenance=known)
    assert npeff.perturb(model, data, stamped, 0, **QUICK).ratio > 1
    with pytest.raises(DataError, match="have other outputs than when the Fishers were computed, although"):
        npeff.perturb(model, data[::-1], stamped, 0, **QUICK)
    with pytest.warns(UserWarning, match="are model and data the same"):
        npeff.perturb(model, data[::-1], components, 0, **QUICK)
    with npeff.applied(model, components.state_dict(0), 0.1), pytest.warns(UserWarning, match="other weights"):
        npeff.perturb(model, data, stamped, 0, **QUICK)
    with pytest.raises(DataError, match="logits: example 0 "):
        npeff.perturb(model, [(x * torch.nan, y) for x, y in data], components, 0, **QUICK)


def test_components_of_some_of_the_data(case):
    model, data, _, _ = case
    ids = np.array([33, 4, 11, 25, 8, 39, 17, 2])
    components = components_of(model, data, ids=ids)
    effect = npeff.perturb(model, (batch for batch in data), components, 0, **{**QUICK, "top": 3})
    np.testing.assert_array_equal(effect.ids, np.sort(ids))
    np.testing.assert_array_equal(effect.coefficient, components.coefficients[np.argsort(ids), 0])
    top = ids[components.top_examples(0, 3)]
    assert set(effect.ids[effect.top]) == set(top.tolist())
