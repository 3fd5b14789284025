"""Companions on a component's page: pixels, tokens, training examples, triples; from Python and the shell."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import npeff
from npeff.cli import run
from npeff.companions import rollback
from npeff.companions.influence import CrossLossInfluence, component_influence, cross_entropy
from npeff.companions.linearize import attribute_component, attribute_top_examples
from npeff.errors import ArgumentError, DataError
from npeff.models.targets import load_data, load_model
from npeff.reports import load_extras, save_extras
from report_cases import Page
from retraining import minimise

DECAY = 1e-2

SOURCE = """
import torch
from torch import nn
from npeff.companions import rollback

def images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 1, 6, 6, generator=generator), torch.arange(60) % 3
    x[torch.arange(60), 0, y, y] += 2
    return x, y

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))

def model():
    made = net()
    made.load_state_dict(torch.load("net.pt", weights_only=True))
    return made.eval()

def train():
    x, y = images()
    return [(x[:20], y[:20]), (x[20:40], y[20:40])]

def data():
    x, y = images()
    return [(x[40:52], y[40:52]), (x[52:], y[52:])]

def graph():
    return rollback.Record.load("record.h5").model().eval()

def triples():
    names = rollback.Vocabulary.of(rollback.read_triples("train.txt"))
    rows = torch.from_numpy(names.encode(rollback.read_triples("test.txt")))
    return [(rows[i : i + 8], rows[i : i + 8, 2]) for i in range(0, len(rows), 8)]

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(20, 5)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, ids):
        return self.read(self.embed(ids))

    def read(self, vectors):
        return self.layers(vectors.mean(1))

def reader():
    return Reader().eval()

def texts():
    ids = torch.randint(1, 20, (16, 4), generator=torch.Generator().manual_seed(3))
    return [(ids[:8], torch.zeros(8, dtype=torch.long)), (ids[8:], torch.ones(8, dtype=torch.long))]

def printed():
    return [{"text": [" ".join(f"w{int(i)}" for i in row) for row in ids], "labels": y} for ids, y in texts()]

def embed(model, ids):
    return model.embed(ids)

def read(model, vectors):
    return model.read(vectors)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, data and their components, as a user's script would have them."""
    here, before = tmp_path_factory.mktemp("companions"), Path.cwd()
    os.chdir(here)
    try:
        (here / "it.py").write_text(SOURCE)
        model = load_model("it.py:net")
        minimise(model, cross_entropy, load_data("it.py:train"), weight_decay=DECAY, tolerance=1e-5)
        torch.save(model.state_dict(), here / "net.pt")
        rng = np.random.default_rng(0)
        rows = [
            [f"e{a}", f"r{b}", f"e{(a + b) % 9}"]
            for a, b in zip(rng.integers(9, size=60), rng.integers(4, size=60), strict=True)
        ]
        for name, part in (("train.txt", rows[:44]), ("test.txt", rows[44:])):
            (here / name).write_text("\n".join("\t".join(row) for row in part))
        known = rollback.Vocabulary.of(rollback.read_triples("train.txt"))
        graph = rollback.DistMult(len(known.entities), len(known.relations), 4)
        rollback.fit(
            graph, known.encode(rollback.read_triples("train.txt")), rollback.Recipe(epochs=5, negatives=4),
            out=here / "record.h5", names={"entities": known.entities, "relations": known.relations}, progress=False,
        )  # fmt: skip
        for model, data, out, parameters in (
            ("model", "data", "c.h5", None),
            ("graph", "triples", "g.h5", None),
            ("reader", "texts", "t.h5", ["layers*"]),
        ):
            made = load_model(f"it.py:{model}")
            fishers = npeff.compute_fishers(
                made, load_data(f"it.py:{data}"), compress=None, parameters=parameters, progress=False
            )
            npeff.decompose(fishers, 2, n_init=1, n_replacements=0, max_iterations=30, progress=False).save(here / out)
    finally:
        os.chdir(before)
    return here


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def page_of(tmp_path, components, data, **extras) -> Page:
    out = npeff.report(components, data, tmp_path / "page.html", progress=False, **extras)
    return Page(out.read_text(encoding="utf-8"))


def from_the_shell(tmp_path, *arguments: str) -> Page:
    out = tmp_path / "shell.html"
    assert run(["report", *arguments, "--out", str(out), "--quiet"]) == 0
    return Page(out.read_text(encoding="utf-8"))


def section(page: Page, j: int, kind: str) -> str:
    """A section of component j's page."""
    article = re.search(rf'<article class="component" id="component-{j}".*?</article>', page.html, re.S)
    assert article is not None
    found = re.search(rf'<section class="examples {kind}">.*?</section>', article.group(0), re.S)
    assert found is not None, f"component {j} has no {kind}"
    return html.unescape(found.group(0))


