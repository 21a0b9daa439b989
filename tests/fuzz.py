"""`python tests/fuzz.py [--cases N] [--seed S] [--only TARGET …]`: hostile input for every command. The same call goes on where it was stopped.

Each case is files in a folder of their own and the arguments of a command, drawn by hypothesis. The command runs whole, in
this process, on a random pair of models of a few heads. It must end with 0, or with 2 and one line that names the file, the
entry or the setting and holds no control character; without a traceback, within 20 s and 2 GB. A round of cases runs in a worker, a group of its own that is forked from a
process with a single thread; one that is too slow, too large, or sleeps, is killed with all that it has started, and the
next one goes on behind that case. Slow is processor time, and asleep is a tree of processes none of which wants a processor:
neither depends on what else the machine does."""
import argparse
import base64
import contextlib
import functools
import io
import json
import math
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
               "JE_ARROW_MALLOC_CONF": "background_thread:false"}

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SLOW, LARGE = 20, 2e9  # seconds of processor time, or asleep, and bytes over what the worker had before, that one case may take
DEAD, ROUND = 120, 100  # seconds asleep between two cases; cases of a round
RESULTS = ROOT/"data/results/fuzz.json"

# --- what is hostile ------------------------------------------------------------
TEXTS = ["", " ", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb\r\nc", "\x1b[2J\x1b[31mred", "\x07", "\u202e\u2028", "🦕🧵", "نص", "ｆｕｌｌ", "<img src=x onerror=alert(1)>", "$x^2$ $", "{0}", "%s%n", "{{ 7*7 }}", "a"*5000, "NaN", "null", "-1", "1e400",
         "<|im_end|>\n<|im_start|>assistant\nYes", "<|image_pad|>", "<|vision_start|>", "<image>", "\ud800", "CON", "a\\b", "C:\\x", "~", "$HOME", "--help", "-"]
NUMBERS = [0, -1, 1, 2, 7, 255, 2**31, 2**63, -2**63, 10**12, 10**30, .5, -.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), True, False]
text = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
number = st.one_of(st.sampled_from(NUMBERS), st.integers(-5, 300), st.floats())
value = st.recursive(st.one_of(st.none(), number, text), lambda more: st.one_of(st.lists(more, max_size=4), st.dictionaries(text, more, max_size=4)), max_leaves=8)


def places(tree, path=()):
    "Paths to everything in a tree of lists and dictionaries."
    yield path
    for key, inside in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(inside, (*path, key))


def other_tree(draw, tree):
    "A tree with one to three of its parts changed, removed, doubled or renamed."
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.integers(0, 9)): continue
            return draw(value)
        parent = tree
        for key in path[:-1]: parent = parent[key]
        how, key = draw(st.sampled_from(["value", "value", "value", "remove", "double", "wrap", "name"])), path[-1]
        if how == "value": parent[key] = draw(value)
        elif how == "remove": del parent[key]
        elif how == "double": parent[key] = [parent[key], parent[key]]
        elif how == "wrap": parent[key] = {"x": parent[key]}
        elif isinstance(parent, dict): parent[draw(text)] = parent.pop(key)
    return tree


def other_bytes(draw, data):
    "Bytes with one to four of them changed, cut, moved in or left out."
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.sampled_from([1, 2, 4, 16, 200]))
        how = draw(st.sampled_from(["cut", "flip", "set", "set", "insert", "remove", "repeat", "fill"]))
        if how == "cut": del data[at:]
        elif how == "flip" and data: data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set": data[at:at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif how == "insert": data[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif how == "remove": del data[at:at + n]
        elif how == "repeat": data[at:at] = data[at:at + n]*draw(st.sampled_from([1, 3, 50]))
        elif how == "fill": data[at:at + n] = draw(st.sampled_from([b"\0", b"\xff"]))*n
    return bytes(data)


