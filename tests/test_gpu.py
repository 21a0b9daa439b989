"""What runs on a card, against the same on the CPU. CI has no card and skips this file.

On 2026-11-27 25 of 31 passed on an H200; the six others were mended after that and have not run on a card since.

`python tests/test_gpu.py` runs it on a card and writes data/results/gpu_tests.json. (Under plain pytest conftest.py hides
the card.) LAID_GPU_TESTS=cpu runs it without one, to try the tests themselves."""
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = DEVICE == "cpu"
pytestmark = pytest.mark.skipif(CPU and os.environ.get("LAID_GPU_TESTS") != "cpu", reason="there is no CUDA device here")
METHODS = ("sft", "kd", "laid", "laid+")
# Of trained weights in float64, against another device: transformers makes cosines, sines and root mean squares in float32
# in every dtype. On one CPU, one unit in the last place in the former moves a weight of these runs by 3.5e-7, in the
# latter by 7.4e-7, in both by 8.0e-7.
OTHER_DEVICE = 2e-6


@pytest.fixture(autouse=True)
def exact():
    "Float32 is float32."
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if not CPU: torch.cuda.empty_cache()


@pytest.fixture
def note(record_property):
    "note(name, value): a number for the report -> the number."
    def keep(name, value):
        record_property(name, value)
        return value
    return keep


def far(a, b):
    "Norm of a difference over the norm of what it should be."
    a, b = (x.detach().double().cpu() for x in (a, b))
    return ((a - b).norm()/b.norm().clamp(min=1e-30)).item()


def here(batch): return {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in batch.items()}


def logged(made, name="loss"): return [h[name] for h in made.state.log_history if name in h]


@pytest.fixture
def train(processor, tiny, pool, tmp_path):
    "train(device, folder, **settings): a trained LaidTrainer of tiny models."
    from laid_nb.simulate import WindowSimulation
    from laid_nb.train import LaidConfig, LaidTrainer
    def run(device=DEVICE, folder="run", data=None, resume=None, **settings):
        quiet = dict(disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                     learning_rate=1e-3, mixing_learning_rate=1e-2, max_steps=3, use_cpu=device == "cpu")
        simulation = WindowSimulation(**{k: settings.pop(k) for k in ("max_gap", "max_multiplicity") if k in settings})
        made = LaidTrainer(tiny("student"), LaidConfig(str(tmp_path/folder), **quiet | settings), data or pool, processor, tiny("teacher"), simulation=simulation)
        made.train(resume_from_checkpoint=resume)
        return made
    return run


# --- reading ------------------------------------------------------------------
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, .05)], ids=["float32", "bfloat16"])
def test_queries_and_keys_are_those_of_eager_attention_on_the_cpu(tiny, processor, haystacks, note, dtype, near):
    from laid_nb.capture import capture
    from laid_nb.inputs import HaystackCollator, image_inputs
    batch, seen = HaystackCollator(processor)(haystacks[:2]), []
    for device, kernel, kind in (("cpu", "eager", torch.float32), (DEVICE, "sdpa", dtype)):
        model = tiny("student").to(device, kind).eval()
        model.set_attn_implementation(kernel)
        given = {k: v.to(device) for k, v in image_inputs(model, batch, "student").items()}
        with torch.no_grad(), capture(model) as cache: model(**given)
        real = batch["attention_mask"].bool()
        seen.append([cache[x, layer].cpu().transpose(1, 2)[real] for layer in cache.layers for x in "qk"])
    assert note("difference", max(far(b, a) for a, b in zip(*seen, strict=True))) < near


def test_features_of_pictures(tiny, processor, haystacks, note):
    from laid_nb.inputs import HaystackCollator, precompute
    made = [precompute(haystacks[:3], HaystackCollator(processor), tiny("student").to(d), tiny("teacher").to(d), progress=False) for d in ("cpu", DEVICE)]
    names = ("student_features", "teacher_features")
    assert note("difference", max(far(b[name], a[name]) for a, b in zip(*made, strict=True) for name in names)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "gemma3"])
