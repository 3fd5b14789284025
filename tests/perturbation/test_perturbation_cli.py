"""``npeff perturb`` and ``npeff trace`` on a small network that reads digits."""

import json
import os

import pytest
import torch

import npeff
from npeff import demo
from npeff.cli import run

SOURCE = """
import torch
from npeff import heads, units
from npeff import demo

def model():
    net = demo.digits_cnn()
    net.load_state_dict(torch.load("model.pt", weights_only=True))
    return net.eval()

def other():
    return demo.digits_cnn().eval()

def data():
    return demo.digits(batch_size=64).first(120)

class Named(list):
    def output_names(self, classes):
        return [f"digit {c}" for c in classes]

def named():
    return Named(data())

def short():
    return demo.digits(batch_size=64).first(30)

def hidden():
    return units({"5.*": 0, "7.weight": 1}, 4, label="hidden")

def forward(model, batch):
    return model(batch[0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained network, and low-rank and diagonal components of 90 digits."""
    path = tmp_path_factory.mktemp("perturb")
    torch.manual_seed(0)
    digits = demo.digits(batch_size=64).first(120)
    net = demo.train(demo.digits_cnn(), digits, epochs=3, learning_rate=3e-3)
    torch.save(net.state_dict(), path / "model.pt")
    (path / "digits.py").write_text(SOURCE)
    options = {"max_examples": 90, "progress": False, "compress": npeff.TopK(1024)}
    for kind, more in (("low_rank", {"energy": 0.9}), ("diagonal", {})):
        fishers = npeff.compute_fishers(net, digits, kind=kind, **options, **more)
        components = npeff.decompose(fishers, 4, n_init=1, n_replacements=0, max_iterations=30, progress=False)
        components.save(path / f"{kind}.h5")
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


TARGETS = ["digits.py:model", "digits.py:data"]


