"""A report in parts: what stands in the page, what beside it, what a limit leaves out, and what replaces what."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.errors import ArgumentError, DataError, StorageError
from npeff.reports import html as page_module
from npeff.reports import report
from npeff.reports.writer import MARKER, ReportWriter, script_json
from report_cases import Page, batches, components_of, data_of, inline_of, part_of

NASTY = "</script><script>alert(1)</script><!-- \u2028 & ' \" \\ ]]>"


def large(n=70, r=24, **changes):
    """More components than stand in a strict page at once."""
    return components_of(n=n, r=r, vectors=np.random.default_rng(1).normal(size=(r, 122)).astype(np.float32), **changes)


@given(
    st.recursive(
        st.text() | st.integers(-9, 9) | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(max_examples=40, deadline=None)
def test_json_that_may_stand_in_a_script(value):
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    if "\\ud" not in json.dumps(value):
        assert json.loads(text) == value


def test_json_of_lone_surrogates():
    assert json.loads(script_json(["a\ud800b"])) == ["a?b"]


def test_small_folder_is_one_page_and_its_parts(tmp_path):
    components = components_of(n=40, r=3)
    path = report(components, batches(torch.rand(40, 1, 8, 8), components.labels), tmp_path)
    html = path.read_text(encoding="utf-8")
    assert len(Page(html).all("article")) == 3, "small enough to be read without scripts"
    records = part_of(tmp_path, "examples-0")
    W = components.coefficients
    for i, (position, label, prediction, confidence, _, count, listed, *_) in enumerate(records):
        assert (position, label, prediction) == (i, components.labels[i], components.predictions[i])
        p = np.exp(components.logits[i].astype(float))
        assert confidence == pytest.approx(p.max() / p.sum(), rel=1e-3)
        assert count == (W[i] > 0).sum()
        assert [j for j, _ in listed] == [j for j in np.argsort(-W[i], kind="stable") if W[i, j] > 0.005 * W[i].sum()]
        np.testing.assert_allclose([w for _, w in listed], [W[i, j] for j, _ in listed], rtol=1e-3)
    pictures = part_of(tmp_path, "pictures-0")
    assert len(pictures) == 40 and all(p["uri"].startswith("data:image/png") for p in pictures)


def test_large_folder_loads_what_is_looked_at(tmp_path, strict):
    components = large()
    path = report(components, batches(torch.rand(70, 1, 28, 28), components.labels), tmp_path, k=6)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.all("article"), "component pages are files of their own"
    rows = [a for t, a in page.tags if t == "tr" and "data-row" in a]
    assert len(rows) == 10 and [len(part_of(tmp_path, f"rows-{i}")) for i in (1, 2)] == [10, 4]
    (parts,) = tmp_path.glob("data-*")
    for img in page.all("img"):
        assert (tmp_path / img["src"]).is_file()
    assert len(list(parts.glob("component-*.js"))) == 24 and len(list(parts.glob("thumb-*.webp"))) == 24
    assert part_of(tmp_path, "component-7").count("<article") == 1
    assert sum(len(part_of(tmp_path, f"examples-{i}")) for i in range(3)) == 70
    data = data_of(html)
    assert sorted(row[0] for row in data["rows"]) == list(range(24))
    shares = [row[data["columns"].index("share")] for row in data["rows"]]
    assert shares == sorted(shares, reverse=True)
    assert len(html) < 150_000


def test_every_part_that_the_page_may_ask_for_is_there(tmp_path, strict):
    report(large(), None, tmp_path, k=4)
    tree = part_of(tmp_path, "tree-0")
    (parts,) = tmp_path.glob("data-*")
    for id, (parent, children, count, *_, j, _group) in enumerate(tree):
        assert (parent < id) and all(tree[c][0] == id for c in children)
        if j < 0:
            assert count == sum(tree[c][2] for c in children)
            assert f"strategy-{id}" in part_of(tmp_path, f"strategy-{id}")
        else:
            assert count == 1 and not children and (parts / f"component-{j}.js").is_file()
    assert sorted(node[6] for node in tree if node[6] >= 0) == list(range(24))


def test_nothing_in_the_data_gets_out_of_a_part(tmp_path, strict):
    components = large()
    names = [NASTY] * 4
    path = report(components, [[NASTY] * 70], tmp_path, class_names=names, title=NASTY)
    for file in [path, *tmp_path.glob("data-*/*.js")]:
        text = file.read_text(encoding="utf-8")
        assert "alert(1)</script>" not in text and "<script>alert" not in text and "<!--" not in text
    assert "<script" not in part_of(tmp_path, "component-3")
    assert NASTY.replace("\\", "\\") in part_of(tmp_path, "pictures-0")[0]["text"], "but nothing is lost"
    single = report(components, [[NASTY] * 70], tmp_path / "x.html", class_names=names).read_text(encoding="utf-8")
    assert inline_of(single, "pictures-0")[0]["text"] == NASTY
    Page(single)


def test_the_page_allows_its_own_script_only(tmp_path):
    html = report(components_of(), None, tmp_path / "x.html").read_text(encoding="utf-8")
    policy = Page(html).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert not re.search(r"\son[a-z]+=", re.sub(r"<script.*?</script>", "", html, flags=re.S))


@pytest.mark.parametrize("limit", [50_000, 200_000, 10_000_000])
def test_a_file_keeps_to_its_limit_and_says_what_is_left_out(tmp_path, strict, limit):
    components = large()
    data = batches(torch.rand(70, 1, 28, 28), components.labels)
    path = report(components, data, tmp_path / "x.html", size_limit=limit, k=4)
    html = path.read_text(encoding="utf-8")
    shell = 120_000  # style, script, the rows of the overview, which are always there
    assert path.stat().st_size < limit + shell
    page, data = Page(html), data_of(html)
    articles = {a["id"] for a in page.all("article")}
    absent = set(data["absent"])
    assert articles | {name for name in absent if name.startswith("component-")} == {
        f"component-{j}" for j in range(24)
    }
    if limit < 10_000_000:
        assert re.search(r"Left out, .* \d+ of 24 component pages", page.text)
        best = [row[0] for row in data["rows"]][: len(articles)]
        assert len(articles) < 24 and articles == {f"component-{j}" for j in best}, "the largest are kept"
    else:
        assert "Left out" not in page.text and not absent
        assert len(inline_of(html, "pictures-0")) == 30


def test_limit_of_a_folder(tmp_path, strict):
    components = large()
    report(components, batches(torch.rand(70, 1, 28, 28), components.labels), tmp_path, size_limit="200kB")
    total = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert total < 200_000 + 120_000
    assert "Left out" in (tmp_path / "index.html").read_text(encoding="utf-8")
    for wrong in (0, "much", 2.5):
        with pytest.raises(ArgumentError, match="size_limit: expected a number of bytes"):
            report(components, None, tmp_path, size_limit=wrong)


def test_a_new_report_replaces_the_old_one_and_nothing_else(tmp_path):
    report(components_of(), None, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data-mine").mkdir()
    (tmp_path / "data-mine" / "x").write_text("mine")
    report(components_of(), None, tmp_path, title="Second")
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "data-2", "data-mine", "notes.txt"}
    assert (tmp_path / "data-2" / MARKER).is_file()
    assert 'data-2"' in script_json(data_of((tmp_path / "index.html").read_text(encoding="utf-8")))


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    components = components_of(n=20)
    path = report(components, None, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="has 5 examples"):
        report(components, [torch.rand(5, 1, 8, 8)], tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReportWriter, "publish", full)
    with pytest.raises(OSError, match="No space"):
        report(components, None, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError, match=r"the disk is full .* An earlier report there is as it was"):
        report(components, None, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before and path.exists()


def test_same_input_same_folder(tmp_path, strict):
    components = large()
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        report(components, batches(torch.ones(70, 1, 8, 8).cumsum(0) / 70), folder)
    files = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in folders]
    assert files[0] == files[1]


def test_without_data_there_are_no_pictures(tmp_path, strict):
    html = report(large(), None, tmp_path).read_text(encoding="utf-8")
    assert not data_of(html)["pictures"]
    assert not list(tmp_path.glob("data-*/pictures-*")) and not list(tmp_path.glob("data-*/thumb-*"))


def test_positions_with_gaps_can_be_found(tmp_path):
    ids = np.array([9, 2, 5, 30])
    components = components_of(n=4, r=2, ids=ids)
    html = report(components, None, tmp_path / "x.html").read_text(encoding="utf-8")
    assert data_of(html)["first_id"] is None and inline_of(html, "ids-0") == ids.tolist()
    html = report(components_of(n=4, r=2, ids=np.arange(4) + 7), None, tmp_path / "x.html").read_text(encoding="utf-8")
    assert data_of(html)["first_id"] == 7


def test_examples_beyond_the_memory_lie_in_a_file(tmp_path, monkeypatch):
    components = components_of()
    texts = ["ü" * i for i in range(40)]
    kept = report(components, [texts], tmp_path / "kept.html").read_bytes()
    monkeypatch.setattr("npeff.reports.examples.IN_MEMORY", 100)
    assert report(components, [texts], tmp_path / "spilled.html").read_bytes() == kept


def test_rows_of_a_file_are_all_there(tmp_path, strict):
    html = report(large(), None, tmp_path / "x.html").read_text(encoding="utf-8")
    assert len([a for t, a in Page(html).tags if t == "tr" and "data-row" in a]) == 24 > page_module.ROWS
