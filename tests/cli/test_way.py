"""The way from command to command: what one writes, the next one takes as it is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npeff
from npeff.cli import run
from npeff.errors import ArgumentError, ExtrasError, StorageError
from npeff.reports import describe_extras, load_extras
from report_cases import data_of, inline_of, page_of
from way_cases import DATA, FEW, FREEZE, MODEL, SEARCH, SOURCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Fishers of each form, and their components."""
    path = tmp_path_factory.mktemp("way")
    before = os.getcwd()
    os.chdir(path)
    Path("net.py").write_text(SOURCE)
    for name, options in (("topk", ["--top-k", "120"]), ("sketch", ["--sketch", "128"]), ("gram", ["--gram-only"])):
        assert run(["fishers", MODEL, DATA, *options, "--out", f"{name}.fishers.h5", "--quiet"]) == 0
        assert run(["decompose", f"{name}.fishers.h5", "--n-components", "3", "--out", f"{name}.h5", *SEARCH]) == 0
    yield path
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """Components of sketches, and of inner products alone, with all vectors in parameter space."""
    found = {}
    for form in ("sketch", "gram"):
        assert run(["recover", f"{form}.h5", MODEL, DATA, "--out", f"{form}.whole.h5", "--quiet"]) == 0
        found[form] = npeff.load(f"{form}.whole.h5")
    return found


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Any]:
    """What each command that looks at components writes in JSON."""
    for command in (
        ["trust", "topk.fishers.h5", "topk.h5", "--repeats", "2", "--shuffles", "1", "--out", "trust.json", "--quiet"],
        ["perturb", MODEL, DATA, "topk.h5", "--all", *FEW, "--out", "all.json"],
        ["perturb", MODEL, DATA, "topk.h5", "-j", "1", *FEW, "--out", "one.json"],
        ["perturb", MODEL, DATA, "topk.h5", "--strategy", "0,2", *FEW, "--out", "group.json"],
        ["trace", MODEL, DATA, "topk.h5", "-j", "1", "--top", "12", "--quiet", "--out", "trace.json"],
        ["linearize", MODEL, DATA, *FREEZE, "--component", "topk.h5:0,1", "-k", "2", "--out", "in.json"],
        ["influence", MODEL, "net.py:train", DATA, "--component", "topk.h5:2", "--damping", "1", "--quiet", "--out",
         "behind.json"],
    ):  # fmt: skip
        assert run(command) == 0, command
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def extras(*names: str) -> list[str]:
    return [word for name in names for word in ("--extras", name)]


def text_of(path: str) -> str:
    from report_cases import Page

    return Page(Path(path).read_text(encoding="utf-8")).text


# ---- onto the page ------------------------------------------------------------------------------------------------


def test_from_fishers_to_stability_null_model_and_effects_on_the_page(folder: Path, written: Any) -> None:
    every = ("trust.json", "all.json", "group.json", "trace.json", "in.json", "behind.json")
    command = ["report", "topk.h5", "--data", DATA, *extras(*every), "--out", "page.html", "--quiet"]
    assert run([*command, "--influence-data", "net.py:train"]) == 0
    html = Path("page.html").read_text(encoding="utf-8")
    text, data = text_of("page.html"), data_of(html)
    rows = {row[0]: dict(zip(data["columns"], row, strict=True)) for row in data["rows"]}
    trust, effects = written["trust.json"], {e["components"][0]: e for e in written["all.json"]}
    for j in range(3):
        assert rows[j]["stability"] == pytest.approx(trust["stability"]["components"][j], rel=1e-3)
        assert rows[j]["kl_ratio"] == pytest.approx(effects[j]["figures"]["ratio"]["value"], rel=1e-3)
        assert f"{trust['stability']['components'][j]:.2f} stable" in text
    below = sum(not above for above in trust["null"]["above"])
    assert f"no more than chance {below}" in text
    shares = [record[4] for record in inline_of(html, "examples-0")]
    np.testing.assert_allclose(shares, trust["explained"], rtol=2e-3)
    ratio = effects[0]["figures"]["ratio"]
    assert f"(the baseline): {ratio['value']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]; random, equal norm" in text
    assert text.count("When the weights move along it") == 4, "three components and the group"
    assert "Components 0, 2 together" in text
    assert f"{written['group.json']['figures']['ratio']['value']:.3g} KL ratio" in text
    assert text.count("Where it acts") == 1 and "share of the KL that moving this part alone keeps" in text
    assert text.count("What in the input speaks for it") == 2 and text.count("Training examples with the largest") == 1


