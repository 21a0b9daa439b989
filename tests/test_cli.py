"""The command `laid`: what each command writes, that it resumes, and that bad input is one line and exit code 2."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from laid_nb import __version__, cli, demo, explore, inspector, serve
from laid_nb.anchors import anchor_config
from laid_nb.baselines import evaluate_with
from laid_nb.capture import capture
from laid_nb.evaluate import evaluate, read_records
from laid_nb.explore import SHIPPED
from laid_nb.haystack import Scene, drawn_test, picture_haystack
from laid_nb.inputs import OURS, PROMPT_FILE, encode
from laid_nb.limits import limit_pixels
from laid_nb.script import number_list
from laid_nb.spectra import distance_response
from laid_nb.store import load_model, save_model, slug
from laid_nb.vhs import VHS_PROMPT, export_vhs


def tiny(folder, processor, name, layers, heads, head_dim=32, break_it=None):
    "Save a random Qwen2.5-VL."
    config = anchor_config(name, processor.tokenizer).to_dict()
    sections = {32: [4, 6, 6], 64: [8, 12, 12]}[head_dim]
    config["text_config"] |= dict(hidden_size=head_dim*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections})
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=head_dim*heads, fullatt_block_indexes=[0])
    torch.manual_seed(layers)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    if break_it: break_it(model)
    save_model(model, processor, folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("pair")
    tiny(folder/"teacher", processor, "teacher", 3, 3)
    tiny(folder/"student", processor, "student", 2, 2)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ok(line): assert cli.main([str(x) for x in line]) == 0


def weights(folder): return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


# --- the command line ---------------------------------------------------------

def test_help_imports_nothing_heavy():
    code = "import sys; from laid_nb.cli import main; code = main(['--help']); sys.exit(code or bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "spectra" in done.stdout, done.stderr


def test_version(capsys):
    ok(["--version"])
    assert capsys.readouterr().out == f"laid {__version__}\n"


@pytest.mark.parametrize("command", ["demo", "train", "check", "eval", "spectra", "inspect", "anchors", "real"])
def test_every_command_has_help(command, capsys):
    ok([command, "--help"])
    assert "--out" in capsys.readouterr().out


def test_train_help_lists_our_settings_and_the_paper_s_defaults(capsys):
    ok(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("method", "alpha 0.3", "temperature 2.0", "max_multiplicity", "learning_rate 1e-05")) and "--fsdp" not in out


@pytest.mark.parametrize("text,numbers", [("1,2,5", [1, 2, 5]), ("2-4", [2, 3, 4]), ("5, 2-3, 5", [2, 3, 5])])
def test_number_list(text, numbers): assert number_list(text) == numbers


def test_debug_lets_the_traceback_through(work):
    with pytest.raises(FileNotFoundError): cli.main(["eval", "teacher", "--debug", "--data", "nowhere.json", "--image_root", "."])


def test_interrupt_is_130(monkeypatch, capsys):
    def stop(): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "anchors", stop)
    assert cli.main(["anchors"]) == 130
    assert capsys.readouterr().err == "laid: stopped; go on with laid anchors\n"


def test_a_signal_says_how_to_go_on(monkeypatch, capsys):
    def stop(quick: bool = False, fresh: bool = False): os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setitem(cli.COMMANDS, "demo", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["demo", "--fresh", "--quick"]) == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "laid: stopped; go on with laid demo --quick\n"


def test_anchors_is_called_with_both_folders(monkeypatch, work):
    from laid_nb import anchors
    called = []
    monkeypatch.setattr(anchors, "make_anchors", lambda folder, out, models, towers, device: called.append((str(folder), str(out), models, towers)))
    ok(["anchors", "--out", "pair", "--folder", "drafts", "--models", "near", "--towers", "made"])
    assert called == [("drafts", "pair", ["near"], "made")]


def test_anchors_teaches_towers_alone(monkeypatch, work, capsys):
    from laid_nb import anchors
    called = []
    monkeypatch.setattr(anchors, "make_varied", lambda folder, out, towers, device: called.append((str(folder), str(out), towers)))
    ok(["anchors", "--varied", "--out", "pair", "--folder", "drafts"])
    assert called == [("drafts", "pair", None)]
    assert cli.main(["anchors", "--varied", "--models", "near"]) == 2 and "leave out --models" in capsys.readouterr().err


# --- parts ---------------------------------------------------------------------

def test_yaml_is_read_as_flags_and_flags_win(work):
    (work/"a.yaml").write_text("method: kd\nlayers: 2:3\nlearning_rate: 1e-4\nreport_to: none\nbf16: false\nuse_cpu: true\n")
    config, _ = cli._training_settings(cli._yaml_settings("a.yaml") | {"learning_rate": ["3e-4"]})
    assert (config.method, config.layers, config.learning_rate, config.bf16, config.output_dir) == ("kd", "2:3", 3e-4, False, "laid-runs")


def test_a_flag_of_the_command_in_a_file_of_settings_is_named(work, capsys):
    for line in ("sizes: [2, 3]", "sizes: 2-4", "haystacks: 4"):
        (work/"a.yaml").write_text(line)
        refused(capsys, work, ["train", "--pictures", "--config", "a.yaml"], "a.yaml", line.split(":")[0], "is a flag of laid train")


def test_settings_from_python_are_values():
    config, simulation = cli._training_settings(dict(report_to=[], use_cpu=True, alpha=0.4, max_gap=3, seed=2, resume_from_checkpoint=None, label_names=("a", "b"), lr_scheduler_kwargs={}))
    assert (config.report_to, config.alpha, config.seed, config.label_names, simulation.max_gap) == ([], 0.4, 2, ["a", "b"], 3)
    assert cli._training_settings({"report_to": ["none"], "use_cpu": []})[0].report_to == []


@pytest.mark.parametrize("given, takes", [(True, True), ("true", True), ("last", True), (False, None), ("false", None), (None, None), ("a/checkpoint-3", "a/checkpoint-3"), (Path("b"), "b")])
def test_a_training_goes_on_where_it_is_told(given, takes):
    assert cli._checkpoint(cli._training_settings(dict(use_cpu=True, resume_from_checkpoint=given))[0].resume_from_checkpoint) == takes


# --- commands on a tiny pair --------------------------------------------------

def test_eval_writes_what_evaluate_finds(pair, work, capsys):
    ok(["eval", pair/"student", "--pictures", "--sizes", "1,3", "--questions", "5", "--seed", "2", "--out", "r/a.jsonl", "--vhs", "vhs", "--plot", "p.png"])
    model, processor = load_model(str(pair/"student"))
    direct = evaluate(model, processor, drawn_test([1, 3], 5, 2), progress=False)
    assert [(r["haystack"], r["question"], r["correct"]) for r in read_records("r/a.jsonl")[1]] == [(r["haystack"], r["question"], r["correct"]) for r in direct]
    np.testing.assert_allclose([r["margin"] for r in read_records("r/a.jsonl")[1]], [r["margin"] for r in direct], atol=1e-4)
    assert len(list((work/"vhs").rglob("*.json"))) == 10 and Image.open("p.png").width > 500
    assert "window at 0.75" in capsys.readouterr().out


def test_eval_goes_on_where_it_stopped(pair, work):
    line = ["eval", pair/"student", "--pictures", "--sizes", "1,3", "--questions", "4", "--out", "a.jsonl"]
    ok(line)
    full, text = read_records("a.jsonl"), (work/"a.jsonl").read_text()
    (work/"a.jsonl").write_text(text[:len(text)//2])
    ok(line)
    header, records = read_records("a.jsonl")
    assert header == full[0] and [(r["haystack"], r["question"]) for r in records] == [(r["haystack"], r["question"]) for r in full[1]]
    np.testing.assert_allclose([r["margin"] for r in records], [r["margin"] for r in full[1]], atol=1e-4)


@pytest.mark.parametrize("option, said", [(("--yarn", "2"), "yarn 2"), (("--yarn", "1.5:100"), "yarn 1.5:100"), (("--self-extend", "3:8"), "self_extend 3:8"), (("--log-n", "0.2:20"), "log_n 0.2:20"), (("--small-steps", "0.25"), "small_steps 0.25"), (("--sort", "1"), "sort 1")])
def test_eval_with_a_training_free_baseline(option, said, pair, work, capsys):
    line = ["eval", pair/"student", "--pictures", "--sizes", "3", "--questions", "2", "--out", "a.jsonl"]
    ok([*line, *option])
    assert read_records("a.jsonl")[0]["method"] == said
    method, _, values = said.partition(" ")
    model, processor = load_model(str(pair/"student"))
    direct = evaluate_with(method, tuple((float if "." in v else int)(v) for v in values.split(":")), model, processor, drawn_test([3], 2), progress=False)
    np.testing.assert_allclose([r["margin"] for r in read_records("a.jsonl")[1]], [r["margin"] for r in direct], atol=1e-4)
    refused(capsys, work, line, "another", "method")


def test_eval_under_pixel_limits(pair, work, capsys):
    line = ["eval", pair/"student", "--pictures", "--sizes", "3", "--questions", "2", "--out", "a.jsonl"]
    ok([*line, "--min_pixels", "784", "--max_pixels", "1568"])
    model, processor = load_model(str(pair/"student"))
    limit_pixels(processor, 784, 1568)
    direct = evaluate(model, processor, drawn_test([3], 2), progress=False)
    np.testing.assert_allclose([r["margin"] for r in read_records("a.jsonl")[1]], [r["margin"] for r in direct], atol=1e-4)
    refused(capsys, work, line, "another", "model")


def test_eval_reads_files_as_it_reads_drawings(pair, work):
    stacks = drawn_test([3], 3)
    export_vhs(stacks, work/"vhs")
    ok(["eval", pair/"student", "--data", "vhs/VHs_qa/single_needle/visual_haystack_3.json", "--image_root", "vhs/images", "--out", "a.jsonl", "--generate"])
    records = read_records("a.jsonl")
    assert len(records[1]) == 3 and all("response" in r for r in records[1]) and "Yes or No" in records[0]["prompt"]


@pytest.mark.parametrize("method", ["laid", "laid+"])
def test_train_makes_a_stock_checkpoint(pair, work, method):
    (work/"a.yaml").write_text(f"method: {method}\nmax_gap: 50\nmax_multiplicity: 4\nlearning_rate: 1e-2\nreport_to: none\nuse_cpu: true\n")
    ok(["train", "--teacher", pair/"teacher", "--student", pair/"student", "--pictures", "--sizes", "2-3", "--haystacks", 4, "--config", "a.yaml", "--max_steps", 1, "--warmup_steps", 0, "--output_dir", "run", "--disable_tqdm", "true"])
    before, after = weights(pair/"student"), weights("run/model")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys() and moved and not any("visual" in k for k in moved)


def test_spectra_are_those_of_the_captured_heads(pair, work):
    ok(["spectra", pair/"teacher", "--layers", "0,2", "--images", 3, "--seed", 5, "--out", "a.npz", "a.png"])
    model, processor = load_model(str(pair/"teacher"))
    sample = encode(processor, picture_haystack(5, 3, 1, "test"), [0])
    with torch.no_grad(), capture(model) as cache: model(**{k: v for k, v in sample.items() if k not in OURS})
    arrays = np.load("a.npz")
    assert arrays["layers"].tolist() == [0, 2] and Image.open("a.png").width > 500
    for row, layer in enumerate((0, 2)): np.testing.assert_allclose(arrays["response"][row], distance_response(cache["q", layer], cache["k", layer]), atol=1e-4)


@pytest.fixture
def small_demo(monkeypatch): monkeypatch.setattr(demo, "QUICK", dict(questions=2, steps=1, pool=3, batch=2, longest=3, shown=4, sizes=(1, 2, 3)))


def test_demo_from_start_to_end_stopped_once(pair, work, small_demo, monkeypatch, capsys):
    line = ["demo", "--quick", "--teacher", str(pair/"teacher"), "--student", str(pair/"student")]
    real = demo.save_model
    def stop_at_laid(model, processor, folder):
        if str(folder).endswith("laid"): raise KeyboardInterrupt
        real(model, processor, folder)
    monkeypatch.setattr(demo, "save_model", stop_at_laid)
    assert cli.main(line) == 130
    out = work/"laid-demo-quick"
    assert sorted(p.name for p in (out/"models").iterdir()) == ["sft", "sft-window-simulation"] and not (out/"results.json").exists()
    sft = (out/"models/sft/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(demo, "save_model", real)
    capsys.readouterr()
    ok(line)
    printed = capsys.readouterr().out
    assert (out/"models/sft/model.safetensors").stat().st_mtime_ns == sft
    assert all(f"[{i}/15]" in printed for i in range(1, 16)) and all(name in printed for name in demo.TRAININGS)
    assert {p.name for p in out.iterdir()} == {name.split("/")[0] for name in json.loads((out/"demo.json").read_text())["made"]} | {"demo.json"}
    results = json.loads((out/"results.json").read_text())
    assert list(results["models"]) == ["teacher", "student", *demo.TRAININGS] and results["command"].startswith("laid demo --quick") and results["hardware"]["cores"] >= 1
    for name, model in results["models"].items():
        records = read_records(out/"records"/f"{slug(name)}.jsonl")[1]
        assert model["total"] == [2, 2, 2] and sum(model["correct"]) == sum(r["correct"] for r in records)
    logs = {name: json.loads((out/"training"/f"{slug(name)}.json").read_text()) for name in demo.TRAININGS}
    terms = {name: [k for k in log[0] if k.startswith("loss_")] for name, log in logs.items()}
    assert terms["SFT"] == ["loss_sft"] and terms["LAid"] == terms["LAid + window simulation"] == ["loss_sft", "loss_kl", "loss_laid"]
    assert terms["LAid+"] == terms["LAid+ + window simulation"] == ["loss_sft", "loss_kl", "loss_laid", "loss_fourier", "loss_attention"]
    assert len({slug(name) for name in demo.TRAININGS}) == len(demo.TRAININGS)
    assert logs["SFT"][0]["loss_sft"] == pytest.approx(logs["LAid"][0]["loss_sft"], rel=1e-4)  # the same first batch
    assert weights(out/"models/sft").keys() == weights(pair/"student").keys()
    assert (out/"table.md").read_text().count("\n| ") == 2 + len(demo.TRAININGS)
    assert cli.main(line + ["--seed", "1"]) == 2 and "another seed" in capsys.readouterr().err


# --- bad input ----------------------------------------------------------------

ENTRY = {"conversations": [{"from": "human", "value": "For the image with the dog, is there a cat?"}, {"from": "gpt", "value": "yes"}], "pos_image": ["a.png"], "neg_image": ["b.png"]}


@pytest.fixture
def files(work):
    "A VHs file and its images."
    (work/"images").mkdir()
    for name in ("images/a.png", "images/b.png", "secret.png"): Image.new("RGB", (56, 56)).save(work/name)
    def write(**changes):
        (work/"vhs.json").write_text(json.dumps([{k: v for k, v in (ENTRY | changes).items() if v is not None}]))
        return ["--data", "vhs.json", "--image_root", "images"]
    return write


def refused(capsys, folder, line, *words):
    "The command ends with 2 and one line that holds `words`, and makes no file."
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    code, err = cli.main([str(x) for x in line]), capsys.readouterr().err
    said = [part for part in err.splitlines() if part and "question/s]" not in part]  # a progress bar may stand before it
    assert code == 2 and len(said) == 1 and said[0].startswith("laid: error: "), (code, err)
    for word in words: assert str(word) in err, err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("line,words", [
    ([], ["COMMAND"]),
    (["dance"], ["dance"]),
    (["eval", "./student", "--nice"], ["--nice"]),
    (["demo", "--steps", "none"], ["'none'"]),
    (["demo", "--questions", "0"], ["'0'"]),
    (["demo", "--teacher", "./nowhere"], ["./nowhere"]),
    (["eval", "./nowhere", "--pictures"], ["./nowhere"]),
    (["eval", "nobody/nothing-here", "--pictures"], ["nobody/nothing-here"]),
    (["eval", "student", "--pictures", "--sizes", "0"], ["at least 1 image"]),
    (["eval", "student", "--pictures", "--sizes", "5-2"], ["5-2"]),
    (["eval", "student"], ["--data", "--pictures"]),
    (["eval", "student", "--data", "vhs.json"], ["--image_root"]),
    (["eval", "student", "--data", "nowhere.json", "--image_root", "."], ["nowhere.json"]),
    (["eval", "student", "--pictures", "--plot", "a.txt"], ["a.txt"]),
    (["spectra", "student", "--out", "a.txt"], ["a.txt"]),
    (["train", "--pictures", "--alfa", "1"], ["--alfa"]),
    (["train", "--pictures", "--alpha", "3"], ["alpha is 3"]),
    (["train", "--pictures", "--method", "magic"], ["magic"]),
    (["train", "--pictures", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["train"], ["--data", "--pictures"]),
    (["train", "--pictures", "--seed", "-1"], ["seed is -1"]),
    (["eval", "student", "--pictures", "--seed", "-1"], ["--seed", "'-1'"]),
    (["spectra", "student", "--layers", "0,"], ["--layers", "'0,'", "0,3"]),
])
def test_bad_arguments(line, words, work, capsys): refused(capsys, work, line, *words)


def test_wrong_image_root(pair, files, work, capsys): refused(capsys, work, ["eval", pair/"student", *files()[:3], "nowhere"], "nowhere")


def test_missing_image(pair, files, work, capsys): refused(capsys, work, ["eval", pair/"student", *files(neg_image=["c.png"])], "c.png")


def test_picture_that_is_none(pair, files, work, capsys):
    (work/"images/b.png").write_text("not a picture")
    refused(capsys, work, ["eval", pair/"student", *files()], "b.png")


def test_corrupt_json(pair, work, capsys):
    (work/"vhs.json").write_text('[{"conversations": ')
    refused(capsys, work, ["eval", pair/"student", "--data", "vhs.json", "--image_root", "."], "vhs.json", "line 1")


@pytest.mark.parametrize("field", ["conversations", "pos_image", "neg_image"])
def test_missing_field(field, pair, files, work, capsys): refused(capsys, work, ["train", "--student", pair/"student", *files(**{field: None})], field)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_image_outside_the_root(name, pair, files, work, capsys):
    (work/"images/link.png").symlink_to(work/"secret.png")
    refused(capsys, work, ["eval", pair/"student", *files(neg_image=[name])], name)


def test_zero_images(pair, files, work, capsys): refused(capsys, work, ["eval", pair/"student", *files(pos_image=[], neg_image=[])], "no images")


def test_unknown_object(pair, work, capsys, monkeypatch):
    monkeypatch.setattr(cli, "picture_haystack", lambda *_: Scene(("dragon",), 0))
    refused(capsys, work, ["spectra", pair/"student"], "dragon")


def test_layer_that_is_not_there(pair, work, capsys): refused(capsys, work, ["spectra", pair/"student", "--layers", "9", "--images", 2], "layer 9")


def test_commands_called_from_python_read_values_as_their_flags(pair, work):
    shown = cli.spectra(pair/"student", layers=1, images=2, out=Path("a.npz"))
    assert torch.equal(shown, cli.spectra(str(pair/"student"), layers=[1], images="2", out=["a.npz"])) and len(shown) == 1
    with pytest.raises(ValueError, match="layers: '0,'"): cli.spectra(pair/"student", layers="0,")
    results = cli.evaluate(pair/"student", pictures=True, sizes=2, questions=2, out=Path("a.jsonl"), yarn=2)
    assert read_records("a.jsonl")[0]["method"] == "yarn 2" and list(results.sizes) == [2]
    with pytest.raises(FileNotFoundError, match="nowhere.json"): cli.evaluate(pair/"student", data=Path("nowhere.json"), image_root=work)


def train_line(teacher, student, *more):
    return ["train", "--teacher", teacher, "--student", student, "--pictures", "--sizes", "2", "--haystacks", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1", *more]


def test_broken_yaml(pair, work, capsys):
    (work/"a.yaml").write_text("alpha: [1")
    refused(capsys, work, ["train", "--pictures", "--config", "a.yaml"], "a.yaml is not YAML")


def test_layers_of_a_training_that_are_not_there(pair, work, capsys): refused(capsys, work, train_line(pair/"teacher", pair/"student", "--layers", "7:7"), "layer 7")


def test_result_that_exists(pair, work, capsys):
    (work/"run/model").mkdir(parents=True)
    refused(capsys, work, train_line(pair/"teacher", pair/"student", "--output_dir", "run"), "run/model exists")


@pytest.mark.parametrize("options, words", [(("--yarn", "2", "--sort", "1"), ("--sort", "not allowed with", "--yarn")), (("--self-extend", "4"), ("'4'", "GROUP:WINDOW")), (("--self-extend", "4:2.5"), ("'4:2.5'", "GROUP:WINDOW")),
                                            (("--log-n", "1:2:3"), ("SLOPE:KEYS",)), (("--yarn", ""), ("FACTOR[:POSITIONS]",)), (("--self-extend", "0:5"), ("0 and 5",)), (("--yarn", "0.5"), ("factor 0.5",)), (("--sort", "0"), ("got 0",)),
                                            (("--log-n", "nan:5"), ("nan:5",)), (("--small-steps", "2"), ("at most 1 position, got 2",)), (("--small-steps", "0.5", "--yarn", "2"), ("--small_steps is not allowed with --yarn",))])
def test_training_free_baselines_that_cannot_be(options, words, pair, work, capsys):
    refused(capsys, work, ["eval", pair/"student", "--pictures", "--sizes", "2", "--questions", "2", "--out", "a.jsonl", *options], *words)


def test_evaluation_of_another_model(pair, work, capsys):
    line = ["--pictures", "--sizes", "1", "--questions", "1", "--out", "a.jsonl"]
    ok(["eval", pair/"student", *line])
    refused(capsys, work, ["eval", pair/"teacher", *line], "a.jsonl holds an evaluation with another")


def test_unequal_tokenizers(pair, work, capsys, tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(pair/"teacher", folder/"teacher")
    tokens = json.loads((folder/"teacher/tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["Yes"], vocabulary["No"] = vocabulary["No"], vocabulary["Yes"]
    (folder/"teacher/tokenizer.json").write_text(json.dumps(tokens))
    refused(capsys, work, train_line(folder/"teacher", pair/"student"), "tokenizers differ")
    refused(capsys, work, ["demo", "--teacher", folder/"teacher", "--student", pair/"student"], "tokenizers differ")


def test_head_dimensions_that_differ(pair, work, capsys, tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("wide")
    tiny(folder/"teacher", processor, "teacher", 2, 1, head_dim=64)
    refused(capsys, work, train_line(folder/"teacher", pair/"student"), "student 32, teacher 64")
    refused(capsys, work, ["demo", "--teacher", folder/"teacher", "--student", pair/"student"], "student 32, teacher 64")


def test_model_without_rope(pair, work, capsys, tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("gpt")
    text = GPT2Config(vocab_size=len(processor.tokenizer), n_embd=32, n_layer=1, n_head=1, tie_word_embeddings=False)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=56, patch_size=28, projection_dim=32)
    save_model(LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=processor.image_token_id, tie_word_embeddings=False)), processor, folder/"gpt")
    refused(capsys, work, train_line(pair/"teacher", folder/"gpt"), "'gpt2' has no RoPE")


def test_nan_in_a_loss(pair, work, capsys, tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("nan")
    tiny(folder/"student", processor, "student", 2, 2, break_it=lambda model: model.lm_head.weight.data.fill_(float("nan")))
    refused(capsys, work, train_line(pair/"teacher", folder/"student", "--output_dir", "run"), "lm_head.weight of the student is not finite")
    refused(capsys, work, ["eval", folder/"student", "--pictures", "--sizes", "1", "--questions", "1"], "not finite")


def test_checkpoint_that_lacks_a_weight(pair, work, capsys, tmp_path_factory):
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("part")
    shutil.copytree(pair/"student", folder/"student")
    state = load_file(folder/"student/model.safetensors")
    save_file({k: v for k, v in state.items() if "lm_head" not in k}, folder/"student/model.safetensors", metadata={"format": "pt"})
    refused(capsys, work, ["eval", folder/"student", "--pictures"], "lacks 1 weights", "lm_head")


def test_checkpoint_that_is_cut(pair, work, capsys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    shutil.copytree(pair/"student", folder/"student")
    (folder/"student/model.safetensors").write_bytes((folder/"student/model.safetensors").read_bytes()[:1000])
    refused(capsys, work, ["eval", folder/"student", "--pictures"], "cannot load the model")


# --- laid inspect -------------------------------------------------------------

@pytest.fixture
def shown(monkeypatch):
    "Pages at the moment when the command would wait for Ctrl-C."
    pages = []
    def wait(server):
        with urllib.request.urlopen(server.url) as reply: pages.append(reply.read().decode())
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(explore.PageServer, "wait", wait)
    monkeypatch.setattr(explore.webbrowser, "open", lambda url: None)
    return pages


def views(page): return [json.loads(text)["view"] for text in re.findall(r'class="laid-data">(.*?)</script>', page)]


def test_inspect_reads_a_model_once(pair, work, shown, monkeypatch):
    read, reads = inspector.read_heads, []
    monkeypatch.setattr(inspector, "read_heads", lambda model, processor, haystacks, name, **rest: reads.append([len(h.images) for h in haystacks]) or read(model, processor, haystacks, name, **rest))
    def run(*more):
        reads.clear()
        ok(["inspect", pair/"teacher", pair/"student", "--haystacks", 2, "--no-browser", *more])
        return reads
    assert run("--sizes", "1,3") == [[1, 1], [3, 3]]*2
    looks, heads = views(shown[0])
    assert [m["name"] for m in heads["models"]] == ["teacher", "student"] and heads["sizes"] == [1, 3]
    assert [h["images"] for h in looks["haystacks"]] == [1, 3] and Path("laid-inspect/index.html").read_text() == shown[0]
    monkeypatch.setattr(explore, "load_model", None)
    assert run("--sizes", "1,3") == [] and shown[1] == shown[0]
    monkeypatch.undo()


def test_inspect_opens_the_embedded_models_without_reading(work, shown, monkeypatch):
    monkeypatch.setattr(explore, "load_model", None)
    ok(["inspect"])
    assert [[m["name"] for m in view["models"]] for view in views(shown[0]) if view["kind"] == "heads"] == [list(SHIPPED)]
    assert Path("laid-inspect/open.html").stat().st_mode & 0o077 == 0 and "token=" in Path("laid-inspect/open.html").read_text()


def test_inspect_reads_the_haystacks_of_files(pair, files, work, shown):
    ok(["inspect", pair/"student", *files()])
    assert views(shown[0])[-1]["sizes"] == [2]


def test_inspect_in_jupyterlab(work, monkeypatch):
    calls = []
    monkeypatch.setattr(serve, "serve", lambda *args: calls.append(args))
    ok(["inspect", "--lab"])
    notebook = nbformat.read("laid-inspect/inspect.ipynb", 4)
    nbformat.validate(notebook)
    assert all(str(path) in notebook.cells[1].source for name in SHIPPED for path in serve.shipped_heads(name)) and calls[0][2:] == (True,)
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="JupyterLab is not installed: pip install"): cli.inspect(lab=True)


@pytest.mark.parametrize("options, words", [(("./nowhere",), ("./nowhere",)), (("--sizes", "0"), ("--sizes",)), (("--port", "http"), ("'http'",)), (("--data", "a.json"), ("--image_root",))])
def test_bad_arguments_of_inspect(options, words, work, shown, capsys):
    refused(capsys, work, ["inspect", *options], *words)
    assert not shown


def test_inspect_wants_a_port_that_is_free(work, shown, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken: refused(capsys, work, ["inspect", "--port", taken.getsockname()[1]], str(taken.getsockname()[1]), "in use")


# --- the prompt, the dtype, and evaluation during training ----------------------

def test_eval_asks_as_the_training_did_and_says_so(pair, work, capsys):
    export_vhs(drawn_test([2], 2), work/"vhs-files")
    files = ["--data", work/"vhs-files", "--image_root", work/"vhs-files"/"images"]
    line = ["train", "--student", pair/"student", "--method", "sft", *files, "--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    ok([*line, "--prompt", "Yes or no? ", "--output_dir", "own"])
    ok([*line, "--output_dir", "vhs"])
    assert [json.loads(Path(name, "model", PROMPT_FILE).read_text())["prompt"] for name in ("own", "vhs")] == ["Yes or no? ", VHS_PROMPT]
    capsys.readouterr()
    def said(model, *more):
        Path("a.jsonl").unlink(missing_ok=True)
        ok(["eval", model, "--out", "a.jsonl", *more])
        return read_records("a.jsonl")[0]["prompt"], capsys.readouterr().out.splitlines()[0]
    assert said("own/model", *files) == ("Yes or no? ", f"prompt of the model's training: 'Yes or no? '; of the benchmark vhs: {VHS_PROMPT!r}")
    assert said("own/model", *files, "--prompt", "Look. ")[1].startswith("prompt as given: 'Look. '; of the model's training: 'Yes or no? '")
    assert said("vhs/model", *files) == (VHS_PROMPT, f"prompt of the model's training: {VHS_PROMPT!r}")
    assert said(pair/"student", *files) == (VHS_PROMPT, f"prompt of the benchmark vhs: {VHS_PROMPT!r}")
    assert said(pair/"student", "--pictures", "--sizes", "1", "--questions", "1") == ("", "prompt of drawn haystacks: ''")


def test_eval_in_another_dtype_or_attention_is_another_file(pair, work, capsys):
    line = ["eval", pair/"student", "--pictures", "--sizes", "1", "--questions", "2", "--out", "a.jsonl"]
    ok(line)
    assert {k: read_records("a.jsonl")[0][k] for k in ("dtype", "attention")} == dict(dtype="float32", attention="sdpa")
    refused(capsys, work, [*line, "--dtype", "bfloat16"], "another model, dtype")
    refused(capsys, work, [*line, "--attn_implementation", "eager"], "another attention")
    refused(capsys, work, [*line, "--attn_implementation", "nonsense"], "cannot load the model")
    refused(capsys, work, [*line, "--dtype", "int3"], "int3")
    ok([*line[:-1], "b.jsonl", "--dtype", "bfloat16", "--attn_implementation", "eager"])
    assert {k: read_records("b.jsonl")[0][k] for k in ("dtype", "attention")} == dict(dtype="bfloat16", attention="eager")


def test_train_evaluates_as_it_goes(pair, work, capsys):
    plain = ["train", "--student", pair/"student", "--method", "sft", "--use_cpu", "true", "--report_to", "none"]
    line = [*plain, "--pictures", "--haystacks", "2", "--sizes", "2", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]
    ok([*line, "--eval_sizes", "1,2", "--eval_questions", "4", "--eval_steps", "1", "--output_dir", "a"])
    log = json.loads((work/"a/checkpoint-2/trainer_state.json").read_text())["log_history"]
    asked = [h for h in log if "eval_window" in h]
    assert [h["step"] for h in asked] == [0, 1, 2] and all({"eval_accuracy_1", "eval_accuracy_2"} <= h.keys() for h in asked)
    export_vhs(drawn_test([2], 2), work/"vhs-files")
    files = ["--data", work/"vhs-files", "--image_root", work/"vhs-files"/"images"]
    capsys.readouterr()
    ok([*plain, *files, "--eval_data", work/"vhs-files", "--max_steps", "1", "--save_strategy", "no", "--output_dir", "b"])
    assert "questions of the test were in the training" in capsys.readouterr().err
    refused(capsys, work, [*line, "--eval_sizes", "1", "--eval_data", "x.json", "--output_dir", "c"], "--eval_data or --eval_sizes")
