"""The notebooks' widgets in JupyterLab, by mouse and keyboard."""
import json

import pytest

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
    inspector = page.locator(".laid").nth(1)
    inspector.scroll_into_view_if_needed()
    picture, grid = inspector.locator("img"), inspector.locator(".laid-grid").first
    cells = grid.locator(".laid-grid-cells")
    chosen = picture.get_attribute("alt")
    assert "student, layer 1, head 0" in changed(picture, lambda: cells.hover(position=dict(x=5, y=30)))
    assert "layer 1, head 0" in grid.locator(".laid-grid-readout").inner_text()
    assert changed(picture, lambda: page.mouse.move(0, 0)) == chosen
    assert "student, layer 2, head 0" in changed(picture, lambda: cells.click(position=dict(x=5, y=56)))
    assert "student, layer 2, head 1" in changed(picture, lambda: page.keyboard.press("ArrowRight"))
    page.mouse.move(0, 0)
    assert "distance in tokens" in changed(picture, lambda: inspector.get_by_role("button", name="tokens").click())
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
    viewer = page.locator(".laid").last
    viewer.scroll_into_view_if_needed()
    picture = viewer.locator("img")
    before = picture.get_attribute("alt")
    assert changed(picture, lambda: viewer.locator("select").nth(1).select_option(index=2)) != before  # another question
    assert changed(picture, lambda: viewer.locator("select").nth(3).select_option("mean"))
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
