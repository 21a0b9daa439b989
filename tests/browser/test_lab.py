"""The notebooks' widgets in JupyterLab, by mouse and keyboard."""
import json

import pytest
from playwright.sync_api import expect

from conftest import ROOT, changed


@pytest.fixture
def notebook(lab):
    "Open a notebook of nbs/ by its name; what went wrong on its page fails the test."
    opened = []
    def get(name):
        opened.append(lab(ROOT/f"nbs/{name}.ipynb"))
        return opened[-1].page
    yield get
    for watched in opened: watched.check()


def test_errors_in_callbacks_are_seen(lab, tmp_path):
    "The test of the tests: nothing below is worth anything when this one fails."
    code = """import ipywidgets as widgets
from matplotlib.figure import Figure
from laid_nb.inspector import HeadGrid, Inspector

class Wrong(Inspector):
    def __init__(self):
        self.number = widgets.IntSlider(1, 1, 3)
        self.number.observe(self.redraw, "value")
        super().__init__(self.number)
        self.redraw()
    def draw(self):
        if self.number.value == 2: raise ValueError("wrong in draw")
        return Figure(figsize=(2, 1))
    def describe(self): return "nothing"

grid = HeadGrid([[1., 2.]], (0, 2), "two")
def select(change): raise KeyError("wrong in observe")
grid.observe(select, "selected")
widgets.VBox([grid, Wrong()])"""
    (tmp_path/"wrong.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", id="a", metadata={}, source=code)], metadata=dict(kernelspec=dict(name="python3", display_name="", language="python")), nbformat=4, nbformat_minor=5)))
    watched = lab(tmp_path/"wrong.ipynb")
    page = watched.page
    page.locator(".laid img").wait_for()
    watched.check()
    page.locator(".laid-grid-cells").click()
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator(".laid-error").wait_for()
    for _ in range(300):
        if len(watched.wrong) < 2: page.wait_for_timeout(100)
    with pytest.raises(AssertionError) as error: watched.check()
    assert "shown: wrong in draw" in str(error.value) and "kernel: wrong in draw" in str(error.value) and "wrong in observe" in str(error.value)


def test_head_inspector(notebook, screen):
    page = notebook("12_inspector")
    inspector = page.locator(".laid-view").last  # the first, at the head of the page, is another
    inspector.scroll_into_view_if_needed()
    student, cells = inspector.locator(".laid-legend b").nth(1), inspector.locator(".laid-cells").nth(1)
    assert student.inner_text() == "student, layer 2, head 1" and "Among 20 pictures" in inspector.locator(".laid-said").inner_text()  # what code has set, in a later cell
    cells.hover(position=dict(x=50, y=45))
    expect(student).to_have_text("student, layer 0, head 0")
    page.mouse.move(0, 0)
    expect(student).to_have_text("student, layer 2, head 1")
    cells.click(position=dict(x=50, y=80))
    page.keyboard.press("ArrowRight")
    page.mouse.move(0, 0)
    expect(student).to_have_text("student, layer 1, head 1")
    inspector.get_by_role("button", name="tokens").click()
    expect(inspector.locator(".laid-axis-label").first).to_have_text("distance in tokens, plus one")
    screen("inspector", inspector)


def test_playground(notebook, screen):
    page = notebook("12b_playground")
    playground = page.locator(".laid").last
    playground.scroll_into_view_if_needed()
    picture, handle = playground.locator("img"), playground.locator(".noUi-handle").first
    handle.focus()
    before = picture.get_attribute("alt")
    assert changed(picture, lambda: page.keyboard.press("ArrowLeft")) != before  # theta, a step down
    box = handle.bounding_box()
    def drag():
        page.mouse.move(box["x"] + box["width"]/2, box["y"] + box["height"]/2)
        page.mouse.down()
        page.mouse.move(box["x"] - 60, box["y"] + box["height"]/2, steps=3)
        page.mouse.up()
    assert changed(picture, drag) != before
    assert changed(picture, lambda: playground.locator("select").nth(1).select_option("YaRN")) != before
    screen("playground", playground)


def test_viewer(notebook, screen):
    page = notebook("12c_viewer")
    viewer = page.locator(".laid-view").last
    viewer.scroll_into_view_if_needed()
    assert "boat" in viewer.locator(".laid-question").inner_text()
    viewer.locator("select").first.select_option(index=2)  # another question
    expect(viewer.locator(".laid-question")).to_contain_text("cake")
    viewer.locator("select").nth(1).select_option(label="mean")
    expect(viewer.locator(".laid-shares small").first).to_contain_text("mean of layers")
    screen("viewer", viewer)


def test_mixing_inspector(notebook, screen):
    page = notebook("12a_mixing_inspector")
    inspector = page.locator(".laid").last
    picture, grids = inspector.locator("img"), inspector.locator(".laid-grid")
    inspector.scroll_into_view_if_needed()
    cells = grids.nth(1).locator(".laid-grid-cells")
    assert "student head 0 follows" in changed(picture, lambda: cells.click(position=dict(x=5, y=5)))
    assert "student head 0, teacher head 0" in grids.nth(1).locator(".laid-grid-readout").inner_text()
    assert "and teacher head 1 with" in changed(picture, lambda: page.keyboard.press("ArrowRight"))
    assert "student head 1 follows" in changed(picture, lambda: page.keyboard.press("ArrowDown"))
    step = inspector.locator(".noUi-handle").first
    step.focus()
    assert changed(picture, lambda: page.keyboard.press("ArrowLeft")) != changed(picture, lambda: page.keyboard.press("Home"))
    assert "at step 0" in picture.get_attribute("alt")
    assert "complex weights" in changed(picture, lambda: inspector.locator("select").nth(1).select_option("complex"))
    screen("mixing", inspector)
