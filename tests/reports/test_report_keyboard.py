"""Reports in headless Chromium by keyboard alone."""

import numpy as np

from browsing import R, browser, by, folders, go, needs_chromium, numbers, opened, until

pytestmark = needs_chromium
__all__ = ["browser", "folders"]  # fixtures


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
