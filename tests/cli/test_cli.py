"""The command line: help, exit statuses, messages, and the whole pipeline from a model to a page."""

import csv
import json
import os
import runpy
import shlex
import subprocess
import sys
from functools import wraps
from importlib import import_module

import numpy as np
import pytest
from safetensors.numpy import load_file

import npeff
from npeff.cli import COMMANDS, run
from npeff.cli.command import command
from npeff.errors import DataError
from way_cases import SEARCH

SOURCE = """
import torch

def model():
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).eval()

def data(start=0, stop=60):
    inputs = torch.rand(200, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 3
    return [(inputs[i:i + 20], labels[i:i + 20]) for i in range(start, stop, 20)]

def new():
    return data(60, 100)

def forward(model, batch):
    return model(batch[0])

def training_mode():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(36), torch.nn.Linear(36, 3)).train()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, data, and the files that the first commands make of them."""
    path = tmp_path_factory.mktemp("cli")
    (path / "tiny.py").write_text(SOURCE)
    before = os.getcwd()
    os.chdir(path)
    assert run(["fishers", "tiny.py:model", "tiny.py:data", "--exact", "--out", "fishers.h5", "--quiet"]) == 0
    assert run(["fishers", "tiny.py:model", "tiny.py:new", "--exact", "--out", "new.h5", "--quiet"]) == 0
    assert run(["decompose", "fishers.h5", "--n-components", "4", "--out", "components.h5", *SEARCH]) == 0
    yield path
    os.chdir(before)


