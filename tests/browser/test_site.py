"""The built site in a browser: nothing from another host, no error, and what a reader does works."""
import pytest
from playwright.sync_api import expect

from conftest import Watched


@pytest.fixture
def look(browser, site):
    "Open a page of the site by its path."
    opened = []
    def get(path, **options):
        opened.append(Watched(browser, None, **options))
        opened[-1].page.goto(f"{site}/{path}")
        return opened[-1].page
    yield get
    for watched in opened:
        watched.page.wait_for_load_state("networkidle")
        watched.check()
        watched.page.close()


def pages(page):
    "Paths of the pages in the navigation."
    found = page.locator(".md-nav--primary a.md-nav__link[href]").evaluate_all("links => links.map(a => new URL(a.href)).filter(u => u.host === location.host).map(u => u.pathname.slice(1))")
    return sorted(set(found))


def test_every_page_of_the_navigation_fits_a_phone(look, site):
    page = look("index.html", viewport=dict(width=390, height=844))
    found = pages(page)
    assert len(found) > 15, found
    wide = {}
    for path in found:
        assert page.goto(f"{site}/{path}").ok, path
        page.locator("h1").first.wait_for()
        page.wait_for_function("!document.querySelector('script[src*=\"maths.js\"]') || document.documentElement.dataset.maths")
        wide[path] = page.evaluate("document.scrollingElement.scrollWidth")
    assert all(width <= 390 for width in wide.values()), {path: width for path, width in wide.items() if width > 390}


@pytest.mark.parametrize("path", ["01_capture", "03_mixing", "06_simulate", "09b_train", "13_cli"])
def test_a_line_of_120_characters_fits_a_screen_of_1440_pixels(look, path):
    page = look(f"{path}.html", viewport=dict(width=1423, height=900))  # a scroll bar takes 17
    page.locator("h1").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    blocks = page.locator(".highlight pre > code").evaluate_all(
        "all => all.map(c => [Math.max(...c.textContent.split('\\n').map(line => line.length)), c.scrollWidth - c.clientWidth])")
    assert max(length for length, _ in blocks) > 100
    assert [length for length, over in blocks if length <= 120 and over > 0] == []


def test_imports_are_folded_and_open(look):
    fold = look("06_simulate.html").locator("details.laid-code").first
    assert fold.locator("summary").inner_text() == "Imports" and not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert "import torch" in fold.locator("pre").inner_text()


def test_maths_is_drawn(look):
    page = look("00_rope.html")
    page.locator(".katex").first.wait_for()
    assert page.locator(".katex").count() > 5 and page.locator(".katex-error").count() == 0 and "$" not in page.locator("article p").first.inner_text()


def test_the_search_finds_the_needle_and_its_index_comes_only_then(look):
    page = look("index.html")
    page.wait_for_load_state("networkidle")
    def asked(): return page.evaluate("performance.getEntriesByType('resource').some(r => r.name.endsWith('search_index.json'))")
    assert not asked()
    page.keyboard.press("/")
    page.keyboard.type("needle")
    page.locator(".md-search-result__item").first.wait_for()
    assert asked() and "needle" in page.locator(".md-search-result__item").first.inner_text().lower()
    page.locator(".md-search-result__item a").first.click()
    page.wait_for_url(lambda url: "index.html" not in url)
    assert "needle" in page.locator("article").inner_text().lower()


def test_the_dark_scheme_is_a_click_away_and_stays(look):
    page = look("index.html", color_scheme="light")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "default"
    page.locator("label[for=__palette_1]:visible, label[for=__palette_2]:visible").first.click()
    page.locator('body[data-md-color-scheme="slate"]').wait_for()
    page.goto(page.url.replace("index.html", "glossary.html"))
    page.locator('body[data-md-color-scheme="slate"]').wait_for()


def test_figures_have_words(look):
    page = look("02_spectra.html")
    figures = page.locator("article img")
    assert figures.count() and all(figures.evaluate_all("images => images.map(i => i.alt.trim())"))


@pytest.mark.parametrize("width", [1440, 390])
def test_the_heads_of_the_real_student_answer(look, width):
    page = look("experiments/real.html", viewport=dict(width=width, height=900), color_scheme="dark", has_touch=width < 500)
    heads = page.locator(".laid-view")
    heads.scroll_into_view_if_needed()
    cells, names, tip = heads.locator(".laid-cells"), heads.locator(".laid-legend b"), heads.locator(".laid-tip")
    expect(heads.locator(".laid-said")).to_contain_text("Among 100 items, the best head of each model")
    assert "picture" not in heads.inner_text()
    kept = names.first.inner_text()
    box = cells.first.bounding_box()
    place = dict(x=box["width"] - 4, y=box["height"] - 5)  # the last layer's last head
    if width > 500:
        cells.first.hover(position=place)
        expect(tip).to_contain_text("student, layer 29, head 8")
        page.mouse.move(0, 0)
        expect(names.first).to_have_text(kept)
        cells.first.click(position=place)
    else: cells.first.tap(position=place)
    expect(names.first).to_have_text("student, layer 29, head 8")
    page.keyboard.press("ArrowUp")
    expect(names.first).to_have_text("student, layer 28, head 8")
    heads.get_by_role("button", name="best heads").click()
    expect(names.first).to_have_text(kept)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
