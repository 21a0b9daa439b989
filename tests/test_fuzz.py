"""Hostile input: the kinds that tests/fuzz.py found, each with one of its inputs."""
import io
import json
import math
import os
import re
import shutil
import time
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from laid_nb import accuracy, cli, explore, serve
from laid_nb.evaluate import read_records
from laid_nb.haystack import Question, picture_haystack
from laid_nb.pictures import open_picture
from laid_nb.script import one_line
from laid_nb.spectra import figure_label, figure_words
from laid_nb.store import data_path, read_tensors
from laid_nb.viewer import HaystackViewer, ImageAttention

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    yield tmp_path
    datasets.enable_progress_bars()


@pytest.fixture
def model(work):
    "The embedded student, to be spoilt."
    shutil.copytree(data_path("anchors", "student"), work/"model")
    return work/"model"


def refused(capsys, line, *words):
    "Exit code 2 and one line without control characters that holds `words`."
    capsys.readouterr()
    begun, code, err = time.process_time(), cli.main(line), capsys.readouterr().err
    said = [x for x in re.split("[\r\n]", err) if x and not x.startswith("laid: warning") and not re.search(r"(it|question)/s\]", x)]
    assert code == 2 and len(said) == 1 and said[0].startswith("laid: error: ") and said[0].isprintable(), err
    for word in words: assert word in said[0], said
    assert time.process_time() - begun < 20


@pytest.mark.parametrize("text, words", [
    ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}']*9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")), ["a.yaml", "aliases"]),
    ("alpha: " + "["*5000, ["a.yaml", "nested too deeply"]),
    ("alpha: 0.3\nalpha: 0.5", ["a.yaml", "'alpha' is given twice"]),
    ("no\u202esuch: 1", ["a.yaml", r"\u202e"]),
    ("alpha: \x1b[2J", ["a.yaml"]),
    ("gradient_accumulation_steps: 0", ["gradient_accumulation_steps"]),
    ("per_device_train_batch_size: 0", ["per_device_train_batch_size"]),
    ("alpha: .inf", ["alpha"]),
])
def test_files_of_settings(work, capsys, text, words):
    (work/"a.yaml").write_text(text)
    refused(capsys, ["plan", "student", "teacher", "--config", "a.yaml"], *words)


def test_a_pipe_is_no_file_of_settings(work, capsys):
    os.mkfifo(work/"a.yaml")
    refused(capsys, ["plan", "student", "teacher", "--config", "a.yaml"], "a.yaml", "no plain file")


@pytest.mark.parametrize("line, words", [
    (["eval", "student", "--pictures", "--sizes", "1-100000000000"], ["--sizes", "at most 10,000 images"]),
    (["eval", "student", "--pictures", "--questions", "1" + "0"*5000], ["--questions"]),
    (["spectra", "student", "--images", "1000000000000"], ["--images", "1,000,000"]),
    (["inspect", "--port", "70000"], ["70000", "65535"]),
    (["inspect", ""], ["''"]),
    (["eval", "a\x1b[2Jb/c/d", "--pictures"], [r"a\x1b[2Jb"]),
])
def test_command_lines(work, capsys, monkeypatch, line, words):
    monkeypatch.setattr(serve, "serve", lambda *_: None)
    refused(capsys, line, *words)


@pytest.mark.parametrize("name, data, why", [
    ("a.jsonl", b"null", "line 1 is no row"), ("a.json", b"3", "line 1 is no row"), ("a.jsonl", b'{"image": "0.png", "question": "?", "answer": "x"}\n[]', "line 2 is no row"), ("a.csv", b"image,question,answer\n0.png,\xff,yes\n", "line 2 is not UTF-8 text"),
    ("a.jsonl", b'{"image": {"x": 1}, "question": "?", "answer": "yes"}', "no picture")])
def test_tables_that_would_end_the_process(work, capsys, name, data, why):
    (work/name).write_bytes(data)
    refused(capsys, ["eval", "student", "--data", name, "--image_root", ".", "--benchmark", "table"], name, why)


