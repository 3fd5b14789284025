"""Collages and the LaTeX document, also from the command line."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from npeff.cli import run
from npeff.errors import ArgumentError, DataError, StorageError
from npeff.reports import collage, latex
from npeff.reports.export import escape
from report_cases import batches, components_of

ENGINES = ("pdflatex", "xelatex", "lualatex")
NASTY = r"\input{x} $a_1^2$ {} % & # ~ ^ _ \ < > | \"q\" `x' --- … → é ß ő 中文 🙂 ́a \end{document} [a] \\[3cm] ?`!`"


def images():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("data", ["images", "colour", "texts", "values", None])
def test_collage(tmp_path, data):
    components = components_of()
    made = {
        "images": [images()],
        "colour": [torch.rand(40, 3, 40, 30)],
        "texts": [[f"review {i}: $x_1 ^{{ " + "word " * 90 for i in range(40)]],
        "values": [torch.randn(40, 13)],
        None: None,
    }[data]
    path = collage(components, made, 1, tmp_path / "deep" / "c.png", k=7)
    assert path == tmp_path / "deep" / "c.png" and [p.name for p in path.parent.iterdir()] == ["c.png"]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 100 and pixels.shape[1] > 300 and pixels.std() > 5
    if data == "images":
        assert path.read_bytes() == collage(components, made, 1, path, k=7).read_bytes(), "the same again"


def test_collage_shows_the_top_examples(tmp_path):
    components = components_of()
    marked = torch.zeros(40, 8, 8)
    top = components.top_examples(2, k=4)
    marked[top] = 1.0
    drawn = {}
    for name, data in (("marked", marked), ("none", torch.zeros(40, 8, 8))):
        drawn[name] = np.asarray(Image.open(collage(components, [data], 2, tmp_path / f"{name}.png", k=4)).convert("L"))
    dark = {name: (pixels < 10).mean() for name, pixels in drawn.items()}
    assert dark["none"] > 0.4 and dark["marked"] < 0.02


def test_collage_of_a_component_without_examples(tmp_path):
    W = components_of().coefficients
    W[:, 1] = 0
    assert collage(components_of(coefficients=W), [images()], 1, tmp_path / "c.png").exists()


def test_arguments_of_collages_and_documents(tmp_path):
    components = components_of()
    for j in (3, -1, 1.5, "a", True):
        with pytest.raises(ArgumentError, match="j: expected a component below 3"):
            collage(components, None, j, tmp_path / "c.png")
    with pytest.raises(ArgumentError, match="columns"):
        collage(components, None, 0, tmp_path / "c.png", columns=0)
    with pytest.raises(ArgumentError, match="components: expected Components"):
        latex(5, None, tmp_path / "x.tex")
    with pytest.raises(ArgumentError, match=r"ending in \.tex"):
        latex(components, None, tmp_path / "x.pdf")
    with pytest.raises(ArgumentError, match="class_names: expected 4"):
        latex(components, None, tmp_path / "x.tex", class_names=["a"])
    with pytest.raises(DataError, match="has 5 examples"):
        collage(components, [torch.rand(5, 1, 8, 8)], 0, tmp_path / "c.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        latex(components, None, tmp_path / "file" / "x.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_escaped_text_is_inert(text):
    out = escape(text)
    words = "backslash asciitilde asciicircum less greater bar quotedbl quotesingle asciigrave endash emdash quoteleft"
    commands = "|".join([*(f"text{word}" for word in f"{words} quoteright quotedblleft quotedblright".split()), "dots"])
    known = rf"\\({commands})\{{\}}|\\npeffchar\{{[0-9A-F]{{4,6}}\}}|\\[{{}}$&#%_,]|\$\\to\$|-\{{\}}|\{{[\[\]]\}}"
    rest = re.sub(known, "", out)
    assert not set(rest) & set("\\{}$&#%_~^<>|\"'`[]\n"), rest
    assert all(c.isascii() or "À" <= c <= "ſ" for c in out)


def test_document(tmp_path):
    components = components_of()
    path = latex(components, batches(images(), components.labels), tmp_path / "x.tex", k=3, title="A & B")
    text = path.read_text(encoding="utf-8")
    assert text.count(r"\section*") == 3 and r"A \& B" in text
    files = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text)
    assert len(files) == 9 and all((tmp_path / file).is_file() for file in files)
    assert {p.name for p in tmp_path.iterdir()} == {"x.tex", "x-images"}
    chosen = latex(components, None, tmp_path / "y.tex", chosen=[2]).read_text(encoding="utf-8")
    assert chosen.count(r"\section*") == 1 and r"\section*{2\quad" in chosen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_document_compiles(tmp_path, engine, kind):
    if shutil.which(engine) is None:
        pytest.skip(f"no {engine} here to compile the document with")
    wanted = {"lualatex": ["fontspec.sty", "luaotfload-main.lua"], "xelatex": ["fontspec.sty"]}.get(engine, [])
    for file in wanted:
        if subprocess.run(["kpsewhich", file], capture_output=True).returncode:
            pytest.skip(f"no {file} here, which {engine} needs for the document")
    components = components_of()
    data = {"images": [images()], "texts": [[NASTY] * 40]}[kind]
    latex(components, data, tmp_path / "x.tex", k=11, class_names=[NASTY, "b", "c", "d"], title=NASTY)
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "x.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    components_of().save("c.h5")
    (tmp_path / "d.py").write_text(
        "import torch\ndef data():\n    return [torch.arange(2560.).reshape(40, 1, 8, 8) / 2560]\n"
    )
    (tmp_path / "e.json").write_text('{"effects": {"0": {"kl_ratio": 4.25}}}')
    command = [
        "report",
        "c.h5",
        "--data",
        "d.py:data",
        "--quiet",
        "--collages",
        "--latex",
        "-k",
        "3",
        "--strategies",
        "2",
    ]
    assert run([*command, "--extras", "e.json", "--seed", "3", "--size-limit", "5MB"]) == 0
    made = {p.name for p in (tmp_path / "report").iterdir()}
    assert made == {"index.html", "data-1", "components.tex", "components-images", "components-collages"}
    assert len(list((tmp_path / "report" / "components-collages").glob("*.png"))) == 3
    assert "4.25" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert run([*command, "--out", "birds.html"]) == 0
    assert (tmp_path / "birds.tex").is_file() and (tmp_path / "birds-collages" / "component-2.png").is_file()
    said = capsys.readouterr().out
    assert "birds.html: 3 components" in said and "3 collages" in said and "compile it" in said
    assert run(["report", "c.h5", "--strategies", "9"]) == 1
    assert "strategies is --strategies" in capsys.readouterr().err
    assert run(["report", "c.h5", "--heads", "4", "--out", "x.html"]) == 1
    assert "heads: no parameter could be cut" in capsys.readouterr().err
