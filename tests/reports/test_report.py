"""The page: what it shows of every kind of data, that it is self-contained, that no data can break it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError, DataError, StorageError
from npeff.reports import report
from npeff.reports.summary import summarise
from npeff.reports.text import excerpt, percent
from report_cases import PARAMETERS, batches, components_of, data_of, page_of

ROUTE = re.compile("(overview|strategies|examples|provenance|(component|example|strategy)-[0-9]+)$")


def test_where_it_is_written(tmp_path):
    components = components_of()
    assert report(components, None, tmp_path / "a" / "b") == tmp_path / "a" / "b" / "index.html"
    assert report(components, None, str(tmp_path / "c.html")) == tmp_path / "c.html"
    made = {p.name for p in (tmp_path / "a" / "b").iterdir()}
    assert made == {"index.html", "data-1"}, "nothing else is left"
    folder, file = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a/b/index.html", "c.html"))
    assert "lies in the folder data-1 beside it" in folder and re.search("script-src [^;]*'self' file:", folder)
    assert "This file is complete in itself" in file and not re.search("script-src [^;]*'self'", file)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writing failed"):
        report(components, None, tmp_path / "file" / "x.html")


def test_only_an_earlier_report_is_replaced(tmp_path):
    components = components_of()
    for out in (tmp_path / "site", tmp_path / "own.html"):
        page = report(components, None, out, title="first")
        page.write_text(re.sub('content="npeff [^"]*"', 'content="npeff 0.0.1"', page.read_text(encoding="utf-8")))
        assert "second" in report(components, None, out, title="second").read_text(encoding="utf-8")
        page.write_text("<!doctype html><title>My own page</title>")
        with pytest.raises(
            StorageError, match=r"npeff did not write is there.*choose another out=, or delete the file"
        ):
            report(components, None, out)
        assert "My own page" in page.read_text(encoding="utf-8")
        page.write_text("")
        report(components, None, out)
    for name in ("components.h5", "page.JSON"):
        with pytest.raises(ArgumentError, match=r"out: expected a name ending in \.html, or that of a folder"):
            report(components, None, tmp_path / name)
        assert not (tmp_path / name).exists()
    assert report(components, None, tmp_path / "model.v2").parent.name == "model.v2"


def test_without_data(tmp_path):
    page = page_of(tmp_path, components_of(), title="A title")
    assert page.all("h1") and "A title" in page.text
    assert not page.all("img")
    assert len(page.all("article")) == 3
    assert re.search(r"example \d+", page.text)


def test_self_contained_and_accessible(tmp_path):
    components = components_of(loss_curve=np.geomspace(1, 0.1, 20))
    page = page_of(tmp_path, components, batches(torch.rand(40, 1, 8, 8), components.labels))
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), (tag, address)
    assert "@import" not in page.html and not re.search(r"url\((?!data:|#)", page.html)
    assert all("alt" in img for img in page.all("img")), "every image has a text alternative"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {a["href"][1:] for a in page.all("a")}
    assert all(a in ids or ROUTE.match(a) for a in anchors), anchors - set(ids)
    assert {f"component-{j}" for j in range(3)} <= set(ids), "all components can be read without scripts"
    svgs = page.all("svg")
    assert svgs and all(svg.get("aria-label") for svg in svgs)
    assert any("Relative loss over 20 iterations" in svg["aria-label"] for svg in svgs)
    assert page.all("html")[0]["lang"] == "en"
    assert "prefers-color-scheme: dark" in page.html
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert labelled and set(labelled) <= set(ids)


def test_texts_are_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & <b>bold</b> {{ 7 * 7 }} \' " </style>'
    components = components_of(n=10, r=2)
    components.provenance["note"] = nasty
    page = page_of(tmp_path, components, batches([nasty] * 10, components.labels), class_names=[nasty] * 4, title=nasty)
    harmless = page_of(tmp_path, components_of(n=10, r=2), batches(["words"] * 10, components.labels))
    assert page.html.count("<script") == harmless.html.count("<script") and page.html.count(
        "</script"
    ) == harmless.html.count("</script")
    assert "<b>bold" not in page.html and " 49 " not in page.text
    assert page.text.count('<script>alert("x")</script> & <b>bold</b> {{ 7 * 7 }}') >= 20
    assert page.all("title") and nasty in "".join(page.words)


@pytest.mark.parametrize("form", ["strings", "dict", "pairs", "dict and labels", "tokens", "dict of ids", "ids alone"])
def test_texts(tmp_path, form):
    n = 10
    texts = [f"review number {i} " + "of many words " * (30 if i % 2 else 1) for i in range(n)]
    components = components_of(n=n, r=2)
    ids = torch.arange(n)[:, None] + torch.tensor([[0, 100, 200]])
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens=False: f"decoded {ids[0]} {skip_special_tokens}")
    labels = torch.as_tensor(components.labels)
    data = {
        "strings": [texts],
        "dict": [{"text": texts, "input_ids": ids, "labels": labels}],
        "pairs": [([(text, "second") for text in texts], labels)],
        "dict and labels": [({"text": texts, "input_ids": ids}, labels)],
        "tokens": [(ids, labels)],
        "dict of ids": [{"input_ids": ids, "attention_mask": ids, "labels": labels}],
        "ids alone": [{"input_ids": ids}],
    }[form]
    page = page_of(tmp_path, components, data, tokenizer=None if form == "ids alone" else tokenizer)
    first = summarise(components, 4)[0].top[0].position
    wanted = {
        "tokens": f"decoded {first} True",
        "dict of ids": f"decoded {first} True",
        "ids alone": f"token ids {first} ",
    }
    assert wanted.get(form, f"review number {first} of many words") in page.text
    if form in ("strings", "dict"):
        assert page.text.count("of many words of many words of many words") > 5, "long texts are all there"
    assert not page.all("img")


def test_excerpt():
    assert excerpt("  short ") == ("short", "")
    start, rest = excerpt("word " * 200)
    assert start.endswith("word") and 100 < len(start) <= 220
    assert (start + rest).replace(" ", "") == ("word " * 200).replace(" ", "")
    start, rest = excerpt("x" * 1000)
    assert start + rest == "x" * 1000


def test_data_is_iterated_once_and_no_further_than_needed(tmp_path):
    components = components_of(n=20, ids=np.arange(20) + 5)
    inputs, seen = torch.rand(100, 1, 8, 8), []

    def data():
        for start in range(0, 100, 10):
            seen.append(start)
            yield inputs[start : start + 10]

    page_of(tmp_path, components, data())
    assert seen[-1] <= 20


def test_other_data_is_refused(tmp_path):
    components = components_of(n=20)
    with pytest.raises(DataError, match=r"has 5 examples, .* at least \d+; pass the data given to compute_fishers"):
        page_of(tmp_path, components, [torch.rand(5, 1, 8, 8)])
    with pytest.raises(DataError, match=r"example \d+ has label \d, but \d when the Fishers were computed.*shuffling"):
        page_of(tmp_path, components, batches(torch.rand(20, 1, 8, 8), (components.labels + 1) % 4))
    with pytest.raises(DataError, match="keys a, b; found neither text nor tensors"):
        page_of(tmp_path, components, [{"a": 1, "b": None}])
    with pytest.raises(DataError, match="neither text nor numbers"):
        page_of(tmp_path, components, [([object()] * 20, components.labels)])
    labels = torch.as_tensor(components.labels)
    for short in ({"text": ["a"] * 5, "labels": labels}, {"text": ["a"] * 5, "input_ids": labels, "labels": labels}):
        with pytest.raises(
            DataError, match=r"data: text has 5 entries,( input_ids 20,)? labels 20; expected one of each"
        ):
            page_of(tmp_path, components, [short])
    for parts in (["a"] * 5, {"input_ids": labels[:5]}):
        with pytest.raises(DataError, match=r"data: (inputs|input_ids) has 5 entries, labels 20"):
            page_of(tmp_path, components, [(parts, labels)])
    for one in ({"text": "a text of thirty characters", "labels": labels}, ("a text", labels)):
        with pytest.raises(DataError, match=r"data: (text|inputs) is one string; expected a list, a text per example"):
            page_of(tmp_path, components, [one])
    assert not (tmp_path / "page.html").exists()


def test_the_page_says_how_the_order_was_checked(tmp_path):
    components = components_of(n=20)
    texts = [f"text {i}" for i in range(20)]
    page = page_of(tmp_path, components, batches(texts, components.labels))
    assert "The labels of 20 of the 20 examples read agree" in page.text and "Labels alone were compared" in page.text
    assert "could not be checked" not in page.text
    for unknown, data in (
        (components, [texts]),
        (components_of(n=20, labels=np.full(20, -1)), batches(texts, [1] * 20)),
    ):
        page = page_of(tmp_path, unknown, data)
        assert "The order of the examples could not be checked" in page.text and "agree" not in page.text
    assert not page_of(tmp_path, components).all("p", id="order")


def test_titles_name_words_that_distinguish_the_texts(tmp_path):
    W = np.zeros((40, 2), np.float32)
    W[:10, 0], W[10:, 1] = 1, 1
    texts = [f"the news {'from reuters' if i < 10 else 'of the day'} {i}" for i in range(40)]
    components = components_of(r=2, coefficients=W)
    labels = torch.as_tensor(components.labels)
    page = page_of(tmp_path, components, [{"x": torch.rand(40, 3), "text": texts, "labels": labels}], k=8)
    heads = {row[0]: row[1] for row in data_of(page.html)["rows"]}
    assert heads[0].endswith("with “from”, “reuters”") and "“" not in heads[1]
    assert "words that are frequent in the top examples and not in others" in page.text


def test_options_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match="k: expected at least 1"):
        page_of(tmp_path, components_of(), k=0)
    with pytest.raises(ArgumentError, match="class_names: expected 4 names"):
        page_of(tmp_path, components_of(), class_names=["a"])
    with pytest.raises(ArgumentError, match="class_names: expected 4 names, one per class, got 5"):
        page_of(tmp_path, components_of(), class_names=list("abcde"))
    binary = components_of(n_classes=1, labels=np.arange(40) % 2)
    assert "yes" in page_of(tmp_path, binary, class_names=["no", "yes"]).text, "one output, two classes"
    with pytest.raises(ArgumentError, match="class_names: expected a list of names"):
        page_of(tmp_path, components_of(), class_names="abcd")


def test_class_names_of_the_data(tmp_path):
    class Loader(list):
        dataset = SimpleNamespace(classes=["cat", "dog", "bird", "fish"])

    components = components_of()
    page = page_of(tmp_path, components, Loader(batches(torch.rand(40, 1, 8, 8), components.labels)))
    assert "Predictions: a bar for each class, in the order cat, dog, bird, fish" in page.text


def test_odd_components(tmp_path):
    W = components_of().coefficients
    W[:, 1] = 0
    page = page_of(tmp_path, components_of(coefficients=W, loss_curve=np.array([])))
    assert "No example has a coefficient above zero" in page.text
    page_of(tmp_path, components_of(loss_curve=np.array([1.0, np.nan, 0.5]), loss=float("nan")))
    page_of(tmp_path, components_of(n=1, r=1))
    page_of(tmp_path, components_of(kind="diagonal", norms=np.zeros(40, np.float32)))
    regression = components_of(n_classes=1, labels=np.full(40, -1))
    assert "Weighs between" not in page_of(tmp_path, regression).text
    many = page_of(tmp_path, components_of(n_classes=500))
    assert "more classes" in many.text


def test_components_of_a_published_file_lack_labels_and_logits(tmp_path):
    bare = components_of(n_classes=0, provenance={})
    page = page_of(tmp_path, bare, batches(torch.rand(40, 1, 8, 8)))
    assert "accuracy" not in page.text and "none on record" in page.text
    assert "−1" not in page.text and "-1" not in page.text


def test_summary_against_counting():
    components = components_of(n=200, r=3)
    W, labels, predictions = components.coefficients, components.labels, components.predictions
    for s in summarise(components, 10):
        w = W[:, s.j]
        assert s.share == pytest.approx(w.sum() / W.sum(), rel=1e-5)
        active = w >= 0.1 * w.max()
        assert s.n_active == active.sum() and s.n_zero == (w == 0).sum()
        assert sum(s.histogram) == (w > 0).sum()
        assert s.accuracy == pytest.approx((labels == predictions)[active].mean())
        assert sum(a for _, a, _ in s.classes) == active.sum()
        assert [t.index for t in s.top] == np.argsort(-w, kind="stable")[:10].tolist()
        assert s.profile.sum() == pytest.approx(1)
        assert s.blocks[0][0] == "head.bias" and s.blocks[-1][0] == "all others"
        assert sum(share for _, share, _ in s.blocks) == pytest.approx(1)
        shares = [share for _, share in s.contest]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-9
    sizes = [s.share for s in summarise(components, 10)]
    assert sizes == sorted(sizes, reverse=True)


def test_contest_of_a_confident_prediction():
    logits = np.zeros((1, 3), np.float32)
    logits[0] = [60, 30, 0]
    components = components_of(n=1, r=1, n_classes=3, logits=logits, coefficients=np.ones((1, 1), np.float32))
    (s,) = summarise(components, 4)
    assert [c for c, _ in s.contest] == [0, 1]
    assert s.contest[0][1] == pytest.approx(0.5, abs=1e-6), "1 − p is not lost to rounding"


def test_large_page_is_small(tmp_path):
    components = components_of(n=400, r=32, n_classes=10)
    images = torch.rand(400, 1, 28, 28)
    path = report(components, batches(images, components.labels, 200), tmp_path)
    assert path.stat().st_size < 2_000_000


def test_same_input_same_page(tmp_path):
    components = components_of(loss_curve=np.geomspace(1, 0.1, 60))
    first = report(components, None, tmp_path / "a.html").read_bytes()
    assert report(components, None, tmp_path / "b.html").read_bytes() == first


PERCENTAGES = {0: "0 %", 1e-4: "< 0.1 %", 0.0123: "1.2 %", 0.123: "12 %", 0.994: "99 %", 0.997: "99.7 %"}
PERCENTAGES |= {0.99996: "> 99.9 %", 1 - 1e-7: "100 %", 1: "100 %", -0.5: "−50 %", float("nan"): "–"}


@pytest.mark.parametrize(("share", "text"), PERCENTAGES.items())
def test_percentages(share, text):
    assert percent(share) == text, "100 % are all"


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_block_weights_are_explained_where_energies_stand(tmp_path, kind):
    weights = {p.name: 1.0 for p in PARAMETERS} | {"layer9.weight": 0.25, "head.bias": 4.0}
    fishers = {"options": {"block_weights": {"choice": "balanced", "weights": weights}, "parameters": ["blocks"]}}
    components = components_of(kind=kind, block_weights=weights, provenance={"fishers": fishers})
    page = page_of(tmp_path, components)
    (s, *_) = summarise(components, 4)
    energy = {p.name: np.square(components.vectors[s.j][p.slice]).sum() for p in PARAMETERS}  # as it was decomposed
    for name, share, weighted in s.blocks[:-1]:
        assert share == pytest.approx(components.block_energy(s.j)[name])
        assert weighted == pytest.approx(energy[name] / sum(energy.values()), rel=1e-4)
    assert sum(weighted for *_, weighted in s.blocks) == pytest.approx(1)
    name, share, weighted = s.blocks[0]
    assert f"{name} {percent(share)} · {percent(weighted)}" in page.text
    formula = "w p ‖g p ‖² / Σ q w q ‖g q ‖²" if kind == "low_rank" else "w p ²‖g p ‖² / Σ q w q ²‖g q ‖²"
    assert page.text.count(formula) == 3 and "(balanced, 0.25 to 4)" in page.text
    assert "share of ‖g‖² per parameter, block weights undone" in page.text
    assert "about the same share of the trace" in page.text and page.all("details", id="block-weights")
    assert "linear layers of the transformer blocks alone" in page.text
    plain = page_of(tmp_path, components_of())
    assert "weights" not in plain.text and "share of ‖g‖² per parameter" in plain.text