def test_which_layers_attend_plainly(name, dtype):
    from laid_nb.attention import attention_kinds
    from test_attention import build
    from test_capture import FAMILIES
    assert attention_kinds(build(name, FAMILIES[name], "sdpa", dtype).to(DEVICE)) == attention_kinds(build(name, FAMILIES[name]))


def test_answers(tiny, processor, haystacks, note):
    "Prefixes that are continued on the card, against the same on the CPU, and against whole prompts."
    from laid_nb.evaluate import ask_many, evaluate
    from laid_nb.inputs import image_inputs, prompt_inputs, read_positions
    stacks, models = haystacks[:3], {d: tiny("student").to(d).eval() for d in ("cpu", DEVICE)}
    said = [[log_p for log_p, _ in ask_many(m, processor, stacks, [None]*len(stacks))] for m in models.values()]
    there, card = said[0], said[-1]
    assert note("to the CPU", max((a - b).abs().max().item() for a, b in zip(there, card, strict=True))) < 1e-4
    yes, no = (processor.tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
    off = []
    for h, found in zip(stacks, card):
        for turn in range(len(h.questions)):
            prompt = here(prompt_inputs(processor, h, 56, turn, ""))
            with torch.no_grad(): logits = models[DEVICE](**image_inputs(models[DEVICE], prompt), position_ids=read_positions(models[DEVICE], prompt)).logits[0, -1]
            off.append(((logits[yes] - logits[no]).abs() - (found[turn, 0] - found[turn, 1]).abs()).abs().item())
    assert note("to whole prompts", max(off)) < 1e-4
    right = [[r["correct"] for r in evaluate(m, processor, stacks, progress=False)] for m in models.values()]
    assert right[0] == right[-1] and len(right[0]) == sum(len(h.questions) for h in stacks)


# --- training -----------------------------------------------------------------
@pytest.mark.parametrize("run", ["plain", "lora"])
def test_a_training_in_float64_is_that_of_the_cpu(tmp_path, note, run):
    "All terms, gain, projections: losses, norms of gradients, weights."
    from safetensors.torch import load_file

    from shard_worker import RUNS, keep, pool, trainer
    features, found = pool(), []
    for name in ("cpu", DEVICE):
        made = trainer(tmp_path/f"{name}-run", 4, 2, features, use_cpu=name == "cpu", lambda_images=.1, **RUNS[run])
        made.train()
        keep(made, tmp_path/f"{name}-of")
        found.append((load_file(tmp_path/f"{name}-of.safetensors"), json.loads((tmp_path/f"{name}-of.json").read_text())))
    (expected, logs), (weights, other) = found
    assert weights.keys() == expected.keys() and len(logs) == 2
    assert note("weights", max((weights[k] - x).abs().max().item() for k, x in expected.items())) < OTHER_DEVICE
    for a, b in zip(logs, other):
        for name in a: assert b[name] == pytest.approx(a[name], rel=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_losses_in_float32_are_those_of_the_cpu(train, note, method):
    more = dict(method=method, max_gap=100, max_multiplicity=4) | (dict(lambda_hidden=.1) if "laid" in method else {})
    runs = [train(device, f"run-{i}", **more) for i, device in enumerate(("cpu", DEVICE))]
    a, b = (logged(made) for made in runs)
    assert len(a) == 3 and note("difference", max(abs(x - y)/abs(x) for x, y in zip(a, b, strict=True))) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_bf16_with_checkpointing_and_adapters(train, tiny, note, method):
    made = train(method=method, bf16=True, gradient_checkpointing=True, lora_rank=2, learning_rate=1e-2, gain=method == "laid+", max_steps=4)
    losses, before = logged(made), tiny("student").state_dict()
    assert all(x == x and abs(x) < 1e4 for x in losses) and made.model.device.type == DEVICE
    state = made.model.state_dict()
    moved = [k for k, x in before.items() if not torch.equal(state[k].cpu(), x)]
    note("losses", losses)
    assert any("q_proj" in k for k in moved) and not any("visual" in k for k in moved)


def test_checkpointing_changes_nothing(train, note):
    a, b = (logged(train(folder=str(c), method="laid+", gradient_checkpointing=c)) for c in (False, True))
    assert note("difference", max(abs(x - y)/abs(x) for x, y in zip(a, b, strict=True))) < 1e-3


def test_a_teacher_on_the_cpu(train, note):
    runs = {place: train(folder=place, method="laid+", teacher_placement=place) for place in ("same", "cpu")}
    assert [made.teacher.device.type for made in runs.values()] == [DEVICE, "cpu"]
    a, b = map(logged, runs.values())
    assert note("difference", max(abs(x - y)/abs(x) for x, y in zip(a, b, strict=True))) < 1e-3


def test_what_is_kept_on_disk_is_read_again(train, haystacks, tmp_path, note):
    kept = dict(teacher_cache=str(tmp_path/"said"), feature_cache=str(tmp_path/"seen"), method="laid", data=haystacks[:4], max_steps=-1, num_train_epochs=2)
    first, again, plain = train(folder="first", **kept), train(folder="again", **kept), train(folder="plain", **kept | dict(teacher_cache=None, feature_cache=None))
    assert first.cached.found >= 4 and again.cached.asked == 0
    for made in (again, plain): assert note("difference", max(abs(x - y)/abs(x) for x, y in zip(logged(first), logged(made), strict=True))) < 1e-3


def test_a_run_goes_on_from_a_checkpoint(train, tmp_path, note):
    more = dict(method="laid+", max_steps=4, save_strategy="steps", save_steps=2)
    straight = train(folder="straight", **more)
    again = train(folder="straight", resume=str(tmp_path/"straight"/"checkpoint-2"), **more)
    pairs = list(zip(straight.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    note("the same to the bit", all(torch.equal(x, y) for x, y in pairs))
    assert note("difference", max(far(y, x) for x, y in pairs)) < 1e-4


def test_the_student_is_saved_as_a_stock_model(train, tmp_path, pool, note):
    from transformers import AutoModelForImageTextToText

    from laid_nb.inputs import image_inputs
    made = train(method="laid+")
    made.save_student(tmp_path/"student")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path/"student").to(DEVICE).eval()
    batch = here(made.data_collator(pool[:2]))
    with torch.no_grad(): a, b = (m.eval()(**image_inputs(m, batch, "student")).logits for m in (made.model, stock))
    assert type(stock) is type(made.model) and note("difference", far(b, a)) < 1e-5


@pytest.mark.skipif(CPU, reason="accelerate makes no group of one process on a CPU; two are in test_shard.py")
def test_fsdp_and_a_sharded_teacher_in_one_process(tmp_path, note):
    from safetensors.torch import load_file

    from shard_worker import keep, trainer
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", __file__, "fsdp", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    made = trainer(tmp_path/"alone", 4, 2)
    made.train()
    keep(made, tmp_path/"one")
    one, sharded = load_file(tmp_path/"one.safetensors"), load_file(tmp_path/"fsdp.safetensors")
    assert one.keys() == sharded.keys()
    assert note("weights", max((sharded[k] - x).abs().max().item() for k, x in one.items())) < OTHER_DEVICE


def fsdp(folder):
    "What the process of that test does."
    from shard_worker import FSDP, keep, trainer
    made = trainer(folder/"fsdp-run", 4, 2, use_cpu=False, teacher_placement="shard", **FSDP)
    assert made.is_fsdp_enabled
    made.train()
    keep(made, folder/"fsdp")
    torch.distributed.destroy_process_group()


# --- memory -------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["kd", "laid"])
def test_the_plan_against_the_allocator(processor, tmp_path, note, method, checkpointing):
    from transformers import AutoModelForImageTextToText

    from laid_nb.haystack import picture_haystack
    from laid_nb.inputs import HaystackCollator
    from laid_nb.plan import Cards, Sample, plan_training
    from laid_nb.train import LaidConfig, LaidTrainer
    from test_plan import cut_down
    images, side, wide = (4, 112, 1) if CPU else (32, 224, 4)
    configs = cut_down(processor.tokenizer, 256*wide, 4, 2*wide, 700*wide), cut_down(processor.tokenizer, 384*wide, 5, 3*wide, 1000*wide)
    collator, data = HaystackCollator(processor, turns=2, size=side), [picture_haystack(i, images, 2, "train") for i in range(2)]
    student, teacher = (AutoModelForImageTextToText.from_config(c, dtype=torch.float32).to(DEVICE) for c in configs)
    args = LaidConfig(str(tmp_path), method=method, gradient_checkpointing=checkpointing, bf16=True, max_steps=2, gradient_accumulation_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=CPU)
    made = LaidTrainer(student, args, data, processor, teacher, None, data_collator=collator)
    batch = collator(data[:1])
    tokens, replies = batch["input_ids"].shape[1], int(batch["replies"].sum())
    pictures = int((batch["input_ids"] == configs[0].image_token_id).sum())
    configs[1].dtype = torch.float32
    planned = plan_training(*configs, args, Sample(images, side, side, tokens - pictures - 2*images, replies), Cards())
    assert planned.tokens == tokens and planned.total > 0
    if CPU:
        made.train()
        return
    torch.randn(8, 8, device=DEVICE) @ torch.randn(8, 8, device=DEVICE)  # the library's own memory is taken before
    gc.collect()  # else the trainer of the test before is freed while this one trains, and the peak is the present
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    weights = sum(p.nbytes for m in (student, teacher) for p in m.parameters())
    others = torch.cuda.memory_allocated() - weights
    torch.cuda.reset_peak_memory_stats()
    made.train()
    measured = torch.cuda.max_memory_allocated() - others
    assert note("measured MB", measured/1e6) > weights/1e6  # gradients and states at least
    assert .6 < note("planned / measured", planned.total/measured) < 1.6


# --- the embedded models ------------------------------------------------------
def test_the_embedded_models_are_trained_alike(processor, tmp_path, note):
    import numpy as np

    from laid_nb.anchors import (
        CONTENTS,
        PAIR,
        Namer,
        _content_labels,
        _train_language,
        _vision_loss,
        anchor_config,
        anchor_model,
        patchify,
    )
    torch.manual_seed(0)
    namer = Namer({name: anchor_config(name, processor.tokenizer) for name in PAIR})
    patches = patchify(np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3)).astype(np.uint8), [.5]*3, [.5]*3)
    pictures, trained, seen = torch.randn(2, len(CONTENTS), 4, 128, dtype=torch.float16), [], []
    begun = anchor_model("small", processor.tokenizer, namer).state_dict()
    for name in ("cpu", DEVICE):
        model = anchor_model("small", processor.tokenizer, namer)
        model.load_state_dict(begun)
        steps = dict(steps=6, longest=5, tokens=600)
        for until in (3, None): _train_language("small", model.to(name), processor.tokenizer, pictures, tmp_path/f"{name}-{len(trained)}", until=until, **steps)
        trained.append(model.model.language_model.state_dict())
        seen.append(_vision_loss(namer.to(name), patches.to(name), _content_labels()[:4].to(name))[0])
        namer.to("cpu")
    assert note("tower", abs(seen[0].item() - seen[1].item())/seen[0].item()) < 1e-3
    assert note("language", max(far(trained[1][k], x) for k, x in trained[0].items())) < 1e-2


# --- as a program -------------------------------------------------------------
def reason(said):
    "Of a test that did not pass, the line that says it: no source, no paths of the machine."
    crash = getattr(said, "reprcrash", None)
    text = crash.message if crash else said[2] if isinstance(said, tuple) else str(said)
    return (text.splitlines() or [""])[0]


class Report:
    "Outcome, seconds and numbers of every test."
    def __init__(self): self.rows = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            why = {} if report.outcome == "passed" else {"why": reason(report.longrepr)}
            self.rows.append(dict(test=report.nodeid.split("::")[-1], outcome=report.outcome, seconds=round(report.duration, 2)) | dict(report.user_properties) | why)


def main():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # conftest.py would hide it
    from laid_nb.store import hardware, versions
    report, start = Report(), time.time()
    code = pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[report])
    if not torch.cuda.is_available(): return code
    found = dict(command="python tests/test_gpu.py", finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), seconds=round(time.time() - start),
                 versions=versions() | {"cuda": torch.version.cuda}, hardware=hardware(), rows=report.rows)
    path = HERE.parent/"data"/"results"/"gpu_tests.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return code


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    if sys.argv[1:2] == ["fsdp"]: fsdp(Path(sys.argv[2]))
    else: sys.exit(main())
