"""Reports in a headless browser: how to open, wait and look."""

import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to drive")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the pages with")

R = 24
PATIENCE = 180_000  # milliseconds, on a busy machine
NAMES = ["cat", "dog", "<b>bird", "fish"]


@contextmanager
def opened(browser, path, route="", **options):
    """A page of its own; whatever it logs, misses or asks the network for fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    told = []
    page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: told.append(f"error: {error}"))
    page.on("requestfailed", lambda request: told.append(f"failed: {request.url}"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or told.append(f"asks {request.url}"))
    page.goto(path.as_uri() + (f"#{route}" if route else ""))
    until(page, "document.documentElement.dataset.route !== undefined")
    try:
        yield page
        assert told == []
    finally:
        context.close()


def go(page, route):
    page.evaluate(f"location.hash = '#{route}'")
    until(page, f"document.documentElement.dataset.route === '#{route}'")


def numbers(page):
    """The components in the table, in order."""
    return page.eval_on_selector_all("#overview-table tbody tr", "rows => rows.map(row => Number(row.dataset.row))")


def until(page, condition):
    """Wait; not by the browser's own polling, which evaluates strings, as the page forbids."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(30)


def by(components, values, descending=True):
    sizes = components.coefficients.sum(0, dtype=np.float64)
    place = {int(j): i for i, j in enumerate(np.argsort(-sizes, kind="stable"))}
    return sorted(range(R), key=lambda j: (-values[j] if descending else values[j], place[j]))
