"""torchrun and the command line: several processes make what one makes, of every form of rows; or refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import npeff
from npeff.cli import COMMANDS, run
from planted import fishers_of, planted
from processes import all_returned, free_port

SOURCE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()

def data(sizes=(8, 5, 8, 1, 6)):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(n, 6, generator=generator), torch.zeros(n).long()) for n in sizes]

def seven():
    return data((3, 4))
"""

FORMS = {
    "exact": ["--exact"],
    "topk": ["--top-k", "20"],
    "sketch": ["--sketch", "16"],
    "kronecker": ["--sketch", "16", "--sketch-form", "kronecker"],
    "diagonal": ["--kind", "diagonal", "--exact"],
    "diagonal-topk": ["--kind", "diagonal", "--top-k", "20"],
    "ragged": ["--exact", "--energy", "0.8"],
    "sampled": ["--top-k", "20", "--labels", "sampled", "--max-examples", "17"],
    "seven": ["--sketch", "16"],
}
CASES = {name: name for name in ("exact", "topk", "sketch", "diagonal", "ragged", "seven", "lopsided")}
CASES |= {"streamed": "sketch", "balanced": "exact"}
"""Decompositions, and the Fishers they are of."""
SEARCH = ["--n-components", "3", "--n-init", "1", "--n-replacements", "1", "--max-iterations", "30", "--quiet"]
OPTIONS = {"streamed": ["--space", "streamed"], "balanced": ["--block-weights", "balanced"]}


def fishers_command(form: str, out: str) -> list[str]:
    data = "work.py:seven" if form == "seven" else "work.py:data"
    return ["fishers", "work.py:model", data, *FORMS[form], "--out", out, "--quiet"]


def decompose_command(case: str, fishers: str, out: str, several: bool) -> list[str]:
    # One process would take K = A Aᵀ, which several never do: rows for both, so that they take the same steps.
    space = [] if several or "--space" in OPTIONS.get(case, []) else ["--space", "rows"]
    return ["decompose", fishers, *SEARCH, *OPTIONS.get(case, []), *space, "--out", out]


REFUSED = {
    "fishers": ["fishers", "work.py:model", "work.py:data", "--gram-only", "--out", "refused.h5", "--quiet"],
    "decompose": ["decompose", "gram.h5", *SEARCH, "--out", "refused.h5"],
    "--select": ["decompose", "exact.h5", "--n-components", "2,3", "--select", "--out", "refused.h5", "--quiet"],
    "published": ["decompose", "exact.h5", *SEARCH, "--algorithm", "published", "--out", "refused.h5"],
    "encode": ["encode", "c-exact.h5", "exact.h5", "--out", "refused.h5"],
    "export": ["export", "c-exact.h5", "--component", "0", "--out", "refused.safetensors"],
    "report": ["report", "c-exact.h5", "--out", "refused", "--quiet"],
    "info": ["info", "c-exact.h5"],
}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A folder with what one process makes."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "work.py").write_text(SOURCE)
    before = os.getcwd()
    os.chdir(folder)
    try:
        for form in FORMS:
            assert run(fishers_command(form, f"{form}.h5")) == 0
        assert run(["fishers", "work.py:model", "work.py:data", "--gram-only", "--out", "gram.h5", "--quiet"]) == 0
        lopsided, _, _ = planted(8, 3, 30, 0.1, seed=2)
        # All rows belong to the last two examples: with three processes one has no row at all.
        fishers_of(lopsided.rows, np.array([0, 0, 0, 0, 0, 0, 0, 16, 32])).save("lopsided.h5")
        for case, fishers in CASES.items():
            assert run(decompose_command(case, f"{fishers}.h5", f"c-{case}.h5", several=False)) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def many(request, one, tmp_path_factory) -> tuple[Path, dict[str, list[int]], str]:
    """A folder with what several processes make in one launch, the exit statuses of each, and what they said.

    They are forked, with the variables that torchrun sets: they need not import torch again.
    """
    folder = tmp_path_factory.mktemp(f"many-{request.param}")
    (folder / "work.py").write_text(SOURCE)
    for name in ("gram.h5", "lopsided.h5", "c-exact.h5"):
        (folder / name).write_bytes((one / name).read_bytes())
    commands = {f"fishers {form}": fishers_command(form, f"{form}.h5") for form in FORMS}
    for case, fishers in CASES.items():
        commands[f"decompose {case}"] = decompose_command(case, f"{fishers}.h5", f"d-{case}.h5", several=True)
    commands |= {f"refused {name}": command for name, command in REFUSED.items()}
    codes, said = zip(*all_returned(request.param, run_all, str(folder), list(commands.values())), strict=True)
    return folder, dict(zip(commands, map(list, zip(*codes, strict=True)), strict=True)), "".join(said)