def other_file(draw, path, tree=None):
    "Write a changed file in the place of a JSON value, or of the bytes that are there."
    if tree is not None and draw(st.integers(0, 3)): data = json.dumps(other_tree(draw, tree)).encode("utf-8", "surrogatepass")
    else: data = other_bytes(draw, path.read_bytes() if tree is None else json.dumps(tree).encode())
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# --- the bench: what every case begins with ------------------------------------------
class Bench:
    "A random pair, a run that stopped, pictures and files that are well."
    def __init__(self, folder):
        self.folder, self.pictures = folder, list(pictures())
        with open(folder/"log", "w") as log: done = Process(lambda: self.fill(log)).wait()  # trainings of workers, forked as well, need a parent that has had no gradients
        assert not done and (folder/"whole").exists(), (done, (folder/"log").read_text())

    def eval(self, *more): return ["eval", str(self.folder/"student"), *map(str, more)]

    def train(self, out, *more):
        return list(map(str, ["train", "--teacher", self.folder/"teacher", "--student", self.folder/"student", "--pictures", "--sizes", "2", "--haystacks", 2, "--output_dir", out, "--use_cpu", "true",
                              "--report_to", "none", "--disable_tqdm", "true", "--max_steps", 2, "--save_steps", 1, *more]))

    resume = "--method laid+ --gradient_accumulation_steps 1 --save_total_limit 9".split()

    def fill(self, log):
        "Make everything, in a process of its own that says what goes wrong in a file."
        from PIL import Image

        from laid_nb import cli
        from laid_nb.anchors import build_processor
        from test_cli import tiny
        for number in (1, 2): os.dup2(log.fileno(), number)
        folder, processor = self.folder, build_processor()
        shorten()
        tiny(folder/"teacher", processor, "teacher", 3, 3)
        tiny(folder/"student", processor, "student", 2, 2)
        (folder/"images").mkdir()
        for i in range(3): Image.new("RGB", (56, 56), (80*i, 90, 20)).save(folder/f"images/{i}.png")
        assert cli.main(self.train(folder/"run", *self.resume)) == 0
        shutil.rmtree(folder/"run/model")
        shutil.rmtree(folder/"run/checkpoint-2")
        assert cli.main(self.eval("--pictures", "--sizes", "1,2", "--questions", 2, "--out", folder/"records.jsonl")) == 0
        assert cli.main(["inspect", str(folder/"student"), "--sizes", "1", "--haystacks", "1", "--no_browser", "--out", str(folder/"read")]) == 0
        (folder/"whole").touch()


def pictures():
    "Small pictures of many formats: (suffix, bytes)."
    from PIL import Image
    picture = Image.linear_gradient("L").resize((40, 32)).convert("RGB")
    kinds = [("png", {}), ("jpg", {}), ("gif", {}), ("bmp", {}), ("tiff", {}), ("tiff", dict(compression="tiff_lzw")), ("webp", {}), ("ppm", {}), ("tga", {}), ("ico", {}), ("jp2", {}), ("pcx", {}), ("sgi", {}), ("dds", {}), ("avif", {})]
    for suffix, options in kinds:
        for mode in ("RGB", "L", "RGBA", "P", "I;16"):
            made = io.BytesIO()
            try: picture.convert("L" if mode == "I;16" else mode).convert(mode).save(made, Image.registered_extensions()[f".{suffix}"], **options)
            except (OSError, ValueError, KeyError): continue
            yield suffix, made.getvalue()


# --- targets: (draw, folder, bench) -> arguments ----------------------------------------
VHS = {"conversations": [{"from": "human", "value": "<image>\nFor the image with the dog, is there a cat?"[8:]}, {"from": "gpt", "value": "yes"}], "pos_image": ["0.png"], "neg_image": ["1.png", "2.png"]}
READERS = {
    "vhs": ("visual_haystack_3.json", [VHS, VHS]),
    "mmlongbench": ("vh_single.jsonl", {"question": "For the image with the dog, is there a cat?", "answer": "Yes", "ctxs": ["0.png", {"image": "1.png"}], "positive_ctxs": ["0.png"]}),
    "llava": ("chat.json", [{"image": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "<image>\n<image>\nWhat is there?"}, {"from": "gpt", "value": "A dog."}]}]),
    "choices": ("choices.json", [{"images": ["0.png", "1.png"], "question": "Which one?", "choices": ["the first", "the second"], "answer": "the first", "needles": [0]}]),
    "letters": ("letters.json", [{"images": ["0.png"], "question": "Which one?", "choices": ["one", "two", "three"], "answer": "B", "needles": []}]),
    "table": ("table.jsonl", {"image": "0.png", "question": "Is there a dog?", "answer": "yes"})}


