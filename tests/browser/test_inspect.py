"""`laid inspect` in a browser: the page behind its token, by mouse, keyboard and touch, wide and on a phone; nothing of it when it has ended."""
import re
import socket
import urllib.error
import urllib.parse
import urllib.request

import pytest
from playwright.sync_api import expect

from conftest import Watched, end


@pytest.fixture
def opened(browser, inspect):
    "Open the page; what went wrong on it fails the test."
    pages = []
    def get(**options):
        pages.append(Watched(browser, inspect[1], **options))
        pages[-1].page.goto(inspect[0])
        pages[-1].page.locator(".laid-mosaic").first.wait_for()
        return pages[-1].page
    yield get
    for watched in pages:
        watched.check()
        watched.page.close()


def status(address):
    try:
        with urllib.request.urlopen(address) as reply: return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e: return e.code, e.read().decode()


def test_it_opens_on_the_question_and_each_models_best_head(opened, screen):
    page = opened(viewport=dict(width=1440, height=900))
    looks, heads = page.locator(".laid-view").all()
    said = looks.locator(".laid-said").inner_text()
    assert "The student spreads its attention over 50 pictures; 15% reach the needle, and it is wrong." in said and "100%" in said and "99%" in said
    assert "100% (teacher), 13% (student), 64% (distilled)" in heads.locator(".laid-said").inner_text()
    assert looks.locator(".laid-right, .laid-wrong").all_inner_texts() == ["No, right ✓ 98% sure", "Yes, wrong ✗ 82% sure", "No, right ✓ 81% sure"]
    assert looks.locator(".laid-needle").count() == 3 and heads.locator(".laid-plot").count() == 4
    assert all(box["width"] > 550 for box in (plot.bounding_box() for plot in heads.locator(".laid-plot").all()))
    screen("inspect", page)


def test_a_head_is_pointed_at_and_kept(opened):
    heads = opened().locator(".laid-view").last
    heads.scroll_into_view_if_needed()
    cells, tip, student = heads.locator(".laid-cells"), heads.locator(".laid-tip"), heads.locator(".laid-legend b").nth(1)
    line = heads.locator(".laid-line").nth(1)
    before = line.get_attribute("d")
    cells.nth(1).hover(position=dict(x=50, y=120))
    expect(tip).to_contain_text("student, layer 2, head 0")
    expect(tip).to_contain_text("attention on the needle: 0.04")
    expect(student).to_have_text("student, layer 2, head 0")
    assert line.get_attribute("d") != before
    heads.page.mouse.move(0, 0)
    expect(student).to_have_text("student, layer 0, head 1")
    assert line.get_attribute("d") == before and not tip.is_visible()
    cells.nth(1).click(position=dict(x=50, y=120))
    heads.page.mouse.move(0, 0)
    expect(student).to_have_text("student, layer 2, head 0")
    expect(heads.locator(".laid-said")).to_contain_text("the heads chosen give the needle")
    heads.get_by_role("button", name="best heads").click()
    expect(student).to_have_text("student, layer 0, head 1")


def test_keys_walk_over_heads_and_controls_keep_the_focus(opened):
    page = opened()
    heads = page.locator(".laid-view").last
    cells, names = heads.locator(".laid-cells"), heads.locator(".laid-legend b")
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    expect(names.first).to_have_text("teacher, layer 3, head 1")
    for _ in range(5): page.keyboard.press("ArrowRight")
    expect(names.first).to_have_text("teacher, layer 3, head 3")  # the last stays
    heads.get_by_role("button", name="5", exact=True).focus()
    page.keyboard.press("Enter")
    expect(heads.locator(".laid-said")).to_contain_text("Among 5 pictures")
    assert page.evaluate("document.activeElement.textContent") == "5"


def test_a_wave_that_is_pointed_at_is_drawn_over_the_answer_to_distance(opened):
    heads = opened().locator(".laid-view").last
    response, power, energy, _ = heads.locator(".laid-plot").all()
    assert response.locator(".laid-wave").count() == 0
    power.hover(position=dict(x=200, y=80))
    expect(response.locator(".laid-wave")).to_have_count(1)
    long = re.search(r"one turn: ([\d.]+) tokens", response.text_content())[1]
    power.hover(position=dict(x=120, y=80))
    expect(response).not_to_contain_text(f"one turn: {long} tokens")
    energy.hover(position=dict(x=300, y=80))
    expect(heads.locator(".laid-readout").nth(2)).to_contain_text("band")
    expect(response.locator(".laid-wave")).to_have_count(1)
    heads.page.mouse.move(0, 0)
    expect(response.locator(".laid-wave")).to_have_count(0)
    power.focus()
    heads.page.keyboard.press("ArrowRight")
    expect(response.locator(".laid-wave")).to_have_count(1)