@pytest.mark.parametrize("name", ["trust.json", "all.json", "one.json", "group.json", "trace.json", "in.json"])
def test_each_file_alone_and_what_info_says_of_it(folder: Path, written: Any, name: str, capsys: Any) -> None:
    assert run(["report", "topk.h5", "--data", DATA, *extras(name), "--out", "alone.html", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["info", name]) == 0
    said = capsys.readouterr().out
    assert npeff.load("topk.h5").digest in said and "npeff report --extras" in said  # type: ignore[union-attr]
    assert run(["info", name, "--json"]) == 0 and json.loads(capsys.readouterr().out)["format"] == "JSON"


def test_two_files_about_one_component_are_not_mixed(folder: Path, written: Any, capsys: Any) -> None:
    command = ["report", "topk.h5", "--out", "two.html", "--quiet"]
    assert run([*command, *extras("all.json", "one.json")]) == 1
    assert "one.json: effects of component 1 were given by another file" in capsys.readouterr().err
    assert run([*command, *extras("trust.json", "trust.json")]) == 1
    assert "trust of explained were given by another file" in capsys.readouterr().err
    Path("null.json").write_text(json.dumps({"null": written["trust.json"]["null"]}))
    Path("stable.json").write_text(json.dumps({"trust": {"stability": written["trust.json"]["stability"]}}))
    assert run([*command, *extras("null.json", "stable.json")]) == 0
    assert "no more than chance" in text_of("two.html") and " stable" in text_of("two.html")


def test_files_about_other_components_are_refused(folder: Path, written: Any, capsys: Any) -> None:
    assert (
        run(["decompose", "topk.fishers.h5", "--n-components", "3", "--seed", "5", "--out", "other.h5", *SEARCH]) == 0
    )
    for name in ("trust.json", "all.json", "one.json", "group.json", "trace.json", "in.json", "behind.json"):
        capsys.readouterr()
        assert run(["report", "other.h5", "--data", DATA, *extras(name), "--out", "no.html", "--quiet"]) == 1
        said = capsys.readouterr().err
        assert name in said and "components_digest: expected" in said and "another decomposition" in said
    assert not Path("no.html").exists()
    with pytest.raises(ExtrasError, match="another decomposition"):
        load_extras("trust.json", components=npeff.load("other.h5"))  # type: ignore[arg-type]


def test_objects_are_taken_in_python(folder: Path, written: Any, tmp_path: Path) -> None:
    components = npeff.load("topk.h5")
    assert isinstance(components, npeff.Components)
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    few = {"n_random": 1, "top": 12, "progress": False}
    effects = npeff.perturb_all(scope["model"](), scope["data"](), components, [0, 2], **few)
    trace = npeff.trace(scope["model"](), scope["data"](), components, 1, top=12, progress=False)
    for given in (effects, {0: effects[0], 2: effects[1]}, [effect.to_json() for effect in effects]):
        page = page_of(tmp_path, components, effects=given, traces=trace)
        assert page.text.count("When the weights move along it") == 2 and page.text.count("Where it acts") == 1
    page = page_of(tmp_path, components, effects=effects[0], traces=[trace], trust=written["trust.json"])
    assert f"{effects[0].ratio:.3g} KL ratio" in page.text and " stable" in page.text
    with pytest.raises(ArgumentError, match=r"effects\[1\]: is about component 0"):
        page_of(tmp_path, components, effects={1: effects[0]})
    with pytest.raises(ArgumentError, match="another one of component 0"):
        page_of(tmp_path, components, effects=[effects[0], effects[0]])
    assert len(page_of(tmp_path, components, **load_extras("all.json", "trace.json", components=components)).text) > 0


# ---- damaged files, and files of other kinds ------------------------------------------------------------------------


def damaged(content: Any, *path: Any, value: Any) -> str:
    """The JSON with one place changed; the key ``del`` takes it away."""
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value == "del":
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("one.json", ["components"], [3], r"effects\[0\].components: expected components 0 to 2, got 3"),
        ("one.json", ["components"], ["a"], r"effects\[0\].components: expected components 0 to 2, got 'a'"),
        ("one.json", ["components"], [-1], r"effects\[0\].components: expected components 0 to 2, got -1"),
        ("one.json", ["figures", "ratio"], "del", r"figures.ratio: expected value, low and high, got None"),
        ("one.json", ["figures", "ratio", "value"], "5", r"figures.ratio.value: expected numbers, got '5'"),
        ("one.json", ["figures", "ratio", "value"], True, r"figures.ratio.value: expected numbers, got True"),
        ("one.json", ["figures", "ratio", "low"], [1, 2], r"figures.ratio.low: expected a number, got \[1, 2\]"),
        ("one.json", ["figures"], 4, r"figures.ratio: expected value"),
        ("one.json", ["controls"], [], r"controls: expected a mapping, got list"),
        ("one.json", ["curve", "top"], [[1]], r"curve.top: expected a list of numbers for each of 2 signs"),
        ("one.json", ["curve", "top", 0], [1], r"curve.top: expected numbers"),
        ("one.json", ["curve", "signs"], None, r"curve"),
        ("one.json", ["top", 0], None, r"top: expected whole numbers ≥ 0"),
        ("all.json", [1, "components"], [0], r"effects\[1\]: another one of component 0 was given"),
        ("trace.json", ["alone"], [], r"traces\[0\].alone: expected a figure and an energy for each of 3 parts"),
        ("trace.json", ["groups", 0], 7, r"groups: expected names of parts"),
        ("trace.json", ["energy", 0], {}, r"energy: expected numbers"),
        ("trust.json", ["stability", "components"], [1, 2], r"trust.stability: expected 3 numbers, got shape \(2,\)"),
        ("trust.json", ["stability", "components", 0], "1", r"trust.stability: expected numbers"),
        ("trust.json", ["stability", "n_strategies"], "two", r"n_strategies: expected a whole number ≥ 1, got 'two'"),
        ("trust.json", ["null", "threshold"], [], r"trust.null.threshold: expected a number"),
        ("trust.json", ["null"], "low", r"trust.null: expected a threshold"),
        ("trust.json", ["explained"], [1], r"trust.explained: expected 48 numbers"),
        ("trust.json", ["explained", 3], {"a": 1}, r"trust.explained: expected numbers"),
        ("in.json", ["attributions", "0"], [1], r"in JSON, an object with components"),
        ("in.json", ["attributions", "9"], {"0": [1]}, r"attributions: expected components 0 to 2, got 9"),
        ("in.json", ["attributions", "0", "48"], [1], r"attributions: expected examples 0 to 47, got 48"),
        ("in.json", ["attributions", "0", "-1"], [1], r"attributions: expected examples 0 to 47, got '-1'"),
        ("in.json", ["attributions", "0", "1"], ["x"], r"attributions\[0, 1\]: expected numbers"),
        ("in.json", ["components_digest"], 4, r"components_digest: expected a text, got 4"),
        (
            "behind.json",
            ["influences", "2", "pairs", 0],
            [0.5, 1],
            r"influences\[2\]: expected whole numbers",
        ),
        (
            "behind.json",
            ["influences", "2", "pairs", 0],
            [1, "x"],
            r"influences\[2\], the score of 1: expected",
        ),
        ("behind.json", ["influences", "2", "pairs"], "pairs", r"influences\[2\]: expected pairs"),
        ("behind.json", ["influences", "2", "by"], 4, r"influences\[2\]: expected by to be a text"),
        ("behind.json", ["influences"], [], r"influences: expected a mapping, got list"),
    ],
)
def test_damaged_files_are_named_with_the_field(
    folder: Path, written: Any, tmp_path: Path, name: str, path: list[Any], value: Any, words: str
) -> None:
    file = tmp_path / name
    file.write_text(damaged(written[name], *path, value=value))
    with pytest.raises(StorageError, match=words) as caught:
        load_extras(file, components=npeff.load("topk.h5"))  # type: ignore[arg-type]
    assert isinstance(caught.value, ExtrasError) and isinstance(caught.value, ArgumentError)
    assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a JSON file written by npeff trust"),
        ('{"trust": ', "expected a JSON file"),
        ('{"trust": {"null": NaN}}', "expected finite numbers or null, got nan"),
        ('{"trust": {"null": -Infinity}}', "expected finite numbers or null, got -inf"),
        ('{"trust": {"null": 1e999}}', "expected finite numbers or null, got inf"),
        ('{"trust": {"null": 1}, "trust": {"null": 2}}', "the name 'trust' stands twice"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"trust": {"stability": ' + "[" * 90 + "1" + "]" * 90 + "}}", "expected at most 64 levels"),
        ("[]", "got a list of 0"),
        ("7", "expected an object or a list, got a whole number"),
        ('{"model": "m", "choices": []}', "got model, choices"),
        ('[{"components": [0], "figures": {}}, 3]', "got a list of 2"),
        ("\ufeff{}", r"got \{\}"),
        (b"\xff\xfe{}", "expected a JSON file"),
        (b"\x89HDF\r\n\x1a\n", "got an HDF5 file, made by an --out that does not end in .json"),
    ],
)
def test_what_is_no_extras(folder: Path, tmp_path: Path, content: str | bytes, words: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    for components in (None, npeff.load("topk.h5")):
        with pytest.raises(ExtrasError, match=words) as caught:
            load_extras(file, components=components)  # type: ignore[arg-type]
        assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 800


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ExtrasError, match="at most 1,073,741,824 bytes of JSON, got 1,073,741,825"):
        load_extras(large)
    os.mkfifo(tmp_path / "pipe.json")
    for path, words in (
        (tmp_path / "pipe.json", "a regular file, but this is a device, pipe"),
        (tmp_path, "this is a folder"),
        (tmp_path / "x", "no such file"),
    ):
        with pytest.raises(ExtrasError, match=words):
            load_extras(path)
    with pytest.raises(ExtrasError, match="expected a JSON file"):
        describe_extras("net.py")