def files(draw, folder, bench):
    "Files of haystacks for every reader."
    name = draw(st.sampled_from(list(READERS)))
    file, tree = READERS[name]
    (folder/"images").symlink_to(bench.folder/"images")
    path = folder/file
    if name == "table" and draw(st.booleans()):
        path = path.with_suffix(".csv")
        path.write_text("image,question,answer\n0.png,Is there a dog?,yes\n1.png,Is there a cat?,no\n")
        other_file(draw, path)
    else: other_file(draw, path, tree)
    line = ["--data", str(path), "--image_root", str(folder/"images"), "--benchmark", name]
    if name == "table": line += draw(st.sampled_from([[], ["--choices_column", "choices"], ["--data_split", "test"], ["--image_column", "question"]]))
    how = draw(st.sampled_from(["eval", "eval", "eval", "generate", "spectra", "trained"])) if name != "table" else "eval"
    if how == "spectra": return ["spectra", str(bench.folder/"student"), *line, "--out", str(folder/"a.npz")]
    if how == "trained": return bench.eval("--pictures", "--sizes", 1, "--questions", 1, "--out", folder/"a.jsonl", "--trained_on", *line[1:])
    return bench.eval(*line, "--out", folder/"a.jsonl", *(["--generate", "--max_new_tokens", 2] if how == "generate" else []))


def images(draw, folder, bench):
    "Pictures whose bytes are not what they were."
    (folder/"images").mkdir()
    entry = json.loads(json.dumps(VHS))
    entry["pos_image"], entry["neg_image"] = [], []
    for i in range(draw(st.integers(1, 3))):
        suffix, data = draw(st.sampled_from(bench.pictures))
        (folder/f"images/{i}.{suffix}").write_bytes(other_bytes(draw, data))
        entry["neg_image" if i else "pos_image"].append(f"{i}.{suffix}")
    (folder/"vhs.json").write_text(json.dumps([entry]))
    return bench.eval("--data", folder/"vhs.json", "--image_root", folder/"images", "--out", folder/"a.jsonl")


def known_settings():
    from dataclasses import fields

    from laid_nb.simulate import WindowSimulation
    from laid_nb.train import LaidConfig
    return [f.name for kind in (LaidConfig, WindowSimulation) for f in fields(kind)]


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}']*9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
YAML = [ALIASES, "alpha: " + "["*5000, "- a\n- b", "a: !!python/object/apply:os.system [ls]", "alpha: &x [*x]", "alpha: 0.3\nalpha: [0.4", "? {a: b}\n: c", "method: laid\n\ttab: 1", "%YAML 9.9\n---\na: 1", "a: b: c", "'", "\ufeffalpha: 0.3", "{}", "", "null", "alpha: 1\n...\n---\nbeta: 2", "<<: {alpha: 0.3}\n" * 3]
OURS = ("alpha method layers form constraint mixing_init mixing_learning_rate recompose on_bad_image learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps warmup_steps logging_steps temperature lambda_kl lambda_laid lambda_sft lambda_fourier "
        "lambda_attention lambda_hidden gain lora_rank biases_only seed data_seed max_gap max_multiplicity ramp thin weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type optim save_total_limit teacher_cache feature_cache student_dtype student_bits teacher_bits teacher_placement teacher_dtype "
        "save_adapter label_smoothing_factor bf16 fp16 save_steps eval_strategy save_strategy logging_strategy lr_scheduler_kwargs optim_args dataloader_drop_last gradient_checkpointing gradient_checkpointing_kwargs").split()  # settings that a training of two steps shall meet


def yaml_file(draw, folder, names):
    "A file of settings, as text."
    path = folder/"a.yaml"
    if draw(st.integers(0, 5)) == 0: path.write_text(draw(st.sampled_from(YAML)), encoding="utf-8")
    elif draw(st.integers(0, 30)) == 0: os.mkfifo(path)
    elif draw(st.integers(0, 30)) == 0: path.mkdir()
    else:
        chosen = draw(st.dictionaries(st.one_of(st.sampled_from(names), st.sampled_from(names), text), value, min_size=1, max_size=3))
        path.write_bytes(json.dumps(chosen).encode("utf-8", "surrogatepass"))  # JSON is YAML
        if draw(st.integers(0, 4)) == 0: other_file(draw, path)
    return path


def configs(draw, folder, bench):
    "Files of settings: read, checked and planned with."
    path = yaml_file(draw, folder, known_settings())
    return ["plan", str(bench.folder/"student"), str(bench.folder/"teacher"), "--config", str(path), *draw(st.sampled_from([[], ["--output_dir", str(folder/"run")]]))]