def test_colours_and_unit_are_chosen(opened):
    heads = opened().locator(".laid-view").last
    heads.locator("select").select_option(label="evenness of attention")
    expect(heads.locator(".laid-bar")).to_contain_text("entropy")
    heads.get_by_role("button", name="positions").click()
    expect(heads.locator(".laid-axis-label").first).to_have_text("distance in positions, plus one")


def test_words_and_pictures_are_clicked(opened):
    looks = opened().locator(".laid-view").first
    detail, shares = looks.locator(".laid-detail"), looks.locator(".laid-shares b")
    looks.locator("[data-picture='22']").nth(1).click()
    looks.page.mouse.move(0, 0)
    expect(detail).to_contain_text("Picture 23 of 50 (")
    expect(detail).to_contain_text("the needle): teacher 100%, student 15%, distilled 99%.")
    assert looks.locator(".laid-picked").count() == 3
    looks.locator(".laid-mosaic").first.focus()
    looks.page.keyboard.press("ArrowRight")
    expect(detail).to_contain_text("Picture 24 of 50")
    looks.locator(".laid-words button", has_text="surfboard").click()
    expect(shares.first).not_to_have_text("100% on the needle, ")
    expect(looks.locator(".laid-shares small").first).to_contain_text("at “surfboard”")
    looks.locator("select").first.select_option(index=2)
    expect(looks.locator(".laid-question")).to_contain_text("cake")
    expect(looks.locator(".laid-words [aria-pressed=true]")).to_have_text("each model's best word")
    looks.get_by_role("button", name="20", exact=True).click()
    expect(looks.locator(".laid-question")).to_contain_text("traffic light")
    looks.locator("select").nth(1).select_option(label="3")
    expect(looks.locator(".laid-models section").nth(1)).to_contain_text("has no layer 3")


def test_on_a_phone_it_fits_and_answers_to_touch(opened, screen):
    page = opened(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, color_scheme="dark")
    looks, heads = page.locator(".laid-view").all()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    screen("inspect-phone", page)
    looks.locator("[data-picture='3']").first.tap()
    expect(looks.locator(".laid-detail")).to_contain_text("Picture 4 of 50")
    heads.locator(".laid-cells").nth(1).tap(position=dict(x=50, y=50))
    expect(heads.locator(".laid-legend b").nth(1)).to_have_text("student, layer 0, head 0")
    heads.locator(".laid-plot").nth(1).tap(position=dict(x=150, y=80))
    expect(heads.locator(".laid-plot").first.locator(".laid-wave")).to_have_count(1)


@pytest.mark.parametrize("scheme, light", [("light", True), ("dark", False)])
def test_light_and_dark_follow_the_reader(opened, scheme, light):
    page = opened(color_scheme=scheme)
    ground, ink = (sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.querySelector('{of}')).{what}"))[:3]))
                   for of, what in (("body", "backgroundColor"), (".laid-said", "color")))
    assert (ground > 700) == light and (ink < 300) == light


def test_the_file_is_the_same_page_without_a_server(browser, inspect, opened):
    page = opened()
    text = page.locator(".laid-said").all_inner_texts()
    alone = browser.new_page()
    alone.goto((inspect[1].parent/"laid-inspect/index.html").as_uri())
    assert alone.locator(".laid-said").all_inner_texts() == text
    alone.close()


@pytest.mark.parametrize("query", ["", "?token=wrong"])
def test_without_the_token_there_is_nothing(inspect, query):
    base = inspect[0].split("?")[0]
    for path in ("", "index.html", "models.json"):
        code, text = status(f"{base}{path}{query}")
        assert code == 403 and "laid-view" not in text


def test_no_other_address_of_the_machine_answers(inspect):
    port = urllib.parse.urlsplit(inspect[0]).port
    for line in open("/proc/net/tcp"):
        local, state = (line.split() + [""]*4)[1:4:2]
        if state == "0A" and int(local.split(":")[1], 16) == port: assert local.split(":")[0] == "0100007F"
    assert socket.create_connection(("127.0.0.1", port)).close() is None


def test_ctrl_c_ends_it(inspect):  # the last test: no server after it
    address, log, process = inspect
    assert end(process) == 0 and not re.search("Traceback|Exception", log.read_text())
    with pytest.raises(OSError): urllib.request.urlopen(address)
