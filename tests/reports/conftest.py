"""Fixtures of the tests of reports: pages that hold little, a browser, and what it opens."""

import numpy as np
import pytest
import torch

from npeff.reports import report
from report_cases import EFFECT, batches, components_of


def hold_little(patch, per_part):
    """Have a page hold little, so that a small decomposition is a large one."""
    patch.setattr("npeff.reports.html.ROWS", 10)
    patch.setattr("npeff.reports.writer.INLINE", 20_000)
    patch.setattr("npeff.reports.html.PER_PART", per_part)


@pytest.fixture
def strict(monkeypatch):
    """A page that holds little."""
    hold_little(monkeypatch, 30)


@pytest.fixture(scope="module")
def browser():
    """Chromium, for tests that need it."""
    import playwright.sync_api as playwright

    from browsing import CHROMIUM

    with playwright.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same report as a folder in parts, as a file, and cut short by a limit."""
    root = tmp_path_factory.mktemp("reports")
    vectors = np.random.default_rng(1).normal(size=(24, 122)).astype(np.float32)
    components = components_of(n=130, r=24, vectors=vectors)
    options = {
        "class_names": ["cat", "dog", "<b>bird", "fish"],
        "k": 4,
        "effects": {j: {**(EFFECT if j == 7 else {}), "kl_ratio": 1.0 + j} for j in range(24)},
        "progress": False,
        "trust": np.linspace(0.5, 1, 24),
        "attributions": {(1, int(components.top_examples(1)[0])): np.ones((8, 8))},
    }
    data = lambda: batches(torch.rand(130, 1, 8, 8), components.labels)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        hold_little(patch, 50)
        made = {
            "folder": report(components, data(), root / "folder", **options),
            "file": report(components, data(), root / "file.html", **options),
            "short": report(components, data(), root / "short.html", size_limit=55_000, **options),
        }
    return components, made