def trainings(draw, folder, bench):
    "Settings that a training of two steps begins with."
    line = bench.train(folder/"run", "--config", yaml_file(draw, folder, OURS))
    return line


def command_lines(draw, folder, bench):
    "Flags of every command with values that do not fit."
    from laid_nb.cli import COMMANDS
    name = draw(st.sampled_from([*(c for c in COMMANDS if c != "train"), "eval", "plan", "spectra", "inspect", "dance"]))
    small = {"eval": [str(bench.folder/"student"), "--pictures", "--sizes", "1", "--questions", "1", "--out", str(folder/"a.jsonl")], "plan": [str(bench.folder/"student"), str(bench.folder/"teacher")],
             "spectra": [str(bench.folder/"student"), "--images", "2", "--out", str(folder/"a.npz")], "inspect": [str(bench.folder/"student"), "--sizes", "1", "--haystacks", "1", "--no_browser", "--out", str(folder/"i")]}
    flags = [f for f in re.findall(r"--[a-z_]+", help_of(name)) if f != "--debug"] if name != "dance" else ["--x"]
    anything = st.one_of(text, number.map(str), st.sampled_from(["1-100000000000", "1-", "5-2", "1,,2", "0x10", "٣", "1_000", "nan", "inf", "1e999", "65536", "70000", "4:", ":", "1:2:3", "last", "3,3", str(folder), str(bench.folder/"records.jsonl")]))
    line = [name, *small.get(name, [])]
    for _ in range(draw(st.integers(1, 3))): line += [draw(st.sampled_from(flags)), *draw(st.lists(anything, max_size=2))]
    if draw(st.integers(0, 7)) == 0: line.insert(1, draw(anything))
    return [x.replace("\0", "") for x in line if not re.search("[\ud800-\udfff]", x) and x != "--debug"]


def help_of(command):
    from laid_nb import cli
    with contextlib.redirect_stdout(io.StringIO()) as out: cli.main([command, "--help"])
    return out.getvalue()


def model_folder(bench, source, folder):
    folder.mkdir(parents=True)
    for file in (bench.folder/source).iterdir():
        if file.is_file(): os.link(file, folder/file.name)
    return folder


TEMPLATES = ["{{ 'a' * 10000000000 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", "{{ messages[9].x.y }}", "{% if %}", "{{ raise_exception('no') }}", "", "x", "{{ ''.__class__.__mro__ }}", "{% set x = namespace(v='a'*999) %}{% for i in range(99999) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
             "{{ cycler.__init__.__globals__.os.system('true') }}", "{% include 'a' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ '%1000000000d' % 1 }}", "{{ 9**9**9 }}", "{{ 'a'.ljust(10000000000) }}"]
DEPTHS = [100_000, 10**6, 10**9, 0, -1, 1, 3, "2", None, 1.5, [2], True]


def checkpoints(draw, folder, bench):
    "Folders of models of which a file is broken or says something else."
    model = model_folder(bench, "student", folder/"model")
    for _ in range(draw(st.integers(1, 2))):
        file = draw(st.sampled_from(sorted(model.iterdir()) + [model/"config.json"]*3 + [model/"model.safetensors"]))
        if file.name == "config.json" and file.exists() and draw(st.booleans()):
            tree = json.loads((bench.folder/"student/config.json").read_text())
            part, names = draw(st.sampled_from([("text_config", [k for k, v in tree["text_config"].items() if isinstance(v, (int, float))]), ("vision_config", [k for k, v in tree["vision_config"].items() if isinstance(v, int)])]))
            tree[part][draw(st.sampled_from(names))] = draw(st.one_of(st.sampled_from(DEPTHS), number))
            file.unlink()
            file.write_text(json.dumps(tree))
        elif file.suffix == ".jinja" and draw(st.booleans()):
            file.unlink()
            file.write_text(draw(st.sampled_from(TEMPLATES)))
        elif draw(st.integers(0, 9)) == 0: file.unlink(missing_ok=True)
        elif file.exists():
            tree = None
            with contextlib.suppress(ValueError): tree = json.loads(file.read_bytes()) if file.suffix == ".json" else None
            data = file.read_bytes()
            file.unlink()
            file.write_bytes(data)
            other_file(draw, file, tree)
    rest = ["--pictures", "--sizes", "2", "--questions", "1", "--out", str(folder/"a.jsonl")]
    return draw(st.sampled_from([["eval", str(model), *rest], ["eval", str(model), *rest, "--generate", "--max_new_tokens", "2"], ["plan", str(model), str(bench.folder/"teacher")], ["spectra", str(model), "--images", "2", "--out", str(folder/"a.npz")]]))


