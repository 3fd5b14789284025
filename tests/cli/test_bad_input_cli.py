"""Slips on the command line and in what a page is made of: nothing is lost, and one message tells."""

from functools import wraps

import numpy as np
import pytest
import torch

import npeff
from npeff.cli import run
from npeff.errors import ArgumentError, ModelError, StorageError
from npeff.fishers.fishers import Fishers
from npeff.fishers.rows import DenseRows
from npeff.models.targets import load_model
from report_cases import components_of

RNG = np.random.default_rng(0)


@pytest.fixture
def components():
    return components_of(n=20)


@pytest.fixture
def files(components, tmp_path, monkeypatch):
    """A folder with the components ``c.h5`` and Fishers ``f.h5`` over the same parameters."""
    monkeypatch.chdir(tmp_path)
    components.save("c.h5")
    n, m = 6, components.parameters.n_parameters
    values = RNG.normal(size=(n, m)).astype(np.float32)
    norms = np.square(values).sum(1)
    labels, logits = np.zeros(n, np.int64), np.zeros((n, 4), np.float32)
    fishers = Fishers(
        kind="low_rank",
        rows=DenseRows(values),
        row_offsets=np.arange(n + 1),
        norms=norms,
        logits=logits,
        labels=labels,
        ids=np.arange(n),
        parameters=components.parameters,
        provenance={},
    )
    fishers.save("f.h5")
    return tmp_path


def page(components, data, out, **options):
    return npeff.report(components, data, out, **options).read_text(encoding="utf-8")


# ---- outputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["c.h5", "f.h5"])
@pytest.mark.parametrize("command", [["encode", "c.h5", "f.h5"], ["export", "c.h5", "--component", "0"]])
def test_inputs_are_not_overwritten(files, capsys, command, target):
    before = (files / target).read_bytes()
    assert run([*command, "--out", target]) == 1
    assert "holds Fishers or Components, and is not overwritten" in capsys.readouterr().err
    assert (files / target).read_bytes() == before


@pytest.mark.parametrize(
    ("out", "words"),
    [("absent/d.h5", "does not exist"), (".", "a folder is there"), ("f.h5", "is there, and is not overwritten")],
)
def test_decompose_checks_the_output_before_the_search(files, capsys, monkeypatch, out, words):
    monkeypatch.setattr(npeff, "decompose", wraps(npeff.decompose)(lambda *a, **k: pytest.fail("it searched")))
    assert run(["decompose", "f.h5", "--n-components", "2", "--out", out]) == 1
    assert words in capsys.readouterr().err


def test_encode_checks_the_output_before_solving(files, capsys, monkeypatch):
    encode = npeff.Components.encode
    monkeypatch.setattr(npeff.Components, "encode", wraps(encode)(lambda *a, **k: pytest.fail("it solved")))
    assert run(["encode", "c.h5", "f.h5", "--out", "absent/d.csv"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_report_checks_the_output_before_the_data(components, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.html").mkdir()

    def data():
        pytest.fail("it read the data")
        yield

    with pytest.raises(StorageError, match="is a file, not a folder"):
        npeff.report(components, data(), tmp_path / "file")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        npeff.report(components, data(), tmp_path / "file" / "deep" / "x.html")
    with pytest.raises(StorageError, match="a folder is there"):
        npeff.report(components, data(), tmp_path / "x.html")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_device_that_is_not_there(files, capsys):
    command = ["decompose", "f.h5", "--n-components", "2", "--device", "cuda", "--out", "d.h5", "--quiet"]
    assert run(command) == 1
    assert capsys.readouterr().err.startswith("npeff: device")


# ---- pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 8, 8), (2, 2, 2), (1, 1, 5), (), (1,)])
def test_inputs_of_any_shape_are_drawn(components, tmp_path, shape):
    data = [torch.randn(20, *shape)]
    assert "data:image" in page(components, data, tmp_path)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3, 4, 5)])
def test_inputs_without_numbers(components, tmp_path, shape):
    assert f"(empty: shape {shape})" in page(components, [torch.zeros(20, *shape)], tmp_path)


