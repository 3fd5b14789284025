"""Reports of places of text in Chromium, on a phone: nothing sticks out; with ten thousand places, their size."""

import time

import numpy as np
import pytest

from browsing import go, needs_chromium, opened, until
from npeff.reports import report
from report_cases import Texts, components_of

pytestmark = needs_chromium

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
HOSTILE = ["<img src=x onerror=alert(1)>", "\u202e", "\n\n", "x" * 400, "</script>", "\ud800", " السلام", "\x07"]
SUBJECTS = ["capital", "colour", "president", "price", "author", "river", "language", "answer"]
R = 32


def places_of(rng, n):
    """Sentences about a few subjects, now and then with a hostile token; the words of the classes."""
    words = [f" word{i}" for i in range(500)] + [" Paris", " green", " yes", " no", *HOSTILE]
    common = [" the", " of", " a", " to", " in", " that", " it", " was"]
    places, subjects = [], rng.integers(0, len(SUBJECTS), n)
    for i in range(n):
        length = int(rng.integers(4, 60))
        before = [common[k] if k < 8 else words[k] for k in rng.integers(0, 480, length)]
        tail = [" The", f" {SUBJECTS[subjects[i]]}", " of", f" place{i % 97}", " is"]
        if i % 50 == 0:
            before.insert(int(rng.integers(length)), HOSTILE[i // 50 % len(HOSTILE)])
        places.append((["Once", *before, *tail, " and", " so", " on", "."], length + len(tail) + (i % 50 == 0)))
    return places, words, subjects


def places_report(folder, n):
    """Components of which each responds to one subject, with effects, continuations and coloured tokens."""
    rng = np.random.default_rng(0)
    places, words, subjects = places_of(rng, n)
    W = rng.gamma(0.2, size=(n, R)).astype(np.float32) * 0.1
    W[np.arange(n), subjects * 4 + rng.integers(0, 4, n)] += rng.gamma(2, 0.3, n).astype(np.float32)
    logits = rng.normal(size=(n, len(words))).astype(np.float32)
    labels = rng.integers(0, 12, n) + subjects * 12
    labels[::9] = len(words) - 1 - rng.integers(0, len(HOSTILE), len(labels[::9]))
    logits[np.arange(n), labels] += 6
    vectors = rng.normal(size=(R, 122)).astype(np.float32)
    components = components_of(
        n=n, r=R, n_classes=len(words), coefficients=W, labels=labels, logits=logits, vectors=vectors
    )
    top = [components.top_examples(j, 8).tolist() for j in range(R)]
    effects = {
        j: {
            "kl_ratio": 1.0 + j,
            "predictions": [
                {"id": i, "classes": [int(labels[i]), 500, 507], "before": [0.8, 0.1, 0.1], "after": [0.1, 0.85, 0.05]}
                for i in top[j]
            ],
            "continuations": [
                {"id": top[j][0], "base": " Paris." + "x" * 300, "down": " a\u202e city\n<b>", "up": " Paris Paris"}
            ],
        }
        for j in range(R)
    }
    attributions = {(j, i): rng.normal(size=len(places[i][0])) for j in range(R) for i in top[j][:4]}
    data = Texts(places, words, labels)
    return components, report(components, data, folder, effects=effects, attributions=attributions, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return places_report(tmp_path_factory.mktemp("places"), 1_000)


def look(browser, components, path):
    """Open every kind of page on a phone; return when the table was there, in milliseconds."""
    best = int(components.top_examples(5)[0])
    with opened(browser, path, **PHONE) as page:
        table = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        assert page.locator("#overview-table tbody tr").count() == R
        dialogs = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        n_words = components.logits.shape[1]
        hostile = [np.flatnonzero(components.labels == c)[0] for c in range(n_words - len(HOSTILE), n_words)]
        examples = (f"example-{best}", *(f"example-{i}" for i in hostile), "examples")
        for route in ("overview", "component-5", *examples, "strategies", "strategy-0"):
            go(page, route)
            until(page, "document.querySelectorAll('main :is(li, tr, dd, article, [role=treeitem])').length > 0")
            page.wait_for_timeout(50)
            width, sight = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width <= sight == 390, f"{route}: no scrolling sideways"
        assert dialogs == []
    return table


def test_places_on_a_phone(browser, made):
    look(browser, *made)


@pytest.mark.slow
def test_ten_thousand_places_on_a_phone(browser, tmp_path):
    start = time.perf_counter()
    components, path = places_report(tmp_path, 10_000)
    seconds = time.perf_counter() - start
    table = look(browser, components, path)
    total = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    first = path.stat().st_size
    print(f"written in {seconds:.1f} s; {total:,} bytes, the page {first:,}; the table after {table:.0f} ms")
    assert first < 200_000 and total < 12_000_000


def test_what_a_component_of_places_shows(browser, made):
    components, path = made
    best = int(components.top_examples(5)[0])
    with opened(browser, path, "component-5", **PHONE) as page:
        until(page, "document.querySelector('article#component-5:not([hidden])')")
        article = page.locator("article#component-5")
        assert article.locator("section.top mark").count() == 16
        assert article.locator("section.top mark.for, section.top mark.against").count() == 4
        assert article.locator("section.shifts li .pair").count() == 24
        assert "10 % → 85 %" in article.inner_text()
        assert article.locator("section.continuations dd").count() == 3
        assert SUBJECTS[1] in page.inner_text("#name-5"), "a title in words"
        go(page, f"example-{best}")
        assert page.inner_text("#example figure mark") == "is"
        assert page.locator("#example .likely li").count() == 5
        assert page.locator("#example .attributions mark").count() == 1