# ---- Fishers that keep sketches, or inner products alone ------------------------------------------------------------


@pytest.mark.parametrize("form", ["sketch", "gram"])
def test_the_way_with_sketches(folder: Path, form: str, capsys: Any) -> None:
    stored, recovered = f"{form}.h5", f"{form}.recovered.h5"
    for command in (
        ["export", stored, "--component", "1", "--out", "g.safetensors"],
        ["export", stored, "--layout", "published", "--out", "theirs.h5"],
    ):
        capsys.readouterr()
        assert run(command) == 1, command
        said = capsys.readouterr().err
        assert "npeff recover COMPONENTS MODEL DATA" in said and "components.recover(model, data" in said, command
    # what has the model and the data recovers the vectors that it needs, and keeps them
    shutil.copy(stored, "copy.h5")
    pixels = ["linearize", MODEL, DATA, *FREEZE, "--component", "copy.h5:1", "--out", "x.json"]
    behind = ["influence", MODEL, "net.py:train", DATA, "--component", "copy.h5:1", "--damping", "1", "--out", "x.json"]
    for command, missing in ((pixels, [0, 2]), ([*behind, "--quiet"], [])):
        assert run(command) == 0, command
        assert npeff.load("copy.h5").not_recovered == missing
    # the page needs no vectors, and says what it lacks
    assert run(["report", stored, "--data", DATA, "--out", f"{form}.html", "--quiet"]) == 0
    text = text_of(f"{form}.html")
    assert "the vectors in parameter space of 3 of 3 components were not recovered" in text
    assert "npeff recover COMPONENTS MODEL DATA --component 1 --out RECOVERED" in text
    assert "Energy by parameter" not in text and "Top examples" in text
    # one component, and then all of them
    assert run(["recover", stored, MODEL, DATA, "--component", "1", "--out", recovered, "--quiet"]) == 0
    assert "1 of 3 components" in capsys.readouterr().out
    assert run(["perturb", MODEL, DATA, recovered, "-j", "1", *FEW, "--out", f"{form}.json"]) == 0
    assert run(["trust", f"{form}.fishers.h5", recovered, "--repeats", "2", "--shuffles", "1", "--quiet", "--out",
                f"{form}.trust.json"]) == 0  # fmt: skip
    command = ["report", recovered, "--data", DATA, "--out", f"{form}.html", "--quiet"]
    assert run([*command, *extras(f"{form}.json", f"{form}.trust.json")]) == 0
    text = text_of(f"{form}.html")
    assert "of 2 of 3 components were not recovered" in text and text.count("Energy by parameter") == 1
    assert " KL ratio" in text and " stable" in text and (form == "gram" or "no more than chance" in text)
    capsys.readouterr()
    # what else is needed is recovered on the way, and kept in the file
    given = ["export", recovered, "--component", "0", "--model", MODEL, "--data", DATA]
    assert run([*given, "--out", "g.safetensors", "--quiet"]) == 0
    assert npeff.load(recovered).not_recovered == [2]
    assert run(["perturb", MODEL, DATA, recovered, "-j", "1", "--reject", "span", *FEW]) == 0
    assert run(["recover", recovered, MODEL, DATA, "--out", recovered, "--quiet"]) == 0, "into the file itself"
    loaded, first = npeff.load(recovered), npeff.load(stored)
    assert isinstance(loaded, npeff.Components) and isinstance(first, npeff.Components)
    assert loaded.digest == first.digest
    assert ", 0 vectors in parameter space" in repr(first) and ", 3 vectors in parameter space" in repr(loaded)
    scope: dict[str, Any] = {}
    exec(SOURCE, scope)
    expected = first.recover(scope["model"](), scope["data"](), progress=False)
    for j in range(3):
        np.testing.assert_allclose(loaded.vector(j), expected.vector(j), atol=1e-6)
    for command in (
        ["perturb", MODEL, DATA, recovered, "--all", "--reject", "span", *FEW, "--out", "all.recovered.json"],
        ["trace", MODEL, DATA, recovered, "-j", "1", "--quiet"],
        ["export", recovered, "--component", "1", "--out", "g.safetensors"],
        ["export", recovered, "--layout", "published", "--out", f"{form}.theirs.h5"],
        ["info", recovered],
        ["influence", MODEL, "net.py:train", DATA, "--component", f"{recovered}:1", "--damping", "1", "--quiet",
         "--out", "behind.recovered.json"],
        ["report", recovered, "--data", DATA, *extras("all.recovered.json"), "--out", f"{form}.html", "--quiet"],
    ):  # fmt: skip
        assert run(command) == 0, command
    assert "not recovered" not in text_of(f"{form}.html")
    theirs = npeff.load(f"{form}.theirs.h5")
    np.testing.assert_allclose(np.abs(theirs.vectors @ loaded.vector(1))[1], 1, rtol=1e-5)  # type: ignore[union-attr]


