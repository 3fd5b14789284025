"""Sketches and inner products from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import npeff
from npeff.cli import run
from npeff.fishers.options import Sketch

TARGETS = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3)).eval()

def data():
    torch.manual_seed(1)
    return [torch.randn(8, 12) for _ in range(3)]
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sketch", "64"], Sketch(64)),
        (["--sketch", "16", "--sketch-form", "kronecker", "--seed", "4"], Sketch(16, 4, "kronecker")),
        (["--gram-only"], None),
    ],
)
def test_command_line(tmp_path: Path, options: list[str], expected: Sketch | None) -> None:
    targets = tmp_path / "targets.py"
    targets.write_text(TARGETS)
    fishers, components = tmp_path / "f.h5", tmp_path / "c.h5"
    run(["fishers", f"{targets}:model", f"{targets}:data", "--out", str(fishers), "--quiet", *options])
    opened = npeff.load(fishers)
    assert isinstance(opened, npeff.Fishers) and opened.sketch == expected
    options = ["--memory", "1GB", "--quiet", "--n-replacements", "1", "--n-init", "1"]
    code = run(["decompose", str(fishers), "--n-components", "2", "--out", str(components), *options])
    assert code == 0 and npeff.load(components).coefficients.shape == (24, 2)
    assert run(["info", str(fishers)]) == 0


def test_command_line_takes_one_way_to_keep_rows(tmp_path: Path) -> None:
    for options in (["--sketch", "64", "--exact"], ["--top-k", "5", "--gram-only"], ["--sketch-form", "kronecker"]):
        assert run(["fishers", "a.py:b", "a.py:c", "--out", str(tmp_path / "f.h5"), *options]) == 2
