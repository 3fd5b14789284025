"""Places of text: the place marked, words for classes and titles, hostile tokens, what a push changes."""

import numpy as np
import pytest
import torch

from npeff.batches.batches import Batch
from npeff.errors import ArgumentError, DataError
from npeff.reports import collage, latex
from report_cases import Texts, components_of, data_of, inline_of, page_of

COUNTRIES = {" France": " Paris", " Spain": " Madrid", " Italy": " Rome"}
WORDS = [*COUNTRIES.values(), " yes", " no", "\n", "Paris", "<b>\u202e"]


def texts(n=24):
    """Capitals, then questions: two kinds of places, told apart by the words before them."""
    countries = [*COUNTRIES]
    places, labels = [], []
    for i in range(n):
        if i < n // 2:
            places.append((["The", " capital", " of", countries[i % 3], " is", COUNTRIES[countries[i % 3]], "."], 4))
            labels.append(i % 3)
        else:
            places.append((["Is", " it", " good", "?", " Say"], 4))
            labels.append(3 + i % 2)
    return Texts(places, WORDS, labels)


def case(n=24, **changes):
    data = texts(n)
    W = np.zeros((n, 2), np.float32)
    W[: n // 2, 0] = np.linspace(1, 0.5, n // 2)
    W[n // 2 :, 1] = np.linspace(1, 0.5, n - n // 2)
    logits = np.zeros((n, len(WORDS)), np.float32)
    logits[np.arange(n), data.labels] = 8
    return components_of(
        n=n, r=2, n_classes=len(WORDS), coefficients=W, labels=data.labels, logits=logits, **changes
    ), data


def test_words_and_the_place_are_shown(tmp_path):
    components, data = case()
    page = page_of(tmp_path, components, data, k=12)
    assert len(page.all("mark")) >= 24
    assert "The capital of France" in page.text and "Paris" in page.text
    heads = {row[0]: row[1] for row in data_of(page.html)["rows"]}
    assert set(heads[0].partition(" after ")[0].split(", ")) == {"Paris", "Madrid", "Rome"}
    assert heads[0].endswith("after “capital … of … is”") or "“The … capital" in heads[0]
    assert "yes" in heads[1] and "no" in heads[1] and "good" in heads[1]
    classes = data_of(page.html)["classes"]
    assert classes["0"] == "Paris" and not set(classes.values()) & set(map(str, range(9))), "no numbers of tokens"
    shown = inline_of(page.html, "pictures-0")[0]
    assert (shown["before"], shown["at"], shown["after"]) == ("The capital of France ", "is", " Paris.")


def test_what_the_model_predicts_is_listed_in_words(tmp_path):
    components, data = case()
    record = inline_of(page_of(tmp_path, components, data).html, "examples-0")[1]
    logits = np.exp(components.logits[1].astype(float))
    word, share = record[8][0]
    assert word == "Madrid" and share == pytest.approx(logits.max() / logits.sum(), rel=1e-3)
    assert len(record[8]) == 5 and record[7] == []


def test_same_words_but_for_white_space_differ(tmp_path):
    components, data = case()
    labels = data.labels.copy()
    labels[:2] = [6, 5]
    data.labels = labels
    components, _ = case()
    components = components_of(
        n=24, r=2, n_classes=len(WORDS), coefficients=components.coefficients, labels=labels, logits=components.logits
    )
    classes = data_of(page_of(tmp_path, components, data).html)["classes"]
    assert {classes["0"], classes["6"]} in ({"Paris", "…Paris"}, {"Paris", "␣Paris"}) and classes["5"] == "↵"


def test_answers_and_names_of_classes(tmp_path):
    data = texts()
    labels = data.labels % 2
    logits = np.where(np.arange(2) == labels[:, None], 5, 0).astype(np.float32)
    components = components_of(n=24, r=2, n_classes=2, labels=labels, logits=logits)
    answers = Texts(data.places, [" yes", " no"], labels)
    heads = [row[1] for row in data_of(page_of(tmp_path, components, answers).html)["rows"]]
    assert all("yes" in head or "no" in head for head in heads)
    page = page_of(tmp_path, components, answers, class_names=["a <good> one", "a bad one"])
    assert data_of(page.html)["classes"] == ["a <good> one", "a bad one"] and page.all("mark")


class Vocabulary:
    """A tokenizer that knows as many words as there are classes, and drops a space at the beginning."""

    def __len__(self):
        return len(WORDS)

    def decode(self, ids):
        return "".join(WORDS[int(i)] for i in ids).removeprefix(" ")


def test_a_tokenizer_names_classes_without_places(tmp_path):
    components, _ = case()
    page = page_of(tmp_path, components, tokenizer=Vocabulary())
    heads = [row[1] for row in data_of(page.html)["rows"]]
    assert any("Paris" in head for head in heads) and not any("after" in head for head in heads)
    unpredicted = components_of(n_classes=0)
    assert "no predictions on record" in page_of(tmp_path, unpredicted, tokenizer=Vocabulary()).text


@pytest.mark.skipif(not hasattr(Batch, "apart"), reason="batches hold no places here")
def test_places_of_batches_with_a_tokenizer(tmp_path):
    ids = torch.tensor([[7, 0, 1, 2], [3, 4, 3, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])  # padded on the left, and on the right
    labels = torch.tensor([[-100, 1, 2, -1], [4, -100, 5, -100]])
    flat = [1, 2, -1, 4, 5]
    logits = np.eye(len(WORDS), dtype=np.float32)[[1, 2, 0, 4, 5]] * 8
    W = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    components = components_of(n=5, r=2, n_classes=len(WORDS), labels=np.array(flat), logits=logits, coefficients=W)
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    page = page_of(tmp_path, components, data, tokenizer=Vocabulary())
    shown = inline_of(page.html, "pictures-0")
    found = [(one["before"], one["at"], one["after"]) for one in shown]
    assert found == [
        (" ", "Paris", " Madrid Rome"),
        (" Paris ", "Madrid", " Rome"),
        (" Paris Madrid ", "Rome", ""),
        (" ", "yes", " no yes"),
        (" yes no ", "yes", ""),
    ]


def test_long_texts_are_cut_around_the_place(tmp_path):
    components, data = case()
    data.places[0] = ([f" word{i}" for i in range(5000)], 2500)
    page = page_of(tmp_path, components, data)
    shown = inline_of(page.html, "pictures-0")[0]
    assert shown["at"] == "word2500"
    assert shown["before"].startswith("… word") and shown["before"].endswith(" word2499 ")
    assert shown["after"].startswith(" word2501") and shown["after"].endswith("…")
    assert 1000 < len(shown["before"]) < 1210 and 200 < len(shown["after"]) < 310
    assert len(page.html) < 150_000


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil",
    "\ud800",
    "\n",
    "\x00",
    "&lt;",
]


def test_hostile_tokens_are_text(tmp_path):
    components, data = case()
    data.places[0] = (HOSTILE, 4)
    data.words = ["<script>alert(2)</script>", "\u202eword", "\ud800", *WORDS[3:]]
    weights = np.linspace(-1, 1, len(HOSTILE))
    page = page_of(tmp_path, components, data, attributions={(0, 0): weights})
    assert not any(tag == "script" and attributes.get("src") for tag, attributes in page.tags)
    assert "<script>alert" not in page.html and "onerror=alert(1)>" not in page.html.replace("&gt;", "")
    assert "\u202e" not in page.html and "\\u202e" in page.text and "\x00" not in page.html
    assert "↵" in page.text, "a marked line break can be seen"
    assert "<img src=x onerror=alert(1)>" in page.text, "but nothing is lost"


def test_tokens_in_colours(tmp_path):
    components, data = case()
    page = page_of(tmp_path, components, data, attributions={(0, 0): [0, 0, 0, -2.0, 1.0], (0, 20): np.ones(5)})
    coloured = [a for tag, a in page.tags if tag in ("mark", "span") and "--v" in a.get("style", "")]
    assert {"for", "against"} == {a["class"] for a in coloured[:2]}
    assert page.text.count("What in the input speaks for it") == 1, "only of the place that no list shows"
    (drawn,) = inline_of(page.html, "examples-0")[0][7]
    assert drawn[0] == 0 and drawn[1]["index"] == 4 and drawn[1]["tokens"][3] == [" France", -1.0]
    with pytest.raises(ArgumentError, match=r"attributions\[0, 0\]: expected a number per token, 7"):
        page_of(tmp_path, components, data, attributions={(0, 0): np.ones(8)})


def test_what_a_push_changes(tmp_path):
    components, data = case()
    effect = {
        "kl_ratio": 3.0,
        "predictions": [{"id": 1, "classes": [1, 0], "before": [0.9, 0.05], "after": [0.2, 0.75]}],
        "continuations": [
            {"id": 2, "base": " Rome.", "down": " <b>a city", "up": " Rome, Rome"},
            {"id": None, "prompt": "My own \u202eprompt", "base": " goes on", "down": None, "up": " up"},
        ],
        "label": [0.45, 0.99],
        "perplexity": [15.0, 15.25],
    }
    page = page_of(tmp_path, components, data, effects={0: effect})
    assert "What the push changes" in page.text and "90 % → 20 %" in page.text and "5.0 % → 75 %" in page.text
    assert "Perplexity on unrelated data: 15 → 15.2" in page.text and "top examples: 45 % → 99 %" in page.text
    assert "My own \\u202eprompt" in page.text
    assert "How the text goes on" in page.text and "<b>a city" in page.text and "turned down" in page.text
    group = page_of(tmp_path, components, data, effects={(0, 1): effect})
    assert "Components 0, 1 together" in group.text and "90 % → 20 %" in group.text and "turned up" in group.text
    wrong = {"predictions": [{"id": 1, "classes": [1], "before": [0.9, 0.05], "after": [0.2]}]}
    with pytest.raises(ArgumentError, match=r"effects\[0\].predictions: expected a probability before and after"):
        page_of(tmp_path, components, data, effects={0: wrong})
    with pytest.raises(ArgumentError, match=r"effects\[0\].continuations: expected texts as base, down, up"):
        page_of(tmp_path, components, data, effects={0: {"continuations": [{"id": 1, "down": 3}]}})
    with pytest.raises(ArgumentError, match="expected the id of an example, or a prompt"):
        page_of(tmp_path, components, data, effects={0: {"continuations": [{"base": "x"}]}})
    with pytest.raises(ArgumentError, match=r"effects\[0\].perplexity: expected two numbers"):
        page_of(tmp_path, components, data, effects={0: {"perplexity": [1.0]}})


def test_other_places_are_refused(tmp_path):
    components, data = case()
    short = Texts(data.places[:20], WORDS, data.labels[:20])
    with pytest.raises(DataError, match="data: has 20 places, but the components were computed"):
        page_of(tmp_path, components, short)
    shuffled = Texts(data.places[::-1], WORDS, data.labels[::-1])
    with pytest.raises(DataError, match="data: place 0 has label"):
        page_of(tmp_path, components, shuffled)


def test_collages_and_documents_show_the_place(tmp_path):
    components, data = case()
    assert collage(components, data, 0, tmp_path / "zero.png").stat().st_size > 1000
    document = latex(components, data, tmp_path / "all.tex").read_text(encoding="utf-8")
    assert "The capital of France {[}is{]} Paris." in document
