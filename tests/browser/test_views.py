"""The views on their own: what comes from data is never markup, and where it is wrong it does not hang."""
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from playwright.sync_api import expect

from conftest import ROOT, Watched
from laid_nb.haystack import picture_haystack
from laid_nb.inspector import HeadInspector, HeadSpectra
from laid_nb.page import fragment, page_html
from laid_nb.store import data_path
from laid_nb.viewer import HaystackViewer, ImageAttention

BAD = '</script><img src=x onerror="window.caught = 1"><b>'


@pytest.fixture
def shown(browser, tmp_path):
    "Open a page of views from a file; what went wrong on it fails the test."
    pages = []
    def show(*views, policy=True):
        text = page_html(BAD, [(BAD, BAD, fragment(view.state, view.describe())) for view in views])
        if not policy: text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        (tmp_path/"page.html").write_text(text, encoding="utf-8")
        pages.append(Watched(browser, None))
        pages[-1].page.goto((tmp_path/"page.html").as_uri())
        pages[-1].page.locator(".laid-view").last.wait_for()
        return pages[-1].page
    yield show
    for watched in pages:
        watched.wrong = [line for line in watched.wrong if not line.startswith("asks for file://")]
        watched.check()
        watched.page.close()


def bad_looks():
    "A viewer whose every text is hostile."
    haystack = picture_haystack(0, 4, 1, "val")
    haystack = replace(haystack, id=BAD, images=(*haystack.images[:-1], tmp_picture(haystack)), questions=(replace(haystack.questions[0], anchor=BAD),))
    shares = torch.rand(1, 3, 1, 2, 5).softmax(-1)[..., :4]
    readings = [ImageAttention(f"{name}{BAD}", BAD, ((haystack.questions[0].text, BAD, "?"),), shares, torch.tensor([[-.1, -2.]]), torch.tensor([True])) for name in "ab"]
    return HaystackViewer([haystack], readings)


def tmp_picture(haystack):
    class Named:
        "A picture with a hostile name."
        name = BAD
        def read_bytes(self):
            import io
            buffer = io.BytesIO()
            haystack.image(0).save(buffer, "PNG")
            return buffer.getvalue()
    return Named()


def test_nothing_of_the_data_is_markup(shown):
    "Even where the page's policy does not stand before it."
    heads = HeadInspector([replace(HeadSpectra.load(data_path("spectra", "heads-student-5.safetensors")), name=BAD, left_out={0: BAD})])
    page = shown(bad_looks(), heads, policy=False)
    looks, grid = page.locator(".laid-view").all()
    looks.locator("[data-picture='3']").first.click()
    expect(looks.locator(".laid-detail")).to_contain_text(BAD)
    grid.locator(".laid-cells").hover(position=dict(x=45, y=45))
    expect(grid.locator(".laid-tip")).to_contain_text(BAD)
    page.wait_for_timeout(200)
    assert page.evaluate("window.caught") is None and page.locator("img").count() == 0
    assert looks.locator(".laid-question").inner_text().startswith(f"For the image with the {BAD}") and page.title() == BAD


def test_layers_left_out_are_grey_and_say_why(shown):
    read = HeadSpectra.load(data_path("spectra", "heads-teacher-5.safetensors"))
    needle = read.needle.clone()
    needle[1] = torch.nan
    page = shown(HeadInspector([replace(read, needle=needle, left_out={1: "attends in a window of 24 tokens"})]))
    heads = page.locator(".laid-view")
    heads.locator(".laid-cells").hover(position=dict(x=45, y=85))
    expect(heads.locator(".laid-tip")).to_contain_text("not measured: this layer attends in a window of 24 tokens")
    expect(heads.locator(".laid-legend small")).to_contain_text("attends in a window")


def test_a_model_of_many_heads_fits_the_page_and_a_phone(shown):
    read = HeadSpectra.load(data_path("spectra", "heads-teacher-5.safetensors"))
    large = {name: value.repeat(7, 10, *[1]*(value.ndim - 2)) for name, value in vars(read).items() if torch.is_tensor(value) and value.shape[:1] == (4,) and value.ndim > 1}
    page = shown(HeadInspector([replace(read, **large), replace(read, name="small")]))
    for width in (1280, 390):
        page.set_viewport_size(dict(width=width, height=800))
        page.wait_for_timeout(200)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert "layer 27" not in page.locator(".laid-legend").inner_text()


