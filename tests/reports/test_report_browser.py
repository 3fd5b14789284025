"""Reports in headless Chromium, opened from disk: views, sorting, filtering, keyboard, dark, on a phone, and large."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from browsing import NAMES, PATIENCE, R, by, go, needs_chromium, numbers, opened, until
from npeff.reports import report
from report_cases import components_of

pytestmark = needs_chromium


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_table_sorts_filters_and_searches(browser, folders, kind):
    components, made = folders
    sizes = components.coefficients.sum(0, dtype=np.float64).tolist()
    with opened(browser, made[kind]) as page:
        first = R if kind == "file" else 10
        assert numbers(page) == by(components, sizes)[:first]
        page.click("th button:has-text('KL ratio')")
        until(page, f"document.querySelector('#overview-table tbody tr').dataset.row === '{R - 1}'")
        assert numbers(page) == list(range(R))[::-1][:first], "rows that were not in the page came"
        assert page.get_attribute("th[aria-sort]", "aria-sort") == "descending"
        page.click("th button:has-text('KL ratio')")
        until(page, "document.querySelector('#overview-table tbody tr').dataset.row === '0'")
        if kind == "folder":
            page.click("#more-rows button")
            until(page, "document.querySelectorAll('#overview-table tbody tr').length === 20")
        page.click("th button:has-text('No.')")
        page.click("#ranges summary")
        page.fill("input[aria-label='Stability at least']", "0.9")
        until(page, "document.getElementById('table-count').textContent.includes(' of 24')")
        stable = [j for j, value in enumerate(np.linspace(0.5, 1, R)) if value >= 0.9]
        assert numbers(page) == stable
        faded = page.eval_on_selector_all("#map a.faded", "all => all.length")
        assert faded == R - len(stable), "the map follows"
        page.click("form#filters button:has-text('Clear')")
        until(page, "!document.getElementById('table-count').textContent.includes(' of ')")
        page.fill("#search", "17")
        until(page, "document.querySelectorAll('#overview-table tbody tr').length === 1")
        assert numbers(page) == [17]
        page.fill("#search", "no such thing")
        until(page, "!document.getElementById('no-rows').hidden")
        page.click("#no-rows button")
        until(page, "document.getElementById('no-rows').hidden")
        options = page.eval_on_selector_all("#filter-strategy option", "all => all.map(one => one.value)")[1:]
        assert len(options) >= 2
        found = []
        for option in options:
            page.select_option("#filter-strategy", option)
            until(page, "document.getElementById('table-count').textContent.includes(' of 24')")
            found.append(int(page.inner_text("#table-count").split()[0]))
        assert sum(found) == R, "every component has one strategy"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_pages_of_components_examples_and_strategies(browser, folders, kind):
    components, made = folders
    with opened(browser, made[kind], "component-7") as page:
        until(page, "document.querySelector('article#component-7:not([hidden])')")
        assert page.locator("article:visible").count() == 1
        until(page, "[...document.querySelectorAll('article:not([hidden]) .top img')].every(img => img.complete)")
        assert page.locator("section.top img").first.evaluate("img => img.naturalWidth") == 8
        assert page.locator("article:visible .heat .cell").count() == len(components.parameters)
        assert page.title().startswith("7 ")
        page.locator("article:visible section.top a").first.click()
        best = int(components.top_examples(7)[0])
        until(page, f"document.documentElement.dataset.route === '#example-{best}'")
        assert f"Example {best}" in page.inner_text("#example h2")
        listed = page.eval_on_selector_all("#example .coefficients a", "all => all.map(one => one.hash)")
        W = components.coefficients[best]
        assert listed[0] == f"#component-{W.argmax()}" and len(listed) <= (W > 0).sum()
        assert NAMES[components.predictions[best]] in page.inner_text("#example dl"), "a name with markup in it is text"
        page.locator("#example .coefficients a").first.click()
        until(page, f"document.querySelector('article#component-{W.argmax()}:not([hidden])')")
        page.click("nav.site a:has-text('Strategies')")
        page.wait_for_selector("[role=treeitem]")
        page.click("[role=treeitem] a >> nth=0")
        until(page, "document.documentElement.dataset.route === '#strategy-0'")
        assert page.locator("#strategy article img").count() == 4
        assert "all components" in page.inner_text("#strategy h3")
        attributed = int(components.top_examples(1)[0])
        go(page, f"example-{attributed}")
        assert page.locator("#example .attributions img").count() == 1
        page.click("nav.site a:has-text('Provenance')")
        assert "00ff" in page.inner_text("#provenance")


def test_list_of_examples(browser, folders):
    components, made = folders
    with opened(browser, made["folder"], "examples") as page:
        page.wait_for_selector("#example-list li")
        assert page.locator("#example-list li").count() == 60
        page.click("#example-pages button:has-text('more')")
        until(page, "document.querySelector('#example-list a').hash === '#example-60'")
        page.check("#only-wrong")
        wrong = np.flatnonzero(components.labels != components.predictions)
        until(page, f"document.querySelector('#example-list a').hash === '#example-{wrong[0]}'")
        shown = page.eval_on_selector_all("#example-list a", "all => all.map(one => Number(one.hash.slice(9)))")
        assert shown == wrong[:60].tolist()
        page.fill("#go-to-number", "999")
        page.press("#go-to-number", "Enter")
        until(page, "document.getElementById('go-to-message').textContent.includes('not decomposed')")
        page.fill("#go-to-number", "104")
        page.press("#go-to-number", "Enter")
        until(page, "document.documentElement.dataset.route === '#example-104'")
        part = next(made["folder"].parent.glob("data-*/pictures-2.js")).read_text(encoding="utf-8")
        picture = json.loads(part[part.index(",") + 1 : -3])[104 - 2 * 50]["uri"]
        assert page.get_attribute("#example figure img", "src") == picture


def test_back_to_where_one_was(browser, folders):
    with opened(browser, folders[1]["folder"]) as page:
        page.evaluate("scrollTo(0, 500)")
        until(page, "scrollY === 500")
        page.wait_for_timeout(50)
        page.locator("#overview-table tbody a").first.evaluate("link => link.click()")
        until(page, "document.documentElement.dataset.route.startsWith('#component')")
        assert page.evaluate("scrollY") == 0
        page.go_back()
        until(page, "document.documentElement.dataset.route === '#overview'")
        until(page, "scrollY === 500")


def test_on_a_phone(browser, folders):
    phone = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with opened(browser, folders[1]["folder"], **phone) as page:
        page.click("#ranges summary")
        page.tap("#overview-table tbody a >> nth=0")
        until(page, "document.documentElement.dataset.route.startsWith('#component')")
        routes = ("overview", "component-7", "example-5", "examples", "strategies", "strategy-0", "provenance")
        for route in routes:
            go(page, route)
            until(page, "document.querySelectorAll('main :is(li, tr, dd, article, [role=treeitem])').length > 0")
            page.wait_for_timeout(50)
            width, sight = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width <= sight == 360, f"{route}: no scrolling sideways"


def test_dark(browser, folders):
    luminance = {}
    for scheme in ("light", "dark"):
        with opened(browser, folders[1]["folder"], "component-1", color_scheme=scheme) as page:
            until(page, "document.querySelector('article#component-1')")
            colours = page.evaluate(
                """["backgroundColor", "color"].map(what => {
                    const canvas = document.createElement("canvas").getContext("2d");
                    canvas.fillStyle = getComputedStyle(document.body)[what];
                    canvas.fillRect(0, 0, 1, 1);
                    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).reduce((a, b) => a + b) / 765;
                })"""
            )
            luminance[scheme] = colours
    assert luminance["light"][0] > 0.9 > 0.2 > luminance["light"][1]
    assert luminance["dark"][1] > 0.8 > 0.2 > luminance["dark"][0]


def test_what_was_left_out_is_said(browser, folders):
    components, made = folders
    last = by(components, components.coefficients.sum(0, dtype=np.float64).tolist())[-1]
    with opened(browser, made["short"]) as page:
        assert "Left out" in page.inner_text("#left-out")
        for route in (f"component-{last}", "example-3", "strategy-0"):
            go(page, route)
            assert "This was left out" in page.inner_text("main")


def test_parts_that_are_missing_are_told(browser, folders, tmp_path):
    _, made = folders
    shutil.copy(made["folder"], tmp_path / "index.html")
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "index.html").as_uri() + "#example-3")
    until(page, "document.getElementById('example').textContent.includes('together with its folder data-1')")
    context.close()


def test_without_scripts(browser, folders):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(folders[1]["file"].as_uri())
    assert (
        page.locator("article:visible").count() == R and page.locator("#overview-table tbody tr:visible").count() == R
    )
    assert page.locator("nav.site:visible, #filters:visible").count() == 0, "nothing that would not work"
    context.close()


# ---- by keyboard alone --------------------------------------------------------------------------------------


def test_by_keyboard(browser, folders):
    components, made = folders
    order = by(components, components.coefficients.sum(0, dtype=np.float64).tolist())
    with opened(browser, made["folder"]) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.type("#3")
        until(page, "document.querySelectorAll('#overview-table tbody tr').length === 1")
        assert numbers(page) == [3]
        page.fill("#search", "")
        page.keyboard.press("Escape")
        page.focus("th button:has-text('No.')")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#overview-table tbody tr').dataset.row === '0'")
        page.keyboard.press("Tab")
        go(page, "component-1")
        page.keyboard.press("ArrowRight")
        until(page, "document.documentElement.dataset.route === '#component-2'")
        assert page.evaluate("document.activeElement.id") == "name-2", "the arrows follow the table's order"
        page.keyboard.press("ArrowLeft")
        until(page, "document.documentElement.dataset.route === '#component-1'")
        page.keyboard.press("/")
        until(page, "document.activeElement.id === 'search'")
        page.keyboard.press("Escape")
        go(page, "component-1")
        page.keyboard.press("Escape")
        until(page, "document.documentElement.dataset.route === '#overview'")
        page.focus("#map a[tabindex='0']")
        start = page.evaluate("document.activeElement.getAttribute('href')")
        assert start == f"#component-{order[0]}"
        for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"):
            page.keyboard.press(key)
        assert page.evaluate("document.querySelectorAll(\"#map a[tabindex='0']\").length") == 1
        target = page.evaluate("document.activeElement.getAttribute('href')")
        assert target != start or R == 1
        page.keyboard.press("Enter")
        until(page, f"document.documentElement.dataset.route === '{target}'")


def test_tree_by_keyboard(browser, folders):
    with opened(browser, folders[1]["folder"], "strategies") as page:
        page.wait_for_selector("[role=treeitem]")
        items = "[...document.querySelectorAll('[role=treeitem]')]"
        page.focus("[role=treeitem][tabindex='0']")
        active = lambda: page.evaluate(f"{items}.indexOf(document.activeElement)")  # noqa: E731
        count = lambda: page.evaluate(f"{items}.length")  # noqa: E731
        assert active() == 0
        page.keyboard.press("ArrowDown")
        assert active() == 1
        page.keyboard.press("Home")
        before = count()
        page.keyboard.press("ArrowLeft")
        assert count() == 1 and page.get_attribute("[role=treeitem]", "aria-expanded") == "false"
        page.keyboard.press("ArrowRight")
        assert count() == before
        for _ in range(60):  # open everything
            page.keyboard.press("ArrowRight")
            if page.evaluate("document.activeElement.getAttribute('aria-expanded')") is None:
                page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        assert active() == count() - 1
        assert page.evaluate("document.querySelectorAll(\"[role=treeitem][tabindex='0']\").length") == 1
        page.keyboard.press("Enter")
        until(page, "/^#(component|strategy)-/.test(document.documentElement.dataset.route)")


# ---- 1 000 components and 100 000 examples ------------------------------------------------------------------


def large_case(n=100_000, r=1_000, n_classes=10, per_example=5, groups=8):
    """Components in planted groups of directions; every example uses a few."""
    rng = np.random.default_rng(0)
    W = np.zeros((n, r), np.float32)
    rows = np.repeat(np.arange(n), per_example)
    W[rows, rng.integers(0, r, n * per_example)] = rng.gamma(2, 0.1, n * per_example)
    centres = rng.normal(size=(groups, 122))
    vectors = centres[rng.integers(0, groups, r)] + 1.5 * rng.normal(size=(r, 122))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return components_of(
        n=n,
        r=r,
        n_classes=n_classes,
        coefficients=W,
        vectors=vectors.astype(np.float32),
        labels=rng.integers(0, n_classes, n),
        logits=(3 * rng.normal(size=(n, n_classes))).astype(np.float32),
    )


def large_images(components, size=1000):
    """Batches of 28×28 images with a few strokes, which compress like drawn digits."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(components.labels), size):
        noise = torch.rand(size, 1, 7, 7, generator=generator)
        images = torch.nn.functional.interpolate((noise - 0.6).clamp_min(0) * 2.5, scale_factor=4, mode="bilinear")
        yield images, torch.as_tensor(components.labels[start : start + size])


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
