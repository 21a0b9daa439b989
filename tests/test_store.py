"""What is kept on disk: whole files or none, and what tells models apart."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    Gemma3Config,
    LlamaConfig,
    Qwen3VLConfig,
)

from laid_nb.store import (
    EMBEDDED,
    _older_names,
    atomic_write,
    data_path,
    load_model,
    lock,
    model_fingerprint,
    model_path,
    read_json,
    remove_on_failure,
    save_model,
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


# ---------------------------------------------------------------- checkpoints that others read

BESIDE = ("generation_config.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json",
          "processor_config.json", "tokenizer.json", "tokenizer_config.json")
MROPE = {"mrope_section": [8, 12, 12], "rope_type": "default"}


def json_of(folder, name="config.json"): return json.loads((folder/name).read_text())


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_ships_has_the_names_of_transformers_4(name):
    "As 4.57 reads them: Qwen2_5_VLTextConfig takes rope_theta and rope_scaling, a tokenizer no list of special tokens."
    config, tokenizer = json_of(data_path("anchors", name)), json_of(data_path("anchors", name), "tokenizer_config.json")
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6 and text["rope_scaling"] == MROPE
    assert "rope_theta" not in config["vision_config"]  # a kind of RoPE that 4.57 has no name for
    assert "extra_special_tokens" not in tokenizer and tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    both = json_of(data_path("anchors", name), "processor_config.json")
    for part, file in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
        assert json_of(data_path("anchors", name), f"{file}_config.json") == both[part] | {"processor_class": "Qwen2_5_VLProcessor"}


@pytest.fixture
def hub(work):
    "A folder as people have it: written by transformers 4, with settings that transformers 5 would not write so."
    shutil.copytree(data_path("anchors", "student"), work/"hub")
    config = json_of(work/"hub")
    text, vision = config["text_config"], config["vision_config"]
    del text["rope_parameters"], vision["rope_parameters"], config["dtype"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    (work/"hub/config.json").write_text(json.dumps(config | {"torch_dtype": "float32", "transformers_version": "4.49.0"}))
    eos = {"eos_token_id": [589, 587], "pad_token_id": 587, "repetition_penalty": 1.05, "temperature": 1e-6, "do_sample": True}
    (work/"hub/generation_config.json").write_text(json.dumps(eos, indent=4))
    (work/"hub/processor_config.json").unlink()
    preprocessor = json_of(work/"hub", "preprocessor_config.json") | {"min_pixels": 3136}
    (work/"hub/preprocessor_config.json").write_text(json.dumps(preprocessor))
    return work/"hub"


def test_a_saved_student_has_the_files_of_its_base_byte_for_byte(hub, work):
    model, processor = load_model("hub")
    processor(text=["a", "a cup"], padding=True, truncation=True, max_length=8)  # leaves a trace in tokenizer.json
    with torch.no_grad(): model.lm_head.weight.mul_(2)
    save_model(model, processor, "saved")
    assert {p.name for p in (work/"saved").iterdir()} == {p.name for p in hub.iterdir()}
    for name in BESIDE:
        assert not (hub/name).exists() or (work/"saved"/name).read_bytes() == (hub/name).read_bytes(), name
    assert (work/"saved/config.json").read_bytes() == (hub/"config.json").read_bytes()
    again, same = load_model("saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and same.chat_template == processor.chat_template


def test_what_was_changed_is_written(hub, work):
    model, processor = load_model("hub", torch.bfloat16)
    model.generation_config.repetition_penalty, processor.chat_template = 1.1, processor.chat_template + "{# ours #}"
    model.config.text_config.rope_parameters |= {"rope_type": "yarn", "factor": 4., "original_max_position_embeddings": 32768}
    save_model(model, processor, "saved")
    again, same = load_model("saved")
    assert same.chat_template.endswith("{# ours #}") and again.generation_config.repetition_penalty == 1.1 and again.dtype == torch.bfloat16
    text = json_of(work/"saved")["text_config"]
    assert text["rope_scaling"]["rope_type"] == "yarn" and text["rope_scaling"]["factor"] == 4. and text["rope_theta"] == 1e6
    assert again.config.text_config.rope_parameters == model.config.text_config.rope_parameters


def test_another_type_of_the_weights_is_all_that_changes_in_a_config(hub, work):
    model, processor = load_model("hub", torch.bfloat16)
    save_model(model, processor, "saved")
    assert json_of(work/"saved") == json_of(hub) | {"torch_dtype": "bfloat16"}


def test_the_checkpoint_of_a_model_without_a_base_has_both_names(work):
    model, processor = load_model("student")
    model.config._name_or_path = processor.tokenizer.name_or_path = ""
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|seen|>"]})
    save_model(model, processor, "saved")
    tokenizer = json_of(work/"saved", "tokenizer_config.json")
    assert tokenizer["additional_special_tokens"] == ["<|seen|>"] and "extra_special_tokens" not in tokenizer
    assert json_of(work/"saved")["text_config"]["rope_scaling"] == MROPE and (work/"saved/preprocessor_config.json").exists()
    again = AutoProcessor.from_pretrained("saved")
    assert again.tokenizer.extra_special_tokens == ["<|seen|>"]
    assert again.tokenizer("a <|seen|> cup").input_ids == processor.tokenizer("a <|seen|> cup").input_ids


@pytest.mark.parametrize("config", [
    LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8., "low_freq_factor": 1., "high_freq_factor": 4.,
                                 "original_max_position_embeddings": 8192}),
    Gemma3Config(), Qwen3VLConfig()], ids=lambda c: c.model_type)
def test_older_names_do_not_change_what_transformers_5_reads(config, work):
    config.save_pretrained("new")
    both = _older_names(json_of(work/"new"))
    text = both.get("text_config", both)
    rope = text["rope_parameters"]
    assert text["rope_theta"] == rope.get("full_attention", rope)["rope_theta"] and "rope_scaling" in text
    (work/"both").mkdir()
    (work/"both/config.json").write_text(json.dumps(both))
    read = [AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": ""} for folder in ("both", "new")]
    assert read[0] == read[1]


# ---------------------------------------------------------------- several writers, and killed ones

def test_no_change_of_a_value_goes_unseen():
    (a, processor), (b, _) = load_model("student"), load_model("student")
    before, weight = model_fingerprint(a, processor), b.lm_head.weight.data.view(-1)
    for i in torch.randint(weight.numel(), (20,)).tolist():
        was = weight[i].clone()
        weight[i] = torch.nextafter(was, torch.tensor(9.))  # the last bit
        assert model_fingerprint(b, processor) != before
        weight[i] = was
    assert model_fingerprint(b, processor) == before


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_lock_keeps_others_out_and_ends_with_its_process(work, place):
    (work/"folder").mkdir(), (work/"file").touch()
    code = f"import time\nfrom laid_nb.store import lock\nwith lock({str(work/place)!r}):\n    print('held', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another process is writing .*{place}"):
            with lock(work/place): pass
    finally: other.kill()
    with lock(work/place, 10): pass  # its process is gone, and so is the lock


def test_a_killed_writer_s_leftovers_go_and_a_living_one_s_stay(work):
    (work/".a.txt-dead").mkdir(), (work/".b.txt-other").mkdir()
    for name in (".a.txt-dead", ".b.txt-other"): os.utime(work/name, (0, 0))
    with atomic_write("a.txt") as part:
        part.write_text("one")
        os.utime(part.parent, (0, 0))
        with atomic_write("a.txt") as mine: mine.write_text("two")
    assert (work/"a.txt").read_text() == "one" and {p.name for p in work.iterdir()} == {"a.txt", ".b.txt-other"}