def without_pictures(markup: str) -> str:
    return re.sub('src="[^"]*"', "", markup)


def test_pixels_behind_a_component(tmp_path, capsys):
    model, components = load_model("it.py:model"), npeff.load("c.h5")
    found = attribute_top_examples(model, components, load_data("it.py:data"), [0], k=3)
    tops = components.top_examples(0, 3).tolist()
    assert set(found) == {(0, i) for i in tops}
    x = torch.cat([x for x, _ in load_data("it.py:data")])[components.ids[tops]]
    maps = attribute_component(model, components, 0, x).maps
    for i, map_ in zip(tops, maps, strict=True):
        np.testing.assert_allclose(found[0, i], map_.numpy(), rtol=1e-4, atol=1e-7)
    page = page_of(tmp_path, components, load_data("it.py:data"), attributions=found)
    shown = section(page, 0, "attributions")
    for i in tops:
        assert f"What in example {components.ids[i]} speaks for component 0" in shown
    assert page.text.count("What in the input speaks for it") == 1, "component 1 was not asked about"

    out = str(tmp_path / "p.json")
    command = ["linearize", "it.py:model", "it.py:data", "--component", "c.h5:0", "-k", "3", "--out", out]
    assert run(command) == 0
    assert "--extras" in capsys.readouterr().out
    for key, map_ in load_extras(out)["attributions"].items():
        np.testing.assert_allclose(map_, found[key], rtol=1e-3, atol=1e-7)  # files keep four digits
    again = section(from_the_shell(tmp_path, "c.h5", "--data", "it.py:data", "--extras", out), 0, "attributions")
    assert without_pictures(again) == without_pictures(shown)


def test_tokens_behind_a_component(tmp_path):
    model, components = load_model("it.py:reader"), npeff.load("t.h5")
    embed, read = (lambda m, ids: m.embed(ids)), (lambda m, vectors: m.read(vectors))
    found = attribute_top_examples(model, components, load_data("it.py:texts"), [1], 2, embed=embed, forward=read)
    assert {value.shape for value in found.values()} == {(4,)}
    page = page_of(tmp_path, components, load_data("it.py:printed"), attributions=found)
    shown = section(page, 1, "attributions")
    words = [word for batch in load_data("it.py:printed") for word in batch["text"]]
    (_, i), weights = next(iter(found.items()))
    strongest = words[components.ids[i]].split()[int(np.abs(weights).argmax())]
    side = "for" if weights[np.abs(weights).argmax()] > 0 else "against"
    assert re.search(rf'class="{side}" style="--v:1.00"[^>]*>{strongest} <', shown)

    out = str(tmp_path / "t.json")
    command = ["linearize", "it.py:reader", "it.py:texts", "--component", "t.h5:1", "-k", "2", "--out", out]
    assert run([*command, "--embed", "it.py:embed", "--forward", "it.py:read"]) == 0
    again = from_the_shell(tmp_path, "t.h5", "--data", "it.py:printed", "--extras", out)
    assert section(again, 1, "attributions") == shown
    with pytest.raises(DataError, match="for tokens pass embed="):
        attribute_top_examples(model, components, load_data("it.py:texts"))
    with pytest.raises(ArgumentError, match="forward: embed= needs"):
        attribute_top_examples(model, components, load_data("it.py:texts"), embed=embed)


def test_training_examples_behind_a_component(tmp_path, capsys):
    model, components = load_model("it.py:model"), npeff.load("c.h5")
    train, data = load_data("it.py:train"), load_data("it.py:data")
    options = {"solver": "exact", "weight_decay": DECAY, "damping": 0.1, "progress": False}
    behind = component_influence(CrossLossInfluence(model, cross_entropy, **options), components, 1, train, data)
    pairs = behind.pairs(12)
    assert [i for i, _ in pairs] == np.argsort(-np.abs(behind.scores.values.sum(1)), kind="stable")[:12].tolist()
    page = page_of(tmp_path, components, data, influences={1: behind}, influence_data=train)
    shown = section(page, 1, "influences")
    assert "+ training on the example raises them" in shown
    for position, score in pairs:
        assert f'alt="Training example {position}"' in shown and f">{score:+.3g}<" in shown
    with pytest.raises(ArgumentError, match=r"influences\[0\]: is about component 1"):
        page_of(tmp_path, components, data, influences={0: behind})

    out = str(tmp_path / "behind.json")
    command = ["influence", "it.py:model", "it.py:train", "it.py:data", "--solver", "exact", "--damping", "0.1"]
    command += ["--weight-decay", str(DECAY), "--quiet", "--component", "c.h5:0,1", "--out"]
    assert run([*command, out]) == 0
    assert f"--extras {out} --influence-data it.py:train" in capsys.readouterr().out
    shell = ("c.h5", "--data", "it.py:data", "--extras", out, "--influence-data", "it.py:train")
    again = from_the_shell(tmp_path, *shell)
    zero, one = (without_pictures(section(again, j, "influences")) for j in (0, 1))
    assert one == without_pictures(shown) and zero != one
    assert run([*command, str(tmp_path / "s.h5")]) == 2
    assert "several components need an --out that ends in .json" in capsys.readouterr().err