def test_looking_is_choosing_as_python_does(shown):
    "Every question, word, layer and head of the shipped readings: the page's numbers are look()'s."
    from laid_nb.viewer import look
    haystack = picture_haystack(2, 20, 6, "val")
    viewer = HaystackViewer([haystack], [ImageAttention.load(data_path("spectra", f"viewer-{name}-20.safetensors")) for name in ("teacher", "student", "distilled")])
    page = shown(viewer)
    for state in (dict(question=0), dict(question=3, token="answer"), dict(question=2, token=6, layer="mean"), dict(question=1, layer=0, head="mean"), dict(question=4, layer="mean", head="mean")):
        full = dict(question=0, token="best", layer="best", head="best") | state
        page.locator("select").first.select_option(index=full["question"])
        page.locator("select").nth(1).select_option(label=str(full["layer"]))
        page.locator("select").nth(2).select_option(label=str(full["head"]))
        words = page.locator(".laid-words button")
        (words.last if full["token"] == "answer" else words.nth(0 if full["token"] == "best" else full["token"] + 1)).click()
        for i, reading in enumerate(viewer.readings):
            asked = haystack.questions[full["question"]]
            shares, where = look(reading, full["question"], asked.needles, full["token"], full["layer"], full["head"])
            on, section = float(shares[list(asked.needles)].sum()), page.locator(".laid-models section").nth(i)
            said = int(re.search(r"(\d+)% on the needle", section.inner_text().replace("under 1%", "0%"))[1])
            assert abs(said - 100*on) < .75 and where in section.inner_text(), (state, reading.name)


def test_the_benchmark_runs():
    "Its figures are not tested."
    done = subprocess.run([sys.executable, ROOT/"benchmarks/inspector.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0 and "median ms" in done.stdout, done.stderr


ROPES = [dict(), dict(theta=1e4, head_dim=64, sections=[], window=511), dict(sections=[22, 21, 21], scaling="linear", window=1000),
         dict(head_dim=64, sections=[8, 12, 12], scaling="dynamic", factor=3., window=777),
         dict(theta=1e5, scaling="yarn", factor=8., window=4096), dict(head_dim=8, sections=[], scaling="yarn", factor=32., window=16)]


@pytest.mark.parametrize("settings", ROPES)
def test_rope_is_counted_as_python_does(browser, settings):
    "Frequencies, amplitude, power by octave, the series and the words of the page against those of transformers and torch."
    from laid_nb.page import front_end
    from laid_nb.playground import RopePlayground, _power_by_octave
    from laid_nb.rope import resolved_bands, rope_series
    play = RopePlayground(**settings)
    page = browser.new_page()
    script = front_end()[0] + "; const n = ropeNumbers(s); return {...n, words: ropeWords(s, n), series: ds.map(d => meanCosine(n.rates, d))};"
    distances = [0, 1, 7, 100, 5000]
    found = page.evaluate(f"([s, ds]) => {{ {script} }}", [play.settings, distances])
    page.close()
    rates = play.spec.inv_freq.double()
    torch.testing.assert_close(torch.tensor(found["rates"], dtype=torch.float64), rates, rtol=2e-6, atol=0)
    assert found["amplitude"] == pytest.approx(play.spec.scaling, abs=1e-6) and found["turning"] == resolved_bands(rates, play.window).tolist()
    for key, shares in zip(("on", "off"), _power_by_octave(play.spec, play.window)):
        torch.testing.assert_close(torch.tensor(found[key], dtype=torch.float64), shares, rtol=1e-4, atol=1e-7)
    series = rope_series(rates, torch.tensor(distances))/len(rates)
    torch.testing.assert_close(torch.tensor(found["series"], dtype=torch.float64), series, rtol=0, atol=1e-3)
    assert found["words"] == play.describe()


def test_the_playground_answers_without_a_kernel(shown):
    "Sliders by key and touch, presets that follow head_dim, scaling, a band whose wave is drawn over the series; a phone."
    from laid_nb.playground import RopePlayground
    play = RopePlayground()
    page = shown(play)
    said, sliders = page.locator(".laid-said"), page.locator("input[type=range]")
    assert said.inner_text() == play.describe()
    sliders.nth(1).focus()
    for _ in range(8): page.keyboard.press("ArrowLeft")  # head_dim 64
    play.show(head_dim=64, sections=[8, 12, 12])
    expect(said).to_have_text(play.describe())
    assert sliders.nth(3).is_disabled()
    page.locator("select").nth(1).select_option(label="YaRN")
    page.locator("select").first.select_option(label="thirds")
    play.show(scaling="yarn", sections=[12, 10, 10])
    expect(said).to_have_text(play.describe())
    assert sliders.nth(3).is_enabled() and "multiplied by 1.30" in page.locator(".laid-panel").first.inner_text()
    bands = page.locator(".laid-plot").nth(1)
    bands.hover()
    expect(page.locator(".laid-wave")).to_have_count(1)
    assert re.search(r"band \d+: a turn in [\d.,e]+ positions", page.locator(".laid-readout").nth(1).inner_text())
    page.set_viewport_size(dict(width=390, height=844))
    page.wait_for_timeout(100)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