@pytest.mark.parametrize("right", [True, 3, "0.png", {"x": 1}])
def test_needles_that_are_no_list(work, capsys, right):
    (work/"0.png").write_bytes(b"")
    (work/"a.jsonl").write_text(json.dumps({"question": "For the image with the dog, is there a cat?", "answer": "Yes", "ctxs": ["0.png"], "positive_ctxs": right}))
    refused(capsys, ["eval", "student", "--data", "a.jsonl", "--image_root", ".", "--benchmark", "mmlongbench"], "a.jsonl, entry 0", "'positive_ctxs'")


def test_letters_without_choices(work, capsys):
    (work/"0.png").write_bytes(data_path("objects").joinpath(next(iter(sorted(p.name for p in data_path("objects").glob("*.png"))))).read_bytes())
    (work/"a.json").write_text(json.dumps([{"images": ["0.png"], "question": "?", "choices": [], "answer": "B"}]))
    refused(capsys, ["eval", "student", "--data", "a.json", "--image_root", ".", "--benchmark", "letters"], "a.json", "choices")


@pytest.mark.parametrize("template, why", [
    ("{{ 'a' * 10000000000 }}", "1 GB"), ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "5 s"), ("{% if %}", "TemplateSyntaxError"),
    ("{{ messages[9].x.y }}", "UndefinedError"), ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"), ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError")])
def test_chat_templates(model, capsys, template, why):
    (model/"chat_template.jinja").write_text(template)
    refused(capsys, ["eval", "model", "--pictures"], "'model'", "chat template", why)


@pytest.mark.parametrize("part, name, value", [("text_config", "num_hidden_layers", 100_000), ("vision_config", "depth", 10**9), ("text_config", "hidden_size", 10**12), ("vision_config", "temporal_patch_size", 100_000)])
def test_configs_that_declare_too_much(model, capsys, part, name, value):
    config = json.loads((model/"config.json").read_text())
    config[part][name] = value
    (model/"config.json").write_text(json.dumps(config))
    refused(capsys, ["eval", "model", "--pictures"], "model", "declares")


def test_a_config_that_no_model_can_be_made_of_is_named_by_its_model(model, capsys):
    config = json.loads((model/"config.json").read_text())
    config["text_config"]["attention_dropout"], config["text_config"]["rope_parameters"]["mrope_section"] = 7., [4, {"x": 6}, 6]
    (model/"config.json").write_text(json.dumps(config))
    refused(capsys, ["plan", "model", "teacher"], "model taught by teacher: ")


def change(file, part, **settings):
    "Other settings in a part of a JSON file; None: not there."
    found = json.loads(file.read_text())
    inner = found[part] if part else found
    inner.update(settings)
    file.write_text(json.dumps(found))


@pytest.mark.parametrize("file, part, settings", [
    ("tokenizer_config.json", "", {"model_max_length": {"most": 9}}), ("processor_config.json", "image_processor", {"image_std": [1., None, 1.]}), ("processor_config.json", "image_processor", {"image_mean": [.5]*7}),
    ("config.json", "", {"image_token_id": 3}), ("config.json", "text_config", {"rms_norm_eps": [1e-6]})])
def test_what_a_library_says_of_a_model_comes_with_its_name(model, capsys, file, part, settings):
    change(model/file, part, **settings)
    refused(capsys, ["spectra", "model", "--images", "2", "--out", "a.npz"], "'model'")
    assert not Path("a.npz").exists()


def test_logits_that_are_not_finite_name_the_model(model, capsys):
    weights = read_tensors(model/"model.safetensors")[0]
    save_file(weights | {name: x*math.inf for name, x in weights.items() if name.endswith("norm.weight")}, model/"model.safetensors", {"format": "pt"})
    refused(capsys, ["eval", "model", "--pictures", "--sizes", "2", "--questions", "1"], "'model'", "not finite")