def test_training_triples_behind_a_component(tmp_path, capsys):
    record = rollback.Record.load("record.h5")
    explainer = rollback.GradientRollback(record.model(), record)
    components = npeff.load("g.h5")
    rows = torch.cat([rows for rows, _ in load_data("it.py:triples")]).numpy()
    behind = rollback.component_rollback(explainer, components, 0, rows, k=4)
    tops = rows[components.ids[components.top_examples(0, 4)]]
    expected = np.zeros(len(record))
    for target in tops:
        candidates = explainer.candidates(target)
        expected[candidates] += explainer.influence(target, candidates) / 4
    own = [tuple(row) in set(map(tuple, tops.tolist())) for row in np.asarray(record.examples).tolist()]
    expected[own] = 0
    np.testing.assert_allclose(behind.influence, expected, atol=1e-12)
    best = behind.made_by(3)
    assert (behind.influence[best] == np.sort(expected)[::-1][:3]).all()
    page = page_of(tmp_path, components, load_data("it.py:triples"), influences={0: behind})
    shown = section(page, 0, "influences")
    assert "updates are taken back" in shown
    for position in best:
        head, relation, tail = np.asarray(record.examples)[position]
        names = record.names
        assert f"{names['entities'][head]} · {names['relations'][relation]} · {names['entities'][tail]}" in shown

    out = str(tmp_path / "g.json")
    command = ["rollback", "record.h5", "--targets", "test.txt", "--component", "g.h5:0", "-k", "4", "--quiet"]
    assert run([*command, "--out", out]) == 0
    again = from_the_shell(tmp_path, "g.h5", "--data", "it.py:triples", "--extras", out)
    assert section(again, 0, "influences") == shown
    assert run([*command, "--out", "g.tsv"]) == 2 and run([*command, "--out", out, "--check"]) == 2
    capsys.readouterr()
    for options, words in (
        ({"j": 2, "examples": rows}, "j: expected a component below 2, got 2"),
        ({"j": 0, "examples": rows[:1]}, "examples: 1 were given"),
    ):
        with pytest.raises(ArgumentError, match=words):
            rollback.component_rollback(explainer, components, k=4, **options)


def test_files_are_put_together(tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    save_extras(one, attributions={(0, 3): np.ones((2, 2))}, influences={0: [(1, -0.5)]})
    save_extras(two, influences={1: {"pairs": [(4, 2.0)], "by": "mine", "texts": {4: "four"}}})
    both = load_extras(one, two)
    np.testing.assert_array_equal(both["attributions"][0, 3], np.ones((2, 2)))
    assert both["influences"][0]["pairs"] == [[1, -0.5]] and both["influences"][1]["texts"] == {"4": "four"}
    with pytest.raises(ArgumentError, match="attributions of component 0 were given by another file"):
        load_extras(one, one)
    with pytest.raises(ArgumentError, match=r"expected a name ending in .json"):
        save_extras(tmp_path / "x.txt")
    two.write_text(json.dumps({"attributions": {"a": {"b": [1]}}}))
    with pytest.raises(ArgumentError, match="attributions: expected components as whole numbers, got 'a'"):
        load_extras(two)


def test_bad_component_options(capsys):
    for arguments, words in (
        (["linearize", "it.py:model", "it.py:data", "--component", "c.h5:0"], "give --out"),
        (["linearize", "it.py:model", "it.py:data", "--component", "c.h5:9", "--out", "x.json"], "0 to 1, got 9"),
        (["linearize", "it.py:model", "it.py:data", "--component", "c.h5:0", "--out", "x.png"], "ending in .json"),
        (
            ["linearize", "it.py:model", "it.py:data", "--component", "c.h5:0", "--out", "x.json", "--output", "1"],
            "leave",
        ),
        (["linearize", "it.py:model", "it.py:data", "--embed", "it.py:embed"], "--embed belongs to --component"),
        (["influence", "it.py:model", "it.py:train", "it.py:data", "--out", "x.json"], "give --component"),
        (["rollback", "record.h5", "--targets", "test.txt", "--component", "g.h5:0"], "give --out"),
        (["rollback", "record.h5", "--targets", "test.txt", "--epochs", "3"], "--epochs belongs to a training"),
        (["rollback", "record.h5", "--targets", "test.txt", "--dim", "8"], "--dim belongs to a training"),
        (["rollback", "record.h5", "--targets", "test.txt", "--record", "r.h5"], "--record belongs to a training"),
    ):
        assert run(arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())
