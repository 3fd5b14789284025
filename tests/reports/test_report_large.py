"""A report of 1 000 components and 100 000 examples in headless Chromium: it loads what is looked at."""

import os
import sys

import pytest

from browsing import browser, go, needs_chromium, opened, until
from npeff.reports import report
from report_sizes import large_case, large_images

pytestmark = needs_chromium
__all__ = ["browser"]  # a fixture


@pytest.mark.slow
def test_a_thousand_components_and_a_hundred_thousand_examples(browser, tmp_path):
    components = large_case()
    path = report(components, large_images(components), tmp_path, progress=sys.stderr.isatty())
    total = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    asked = []

    def bytes_of(url):
        return os.path.getsize(url.removeprefix("file://").split("#")[0])

    with opened(browser, path) as page:
        first = path.stat().st_size
        thumbs = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        first += sum(bytes_of(url) for url in thumbs if url.startswith("file:"))
        page.on("request", lambda request: asked.append(request.url))
        assert page.locator("#map circle").count() == 1000
        page.click("th button:has-text('Purity')")
        until(page, "document.querySelector('th[aria-sort]').textContent.startsWith('Purity')")
        page.click("nav.site a:has-text('Strategies')")
        page.wait_for_selector("[role=treeitem]")
        asked.clear()
        go(page, "component-523")
        until(page, "document.querySelector('article#component-523 img')")
        component = sum(bytes_of(url) for url in asked if url.startswith("file:"))
        asked.clear()
        go(page, "example-77777")
        assert page.locator("#example img").count() == 1
        example = sum(bytes_of(url) for url in asked if url.startswith("file:"))
    print(f"total {total:,} bytes; first page {first:,}; a component {component:,}; an example {example:,}")
    assert first < 1_000_000 and component < 200_000 and example < 500_000 and total > 100_000_000