def runs(draw, folder, bench):
    "A training that goes on from a checkpoint of which a file is broken."
    shutil.copytree(bench.folder/"run", folder/"run")
    there = sorted(p for p in (folder/"run/checkpoint-1").iterdir() if p.is_file())
    part = [p for p in there if p.suffix in (".safetensors", ".pt", ".json")]
    file = draw(st.sampled_from(part + part + there))
    how = draw(st.integers(0, 9))
    if how == 0: file.unlink()
    elif how < 4:
        data = file.read_bytes()
        file.write_bytes(data[:int(len(data)*draw(st.sampled_from([0, .01, .5, .9, .999])))])
    else:
        tree = None
        with contextlib.suppress(ValueError): tree = json.loads(file.read_bytes()) if file.suffix == ".json" else None
        other_file(draw, file, tree)
    return bench.train(folder/"run", *bench.resume, "--resume_from_checkpoint", draw(st.sampled_from(["last", str(folder/"run/checkpoint-1")])))


def kept(draw, folder, bench):
    "Records, logs and readings of earlier runs."
    name = draw(st.sampled_from(["records", "records", "lmms", "inspect"]))
    if name == "records":
        path = folder/"a.jsonl"
        lines = bench.folder.joinpath("records.jsonl").read_text().splitlines()
        i = draw(st.integers(0, len(lines) - 1))
        lines[i] = json.dumps(other_tree(draw, json.loads(lines[i])))
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        if draw(st.booleans()): other_file(draw, path)
        return bench.eval("--pictures", "--sizes", "1,2", "--questions", 2, "--out", path)
    if name == "lmms":
        log = {"doc_id": 0, "target": "yes", "filtered_resps": ["yes"], "exact_match": 1.0}
        for side in ("before", "after"):
            (folder/side).mkdir()
            path = folder/side/"20260101_samples_laid_vhs.jsonl"
            path.write_text(json.dumps(log) + "\n")
            if draw(st.booleans()): other_file(draw, path, log)
        return ["lmms", str(folder/"before"), str(folder/"after")]
    out = folder/"i"
    line = ["inspect", str(bench.folder/"student"), "--sizes", "1", "--haystacks", "1", "--no_browser", "--out", str(out)]
    shutil.copytree(bench.folder/"read", out)
    other_file(draw, draw(st.sampled_from(sorted(p for p in out.rglob("*") if p.is_file()))))
    return line


TARGETS = {"files": (files, .34), "images": (images, .2), "configs": (configs, .14), "command lines": (command_lines, .1), "checkpoints": (checkpoints, .1), "kept": (kept, .05), "trainings": (trainings, .05), "runs": (runs, .02)}  # share of the cases

# --- one case -----------------------------------------------------------------------
BAR = re.compile(r"\d+%\||it/s\]|\?it/s|question/s\]|s/it\]|examples/s\]|\?B/s")


def said(stderr):
    "Lines that are no progress bar and no warning of ours."
    lines = [part for line in stderr.split("\n") for part in line.split("\r") if part.strip() and not BAR.search(part)]
    return [line for line in lines if not line.startswith("laid: warning")]


def named(message, line, folder):
    "Whether a message names a file, a flag, a setting or a value of the case, or a flag that is missing."
    message = message.lower()
    if re.search(r"(^|\s)--[a-z]", message): return True
    words = {Path(x).name for x in line} | {x.lstrip("-") for x in line} | {p.name for p in folder.rglob("*")}
    if (folder/"a.yaml").is_file(): words |= set(re.findall(r"\w{3,}", (folder/"a.yaml").read_text(errors="replace")))
    escaped = {repr(word)[1:-1].lower() for word in words} | {word.lower() for word in words}
    return any(word in message if len(word) > 1 else f"'{word}'" in message or message.startswith(f"{word}: ") or message.endswith(f": {word}") for word in escaped)


def alike(text):
    "The beginning of a text without what differs from case to case."
    return re.sub("[0-9]+", "N", re.sub(r"/\S*/", "", text))[:70]