def test_one_component(folder, capsys):
    command = ["perturb", *TARGETS, "low_rank.h5", "--component", "1", "--n-random", "2", "--top", "16", "--quiet"]
    assert run([*command, "--out", "effect.json", "--unrelated", "digits.py:short"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert "component 1" in lines[0] and "random, equal Fisher norm" in lines[0]
    assert lines[1].startswith("KL on top / KL on baseline") and lines[-1].startswith(
        "effect.json: 1 effect, for npeff report"
    )
    content = json.loads((folder / "effect.json").read_text())
    assert content["components"] == [1] and content["reached"] and len(content["kl"]) == 90
    ratios = [content["figures"]["ratio"]["value"]]  # four components of a loss of 0.53 promise nothing about it
    ratios += [control["figures"]["ratio"]["value"] for control in content["controls"].values()]
    assert len(ratios) == 4 and min(ratios) > 0
    before, after = content["perplexity"]
    assert content["figures"]["perplexity_ratio"]["value"] == pytest.approx(after / before) and before != after
    assert len(content["predictions"]) == 16 and len(content["predictions"][0]["classes"]) == 10
    assert all(0.098 <= result["kl_top"] <= 0.102 for result in content["sign_results"])
    assert len(content["curve"]["magnitudes"][0]) == 8


def test_predictions_are_told_in_words(folder, capsys):
    command = ["perturb", "digits.py:model", "digits.py:named", "low_rank.h5", "-j", "1", "--n-random", "0", "--quiet"]
    assert run([*command, "--top", "3", "--curve", "0", "--out", "named.json"]) == 0
    told = json.loads((folder / "named.json").read_text())["predictions"][0]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  example "))
    before, after = told["before"][0], told["after"][0]
    assert line.startswith(f"  example {told['id']}: 'digit {told['classes'][0]}' {before:.2f} → {after:.2f}, 'digit ")


def test_every_component(folder, capsys):
    command = ["perturb", *TARGETS, "low_rank.h5", "--all", "--n-random", "1", "--baseline", "40", "--quiet"]
    assert run([*command, "--out", "effects.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["component", "KL", "ratio"] and len(lines) == 6
    content = json.loads((folder / "effects.json").read_text())
    assert [effect["components"] for effect in content] == [[0], [1], [2], [3]]
    ratios = [float(line.split()[1]) for line in lines[1:5]]
    assert ratios == sorted(ratios, reverse=True)


def test_options_reach_the_experiment(folder, capsys):
    command = ["perturb", *TARGETS, "low_rank.h5", "--strategy", "0, 2", "--n-random", "0", "--quiet", "--top", "8"]
    options = ["--combine", "principal", "--reject", "span", "--max-sim", "0.9", "--sign", "-1", "--magnitude", "0.05"]
    assert run([*command, *options, "--forward", "digits.py:forward", "--baseline", "all", "--out", "s.json"]) == 0
    content = json.loads((folder / "s.json").read_text())
    assert (content["components"], content["combine"], content["sign"]) == ([0, 2], "principal", -1)
    assert content["magnitude"] == pytest.approx(0.05)
    assert content["details"]["directions"][0]["rejection"]["mode"] == "span"
    assert "components 0, 2" in capsys.readouterr().out


def test_diagonal_components(folder, capsys):
    command = ["perturb", *TARGETS, "diagonal.h5", "-j", "0", "--lam", "0.3", "--lam", "0.7", "--n-random", "1"]
    assert run([*command, "--quiet", "--out", "d.json"]) == 0
    content = json.loads((folder / "d.json").read_text())
    assert {result["lam"] for result in content["sign_results"]} == {0.3, 0.7} and content["reached"]


def test_trace(folder, capsys):
    command = ["trace", *TARGETS, "low_rank.h5", "--component", "2", "--top", "8", "--quiet"]
    for more, n in ((["--groups", "parameter"], 8), (["--groups", "digits.py:hidden"], 5)):
        assert run([*command, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split()[:3] == ["component", "2", "energy"] and len(lines) == n + 2
    assert run([*command, "--out", "where.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "where.png: 4 parts"
    assert (folder / "where.png").read_bytes()[:4] == b"\x89PNG"
    assert run([*command, "--out", "where.json"]) == 0
    assert json.loads((folder / "where.json").read_text())["groups"] == ["0", "2", "5", "7"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["perturb", *TARGETS, "low_rank.h5"], 2, "give either --component J or --strategy"),
        (["perturb", *TARGETS, "low_rank.h5", "-j", "4"], 2, "has components 0 to 3, got 4"),
        (["perturb", *TARGETS, "low_rank.h5", "--strategy", "1,x"], 2, "separated by commas"),
        (["perturb", *TARGETS, "low_rank.h5", "--all", "-j", "1"], 2, "--all takes every component"),
        (["perturb", *TARGETS, "low_rank.h5", "-j", "1", "--baseline", "many"], 2, "--baseline"),
        (["perturb", *TARGETS, "digits.py", "-j", "1"], 1, "digits.py"),
        (["perturb", *TARGETS, "low_rank.h5", "-j", "1", "--out", "absent/x.json"], 1, "absent"),
        (["perturb", *TARGETS, "low_rank.h5", "-j", "1", "--out", "low_rank.h5"], 1, "low_rank.h5"),
        (["perturb", *TARGETS, "low_rank.h5", "-j", "1", "--max-sim", "0.5"], 1, "max_sim: it belongs to reject"),
        (["perturb", "digits.py:model", "digits.py:short", "low_rank.h5", "-j", "1"], 1, "it ends after 30"),
        (["trace", *TARGETS, "low_rank.h5", "-j", "1", "--out", "x.gif"], 2, "ending in .png"),
        (["trace", *TARGETS, "low_rank.h5", "-j", "1", "--groups", "tokens"], 1, "--groups"),
    ],
)
def test_mistakes_are_one_clean_message(folder, arguments, status, words, capsys):
    assert run([*arguments, "--quiet"]) == status
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_another_model_is_noticed(folder, capsys):
    command = ["perturb", "digits.py:other", "digits.py:data", "low_rank.h5", "-j", "0", "--n-random", "0", "--quiet"]
    assert run(command) == 0
    assert "npeff: note: model: it is not the one of the components' Fishers" in capsys.readouterr().err
