"""Perturbations, trust, attributions, influences: shown when given, checked, and absent otherwise."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import npeff
from npeff.errors import ArgumentError, DataError
from npeff.reports import EffectSummary, TrustSummary, load_extras, report
from npeff.reports.evidence import Given
from npeff.reports.examples import RawExample, tokens_of
from npeff.reports.extras import Extras
from npeff.reports.figures import overlay
from perturbation_cases import batches as numbers
from perturbation_cases import components_of as decomposed
from perturbation_cases import linear
from report_cases import EFFECT, batches, components_of, data_of, inline_of, page_of

TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: "".join(f"<{int(i)}>" for i in ids))


def test_without_extras_nothing_is_said_of_them(tmp_path):
    page = page_of(tmp_path, components_of())
    for word in ("Stability", "KL ratio", "chance", "speaks for it", "influence", "When the weights move", "heads"):
        assert word not in page.text


def test_effects(tmp_path):
    given = {0: EFFECT, "1": SimpleNamespace(kl_ratio=np.float32(0.5), magnitudes=None)}
    page = page_of(tmp_path, components_of(), effects=given)
    assert "KL ratio" in page.text and "12.5 KL ratio" in page.text
    assert page.text.count("When the weights move along it") == 1, "no curve, no picture of it"
    assert any("top examples 0.8, baseline 0.05" in svg.get("aria-label", "") for svg in page.all("svg"))
    data = data_of(page.html)
    ratios = {row[0]: row[data["columns"].index("kl_ratio")] for row in data["rows"]}
    assert ratios == {0: 12.5, 1: 0.5, 2: None}


def test_a_ratio_stands_beside_the_largest_of_its_controls(tmp_path):
    figures = {"ratio": {"value": 0.4, "low": 0.1, "high": 0.8}, "disjoint_ratio": {"value": 0.98}}
    controls = {kind: {"figures": {"ratio": {"value": of}}} for kind, of in (("equal_norm", 0.002), ("another", 0.003))}
    page = page_of(tmp_path, components_of(), effects={"components": [0], "figures": figures, "controls": controls})
    assert "0.4 KL ratio 0.003 KL ratio at random" in page.text
    data = data_of(page.html)
    found = {row[0]: row[data["columns"].index("control_ratio")] for row in data["rows"]}
    assert found == {0: 0.003, 1: None, 2: None}
    assert "against the ratio of random directions, not against 1" in page.text
    assert "does not act where its examples are" not in page.text and "on the others" not in page.text
    assert "over KL on a sample of all examples (the baseline): 0.4 [0.1, 0.8]; random, equal norm: 0.002" in page.text
    assert "baseline that have nearly no coefficient: 0.98" in page.text
    assert "At random is the largest" not in page_of(tmp_path, components_of(), effects={0: EFFECT}).text


def test_a_push_is_shown_on_the_examples_with_the_largest_coefficients(tmp_path):
    model, data = linear(), numbers(40, 8)
    components = decomposed(model, data)
    effect = npeff.perturb(model, data, components, 1, top=20, magnitude=0.3, sign=-1, n_random=0, curve=0)
    texts = [(f"text number {i} of them", int(label)) for i, label in enumerate(components.labels)]
    page = page_of(tmp_path, components, [tuple(zip(*texts, strict=True))], effects=effect, k=1)
    order = np.argsort(-components.coefficients[:, 1], kind="stable")[:8].tolist()
    pushed = page.html.split("What the push changes")[1].split("</section>")[0]
    assert [int(i) for i in re.findall(r"text number (\d+) of them", pushed)] == order
    assert "weights moved by −0.3: " in pushed and f"{components.coefficients[order[0], 1]:.2f}" in pushed
    assert "Probability of the label on its top examples, weights moved by −0.3:" in page.text
    pictures = page_of(tmp_path, components, batches(torch.rand(40, 1, 8, 8), components.labels), effects=effect, k=1)
    assert pictures.html.split("What the push changes")[1].split("</section>")[0].count("<img") == 8


def effect(name, value):
    return EffectSummary.of(Given(name, value))


def trust_of(value, r, n):
    return Extras.of({"trust": value}, r, n).trust


def test_effects_as_objects_and_mappings():
    assert effect("effects[0]", EFFECT) == effect(
        "effects[0]", EffectSummary(12.5, (0.0, 0.1, 0.2), (0, 0.2, 0.8), (0, 0.01, 0.05))
    )
    assert effect("effects[0]", {}) == EffectSummary()
    torch_effect = effect("effects[0]", {"magnitudes": torch.tensor([0.0, 1.0]), "kl_top": torch.tensor([0.0, 2.0])})
    assert torch_effect.kl_top == (0.0, 2.0) and torch_effect.kl_baseline == ()


def test_trust(tmp_path):
    components = components_of()
    energy = np.square(components.coefficients).mean(0)
    threshold = float(np.sort(energy)[:2].mean())  # one component is below
    trust = {
        "stability": {
            "components": [0.5, 0.9, 0.95],
            "n_strategies": 2,
            "strategies": {"2": 0.979, "3": 0.981},
            "stable_numbers": [2, 3],
        },
        "null": {"threshold": threshold, "energy": energy.tolist()},
        "selection": {
            "n_components": [2, 3, 4],
            "held_out": [[0.5, 0.3, 0.4], [0.5, 0.32, 0.38]],
            "train": [0.4, 0.2, 0.1],
            "chosen": 3,
        },
        "explained": np.linspace(0, 1, 40),
    }
    page = page_of(tmp_path, components, trust=trust)
    assert "0.90 stable" in page.text and "no more than chance 1" in page.text
    assert page.text.count("Read this one with doubt") == len({0, int(energy.argmin())})
    assert "does not come back when the decomposition is repeated (stability 0.50)" in page.text
    assert "components of shuffled Fishers have as much energy" in page.text
    assert page.text.count("more than chance") == 3, "two components' own pages, and one in all below chance"
    assert page.text.count("of its top examples’ Fishers explained") == 3
    assert page.text.count("0.310 held-out loss of all") == 3
    assert any("least 0.31 at 3" in svg.get("aria-label", "") for svg in page.all("svg"))
    assert len(data_of(page.html)["groups"]) == 2
    assert "2: 0.98, 3: 0.98. 2 or 3 strategies come back about equally well; the smallest number is shown" in page.text
    shares = [record[4] for record in inline_of(page.html, "examples-0")]
    np.testing.assert_allclose(shares, np.linspace(0, 1, 40), rtol=1e-3)


def test_forms_of_trust():
    flat = trust_of([0.1, 0.2], 2, 3)
    np.testing.assert_array_equal(flat.stability, [0.1, 0.2])
    np.testing.assert_array_equal(trust_of({1: 0.2}, 2, 3).stability, [np.nan, 0.2])
    made = SimpleNamespace(components=np.array([0.1, 0.2]), n_strategies=9)
    null = SimpleNamespace(threshold=0.5)
    selection = SimpleNamespace(n_components=(1, 2), held_out=np.ones((3, 2)), train=np.ones(2), chosen=1)
    trust = trust_of({"stability": made, "null": null, "selection": selection}, 2, 3)
    assert (trust.null_threshold, trust.n_strategies, trust.chosen) == (0.5, 2, 1)
    assert trust.held_out == trust.train == ((1, 1.0), (2, 1.0))
    assert trust_of(TrustSummary(chosen=3), 2, 3).chosen == 3 and trust_of({"null": 0.1}, 2, 3).null_threshold == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"effects": [1, 2]}, "effects: expected a mapping, got list"),
        ({"effects": {3: {}}}, "effects: expected components 0 to 2, got 3"),
        ({"effects": {0: {**EFFECT, "kl_top": [1]}}}, r"effects\[0\]: expected curves of one length.*kl_top 1"),
        ({"effects": {0: {"predictions": 5}}}, r"effects\[0\].predictions: expected a list, got 5"),
        ({"effects": {0: {"controls": [1]}}}, r"effects\[0\].controls: expected a mapping from kinds"),
        ({"effects": {0: {"kl_ratio": "much"}}}, r"effects\[0\].kl_ratio: expected numbers"),
        ({"trust": [1, 2]}, "trust.stability: expected 3 numbers"),
        ({"trust": {"explained": [1]}}, "trust.explained: expected 40 numbers"),
        ({"trust": {"selection": {"n_components": [1]}}}, "trust.selection: expected n_components, and held_out"),
        ({"trust": {"stability": {7: 1}}}, "trust.stability: expected components 0 to 2, got 7"),
        ({"attributions": {0: np.ones(3)}}, r"attributions: expected keys \(component, example\), got 0"),
        ({"attributions": {(0, 40): np.ones(3)}}, "attributions: expected examples 0 to 39, got 40"),
        ({"attributions": {(0, 1): np.ones(3)}}, "attributions: need the data"),
        ({"influences": {0: [1, 2]}}, r"influences\[0\]: expected pairs"),
        ({"heads": 4}, "heads: no parameter could be cut"),
        ({"influence_data": 4}, "data: expected an iterable"),
        (
            {"effects": {0: {"predictions": [{"id": 1, "classes": [0.5], "before": [1], "after": [1]}]}}},
            r"effects\[0\].predictions.classes: expected whole numbers ≥ 0, got 0.5",
        ),
    ],
)
def test_other_forms_are_refused(tmp_path, options, words):
    with pytest.raises(ArgumentError, match=words):
        report(components_of(), None, tmp_path / "x.html", **options)
    assert not (tmp_path / "x.html").exists()


def test_what_is_not_known_is_not_shown_as_a_number(tmp_path):
    nan, unknown = float("nan"), {"null": {"threshold": float("nan")}}
    unknown["selection"] = {"n_components": [2, 3], "held_out": [[0.5, nan]], "train": [nan, nan], "chosen": 2}
    parts = {"components": [0], "groups": ["a part"], "energy": [nan], "alone": [{"value": nan}], "lost": [None]}
    moved = {"kl_ratio": nan, "controls": {"at random": nan}, "label": [0.5, nan], "perplexity": [nan, nan]}
    page = page_of(tmp_path, components_of(), effects={0: moved}, trust=unknown, traces=parts)
    for word in ("KL ratio", "at random", "label on its top", "Perplexity", "chance", "held-out loss of all", " nan "):
        assert word not in page.text
    assert "a part – · –" in page.text
    shifts = {"predictions": [{"id": 3, "classes": [1], "before": [nan], "after": [0.2]}]}
    assert "– → 20 %" in page_of(tmp_path, components_of(), effects={0: shifts}).text


def test_attributions_of_images(tmp_path):
    components = components_of()
    i = int(components.top_examples(1)[0])
    data = batches(torch.rand(40, 1, 8, 8), components.labels)
    page = page_of(tmp_path, components, data, attributions={(1, i): torch.randn(1, 8, 8)})
    assert page.text.count("What in the input speaks for it") == 1
    assert page.all("img", alt=f"What in example {i} speaks for component 1")
    (drawn,) = inline_of(page.html, "examples-0")[i][7]
    assert drawn[0] == 1 and drawn[1]["uri"].startswith("data:image/png")
    with pytest.raises(ArgumentError, match=r"attributions\[1, \d+\]: expected shape \(8, 8\)"):
        page_of(tmp_path, components, [torch.rand(40, 1, 8, 8)], attributions={(1, i): torch.randn(7, 8)})


def test_overlay_colours():
    grey = np.full((4, 4), 128, np.uint8)
    weights = np.zeros((4, 4))
    weights[0, 0], weights[3, 3] = 2.0, -2.0
    drawn = overlay(grey, weights).astype(int)
    assert drawn[0, 0, 0] > drawn[0, 0, 2] + 50 and drawn[3, 3, 2] > drawn[3, 3, 0] + 50
    assert len(set(drawn[1, 1])) == 1, "grey where nothing speaks"
    for form in (weights[None], weights[..., None], weights[None, None]):
        np.testing.assert_array_equal(overlay(grey, form), drawn)
    assert np.isfinite(overlay(grey, np.full((4, 4), np.nan))).all()


def test_attributions_of_tokens(tmp_path):
    components = components_of(n=10, r=2)
    i = int(components.top_examples(0)[0])
    ids = torch.arange(10)[:, None] + torch.tensor([[0, 100, 200]])
    data = [{"input_ids": ids, "labels": torch.as_tensor(components.labels)}]
    page = page_of(tmp_path, components, data, tokenizer=TOKENIZER, attributions={(0, i): [1.0, -2.0, 0.0]})
    (drawn,) = inline_of(page.html, "examples-0")[i][7]
    assert drawn == [0, {"tokens": [[f"<{i}>", 0.5], [f"<{i + 100}>", -1.0], [f"<{i + 200}>", 0.0]]}]
    assert f"<{i}>" in page.text, "escaped in the markup"
    words = [["one two <b> four"] * 10]
    page = page_of(tmp_path, components, words, attributions={(0, i): [1, 0, 3, 0]})
    assert "<b>" in page.text and "<b> " not in page.html
    with pytest.raises(ArgumentError, match="3 weights for a text of 4 words"):
        page_of(tmp_path, components, words, attributions={(0, i): [1, 0, 3]})


def test_tokens_without_padding():
    example = RawExample(text="a b", ids=np.array([1, 2, 0, 0]))
    assert tokens_of(example, 2, TOKENIZER, "x") == ["<1>", "<2>"]
    assert tokens_of(example, 2, None, "x") == ["a ", "b "]


def test_attributions_of_values(tmp_path):
    components = components_of(n=12, r=2)
    page = page_of(tmp_path, components, [torch.randn(12, 13)], attributions={(0, 3): np.ones(13)})
    assert page.all("img", alt="What in example 3 speaks for component 0")
    with pytest.raises(ArgumentError, match="expected shape"):
        page_of(tmp_path, components, [torch.randn(12, 13)], attributions={(0, 3): np.ones(12)})


def test_influences(tmp_path):
    scores = {1: {5: -0.5, 2: 3.0}, 2: np.array([[7, 0.1]])}
    page = page_of(tmp_path, components_of(), influences=scores)
    assert page.text.count("Training examples with the largest influence") == 2
    assert page.text.index("+3") < page.text.index("-0.5"), "by magnitude"
    training = [torch.rand(9, 1, 8, 8)]
    page = page_of(tmp_path, components_of(), influences=scores, influence_data=training)
    assert {img["alt"] for img in page.all("img")} == {f"Training example {i}" for i in (2, 5, 7)}
    texts = page_of(tmp_path, components_of(), influences=scores, influence_data=[[f"review {i}" for i in range(9)]])
    assert "review 7" in texts.text
    with pytest.raises(DataError, match="influence_data: has 7 examples, and example 7 is asked for"):
        page_of(tmp_path, components_of(), influences=scores, influence_data=[torch.rand(7, 1, 8, 8)])


def test_extras_from_a_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps({"effects": {"0": EFFECT}, "trust": {"stability": [1, 2, 3]}, "influences": {"1": [[0, 1]]}})
    )
    page = page_of(tmp_path, components_of(), **load_extras(path))
    assert "12.5" in page.text and "Stability" in page.text and "largest influence" in page.text
    for wrong in ("[1]", "{", '{"effect": 1}'):
        path.write_text(wrong)
        with pytest.raises(ArgumentError, match=r"x\.json: expected a JSON"):
            load_extras(path)
    with pytest.raises(ArgumentError, match="absent"):
        load_extras(tmp_path / "absent.json")


def test_heads(tmp_path):
    page = page_of(tmp_path, components_of(), heads={"layer?.weight": 3})
    assert page.text.count("Which heads carry it") == 3 and page.text.count("Which layers carry it") == 3
