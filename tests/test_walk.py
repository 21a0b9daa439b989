"The walk through docs/your_pair.md: its file, its page, and the stand-ins that it is made on."
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"docs"))
import stand_ins
import walk
from laid_nb.store import read_json
from laid_nb.vhs import read_vhs


@pytest.fixture(scope="module")
def page(): return walk.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(): return read_json(walk.RESULTS)


def test_the_page_says_what_the_file_says(page, data):
    "Else: python docs/walk.py"
    assert walk.written(page, data) == page


def test_every_command_of_the_page_is_in_the_file_as_it_stands(page, data):
    rows = data["commands"]
    assert [row["command"] for row in rows] == walk.commands(page)
    for row in rows:
        if "exit" in row: assert (row["run"], row["exit"]) == (walk.as_run(row["command"]), 0)
        else: assert row["not_run"]


def test_a_command_that_changed_or_is_missing_is_seen(page, data):
    assert walk.commands("```sh\na \\\n    --b 1\n\nc\n```\n\n```python\nd\n```\n") == ["a --b 1", "c"]
    assert walk.written(page, data | dict(commands=data["commands"][1:])) != page


@pytest.mark.parametrize("name", stand_ins.QWEN)
def test_a_stand_in_has_the_shape_of_the_published_model(name, tmp_path):
    walk.write_json(tmp_path/"config.json", stand_ins.narrowed(stand_ins.QWEN[name]))
    made, published = (AutoConfig.from_pretrained(folder) for folder in (tmp_path, ROOT/"data"/"recipes"/"configs"/name))
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(made.get_text_config(), key) == getattr(published.get_text_config(), key), key
    for key in ("hidden_size", "num_heads", "patch_size", "spatial_merge_size", "out_hidden_size", "window_size"):
        assert getattr(made.vision_config, key) == getattr(published.vision_config, key), key
    assert made.tie_word_embeddings == published.tie_word_embeddings
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(made, key) == getattr(published, key) == stand_ins.BYTES + stand_ins.SPECIAL.index(
            f"<|{key.removesuffix('_token_id').replace('image', 'image_pad').replace('video', 'video_pad')}|>")
    assert made.get_text_config().rope_parameters["mrope_section"] == [16, 24, 24]


def test_the_haystacks_are_read_as_visual_haystacks(tmp_path):
    stand_ins.make_haystacks(tmp_path, {3: 2}, pictures=8)
    yes, no = read_vhs(tmp_path/"VHs_qa"/"single_needle"/"VHs_large"/"visual_haystack_3.json", tmp_path)
    assert [h.questions[0].answer for h in (yes, no)] == [True, False]
    assert all(h.image(i).size in stand_ins.SIZES for h in (yes, no) for i in range(3))