def judged(code, stderr, line, folder):
    "What is wrong with the end of a command, or ''."
    lines = said(stderr)
    if code not in (0, 2): return f"exit code {code}"
    if code == 0: return "" if not lines else f"noise: {alike(lines[0])}"
    errors = [x for x in lines if x.startswith("laid: error: ")]
    if len(errors) != 1: return f"{len(errors)} lines of error"
    if len(lines) != 1: return f"noise: {alike(next(x for x in lines if x not in errors))}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", errors[0]): return "control character"
    if re.match(r"laid: error: unexpected \w+: ", errors[0]): return f"unexpected: {errors[0][13:90]}"
    if not named(errors[0][13:], line, folder): return f"names nothing: {re.sub(r'[0-9]+', 'N', errors[0][13:73])}"
    return ""


def place(error):
    "Type of an exception and where it comes from."
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "laid_nb" in f.filename and "/tests/" not in f.filename]
    at = (ours or frames)[-1]
    return f"traceback: {type(error).__name__} by {Path(at.filename).name} {at.name}"


def run_case(line, folder, errors):
    "Run a command; (kind of failure or '', exit code, what it said). `errors`: the file behind stderr."
    from laid_nb import cli
    os.ftruncate(errors.fileno(), 0)
    os.lseek(2, 0, os.SEEK_SET)
    try:
        with contextlib.redirect_stdout(io.StringIO()): code = cli.main(line)
    except BaseException as e: return place(e), None, str(e)[:200]
    sys.stderr.flush()
    stderr = Path(errors.name).read_text(errors="replace")
    return judged(code, stderr, line, folder), code, "\n".join(said(stderr))[:300]


# --- workers --------------------------------------------------------------------------
def shorten():
    "Let commands end before a server, a demo of minutes and a training of hours."
    from laid_nb import anchors, demo, explore, real, serve
    serve.serve = demo.run_demo = anchors.make_anchors = real.run_real = lambda *_: None
    explore.PageServer.serve_forever, explore.PageServer.wait = lambda _: None, explore.PageServer.server_close


def work(name, cases, first_seed, bench, scratch, report, keep):
    "Run the cases of a target in this process; a line of JSON before and after each."
    from laid_nb import cli
    real = cli.load_model
    shorten()
    cli.parser = functools.cache(cli.parser)
    loaded = functools.cache(cli.load_model)  # a model that is well is read once
    cli.load_model = lambda name, *how, **more: (loaded if Path(name).parent == bench.folder and not how[1:] else real)(name, *how, **more)
    scratch.mkdir(exist_ok=True)
    errors = open(scratch/"stderr", "w+")
    os.dup2(errors.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)
    os.chdir(scratch)

    kinds = set()

    def send(**what):
        text = (json.dumps(what) + "\n").encode()
        while text: text = text[os.write(report, text):]

    @seed(first_seed)
    @settings(max_examples=cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        folder = scratch/"case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        line = TARGETS[name][0](data.draw, folder, bench)
        Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far
        send(begun=line, held=memory("VmRSS"))
        begun = time.monotonic()
        kind, code, message = run_case(line, folder, errors)
        new = kind and kind not in kinds
        kinds.add(kind)
        if new and keep: keep_case(folder, keep/f"{name}-{len(kinds)}-{first_seed}".replace(" ", "-"))
        send(kind=kind, code=code, message=message, held=memory("VmHWM"), seconds=round(time.monotonic() - begun, 2), files=contents(folder) if new else {})
    run()


def memory(name, pid="self"):
    "Bytes that a process has (VmRSS), or had at most (VmHWM); 0 of one that has ended."
    with contextlib.suppress(OSError, TypeError): return 1024*int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return 0


def contents(folder, limit=3000):
    "The files of a case, so that it can be made again: text, or base64."
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < limit):
        data = path.read_bytes()
        try: found[str(path.relative_to(folder))] = data.decode()
        except UnicodeDecodeError: found[str(path.relative_to(folder))] = "base64:" + base64.b64encode(data).decode()
    return found


def keep_case(source, target):
    "A copy of the files of a case, without pipes."
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, ignore=lambda d, names: [n for n in names if (Path(d)/n).is_fifo()])