@pytest.mark.parametrize("kind", [torch.complex64, torch.bfloat16, torch.bool])
def test_inputs_of_unusual_types(components, tmp_path, kind):
    data = [torch.randn(20, 8).to(kind)]
    assert "data:image" in page(components, data, tmp_path)
    if kind.is_complex:
        assert "data:image" in page(components, [data[0].conj()], tmp_path)


def test_text_that_is_no_unicode(components, tmp_path):
    assert "lone ? surrogate" in page(components, [["lone \ud800 surrogate"] * 20], tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": object()}, "tokenizer: expected something with decode"),
        ({"data": 5}, "data: expected an iterable of batches, got 5"),
        ({"k": "a"}, "k: expected at least 1"),
        ({"class_names": 5}, "class_names: expected a list"),
        ({"class_names": {3: "a", 2: "b", 1: "c", 0: "d"}}, "class_names: expected a list"),
        ({"class_names": {"a", "b", "c", "d"}}, "class_names: expected a list"),
        ({"k": True}, "k: expected at least 1"),
        ({"seed": "a"}, "seed: expected an integer ≥ 0, got 'a'"),
        ({"title": 5}, "title: expected a text, got 5"),
        ({"strategies": True}, "strategies: expected a Strategy or a number from 1 to 3, got True"),
        ({"components": components_of(coefficients=np.full((40, 3), np.nan))}, "components: expected finite"),
        ({"components": 5}, "components: expected Components, got int"),
        ({"out": 5}, "out: expected a path"),
    ],
)
def test_wrong_arguments_of_report(components, tmp_path, options, words):
    with pytest.raises(ArgumentError, match=words):
        npeff.report(**{"components": components, "out": tmp_path, **options})


def test_wrong_arguments_of_collages_and_documents(components, tmp_path):
    for wrong in (0, "fine"):
        with pytest.raises(ArgumentError, match="dpi: expected a"):
            npeff.reports.collage(components, None, 0, tmp_path / "x.png", dpi=wrong)
    for wrong, words in ((1, "chosen: expected numbers of components, got 1"), ([3], "expected a component below 3")):
        with pytest.raises(ArgumentError, match=words):
            npeff.reports.latex(components, None, tmp_path / "x.tex", chosen=wrong)
    with pytest.raises(ArgumentError, match="title: expected a text"):
        npeff.reports.latex(components, None, tmp_path / "x.tex", title=5)
    assert not list(tmp_path.iterdir())


def test_names_of_classes_do_not_turn_what_stands_beside_them(components, tmp_path):
    text = page(components, None, tmp_path, class_names=["a\u202eb", "c", "d", "e"])
    assert "\u202e" not in text and "a\\u202eb" in text


def test_class_names_of_the_command(files, capsys):
    names = ",".join(f"class number {i} {'x' * 250}" for i in range(4))
    assert run(["report", "c.h5", "--class-names", names, "--out", "x.html"]) == 0, "too long for a file's name"
    (files / "names").write_bytes(b"\xff\xfe\x00")
    assert run(["report", "c.h5", "--class-names", "names", "--out", "x.html"]) == 2
    assert "is not a text file" in capsys.readouterr().err


# ---- callables that end the program ------------------------------------------------------------------------


def test_sys_exit_in_targets(files, capsys):
    (files / "ends.py").write_text(
        "import sys\n\ndef model():\n    sys.exit(3)\n\ndef data():\n    yield sys.exit(4)\n"
    )
    (files / "ends_at_once.py").write_text("raise SystemExit\n")
    with pytest.raises(ModelError, match=r"ends.py:model\(\) raised SystemExit: 3"):
        load_model("ends.py:model")
    with pytest.raises(ArgumentError, match=r"importing .*ends_at_once.py raised SystemExit"):
        load_model("ends_at_once.py:model")
    assert run(["report", "c.h5", "--data", "ends.py:data", "--out", "x.html"]) == 1
    assert "the model or the data ended the program: sys.exit(4)" in capsys.readouterr().err
    assert run(["report", "c.h5", "--tokenizer", "ends.py:model", "--out", "x.html"]) == 1
    assert "--tokenizer: ends.py:model() raised SystemExit: 3" in capsys.readouterr().err
