"""Where a component acts: parts that add up where they must, heads and units that are the right rows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import npeff
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.models.parameters import Parameters
from npeff.perturbation.outputs import divergence
from npeff.perturbation.tracing import REST, Part, marked, resolve
from perturbation_cases import batches, components_of, deep, flat, linear, same, state

QUICK = {"n_resamples": 0, "progress": False, "top": 6}


def weights_of(model, parts):
    """Flat mask of elements."""
    names = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    parameters = Parameters.of(names)
    return {name: marked(parameters, e).astype(np.float64) for name, e in resolve(parts, parameters).items()}


def test_parts_with_outputs_of_their_own_add_up():
    """Rows of the last layer move different outputs: with a Gaussian likelihood KL is the sum of theirs."""
    model, data = linear(), batches(30, 8)
    components = components_of(model, data, likelihood="gaussian")
    before = state(model)
    rows = npeff.units({"0.weight": 0, "0.bias": 0}, 3)
    trace = npeff.trace(model, data, components, 1, rows, target_kl=0.3, **{**QUICK, "n_resamples": 100})
    alone, lost = (np.array([i.value for i in part]) for part in (trace.alone, trace.lost))
    assert trace.groups == ("units 0", "units 1", "units 2") and alone.sum() == pytest.approx(1)
    np.testing.assert_allclose(alone, lost, atol=1e-10)
    np.testing.assert_allclose(trace.kl_alone.sum(0), trace.kl)
    np.testing.assert_allclose(trace.kl_alone + trace.kl_without, np.tile(trace.kl, (3, 1)))
    g = components.vector(1).astype(np.float64)
    energy = [(g[5 * i : 5 * i + 5] ** 2).sum() + g[15 + i] ** 2 for i in range(3)]
    np.testing.assert_allclose(trace.energy, energy, rtol=1e-6)
    for interval in trace.alone + trace.lost:
        assert interval.low <= interval.value <= interval.high
    assert same(before, state(model))


def test_parts_against_perturbations_by_hand():
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data)
    options = {**QUICK, "magnitude": 0.7, "sign": -1}
    trace = npeff.trace(model, data, components, 2, "parameter", **options)
    assert trace.groups == components.parameters.names and trace.magnitude == pytest.approx(0.7)
    x = torch.cat([x for x, _ in data])[np.sort(components.top_examples(2, 6))]
    direction = components.state_dict(2)

    def kl(names):
        with torch.no_grad():
            before = model(x)
            with npeff.applied(model, {name: direction[name] for name in names}, -0.7):
                return divergence(model(x), before, "categorical").numpy()

    every = list(direction)
    np.testing.assert_allclose(trace.kl, kl(every), rtol=1e-5)
    for g, name in enumerate(trace.groups):
        np.testing.assert_allclose(trace.kl_alone[g], kl([name]), rtol=1e-5, atol=1e-14)
        others = [other for other in every if other != name]
        np.testing.assert_allclose(trace.kl_without[g], kl(others), rtol=1e-5, atol=1e-14)
        assert trace.alone[g].value == pytest.approx(kl([name]).mean() / kl(every).mean(), rel=1e-5, abs=1e-12)
        assert trace.lost[g].value == pytest.approx(1 - kl(others).mean() / kl(every).mean(), rel=1e-5, abs=1e-9)


def test_layers_are_the_default_and_the_rest_is_shown():
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data)
    layers = npeff.trace(model, data, components, 0, **QUICK)
    assert layers.groups == ("0", "1", "3") and layers.energy.sum() == pytest.approx(1, abs=1e-6)
    some = npeff.trace(model, data, components, 0, {"last": "3.*"}, **QUICK)
    assert some.groups == ("last", REST)
    assert some.alone[0].value == pytest.approx(layers.alone[2].value)
    assert some.kl_alone[1] == pytest.approx(some.kl_without[0]) and some.energy.sum() == pytest.approx(1, abs=1e-6)
    both = [npeff.trace(model, data, components, 0, sign=s, **QUICK) for s in (1, -1)]
    np.testing.assert_allclose(layers.kl, (both[0].kl + both[1].kl) / 2)
    group = Strategy((0, 1), components.coefficients[:, :2].sum(1))
    assert npeff.trace(model, data, components, group, **QUICK).components == (0, 1)


def test_diagonal_components():
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data, kind="diagonal")
    trace = npeff.trace(model, data, components, 1, lam=0.5, **QUICK)
    assert trace.energy.sum() == pytest.approx(1, abs=1e-6) and trace.kl.mean() == pytest.approx(0.1, rel=0.021)


def test_heads_are_the_rows_and_columns_that_torch_gives_them():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    masks = weights_of(attention, npeff.heads({"in_proj_*": (0, 3), "out_proj.weight": 1}, 4))
    assert list(masks) == [f"head {i}" for i in range(4)]
    total = sum(masks.values())
    parameters = Parameters.of((n, tuple(p.shape)) for n, p in attention.named_parameters())
    assert (total[parameters.block("out_proj.bias")] == 0).all()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        _, before = attention(x, x, x, average_attn_weights=False)
        direction = {name: torch.from_numpy(part) for name, part in parameters.unflatten(masks["head 2"]).items()}
        with npeff.applied(attention, direction, 0.5):
            _, after = attention(x, x, x, average_attn_weights=False)
    changed = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False], "the rows of one head change its attention alone"


def test_groups_of_many_forms():
    model = deep()
    masks = weights_of(
        model,
        {
            "row": ("0.weight", (2, slice(None))),
            "several": ["0.bias", ("3.weight", (slice(None), [0, 5]))],
            "part": Part("3.weight", 1, 1, 3),
        },
    )
    unflatten = Parameters.of((n, tuple(p.shape)) for n, p in model.named_parameters()).unflatten
    row, several, part = (unflatten(masks[name]) for name in ("row", "several", "part"))
    assert row["0.weight"][2].all() and masks["row"].sum() == 5
    assert several["0.bias"].all() and several["3.weight"][:, [0, 5]].all() and masks["several"].sum() == 6 + 4
    assert part["3.weight"][:, 2:4].all() and masks["part"].sum() == 4
    labelled = npeff.heads("0.*", 2, label="layer 0") | npeff.units({"3.weight": 1}, 2, label="layer 3")
    assert list(labelled) == ["layer 0 · head 0", "layer 0 · head 1", "layer 3 · units 0", "layer 3 · units 1"]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("block", "expected 'layer', 'parameter' or a mapping"),
        ({}, "expected 'layer', 'parameter' or a mapping"),
        ({"a": "absent.*"}, "matches none"),
        ({"a": []}, "expected patterns"),
        ({"a": 3}, "expected patterns"),
        ({"a": [3]}, "expected a pattern"),
        ({"a": ("0.bias", (slice(None), 0))}, "is no index of 0.bias"),
        ({"a": ("0.bias", slice(9, 12))}, "takes nothing"),
        (npeff.heads("0.weight", 4), "does not divide into 1 × 4 parts"),
        (npeff.heads({"0.bias": 1}, 2), "no dimension 1"),
    ],
)
def test_groups_that_fit_nothing(groups, words):
    model, data = deep(), batches(10, 8, classes=2)
    with pytest.raises(ArgumentError, match=words):
        npeff.trace(model, data, components_of(model, data), 0, groups, **QUICK)


def test_helpers_refuse_no_heads():
    with pytest.raises(ArgumentError, match="an integer ≥ 1, got 0"):
        npeff.heads("0.weight", 0)
    with pytest.raises(ArgumentError, match="parameters: expected patterns"):
        npeff.heads(3, 2)
    with pytest.raises(ArgumentError, match="expected a dimension, or"):
        npeff.units({"0.weight": "rows"}, 2)


def test_a_magnitude_beyond_all_bounds_is_refused():
    model, data = linear(), batches(30, 8)
    with pytest.raises(ArgumentError, match="not finite at 1e\\+308"):
        npeff.trace(model, data, components_of(model, data), 0, magnitude=1e308, **QUICK)


def test_pictures_tables_and_json(tmp_path):
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data)
    bars = npeff.trace(model, data, components, 0, "parameter", **{**QUICK, "n_resamples": 30})
    labelled = npeff.units({"0.*": 0, "3.weight": 1}, 6, label="hidden")
    heat = npeff.trace(model, data, components, 0, labelled, **QUICK)
    for name, trace in (("bars", bars), ("heat", heat)):
        svg = trace.plot(tmp_path / f"{name}.svg").read_text()
        assert "component 0" in svg and "lost without this part" in svg
    assert svg == heat.plot(tmp_path / "again.svg").read_text(), "the same trace gives the same file"
    with Image.open(heat.plot(tmp_path / "heat.png")) as image:
        assert min(image.size) > 250 and len(np.unique(np.asarray(image))) > 20
    assert "0.weight" in (tmp_path / "bars.svg").read_text() and "units 5" in (tmp_path / "heat.svg").read_text()
    few = bars.plot(tmp_path / "few.svg", most=2).read_text()
    assert "4 parts that carry less are left out" in few
    table = bars.table().splitlines()
    assert len(table) == 8 and table[1].startswith("0.weight") and table[-1].startswith("sum")
    content = json.loads(bars.save(tmp_path / "trace.json").read_text())
    assert content == bars.to_json() and content["groups"] == list(bars.groups)
    assert content["alone"][0]["value"] == pytest.approx(bars.alone[0].value)
    with pytest.raises(ArgumentError, match="expected a name ending in"):
        bars.plot(tmp_path / "trace.gif")
    assert "most in" in repr(bars) and len(bars) == 6


def test_the_model_is_as_it_was_after_a_failure():
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data)
    calls = []

    def failing(inner, batch):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return inner(batch[0])

    before, theta = state(model), flat(model)
    with pytest.raises(KeyboardInterrupt):
        npeff.trace(model, data, components, 0, forward=failing, **QUICK)
    assert same(before, state(model)) and (flat(model) == theta).all()


def test_components_on_some_columns():
    model, data = deep(), batches(30, 8, classes=2)
    components = components_of(model, data)
    columns = np.arange(0, 62, 2)
    some = replace(components, vectors=components.vectors[:, columns], columns=columns)
    trace = npeff.trace(model, data, some, 1, "parameter", **QUICK)
    np.testing.assert_allclose(trace.energy, list(some.block_energy(1).values()), rtol=1e-5)


@pytest.mark.slow
def test_heads_of_bert():
    transformers = pytest.importorskip("transformers", reason="the trace of BERT needs transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    data = [
        {
            "input_ids": torch.randint(40, (4, t), generator=generator),
            "attention_mask": torch.ones(4, t, dtype=torch.int64),
            "labels": torch.randint(3, (4,), generator=generator),
        }
        for t in (6, 9, 6)
    ]
    parameters = Parameters.of((name, tuple(p.shape)) for name, p in model.named_parameters())
    rng = np.random.default_rng(0)
    G = rng.normal(size=(2, parameters.n_parameters)).astype(np.float32)
    small = components_of(linear(), batches(12, 4), r=2)
    components = replace(
        small,
        vectors=G / np.linalg.norm(G, axis=1, keepdims=True),
        parameters=parameters,
        logits=np.zeros((12, 0), np.float32),
    )
    before = state(model)
    parts: dict = {}
    for i in range(2):
        at = f"bert.encoder.layer.{i}.attention"
        inside = {f"{at}.self.{x}.*": 0 for x in ("query", "key", "value")}
        parts |= npeff.heads({**inside, f"{at}.output.dense.weight": 1}, 4, label=f"layer {i}")
    trace = npeff.trace(model, data, components, 0, parts, target_kl=0.05, **QUICK)
    assert len(trace) == 9 and trace.groups[-1] == REST and trace.groups[5] == "layer 1 · head 1"
    assert trace.energy.sum() == pytest.approx(1, abs=1e-6) and trace.kl.mean() == pytest.approx(0.05, rel=0.021)
    effect = npeff.perturb(
        model, data, components, 0, n_random=0, curve=0, n_resamples=0, target_kl=1e-7, top=6, progress=False
    )
    quadratic = 0.5 * effect.magnitude**2 * effect.details["fisher_norm"]
    assert effect.kl[effect.baseline].mean() == pytest.approx(quadratic, rel=0.05)
    assert same(before, state(model))