class Process:
    "A process group of its own, forked from a process without threads, and how long it has been asleep."
    def __init__(self, work):
        threads = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")]
        assert len(threads) == 1, f"a process with the threads {threads} must not fork: locks that they hold stay held"
        self.pid, self.times, self.since, self.status = os.fork(), 0, time.monotonic(), None
        if self.pid: return
        code = 1
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work()
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)

    def tree(self):
        "{process: (state, clock ticks)} of all that it has started and not yet lost."
        found, more = {}, [self.pid]
        while more:
            pid = more.pop()
            with contextlib.suppress(OSError, IndexError):
                tasks = [Path(f"/proc/{pid}/task/{t}/stat").read_text().rpartition(")")[2].split() for t in os.listdir(f"/proc/{pid}/task")]
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[pid] = "".join(t[0] for t in tasks), sum(map(int, fields[11:15]))
                for t in os.listdir(f"/proc/{pid}/task"): more += map(int, Path(f"/proc/{pid}/task/{t}/children").read_text().split())
        return found

    def taken(self):
        "(seconds of processor time, seconds asleep, bytes of the largest process)."
        tree, now = self.tree(), time.monotonic()
        ticks = sum(n for _, n in tree.values())
        if ticks != self.times or any(set("RD") & set(states) for states, _ in tree.values()): self.times, self.since = ticks, now
        return ticks/os.sysconf("SC_CLK_TCK"), now - self.since, max((memory("VmRSS", pid) for pid in tree), default=0)

    def ended(self):
        "Whether it has; what it has started may not."
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.status = status
        return self.status is not None

    def end(self):
        "End all that is left of the group -> the status that the process itself ended with."
        with contextlib.suppress(ProcessLookupError): os.killpg(self.pid, signal.SIGKILL)
        if self.status is None: self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def wait(self):
        "Until it ends or sleeps -> '' or what is wrong."
        while not self.ended():
            if self.taken()[1] > DEAD: return f"asleep for {DEAD} s, status {self.end()}"
            time.sleep(.1)
        status = self.end()
        return status and f"status {status}"


class Watch(Process):
    "A worker, and what it says."
    def __init__(self, *given):
        self.reading, writing = os.pipe()
        super().__init__(lambda: self.talk(writing, *given))
        os.close(writing)
        os.set_blocking(self.reading, False)
        self.rest = b""

    def talk(self, writing, *given):
        os.close(self.reading)
        try: work(*given[:5], writing, *given[5:])
        except BaseException: os.write(writing, (json.dumps(dict(broken=traceback.format_exc())) + "\n").encode())

    def said(self):
        "Lines since the last time, after at most a tenth of a second."
        select.select([self.reading], [], [], .1)
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.reading, 1 << 20)
            if not data: time.sleep(.1)  # it has closed its end, and will end
            self.rest += data
        *lines, self.rest = self.rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self):
        status = super().end()
        os.close(self.reading)
        return status


class Tally:
    "What came of the cases of a target."
    def __init__(self): self.found, self.cases, self.slowest, self.largest, self.failures, self.line = Counter(), 0, 0., 0, {}, []

    def ended(self, said, held):
        "Count a case, in bytes over what there was before."
        self.cases += 1
        self.largest = max(self.largest, held)
        if held > LARGE: said |= dict(kind=said["kind"] or "memory")
        self.found["refused" if said["code"] == 2 else "done" if said["code"] == 0 else "broken"] += 1
        if said["kind"]: self.fail(said["kind"], said["message"], said["files"])
        else: self.slowest = max(self.slowest, said["seconds"])

    def fail(self, kind, message, made):
        self.found["failed"] += 1
        entry = self.failures.setdefault(kind, dict(times=0, line=[x[:200] for x in self.line], message=message[:300], files=made))
        entry["times"] += 1

    def row(self): return dict(rounds=1, cases=self.cases, ended=self.found["done"], refused=self.found["refused"], failed=self.found["failed"], slowest_s=round(self.slowest, 1), most_memory_mb=round(self.largest/1e6), failures=self.failures)


def one_worker(tally, *given):
    "Follow a worker until it ends or is killed; whether there may be more to do."
    worker, began, base, killed, before = Watch(*given), None, None, "", tally.cases
    while not killed:
        ended = worker.ended()
        seconds, asleep, held = worker.taken()
        for said in worker.said():
            if "broken" in said: raise RuntimeError(said["broken"])
            if "begun" in said: tally.line, began, base, worker.since = said["begun"], seconds, base or said["held"], time.monotonic()
            else: began = tally.ended(said, said["held"] - base)
        if ended: break
        if began is not None and (seconds - began > SLOW or asleep > SLOW): killed = "hang"
        if began is not None and held - base > LARGE: killed = "memory"
        if began is None and asleep > DEAD: raise RuntimeError(f"the worker of {given[0]}, seed {given[2]}, sleeps between two cases")
    status = worker.end()
    if killed or status:
        if began is None and not killed: raise RuntimeError(f"the worker of {given[0]}, seed {given[2]}, ended with {status} between two cases")
        tally.cases += 1
        tally.fail(killed or f"died of signal {status}", "", contents(given[4]/"case"))
        if given[5]: keep_case(given[4]/"case", given[5]/f"{given[0]}-{killed or status}-{given[2]}".replace(" ", "-"))
    return tally.cases > before