def test_a_vector_becomes_an_adapter(folder: Path, capsys: Any) -> None:
    given = ["export", "sketch.h5", "--component", "2", "--peft"]
    pass_over = ["--model", MODEL, "--data", DATA, "--rank", "2", "--scale", "0.5", "--quiet"]
    assert run(["recover", "sketch.h5", MODEL, DATA, "--rank", "2", "--component", "2", "--out", "low.h5"]) == 0
    assert "factors lose up to" in capsys.readouterr().out
    assert run([*given, *pass_over, "--out", "adapter"]) == 0
    assert "adapter: an adapter with " in capsys.readouterr().out
    assert {path.name for path in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for arguments, words in (
        ([*given, "--out", "a"], "give --model"),
        (["export", "sketch.h5", "--layout", "published", "--model", MODEL, "--out", "a"], "belong to --component"),
        (["export", "sketch.h5", "--component", "2", "--rank", "2", "--out", "a"], "belong to --peft"),
    ):
        assert run(arguments) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_recover_says_what_is_wrong(folder: Path, capsys: Any) -> None:
    for arguments, status, words in (
        (["topk.h5", MODEL, DATA], 1, "are in parameter space already"),
        (["sketch.h5", MODEL, DATA, "--component", "7"], 2, "sketch.h5 has components 0 to 2, got 7"),
        (["sketch.h5", MODEL, DATA, "--component", "x"], 2, "expected J or J,J,…"),
        (["sketch.fishers.h5", MODEL, DATA], 2, "holds Fishers, expected Components"),
        (["sketch.h5", MODEL, "net.py:train"], 1, "it ended after 24 examples"),
        (["sketch.h5", MODEL, DATA, "--out", "absent/x.h5"], 1, "does not exist"),
    ):
        capsys.readouterr()
        out = [] if "--out" in arguments else ["--out", "r.h5"]
        assert run(["recover", *arguments, *out, "--quiet"]) == status
        assert words in " ".join(capsys.readouterr().err.split())
    assert not Path("r.h5").exists()


def test_inner_products_alone_are_compared_in_parameter_space(folder: Path, whole: dict[str, Any]) -> None:
    gram, other = npeff.load("gram.h5"), whole["gram"]
    with pytest.raises(ArgumentError, match="npeff recover"):
        npeff.trust.similarity(gram, gram)  # their own coordinates say nothing about others'
    cosines = npeff.trust.similarity(other, other)
    np.testing.assert_allclose(np.diag(cosines), 1, rtol=1e-5)
    topk = npeff.trust.similarity(whole["sketch"], other)
    assert topk.shape == (3, 3) and (topk <= 1).all()


def test_explained_shares_of_inner_products_are_those_of_rows(folder: Path, whole: dict[str, Any]) -> None:
    assert run(["fishers", MODEL, DATA, "--exact", "--out", "exact.h5", "--quiet"]) == 0
    exact, gram, components = npeff.load("exact.h5"), npeff.load("gram.fishers.h5"), whole["gram"]
    provenance = {**components.provenance, "fishers": exact.provenance}
    rows = replace(components, vectors=components.recovered_vectors, provenance=provenance)
    with_rows = npeff.trust.explained(rows, exact)  # type: ignore[arg-type]
    np.testing.assert_allclose(npeff.trust.explained(components, gram), with_rows, atol=1e-4)  # type: ignore[arg-type]


def test_block_weights_of_sketches_say_what_can_be_done(folder: Path, capsys: Any) -> None:
    for form in ("sketch", "gram"):
        command = ["decompose", f"{form}.fishers.h5", "--n-components", "2", "--block-weights", "balanced"]
        assert run([*command, "--out", "b.h5", *SEARCH]) == 1
        said = capsys.readouterr().err
        assert "npeff fishers --parameters PATTERN" in said and "--top-k N" in said and "'energy'" in said
    # and each way that the message names is there
    for number, options in enumerate((["--sketch", "128", "--parameters", "4.*"], ["--top-k", "120"])):
        fishers = f"weighted{number}.h5"
        assert run(["fishers", MODEL, DATA, *options, "--out", fishers, "--quiet"]) == 0
        weights = ["--block-weights", "energy" if number == 0 else "balanced"]
        assert run(["decompose", fishers, "--n-components", "2", *weights, "--out", f"b{number}.h5", *SEARCH]) == 0


def test_the_held_out_losses_of_a_selection_are_on_the_page(folder: Path, capsys: Any) -> None:
    assert run(["decompose", "topk.fishers.h5", "--n-components", "2,3", "--select", "--out", "s.h5", *SEARCH]) == 0
    losses = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[1:3]]
    assert run(["report", "s.h5", "--out", "s.html", "--quiet"]) == 0
    html = Path("s.html").read_text(encoding="utf-8")
    assert f"Held-out loss by number of components, least {min(losses):.3f}"[:-1] in html
    assert run(["info", "s.h5"]) == 0


