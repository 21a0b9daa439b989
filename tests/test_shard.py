"""Two gloo processes on CPU: DDP, FSDP2 and one process agree; a run resumes to the bit; nobody waits for ever. What the processes do is in shard_worker.py."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PrinterCallback

from laid_nb import shard
from laid_nb.train import LaidConfig
from shard_worker import ENGINES, RUNS, fresh, keep, pool, tiny, trainer

HERE = Path(__file__).parent


def start(folder, *jobs):
    "The jobs on two processes; what they say goes to a file."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE/"shard_worker.py", folder, *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    with open(folder/f"{jobs[-1]}.log", "w") as log: return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folder of all results: those of two processes, and meanwhile those of this one, four haystacks at once (one4) and one after the other (one1)."
    folder = tmp_path_factory.mktemp("shard")
    both, failing = start(folder, "agree", "resume", "cached", "spoiled", "half"), start(folder, "fail")
    features = pool()
    for batch, name in ((4, "plain"), (1, "plain"), (4, "lora")):
        made = trainer(folder/"one"/name, batch, 2, features, **RUNS[name])
        made.remove_callback(PrinterCallback)
        made.train()
        keep(made, folder/f"one{batch}-{name}")
    try: both.wait(480), failing.wait(60)
    finally: both.terminate(), failing.terminate()
    assert both.returncode == 0, (folder/"half.log").read_text()
    assert failing.returncode == 1
    return folder


def result(runs, name): return load_file(runs/f"{name}.safetensors"), json.loads((runs/f"{name}.json").read_text())


# --- one gradient -------------------------------------------------------------
@pytest.mark.parametrize("run", ["one1-plain", *(f"{engine}-{name}" for engine, (_, runs) in ENGINES.items() for name in runs)])
def test_however_haystacks_are_spread_the_training_is_the_same(runs, run):
    "Losses, gradient norm and final weights, those beside the student too: replies, sizes and lengths of the four haystacks differ."
    (weights, log), (expected, other) = result(runs, run), result(runs, "one4-" + run.split("-")[-1])
    assert weights.keys() == expected.keys() and len(log) == len(other) == 2
    for name, w in expected.items(): torch.testing.assert_close(weights[name], w, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(log, other):
        assert {"loss", "grad_norm", "loss_hidden"} <= a.keys() == b.keys()
        for name in a: assert a[name] == pytest.approx(b[name], rel=1e-6), name
    before = tiny("student").state_dict()
    assert max((expected[f"student.{k}"] - v).abs().max() for k, v in before.items()) > 1e-3  # and it moved


def test_the_gradient_norm_counts_what_learns_beside_the_student(tmp_path):
    made = trainer(tmp_path, 4, 1, max_grad_norm=1e-3)
    made.remove_callback(PrinterCallback)
    norms = []
    clip = made.accelerator.clip_grad_norm_
    def watch(parameters, limit):
        parameters = list(parameters)
        norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
        before = [p.grad.clone() for p in made.more_parameters]
        total = clip(parameters, limit)
        for p, grad in zip(made.more_parameters, before): torch.testing.assert_close(p.grad, grad*limit/total, rtol=1e-4, atol=1e-12)
        return total
    made.accelerator.clip_grad_norm_ = watch
    made.train()
    assert [h["grad_norm"] for h in made.state.log_history if "grad_norm" in h] == [pytest.approx(norms[0].item(), rel=1e-6)]


# --- checkpoints --------------------------------------------------------------
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_fsdp_resumes_to_the_bit_and_saves_a_stock_student(runs, name):
    (straight, log), (again, other) = result(runs, f"{name}-straight"), result(runs, f"{name}-again")
    assert straight.keys() == again.keys() and all(torch.equal(straight[k], again[k]) for k in straight)
    assert [h["loss"] for h in log] == [h["loss"] for h in other] and len(log) == 4
    folder = runs/f"{name}-straight"
    model = AutoModelForImageTextToText.from_pretrained(folder/"model", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.architectures == ["Qwen2_5_VLForConditionalGeneration"]  # as it was given
    assert model.lm_head.weight is model.get_input_embeddings().weight
    last = AutoModelForImageTextToText.from_pretrained(folder/"checkpoint-4", dtype="auto").state_dict()
    for k, v in model.state_dict().items():
        assert torch.equal(v, straight[f"student.{k}"].bfloat16())
        assert torch.equal(last[k], straight[f"student.{k}"])  # gains folded and adapters merged, as in the student itself
    assert {p.name for p in (folder/"checkpoint-2").iterdir()} >= {"mixing.safetensors", "gain.safetensors", "optimizer_0", "scheduler.pt"}


def test_bf16_under_fsdp(runs):
    weights, log = result(runs, "half")
    assert {w.dtype for n, w in weights.items() if n.startswith("student")} == {torch.float32} and all(x["loss"] == x["loss"] for x in log)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_keep_what_the_teacher_says_once(runs, engine):
    "One epoch asks, each sample once; later epochs, whose order is another, and other runs find it whoever wrote it; a run that goes on too. (How the mixing started is kept in float32.)"
    (weights, log), told = result(runs, f"cached-{engine}-plain"), lambda name: [json.loads((runs/f"cached-{engine}-{name}-{i}").read_text()) for i in (0, 1)]
    for name, asked in (("first", 4), ("other", 0), ("on", 0)):
        (kept, same), both = result(runs, f"cached-{engine}-{name}"), told(name)
        assert sum(one["asked"] for one in both) == asked and sum(one["found"] for one in both) == {"first": 8, "other": 12, "on": 4}[name]
        samples = [key for one in both for key in one["written"] if key.startswith("said/") and key != "said/head"]
        assert len(samples) == len(set(samples)) == asked
        for key, w in weights.items(): torch.testing.assert_close(kept[key], w, rtol=0, atol=1e-10 if name == "first" else 1e-6, check_dtype=False, msg=lambda m, key=key: f"{key}: {m}")
        for a, b in zip(log, same, strict=True): assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert len([f for f in (runs/f"cache-{engine}"/"said").glob("*.safetensors") if f.stem != "head"]) == 4


# --- pictures that go bad -----------------------------------------------------
def after_spoiling(runs, name): return [(json.loads((runs/f"{name}-{i}.json").read_text()), load_file(runs/f"{name}-{i}.safetensors")) for i in (0, 1)]


@pytest.mark.parametrize("name, step", [("spoiled-fail-0-train", 1), ("spoiled-fail-1-train", 1), ("spoiled-fail-0-test", 2)])
def test_a_picture_that_one_process_cannot_read_ends_both_and_costs_no_step(runs, name, step):
    "Each has pictures of its own, and the second one's are emptied after a step; read by itself, by a data reader, and to be asked about."
    (first, weights), (second, same) = after_spoiling(runs, name)
    assert first["step"] == second["step"] == step and "the file is empty" in second["said"] and first["said"]
    kept = AutoModelForImageTextToText.from_pretrained(runs/name/f"checkpoint-{step}", dtype="auto").state_dict()
    before = tiny("student").state_dict()
    for k, w in weights.items(): assert torch.equal(w, same[k]) and torch.equal(w, kept[k]), k
    assert any(not torch.equal(w, before[k]) for k, w in weights.items())


@pytest.mark.parametrize("name", ["spoiled-skip-0-train", "spoiled-skip-1-train", "spoiled-skip-0-test"])
def test_a_picture_that_one_process_cannot_read_is_skipped_and_both_go_on(runs, name):
    (first, weights), (second, same) = after_spoiling(runs, name)
    assert first["step"] == second["step"] == 4 and first["said"] is second["said"] is None
    assert all(torch.equal(w, same[k]) for k, w in weights.items())
    if name.endswith("test"): assert first["asked"] == second["asked"] == [0, 2, 4] and all("3 of 4 haystacks" in t["told"][0] and len(t["told"]) == 1 for t in (first, second))
    elif "-0-" in name: assert not first["told"] and all("left out: cannot read image" in t for t in second["told"]) and second["told"]  # a reader's warnings stay with it


# --- failures -----------------------------------------------------------------
def test_who_waits_for_a_failed_process_is_told(runs):
    said = [(runs/f"said-{i}").read_text() for i in (0, 1)]
    assert said[0].startswith("ConnectionError: process 0 of 2 got no answer from another within 5 s (ddp_timeout)")
    assert said[1] == "FloatingPointError: loss term 'sft' is nan"


@pytest.mark.parametrize("environment, words", [
    (dict(ACCELERATE_USE_DEEPSPEED="true"), "DeepSpeed is not supported: use FSDP2"), (dict(ACCELERATE_USE_MEGATRON_LM="true"), "Megatron-LM is not supported: use FSDP2"),
    (dict(ACCELERATE_USE_FSDP="true"), "set fsdp_version 2"), (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"), "set fsdp_version 2"),
    (dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true"), "teacher empty"),
    (dict(ACCELERATE_USE_PARALLELISM_CONFIG="true", PARALLELISM_CONFIG_CP_SIZE="2"), "context or sequence parallelism is not supported")])
def test_engines_of_the_environment_are_refused(monkeypatch, environment, words):
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words): LaidConfig(use_cpu=True)


def test_engines_of_the_settings_are_refused():
    with pytest.raises(ValueError, match="DeepSpeed is not supported: use FSDP2"): LaidConfig(use_cpu=True, deepspeed="zero3.json")
    with pytest.raises(ValueError, match="set fsdp_version 2"): LaidConfig(use_cpu=True, fsdp=True, fsdp_config=dict(version=1))
    with pytest.raises(ValueError, match="teacher empty"): LaidConfig(use_cpu=True, fsdp=True, fsdp_config=dict(cpu_ram_efficient_loading=True))
    config = LaidConfig(use_cpu=True, fsdp=True)
    assert config.fsdp_plugin_args["fsdp_version"] == 2 and config.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    fresh()


# --- precision and places -----------------------------------------------------
@pytest.mark.parametrize("settings, words", [(dict(student_dtype="bfloat16"), "stand still"), (dict(student_dtype="float16"), "need float32 or bfloat16"),
                                             (dict(student_dtype="bfloat16", optim="adamw_torch_8bit"), "bf16_stochastic_round=True"), (dict(teacher_placement="here"), "teacher_placement is 'here'")])
def test_precision_and_places_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words): LaidConfig(use_cpu=True, **settings)


def test_a_half_precision_student_learns_in_float32_and_is_saved_as_it_came(tmp_path):
    made = trainer(tmp_path/"run", 4, 2, student=tiny("student", torch.bfloat16), teacher=tiny("teacher", torch.bfloat16), bf16=True, learning_rate=1e-5, optim="adamw_torch")
    made.remove_callback(PrinterCallback)
    before = {k: v.float() for k, v in tiny("student", torch.bfloat16).state_dict().items()}
    made.train()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert made.model.dtype == torch.float32 and (made.model.state_dict()[name] != before[name]).float().mean() > .99
    made.save_model(str(tmp_path/"model"))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path/"model", dtype="auto").dtype == torch.bfloat16


def test_a_teacher_stays_where_it_was_mapped_to_or_is_refused():
    teacher = tiny("teacher")
    teacher.hf_device_map = {"": "cpu"}
    shard.place_teacher(teacher, "same", torch.device("meta"))
    assert teacher.device.type == "cpu" and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="loaded with a device map"): shard.place_teacher(teacher, "shard", torch.device("cpu"))