def run_all(rank: int, folder: str, commands: list[list[str]]) -> tuple[list[int], str]:
    os.chdir(folder)
    with redirect_stderr(StringIO()) as said:
        codes = [run(command) for command in commands]
    return codes, said.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_fishers_of_every_form_are_those_of_one_process(one, many, form):
    folder, codes, said = many
    assert not any(codes[f"fishers {form}"]), said
    assert (folder / f"{form}.h5").read_bytes() == (one / f"{form}.h5").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_components_of_every_form_are_those_of_one_process(one, many, case):
    folder, codes, said = many
    assert not any(codes[f"decompose {case}"]), said
    found, expected = npeff.load(folder / f"d-{case}.h5"), npeff.load(one / f"c-{case}.h5")
    assert found.loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
    order = np.abs(found.vectors @ expected.vectors.T).argmax(0)
    cosines = (found.vectors[order] * expected.vectors).sum(1)
    assert np.abs(cosines).min() > 1 - 1e-4
    np.testing.assert_allclose(found.coefficients[:, order], expected.coefficients, atol=3e-3)
    for name in ("ids", "labels", "logits", "norms", "columns", "row_offsets"):
        theirs, ours = getattr(found, name), getattr(expected, name)
        assert (theirs is None) == (ours is None)
        assert theirs is None or np.array_equal(theirs, ours), name
    assert (found.row_weights is None) == (expected.row_weights is None)
    if expected.row_weights is not None:  # what `recover` needs: the weights of every process's rows, in their order
        scale = np.abs(expected.row_weights).max()
        weights = found.row_weights[:, order] * np.sign(cosines)
        np.testing.assert_allclose(weights, expected.row_weights, atol=3e-3 * scale)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_out_is_refused(many, what):
    folder, codes, said = many
    assert set(codes[f"refused {what}"]) <= {1, 2}, said
    assert not list(folder.glob("*refused*"))
    assert "Traceback" not in said
    assert f"npeff {what} runs in one process" in said or what not in ("encode", "export", "report", "info")


def test_nothing_else_is_left(many):
    folder, _, _ = many
    kept = {"work.py", "gram.h5", "lopsided.h5", "c-exact.h5", "__pycache__"}
    kept |= {f"{form}.h5" for form in FORMS} | {f"d-{case}.h5" for case in CASES}
    assert {path.name for path in folder.iterdir()} <= kept


def test_only_commands_that_share_their_work_run_in_several_processes():
    from importlib import import_module

    made = {name: getattr(import_module(home), attribute) for name, (home, _, attribute) in
            ((name, target.partition(":")) for name, target in COMMANDS.items())}  # fmt: skip
    assert {name for name, command in made.items() if command.shared} == {"fishers", "decompose"}


def test_the_documented_command(one, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = decompose_command("sketch", "sketch.h5", str(tmp_path / "c.h5"), several=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launch, "-m", "npeff", *command], cwd=one, capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 components of 28 examples") == 1
    assert npeff.load(tmp_path / "c.h5").loss == pytest.approx(npeff.load(one / "c-sketch.h5").loss, rel=1e-4)