def test_help_imports_nothing_heavy():
    code = "import sys; from npeff.cli import run; run(['--help']); print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "h5py", "scipy", "matplotlib", "jinja2", "PIL", "sklearn", "safetensors", "numpy", "tqdm"}
    assert heavy.isdisjoint(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(command, capsys):
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  npeff {command}" in text and "Examples:" in text
    for option in ("--debug", "--help"):
        assert option in text


def test_help_lists_the_commands_in_the_order_of_the_pipeline(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out.partition("Commands:")[2]
    assert [line.split()[0] for line in text.splitlines() if line.strip()] == list(COMMANDS)


def test_as_module_and_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["npeff", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("npeff", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("npeff ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fisher"], "There is no command 'fisher'. Did you mean 'fishers'?"),
        (["xyz"], "There is no command 'xyz'."),
        (["mend"], "There is no command 'mend': it is a function in Python alone, npeff.mend"),
        (["expand"], "There is no command 'expand': it is a function in Python alone, npeff.expand"),
        (["compute_fishers"], "There is no command 'compute_fishers'. Did you mean 'fishers'?"),
        (["fishers", "m:f"], "Missing argument 'DATA'"),
        (["fishers", "m:f", "d:f"], "Missing option '--out'"),
        (["fishers", "m:f", "d:f", "--out", "x.h5", "--exact", "--top-k", "3"], "--exact keeps all values"),
        (["fishers", "m:f", "d:f", "--out", "x.h5", "--top-k", "0"], "0 is not in the range x>=1"),
        (["decompose", "absent.h5", "--n-components", "3", "--out", "x.h5"], "'absent.h5' does not exist"),
        (
            ["decompose", __file__, "--n-components", "3", "--out", "x", "--orthogonality", "big"],
            "a number or 'hard'",
        ),
        (["encode", __file__, __file__, "--out", "x.txt"], "ending in .h5, .npz or .csv"),
        (["export", __file__, "--out", "x"], "either --layout published or --component J"),
        (["report", __file__, "-k", "few"], "'-k': expected a whole number, got 'few'"),
        (["report", __file__, "--heads", "few"], "'--heads': expected a whole number, got 'few'"),
        (["trust", __file__, __file__, "--shuffles", "-1"], "-1 is not in the range x>=0"),
        (["doctor", "--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_is_2(arguments, words, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


def _raising(error):
    @command("npeff boom")
    def boom():
        raise error

    return boom


@pytest.fixture
def boom(monkeypatch):
    """Add a command that raises."""

    def add(error):
        monkeypatch.setitem(COMMANDS, "boom", "tests_boom:boom")
        monkeypatch.setitem(sys.modules, "tests_boom", type(sys)("tests_boom"))
        sys.modules["tests_boom"].boom = _raising(error)

    return add


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (
            DataError("example 3: its gradient of a.weight is NaN"),
            1,
            "npeff: example 3: its gradient of a.weight is NaN\n",
        ),
        (OSError(28, "No space left on device"), 1, "npeff: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "npeff: MemoryError\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_status_of_errors(boom, capsys, error, status, words):
    boom(error)
    assert run(["boom"]) == status
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err


def test_debug_keeps_the_traceback(boom):
    boom(DataError("x"))
    with pytest.raises(DataError):
        run(["boom", "--debug"])
    assert run(["boom"]) == 1, "and only for that call"


def test_a_bug_is_not_disguised(boom):
    boom(ZeroDivisionError("a bug of ours"))
    with pytest.raises(ZeroDivisionError):
        run(["boom"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["fishers", "absent.py:model", "tiny.py:data", "--out", "x.h5"],
            "MODEL: file absent.py does not exist",
        ),
        (["fishers", "tiny.py:modle", "tiny.py:data", "--out", "x.h5"], "did you mean model?"),
        (["fishers", "tiny.py:training_mode", "tiny.py:data", "--out", "x.h5"], "eval()"),
        (["fishers", "tiny.py:model", "tiny.py:data", "--out", "absent/x.h5"], "absent"),
        (["info", "tiny.py"], "tiny.py"),
        (
            ["fishers", "tiny.py:model", "tiny.py:data", "--basis", "reduced", "--min-prob", "0.1", "--out", "x.h5"],
            "min_prob",
        ),
        (["info", "absent.h5"], "absent.h5"),
        (["info", "."], "expected a file, but this is a folder"),
        (["report", "components.h5", "--tokenizer", ""], "--tokenizer: expected package.module:callable"),
        (["report", "components.h5", "--data", ""], "DATA: expected package.module:callable"),
        (["report", "components.h5", "--data", "tiny.py:new", "--out", "x.html"], "data: "),
        (["report", "components.h5", "-k", "0"], "got 0 (on the command line: k is -k)"),
    ],
)
def test_errors_are_one_clean_message(folder, arguments, words, capsys):
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("npeff: ")
    assert words in captured.err and "Traceback" not in captured.err


def test_fishers_says_what_it_made_and_resumes(folder, capsys):
    arguments = ["fishers", "tiny.py:model", "tiny.py:data", "--exact", "--out", "fishers.h5", "--quiet"]
    before = (folder / "fishers.h5").read_bytes()
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert "fishers.h5: 60 Fishers of 323 parameters" in captured.out and "exists" in captured.err
    assert (folder / "fishers.h5").read_bytes() == before
    assert run([*arguments, "--basis", "class"]) == 1
    assert "class" in capsys.readouterr().err
    assert (folder / "fishers.h5").read_bytes() == before


def test_options_reach_compute_fishers(folder, capsys):
    options = [
        "--kind",
        "diagonal",
        "--top-k",
        "50",
        "--parameters",
        "3.*",
        "--max-examples",
        "30",
        "--quiet",
    ]
    targets = ["tiny.py:model", "tiny.py:data", "--forward", "tiny.py:forward"]
    assert run(["fishers", *targets, *options, "--out", "diagonal.h5"]) == 0
    said = capsys.readouterr().err
    assert "npeff: note: TopK(k=50): an example has at most" in said and "all are kept, and nothing is lost" in said
    fishers = npeff.load("diagonal.h5")
    assert (fishers.kind, len(fishers), fishers.n_parameters) == ("diagonal", 30, 27)


def test_decompose(folder, capsys):
    command = ["decompose", "fishers.h5", "--n-components", "3", "--quiet", "--n-init", "2", "--n-replacements", "0"]
    assert run([*command, "--block-weights", "balanced", "--wrong-only", "--out", "wrong.h5"]) == 0
    assert "wrong.h5: 3 components of" in capsys.readouterr().out
    components = npeff.load("wrong.h5")
    assert (components.predictions != components.labels).all()
    assert components.coefficients.shape[1] == 3


@pytest.mark.parametrize("suffix", ["h5", "npz", "csv"])
def test_encode(folder, suffix, capsys):
    assert run(["encode", "components.h5", "new.h5", "--out", f"new_coefficients.{suffix}"]) == 0
    assert "coefficients of 40 examples on 4 components; largest KKT residual" in capsys.readouterr().out
    expected = npeff.load("components.h5").encode(npeff.load("new.h5")).coefficients
    if suffix == "npz":
        found = np.load("new_coefficients.npz")["coefficients"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    if suffix == "csv":
        with open("new_coefficients.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 41


def test_commands_refuse_files_of_the_wrong_kind(folder, capsys):
    assert run(["decompose", "components.h5", "--n-components", "3", "--out", "x.h5"]) == 2
    assert "components.h5 holds Components, expected Fishers (made by: npeff fishers)" in capsys.readouterr().err
    assert run(["report", "fishers.h5"]) == 2
    assert "expected Components (made by: npeff decompose)" in capsys.readouterr().err


def test_report(folder, capsys):
    command = ["report", "components.h5", "--out", "page.html", "--title", "Tiny"]
    assert run([*command, "--data", "tiny.py:data", "--class-names", "red, green,blue", "-k", "3"]) == 0
    assert "page.html: 4 components" in capsys.readouterr().out
    html = (folder / "page.html").read_text(encoding="utf-8")
    assert "<h1>Tiny</h1>" in html and "green" in html and "data:image/png" in html
    (folder / "names.txt").write_text("cyan\nmagenta\nyellow\n")
    assert run([*command, "--class-names", "names.txt"]) == 0
    assert "magenta" in (folder / "page.html").read_text(encoding="utf-8")


def test_info(folder, capsys):
    for name in ("fishers.h5", "components.h5"):
        assert run(["info", name]) == 0
        text = capsys.readouterr().out
        assert "npeff" in text and "1.weight" in text
        assert run(["info", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["content"] == name.split(".")[0]


def test_export(folder, capsys):
    assert run(["export", "components.h5", "--component", "2", "--out", "g2.safetensors"]) == 0
    tensors = load_file("g2.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        "1.weight": (8, 36), "1.bias": (8,), "3.weight": (3, 8), "3.bias": (3,)
    }  # fmt: skip
    flat = np.concatenate([tensors[p.name].ravel() for p in npeff.load("components.h5").parameters])
    np.testing.assert_allclose(flat, npeff.load("components.h5").vector(2), rtol=1e-6)
    assert run(["export", "fishers.h5", "--layout", "published", "--out", "theirs.h5"]) == 0
    assert len(npeff.load("theirs.h5")) == 60
    capsys.readouterr()
    assert run(["export", "components.h5", "--component", "4", "--out", "x"]) == 2
    assert "has components 0 to 3, got 4" in capsys.readouterr().err


def test_doctor(capsys):
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("Versions", "Processor", "Kernels", "CUDA", "threads", "npeff._cuda", "driver"):
        assert word in text
    assert "unavailable" not in text


def test_interrupted_from_the_keyboard(tmp_path, monkeypatch, capsys):
    lines = ["import os, signal", "def model():", "    os.kill(os.getpid(), signal.SIGINT)", "    return 1"]
    (tmp_path / "slow.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert run(["fishers", "slow.py:model", "slow.py:model", "--out", "x.h5"]) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err and "Traceback" not in captured.err


def test_reader_that_goes_away(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m npeff --help | head -1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["info", "components.h5"]])
def test_reader_that_is_gone_before_anything_is_written(folder, arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "npeff", *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_each_command_tells_the_next_one(folder, capsys, monkeypatch):
    (folder / "a way").mkdir()
    monkeypatch.chdir(folder / "a way")
    command = ["fishers", "../tiny.py:model", "../tiny.py:data", "--exact", "--out", "f 1.h5"]
    for following in ("decompose", "report", "trust"):
        assert run(command) == 0
        (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("next: "))
        command = shlex.split(told.removeprefix("next: npeff ").partition(" (")[0].partition(",")[0])
        assert command[0] == following
        command = [{"DATA": "../tiny.py:data", "FISHERS": "f 1.h5"}.get(word, word) for word in command]
    assert sorted(os.listdir()) == ["components.h5", "f 1.h5", "report"]
    assert run(["report", "components.h5", "--out", "x.html", "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "without --data the pages show numbers alone" in said and "next:" not in said


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("npeff.demo.TRAINED_ON", 100)
    real, solve = import_module("npeff.demo").run_demo, npeff.decompose
    few = wraps(solve)(lambda *a, **k: solve(*a, **k, n_init=1, n_replacements=0))
    monkeypatch.setattr(npeff, "decompose", few)
    small = wraps(real)(lambda *a, **k: real(*a, **k, epochs=1, max_examples=40))
    monkeypatch.setattr("npeff.demo.run_demo", small)
    command = ["demo", "--out", str(tmp_path / "demo"), "--n-components", "3", "--no-open", "--quiet"]
    assert run(command) == 0
    text = capsys.readouterr().out
    page = tmp_path / "demo" / "report" / "index.html"
    assert str(page) in text and page.exists()
    made = {p.name for p in (tmp_path / "demo").iterdir()}
    assert made == {"model.pt", "digits.py", "fishers.h5", "components.h5", "report"}
    assert run(command) == 0, "it can be run again"
    capsys.readouterr()
    # What it tells the user to type next works.
    advice = [line.split()[1:] for line in text.splitlines() if line.startswith("  npeff ")]
    assert len(advice) == 2
    for arguments in advice:
        assert run(["2" if a == "16" else a for a in arguments]) == 0


def test_demo_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "fishers.h5").write_text("precious")
    assert run(["demo", "--out", str(tmp_path), "--no-open"]) == 1
    assert "holds fishers.h5, not from a demo" in capsys.readouterr().err
    assert (tmp_path / "fishers.h5").read_text() == "precious"
