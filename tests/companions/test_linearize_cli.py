"""``npeff linearize``: what it prints, writes and refuses."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from npeff.cli import run
from npeff.companions.linearize import linearize
from npeff.models.targets import load_data, load_model

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    return nn.Sequential(*layers).eval()

def data():
    images = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [(images[:4], torch.zeros(4)), (images[4:], torch.zeros(3))]

def vectors():
    return [(images.flatten(1), labels) for images, labels in data()]

def forward(model, x):
    return model(x.view(-1, 1, 8, 8))

def smooth():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.GELU(), nn.Linear(4, 2)).eval()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_it_says_and_writes(folder, capsys):
    command = ["linearize", "net.py:model", "net.py:data", "--example", "5", "--output", "2"]
    assert run([*command, "--out", "p.png", "--table", "t.csv"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("example 5, output 2: ") and "left over: " in said and "the biases of 3" in said
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 66 and rows[9]["position"] == "0, 1, 1"
    value = float(said.split("output 2: ")[1].split()[0])
    assert abs(sum(float(row["contribution"]) for row in rows) - value) <= 1e-5
    pixel = rows[20]
    assert float(pixel["value"]) * float(pixel["weight"]) == pytest.approx(float(pixel["contribution"]), rel=1e-5)


def test_pictures_of_contributions(folder, monkeypatch):
    """A picture stands beside W and its contributions; of other inputs the largest numbers are bars."""
    drawn, write = [], Figure.savefig

    def noted(figure, *where, **how):
        drawn.append(figure)
        write(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", noted)
    command = ["linearize", "net.py:model", "--output", "2", "--out", "p.png"]
    assert run([*command, "net.py:data"]) == 0
    titles = ["input", "output 2: W", "output 2: W∘x"]
    assert [axes.get_title() for axes in drawn[0].axes] == titles
    (x, _), *_ = load_data("net.py:data")
    linear = linearize(load_model("net.py:model"), x[:1], 2)
    for axes, values in zip(drawn[0].axes[1:], (linear.W[0, 0, 0], linear.contributions()[0, 0, 0]), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), values, rtol=1e-5, atol=1e-7)
        assert axes.images[0].get_clim()[1] == pytest.approx(float(values.abs().max()))
    assert run([*command, "net.py:vectors", "--forward", "net.py:forward"]) == 0
    assert [axes.get_title() for axes in drawn[1].axes] == titles[1:]
    widths = [bar.get_width() for bar in drawn[1].axes[1].patches]
    largest = linear.contributions().flatten().double().abs().sort(descending=True).values[:40]
    np.testing.assert_allclose(sorted(map(abs, widths), reverse=True), largest, rtol=1e-5)


def test_layers_vectors_and_the_largest_output(folder, capsys):
    assert run(["linearize", "net.py:model", "net.py:data", "--at", "1"]) == 0
    said = capsys.readouterr().out
    assert "from the output of 1" in said and "the output of 1[" in said
    assert run(["linearize", "net.py:model", "net.py:vectors", "--forward", "net.py:forward", "--out", "b.svg"]) == 0
    assert (folder / "b.svg").read_text().startswith("<?xml")


def test_smooth_models(folder, capsys):
    assert run(["linearize", "net.py:smooth", "net.py:data"]) == 1
    assert "2 (GELU): gelu, gate held" in capsys.readouterr().err
    assert run(["linearize", "net.py:smooth", "net.py:data", "--smooth", "freeze"]) == 0
    assert "not piecewise linear: 2 (GELU)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--example", "7"], 1, "data: it has 7 examples, and example 7 is asked for"),
        (["--output", "3"], 2, "--output: expected a position below 3, got 3"),
        (["--at", "layer"], 1, "at: expected 'input' or the name of a layer, got 'layer'"),
        (["--out", "p.txt"], 2, "--out: expected a name ending in .png, .svg or .pdf"),
        (["-k", "3"], 2, "-k belongs to --component"),
        (["--component", "c.h5:0", "--out", "x.json", "--at", "1"], 2, "--at: a component is attributed to the input"),
        (["--table", "t.h5"], 2, "--table: expected a name ending in .csv"),
        (["--out", "absent/p.png"], 1, "the folder absent does not exist"),
    ],
)
def test_what_is_refused(folder, capsys, arguments, status, words):
    assert run(["linearize", "net.py:model", "net.py:data", *arguments]) == status
    assert words in capsys.readouterr().err
