"What goes to a page: packed arrays, JSON that cannot end its element, a page that loads nothing."
import base64
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from laid_nb.page import embedded, fragment, front_end, packed, page_html, page_script, standalone

BAD = '</script><img src=x onerror="alert(1)"><!--'
FORMS = {"f4": "<f4", "f2": "<f2", "root": np.uint8}


@pytest.mark.parametrize("form, worst", [("f4", 0), ("f2", 5e-4), ("root", 4e-3)])
def test_an_array_comes_back(form, worst):
    values = np.random.default_rng(0).random((3, 4, 5), dtype=np.float32)**3
    made = packed(values, form)
    raw = np.frombuffer(base64.b64decode(made["base64"]), FORMS[form]).reshape(made["shape"])
    assert np.abs((raw/255)**2 - values if form == "root" else raw - values).max() <= worst


def test_nan_stays_nan_and_an_unknown_form_is_refused():
    assert np.isnan(np.frombuffer(base64.b64decode(packed([1., np.nan])["base64"]), "<f2")).tolist() == [False, True]
    with pytest.raises(ValueError, match="form is 'f8'"): packed([1.], "f8")


@pytest.mark.parametrize("make", [fragment, standalone, lambda state, words: page_html(BAD, [(BAD, BAD, fragment(state, words))])])
def test_nothing_of_the_data_is_markup(make):
    state = dict(view=dict(kind="heads", models=[{BAD: BAD}]), name=BAD)
    made = make(state, BAD)
    assert "<img" not in made and "<!--" not in made.replace("<!DOCTYPE", "") and len(re.findall("</script>", made)) == len(re.findall("<script", made)) <= 2
    assert json.loads(re.search(r'class="laid-data">(.*?)</script>', made)[1]) == state
    assert "\u2028" not in embedded("\u2028")


def test_a_picture_gets_its_words():
    assert re.search(r'<img class="laid-fallback" alt="a &lt;b&gt;" src="data:image/png;base64,AA==">', fragment({}, "a <b>", "data:image/png;base64,AA=="))


def test_a_page_may_run_its_script_and_nothing_else():
    page = page_html("t", [])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "unsafe-inline'; script" not in policy.split("style-src")[0]


def test_the_front_end_asks_nobody_and_makes_no_markup():
    script, style = front_end()
    code = re.sub(r"//[^\n]*", "", script.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?:|\beval\b|\bfetch\b|XMLHttpRequest|WebSocket|\bimport\b", code)
    assert not re.search(r"url\(|@import", style) and "</script" not in page_script() and len((script + style).encode()) < 100_000


def test_neither_torch_nor_widgets_are_needed():
    code = "import sys, laid_nb.page, laid_nb.explore; print(sorted({'torch', 'transformers', 'matplotlib', 'ipywidgets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