def test_a_template_without_pictures_names_the_model(model, capsys):
    (model/"chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    refused(capsys, ["eval", "model", "--pictures", "--sizes", "2", "--questions", "1"], "'model'")
    refused(capsys, ["inspect", "model", "--sizes", "1", "--haystacks", "1", "--no_browser"], "'model'")


def test_a_plan_that_cannot_be_simulated_is_one_line(model, capfd):
    change(model/"config.json", "vision_config", hidden_size=5)
    assert cli.main(["plan", "model", "teacher"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("laid: warning")]
    assert len(said) == 1 and said[0].startswith("laid: error: model taught by teacher"), said


@pytest.mark.parametrize("at, value", [(8, b"\xff"*8), (30, b"\0"*40), (200, b"")])
def test_libtiff_says_nothing_beside_the_error(tmp_path, capfd, at, value):
    made = io.BytesIO()
    Image.linear_gradient("L").resize((40, 40)).save(made, "TIFF", compression="tiff_lzw")
    data = made.getvalue()
    (tmp_path/"a.tiff").write_bytes(data[:at] + value + data[at + len(value):] if value else data[:at])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="a.tiff"):
        warnings.simplefilter("ignore")
        open_picture(str(tmp_path/"a.tiff"))
    assert capfd.readouterr().err == ""


def test_a_name_of_white_space_is_shown(work, capsys):
    refused(capsys, ["inspect", "student", "--data", "\u2029\u2028", "--image_root", "."], r"\u2029\u2028")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A training with a checkpoint, and the command that goes on with it elsewhere."
    out = tmp_path_factory.mktemp("trained")/"run"
    line = ["train", "--pictures", "--sizes", "1", "--haystacks", "1", "--method", "sft", "--max_steps", "1", "--save_steps", "1", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    assert cli.main([*line, "--output_dir", str(out)]) == 0
    return out/"checkpoint-1", [*line, "--max_steps", "2", "--allow_changed", "max_steps"]


@pytest.mark.parametrize("old, new", [(b'"dtype":', b'"dtyp_":'), (b"norm.weight", b"norm.weighs")])
def test_weights_of_a_checkpoint_that_are_not_all_there_are_named(trained, work, capsys, old, new):
    shutil.copytree(trained[0], work/"checkpoint-1")
    weights = work/"checkpoint-1/model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(old, new, 1))  # of the same size
    refused(capsys, [*trained[1], "--output_dir", "run", "--resume_from_checkpoint", "checkpoint-1"], "checkpoint-1")


@pytest.mark.parametrize("text, why", [("[]", "line 1: it is no question"), ('{"doc_id": [1]}', "line 1: it is no question"), ('{"doc_id": 0}\n{"doc_id": 1, "exact_match": NaN}', "line 2: a score is nan"),
                                       ('{"doc_id": 0}\n{"doc_id": 0}', "line 2: question 0 is there twice"), ("x\xff", "line 1: "), ("["*100_000, "line 1: "), ("", "holds no question")])
def test_logs_that_are_broken_are_named_by_line(work, capsys, text, why):
    for side in "ab":
        (work/side).mkdir()
        (work/side/"1_samples_pope.jsonl").write_bytes(text.encode("latin-1"))
    refused(capsys, ["lmms", "a", "b"], "1_samples_pope.jsonl", why)


@pytest.mark.parametrize("record", [{"haystack": {"x": 1}}, {"question": [0]}, {"question": True}, {"fingerprint": None}, {"correct": "yes"}])
def test_records_that_are_none(tmp_path, record):
    sound = {"haystack": "h", "question": 0, "fingerprint": "f", "correct": True}
    path = tmp_path/"a.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in ({"laid_evaluation": 1}, sound, sound | record)))
    with pytest.raises(ValueError, match="a.jsonl.*line 3 is no record"): read_records(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "Records of the embedded student, and the command that made them."
    out = tmp_path_factory.mktemp("asked")/"a.jsonl"
    line = ["eval", "student", "--pictures", "--sizes", "1,3", "--questions", "2", "--out"]
    assert cli.main([*line, str(out)]) == 0
    return out.read_text().splitlines(), line


@pytest.mark.parametrize("change", [{"size": None}, {"size": 2}, {"size": ...}, {"mass": ...}, {"margin": "1"}, {"margin": float("nan")}, {"needles": [7]}, {"needles": ...}, {"kind": "multi"}, {"answer": "yes"}, {"question": 77}])
def test_records_that_are_of_other_questions(asked, work, capsys, change):
    lines, line = asked
    record = {name: x for name, x in (json.loads(lines[2]) | change).items() if x is not ...}
    (work/"a.jsonl").write_text("\n".join([*lines[:2], json.dumps(record), *lines[3:]]) + "\n")
    refused(capsys, [*line, "a.jsonl"], "a.jsonl")


def test_readings_that_are_none(work, capsys, monkeypatch):
    monkeypatch.setattr(explore.PageServer, "wait", lambda self: None)
    line = ["inspect", "student", "--sizes", "1", "--haystacks", "1", "--no_browser", "--out", "i"]
    assert cli.main(line) == 0
    views, = Path("i").glob("views-*.json")
    look, = Path("i").glob("*-look-*.safetensors")
    sound, data = views.read_text(), look.read_bytes()
    for made in (lambda v: v[0].pop("words"), lambda v: v[0].update(state=[]), lambda v: v.append(3)):
        broken = json.loads(sound)
        made(broken)
        views.write_text(json.dumps(broken))
        refused(capsys, line, views.name)
    views.unlink()
    look.write_bytes(data.replace(b'"words":"[[', b'"words":"[3,', 1))
    refused(capsys, line, look.name)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_tensors_that_are_cut_are_named(tmp_path, kept):
    path = tmp_path/"gain.safetensors"
    save_file({"gain.0": torch.ones(40)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="gain.safetensors is no whole safetensors file"): read_tensors(path)


def test_pytorch_bin_is_never_read(model, capsys):
    torch.save({}, model/"pytorch_model.bin")
    (model/"model.safetensors").unlink()
    refused(capsys, ["eval", "model", "--pictures"], "'model'")


@pytest.mark.parametrize("package, extra", [("jupyterlab", "laid_nb[inspect]"), ("bitsandbytes", "bitsandbytes")])
def test_a_package_that_is_missing_is_said_with_its_extra(package, extra):
    assert f'pip install "{extra}"' in one_line(ModuleNotFoundError(f"No module named {package!r}", name=package))


def test_an_error_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def broken(): raise KeyError("a\nb\x07")
    monkeypatch.setitem(cli.COMMANDS, "anchors", broken)
    refused(capsys, ["anchors"], "unexpected KeyError", "--debug")
    with pytest.raises(KeyError): cli.main(["anchors", "--debug"])


# --- words from data in views -------------------------------------------------------
def viewer(words, name="student"):
    haystack = picture_haystack(0, 3, 1, "test")
    asked = Question("", "", "choice", True, (0,), words)
    haystack = type(haystack)(haystack.images, (asked,), f"h {EVIL}")
    reading = ImageAttention(name, haystack.id, ((words, "?"),), torch.full((1, 2, 1, 1, 3), .2), torch.tensor([[-.1, -2.]]), torch.tensor([True]))
    return HaystackViewer([haystack], [reading])


@pytest.mark.parametrize("words", ["Is there a dog for $5, or $x_{1$?", "画像に犬はいますか", "هل يوجد كلب؟", "क्या कुत्ता है", "🦕 and 👩‍👩‍👧?", "a\tb\x1b\u202e", "$" * 7, r"\frac{1}{0} $\undefined$"])
def test_the_viewer_takes_any_words(words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = viewer(words, f"model_$1 {words}")
        shown.draw().savefig(io.BytesIO())
    assert shown.html()


def test_words_are_no_markup():
    shown = viewer(EVIL, EVIL)
    assert "<img src=x" not in shown.html()
    assert "<img" not in accuracy.table_markdown([[("model", ""), ("1", "")], [(EVIL, ""), ("50", "9–91")]]) and r"a\|b" in accuracy.table_markdown([[("a|b", "")], [("c", "")]])


def test_words_of_figures():
    assert figure_words("plain") == dict(s="plain", fontfamily=["DejaVu Sans"], parse_math=False)
    assert figure_label("a$b") == r"a\$b" and figure_label("_hidden").endswith("_hidden") and not figure_label("_hidden").startswith("_")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = Figure().subplots()
        axes.plot([1], [1], label=figure_label("$a$ 🦕"))
        axes.legend().figure.canvas.draw()


def test_the_page_on_what_was_tried_says_what_the_files_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/"docs"))
    import trust
    assert (ROOT/"docs/trust.md").read_text(encoding="utf-8") == trust.page(), "python docs/trust.py writes it"
