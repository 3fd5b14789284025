"""Reports in headless Chromium, opened from disk: views, sorting, filtering, dark, on a phone."""

import json
import shutil

import numpy as np
import pytest

from browsing import NAMES, PATIENCE, R, browser, by, folders, go, needs_chromium, numbers, opened, until

pytestmark = needs_chromium
__all__ = ["browser", "folders"]  # fixtures


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
        assert page.locator("section.top img").first.evaluate("img => img.complete && img.naturalWidth") == 8
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


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_on_a_phone(browser, folders, kind):
    phone = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with opened(browser, folders[1][kind], **phone) as page:
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