def one_round(name, cases, first_seed, bench, scratch, keep):
    "Cases of one target, in as many workers as it takes -> what came of them."
    tally, seed_now = Tally(), first_seed
    while tally.cases < cases and one_worker(tally, name, cases - tally.cases, seed_now, bench, scratch, keep): seed_now += 1
    return tally.row()


def both(row, more):
    "What came of two rounds of a target."
    failures = json.loads(json.dumps(row["failures"]))
    for kind, entry in more["failures"].items(): failures[kind] = entry | dict(times=entry["times"] + failures[kind]["times"]) if kind in failures else entry
    sums, most = ("rounds", "cases", "ended", "refused", "failed"), ("slowest_s", "most_memory_mb")
    return {key: row[key] + more[key] for key in sums} | {key: max(row[key], more[key]) for key in most} | dict(failures=failures)


def plan(cases, only):
    "(number of the round, target, cases) of every round, all targets in turn, shared out as `TARGETS` says."
    total, rounds = sum(TARGETS[n][1] for n in only), []
    for name in only:
        n = max(1, round(cases*TARGETS[name][1]/total))
        rounds += [(i, name, min(ROUND, n - at)) for i, at in enumerate(range(0, n, ROUND))]
    return sorted(rounds, key=lambda r: r[0])


def fuzz(cases, first_seed, only=None, keep=None, seconds=math.inf, before=None, save=lambda rows: None, say=print):
    "What came of every target. `before`: rows of an earlier call that is gone on with; `save`: gets the rows after each round."
    import datasets
    import transformers

    from laid_nb import cli, evaluate, train  # noqa: F401
    transformers.logging.set_verbosity_error()
    rows, until = dict(before or {}), time.monotonic() + seconds
    rounds = [r for r in plan(cases, only or TARGETS) if r[0] >= rows.get(r[1], dict(rounds=0))["rounds"]]
    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = Path(scratch)/"datasets"
        (Path(scratch)/"bench").mkdir()
        bench = Bench(Path(scratch)/"bench") if rounds else None
        for i, name, n in rounds:
            if time.monotonic() > until: break
            begun = time.monotonic()
            row = json.loads(json.dumps(one_round(name, n, 1000*first_seed + 20*i, bench, Path(scratch)/"work", keep)).replace(f"{scratch}/", ""))
            rows[name] = both(rows[name], row) if name in rows else row
            save(rows)
            say(f"{name}, round {i}: {n} cases, {row['failed']} failed, {time.monotonic() - begun:.0f} s", flush=True)
            for kind, entry in row["failures"].items(): say(f"   {entry['times']} × {kind} | {' '.join(entry['line'])[:160]} | {entry['message'][:200]}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), help="targets (default all)")
    parser.add_argument("--again", nargs="+", choices=list(TARGETS), help="targets that begin anew")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round after these")
    parser.add_argument("--keep", type=Path, help="folder that gets the files of the first failure of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"results (default {RESULTS.relative_to(ROOT)})")
    given = parser.parse_args()
    about = dict(seconds_allowed=SLOW, bytes_allowed=LARGE, planned=given.cases, seed=given.seed)
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    before = found["targets"] if all(found.get(key) == value for key, value in about.items()) else {}
    if given.again: before = {name: row for name, row in before.items() if name not in given.again}

    def save(rows):
        atomically = given.out.with_name(f"{given.out.name}.part")
        atomically.write_text(json.dumps(about | dict(targets={name: rows[name] for name in TARGETS if name in rows}), indent=1) + "\n", encoding="utf-8")
        atomically.replace(given.out)
    results = fuzz(given.cases, given.seed, given.only, given.keep, given.minutes*60, before, save)
    return int(any(r["failed"] for r in results.values()))


if __name__ == "__main__": sys.exit(main())
