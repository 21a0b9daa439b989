"""What is kept on disk: whole files or none, and what tells models apart."""
import json

import pytest
import torch

from laid_nb.store import (
    atomic_write,
    load_model,
    model_fingerprint,
    model_path,
    read_json,
    remove_on_failure,
    slug,
    tower_fingerprint,
    write_json,
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_fails_leaves_nothing_behind(work):
    with pytest.raises(ValueError):
        with atomic_write("a/b.txt") as part:
            part.write_text("half")
            raise ValueError
    assert list((work/"a").iterdir()) == []
    with atomic_write("a/b.txt") as part:
        part.write_text("all")
    assert [p.name for p in (work/"a").iterdir()] == ["b.txt"] and (work/"a/b.txt").read_text() == "all"


def test_what_was_there_is_never_removed(work):
    (work/"old").mkdir()
    for name, keep, left in (("old", False, True), ("new", False, False), ("kept", True, True)):
        with pytest.raises(ValueError):
            with remove_on_failure(name, keep=lambda path: keep):
                (work/name).mkdir(exist_ok=True)
                raise ValueError
        assert (work/name).exists() == left


def test_json_names_its_file(work):
    write_json("a.json", {"x": [1, 2]})
    assert read_json("a.json") == {"x": [1, 2]} == json.loads((work/"a.json").read_text())
    (work/"b.json").write_text("[1,")
    with pytest.raises(ValueError, match="b.json is not JSON"): read_json("b.json")


def test_slugs_tell_methods_apart():
    names = ["LAid", "LAid+", "LAid + window simulation", "LAid+ + window simulation"]
    assert [slug(n) for n in names] == ["laid", "laid-plus", "laid-window-simulation", "laid-plus-window-simulation"]


def test_paths_that_are_no_models(work):
    (work/"a.txt").write_text("x")
    with pytest.raises(ValueError, match="is a file"): model_path("a.txt")
    with pytest.raises(FileNotFoundError, match="no such folder"): model_path("./nowhere")
    assert model_path("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_fingerprint_sees_weights_and_template():
    (a, processor), (b, _) = load_model("student"), load_model("student")
    before = model_fingerprint(a, processor)
    assert before == model_fingerprint(b, processor)
    with torch.no_grad():
        b.lm_head.weight[0, 0] += 1
    assert model_fingerprint(b, processor) != before and tower_fingerprint(a) == tower_fingerprint(b)
    processor.chat_template += " "
    assert model_fingerprint(a, processor) != before