def test_a_number_of_components_is_not_chosen_on_inner_products(folder: Path, capsys: Any) -> None:
    command = ["decompose", "gram.fishers.h5", "--n-components", "2,3", "--select", "--out", "s.h5", *SEARCH]
    assert run(command) == 1
    assert "cannot be split into halves of the parameters" in capsys.readouterr().err


def test_keywords_in_messages_are_told_as_options(folder: Path, capsys: Any) -> None:
    """A message of a Python function, read by someone at the command line."""
    Path("dicts.py").write_text(
        SOURCE
        + """
def dicts():
    return [{"x": x, "labels": y} for x, y in data()]

def tokens(model, batch):
    return model(batch["x"])

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
"""
    )
    model, dicts, forward = "dicts.py:model", "dicts.py:dicts", ["--forward", "dicts.py:tokens"]
    fishers = ["fishers", model, dicts, "--top-k", "120", "--out", "dicts.f.h5", "--quiet"]
    assert run(fishers) == 1
    assert "(on the command line: forward= is --forward)" in capsys.readouterr().err
    assert run([*fishers, *forward]) == 0
    assert run(["decompose", "dicts.f.h5", "--n-components", "2", "--out", "dicts.h5", *SEARCH]) == 0
    command = ["influence", model, dicts, dicts, "--train-loss", "dicts.py:loss", "--component", "dicts.h5:0"]
    command += ["--damping", "1", "--quiet", "--out", "dicts.json"]
    assert run(command) == 1
    assert "forward= is --forward" in capsys.readouterr().err
    assert run([*command, *forward]) == 0
    assert run(["report", "dicts.h5", *extras("dicts.json"), "--out", "dicts.html", "--quiet"]) == 0
    assert "Training examples with the largest influence" in text_of("dicts.html")
    assert run(["influence", model, dicts, dicts, *forward, "--out", "s.h5"]) == 2


