"""Decompositions made of random numbers, their data, and how to read the pages that show them."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import torch

from npeff.components.components import Components
from npeff.models.parameters import Parameters
from npeff.reports import report

EFFECT = {"kl_ratio": 12.5, "magnitudes": [0.0, 0.1, 0.2], "kl_top": [0, 0.2, 0.8], "kl_baseline": [0, 0.01, 0.05]}
PARAMETERS = Parameters.of([(f"layer{i}.weight", (3, 4)) for i in range(10)] + [("head.bias", (2,))])
VOID = {"meta", "link", "img", "br", "hr", "input", "rect", "path", "use"}


def components_of(n=40, r=3, n_classes=4, seed=0, **changes):
    """Components made of random numbers."""
    rng = np.random.default_rng(seed)
    W = rng.gamma(0.4, size=(n, r)).astype(np.float32)
    W[W < 0.2] = 0
    energy = np.concatenate([np.full(p.numel, (i + 1) / p.numel) for i, p in enumerate(PARAMETERS)])
    vector = np.sqrt(energy / energy.sum()).astype(np.float32)
    parts = {
        "kind": "low_rank",
        "coefficients": W,
        "vectors": np.tile(vector, (r, 1)),
        "columns": None,
        "block_weights": None,
        "parameters": PARAMETERS,
        "labels": rng.integers(0, n_classes, n) if n_classes else np.full(n, -1),
        "logits": rng.normal(size=(n, n_classes)).astype(np.float32) * 3,
        "ids": np.arange(n),
        "norms": np.ones(n, np.float32),
        "loss_curve": np.array([0.1]),  # too short to be drawn, which takes longer than all the rest of a page
        "loss": 0.1,
        "provenance": {"model": {"digest": "00ff", "class": "Tiny"}, "options": {"seed": 0}},
    }
    return Components(**{**parts, **changes})


class Texts:
    """Places of texts as :class:`npeff.language.Places` offers them, without a tokenizer.

    Args:
        places: Of every place, the tokens and the index of its own.
        words: The word of every class.
        labels: Of every place; unknown by default.
    """

    def __init__(self, places, words, labels=None):
        self.places, self.words, self.n_examples = places, words, len(places)
        self.labels = np.full(len(places), -1) if labels is None else np.asarray(labels)

    def __iter__(self):
        raise AssertionError("the examples are asked for by number")

    def example(self, number):
        tokens, index = self.places[number]
        return SimpleNamespace(tokens=tuple(tokens), index=index)

    def output_names(self, classes):
        return [self.words[c] for c in classes]


class Page(HTMLParser):
    """A parsed page: its text, its elements, and whether they are properly nested."""

    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.open, self.words = html, [], [], []
        self.feed(html)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(a.get(k.rstrip("_")) == v for k, v in attributes.items())]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(tmp_path, components, data=None, **options):
    return Page(report(components, data, tmp_path / "page.html", **options).read_text(encoding="utf-8"))


def batches(inputs, labels=None, size=7):
    """Batches of tensors or lists."""
    for start in range(0, len(inputs), size):
        part = slice(start, start + size)
        yield inputs[part] if labels is None else (inputs[part], torch.as_tensor(np.asarray(labels)[part]))


def part_of(folder, name):
    """What a part beside the page hands to it."""
    (parts,) = folder.glob("data-*")
    text = (parts / f"{name}.js").read_text(encoding="utf-8")
    head = f'npeff("{name}",'
    assert text.startswith(head) and text.endswith(");\n")
    return json.loads(text[len(head) : -3])


def data_of(html):
    """The page's own data."""
    return json.loads(re.search('id="report-data">(.*?)</script>', html, re.S).group(1))


def inline_of(html, name):
    return json.loads(re.search(f'data-part="{name}">(.*?)</script>', html, re.S).group(1))
