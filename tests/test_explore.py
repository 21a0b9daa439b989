"The page of models: what is read once and kept, what ships, who may see it."
import json
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from laid_nb import explore
from laid_nb.explore import (
    SHIPPED,
    KnownModels,
    PageServer,
    drawn_stacks,
    given_stacks,
    kept_views,
    shipped_views,
    view_of,
)
from laid_nb.haystack import picture_haystack
from laid_nb.inspector import HeadInspector, HeadSpectra
from laid_nb.store import data_path
from laid_nb.viewer import HaystackViewer, ImageAttention


def differences(a, b, path=""):
    "Where two JSON values differ: pictures by their pixels' place only, as JPEG varies by version."
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys(): return [d for k in a if k != "sheet" for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b): return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}[{i}]")]
    if path.endswith(".base64") and len(a) == len(b): return []  # numbers are compared elsewhere; half precision rounds by platform
    return [] if a == b or isinstance(a, float) and np.isclose(a, b, rtol=1e-3) else [path]


def test_what_ships_is_what_the_shipped_readings_show():
    stacks = [picture_haystack(2, 20, 6, "val"), picture_haystack(7, 50, 6, "val")]
    looks = [ImageAttention.load(data_path("spectra", f"viewer-{name}-{len(h.images)}.safetensors")) for h in stacks for name in SHIPPED]
    heads = [HeadSpectra.load(data_path("spectra", f"heads-{name}-{n}.safetensors")) for name in SHIPPED for n in (5, 20, 50)]
    made = json.loads(json.dumps([view_of(HaystackViewer(stacks, looks)), view_of(HeadInspector(heads))]))
    assert differences(made, shipped_views()) == []


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A checkpoint of one's own."
    return shutil.copytree(data_path("anchors", "student"), tmp_path_factory.mktemp("models")/"mine")


@pytest.fixture(scope="module")
def kept(mine, tmp_path_factory):
    "Its views at two sizes, and the folder they are kept in."
    out = tmp_path_factory.mktemp("out")
    return kept_views({str(mine): "mine"}, *drawn_stacks([1, 2], 1), out), out


def test_views_are_those_of_the_model(kept):
    looks, heads = kept[0]
    assert [h["images"] for h in looks["state"]["view"]["haystacks"]] == [1, 2] and heads["state"]["images"] == 2 and "mine, layer" in heads["words"]


def test_the_second_time_no_weight_is_read(kept, mine, monkeypatch):
    monkeypatch.setattr(explore, "load_model", None)
    assert kept_views({str(mine): "mine"}, *drawn_stacks([1, 2], 1), kept[1]) == kept[0]


def test_another_size_reads_only_that(kept, mine):
    before = {file.name: file.stat().st_mtime_ns for file in kept[1].glob("*.safetensors")}
    views = kept_views({str(mine): "mine"}, *drawn_stacks([1, 2, 3], 1), kept[1])
    after = {file.name: file.stat().st_mtime_ns for file in kept[1].glob("*.safetensors")}
    assert len(after) == len(before) + 2 and after.items() > before.items() and views[1]["state"]["view"]["sizes"] == [1, 2, 3]


def test_a_checkpoint_written_anew_is_another(mine, tmp_path):
    copy = shutil.copytree(mine, tmp_path/"copy")
    first = KnownModels(tmp_path).fingerprint(str(copy))
    model, processor = (x.from_pretrained(copy) for x in (AutoModelForImageTextToText, AutoProcessor))
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(copy)
    assert KnownModels(tmp_path).fingerprint(str(copy)) != first


def test_the_same_weights_written_anew_are_the_same(mine, tmp_path):
    first = KnownModels(tmp_path).fingerprint(str(mine))
    os.utime(mine/"model.safetensors")
    again = KnownModels(tmp_path)
    assert again.fingerprint(str(mine)) == first and again.loaded


def test_models_whose_words_differ_get_viewers_of_their_own(tmp_path):
    stack = picture_haystack(7, 50, 6, "val")
    files = {}
    for name in SHIPPED:
        read = ImageAttention.load(data_path("spectra", f"viewer-{name}-50.safetensors"))
        if name == "teacher": read = replace(read, words=tuple((first, *rest[:-1], rest[-1] + " ") for first, *rest in read.words))
        read.save(tmp_path/f"{name}.safetensors")
        files[name] = [tmp_path/f"{name}.safetensors"]
    assert [[r.name for r in viewer.readings] for viewer in explore._viewers([stack], files)] == [["teacher"], ["student", "distilled"]]


def test_the_viewer_takes_haystacks_whose_answers_are_known():
    known, unknown = picture_haystack(0, 2, 2, "val"), picture_haystack(1, 2, 2, "val")
    unknown = replace(unknown, questions=tuple(replace(q, answer=None) for q in unknown.questions))
    stacks, asked = given_stacks([unknown, known, picture_haystack(0, 1, 1, "val")], 1)
    assert stacks == {1: [picture_haystack(0, 1, 1, "val")], 2: [unknown]} and asked == [picture_haystack(0, 1, 1, "val"), known]


@pytest.fixture
def server():
    server = PageServer()
    server.page = "<p>ä</p>"
    yield server
    server.shutdown()
    server.server_close()


def status(address):
    try:
        with urllib.request.urlopen(address) as reply: return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e: return e.code, e.read().decode()


def test_the_page_is_for_whoever_has_the_token(server):
    assert server.server_address[0] == "127.0.0.1" and status(server.url) == (200, "<p>ä</p>")
    base = server.url.split("?")[0]
    for wrong in (base, f"{base}?token=", f"{base}?token=wrong", f"{base}?token={server.token}x", f"{base}?token=ä".encode().decode("latin1").replace("Ã¤", "%C3%A4")):
        code, text = status(wrong)
        assert code == 403 and "ä" not in text, wrong
    assert status(f"{base}etc/passwd?token={server.token}")[0] == 404


def test_while_models_are_read_the_page_says_so(server):
    server.page = explore.waiting_page("reading <b>mine")
    assert "reading &lt;b&gt;mine" in status(server.url)[1] and 'http-equiv="refresh"' in status(server.url)[1]