def test_published_layouts_have_no_names_to_move_along(folder: Path, capsys: Any) -> None:
    assert run(["export", "topk.h5", "--layout", "published", "--out", "nameless.h5"]) == 0
    assert run(["perturb", MODEL, DATA, "nameless.h5", "--all", "--quiet"]) == 1
    assert "published layout, which has no names of parameters" in capsys.readouterr().err
    assert run(["report", "nameless.h5", "--out", "nameless.html", "--quiet"]) == 0
    assert "nan" not in text_of("nameless.html").lower().split("provenance")[0].replace("domin", "")
    command = ["trust", "topk.fishers.h5", "nameless.h5", "--quiet", "--repeats", "2", "--shuffles", "0"]
    assert run(command) == 1 and "expected the parameters" in capsys.readouterr().err


def test_info_knows_every_file_that_a_command_writes(folder: Path, written: Any, capsys: Any) -> None:
    Path("triples.txt").write_text("a\tr\tb\nb\tr\tc\nc\tr\ta\n")
    for command in (
        ["encode", "topk.h5", "topk.fishers.h5", "--out", "coefficients.h5"],
        ["influence", MODEL, "net.py:train", DATA, "--solver", "identity", "--damping", "1", "--out", "scores.h5"],
        ["rollback", "triples.txt", "--record", "record.h5", "--dim", "2", "--epochs", "1", "--quiet"],
        ["plan", MODEL, DATA, "--n-components", "3", "--batches", "2", "--json", "plan.json"],
        ["export", "topk.h5", "--component", "0", "--out", "g0.safetensors"],
        ["export", "topk.fishers.h5", "--layout", "published", "--out", "theirs.h5"],
    ):
        assert run(command) == 0, command
    for name, words in (
        ("coefficients.h5", "npeff encode"),
        ("scores.h5", "influence"),
        ("record.h5", "rollback"),
        ("plan.json", "npeff plan"),
        ("g0.safetensors", "2.weight"),
        ("theirs.h5", "published"),
        ("topk.h5", "components"),
        ("topk.fishers.h5", "fishers"),
    ):
        capsys.readouterr()
        assert run(["info", name]) == 0, name
        assert words in capsys.readouterr().out
        assert run(["info", name, "--json"]) == 0 and json.loads(capsys.readouterr().out)
    Path("bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    for name in ("bad.safetensors", "net.py"):
        assert run(["info", name]) == 1
        assert name in capsys.readouterr().err
