"""What was computed once: the same losses, no second reading of the teacher, and nothing found that does not belong."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.cache import CACHE_OPTIONS, TeacherCache, cached_teacher, draw_subset, from_bits, to_bits, token_counts
from laid_nb.folder import Damaged, TensorFolder
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, StoredSamples, image_inputs, precompute
from laid_nb.losses import laid_loss
from laid_nb.parts import MixingPart
from laid_nb.simulate import WindowSimulation
from laid_nb.train import LaidConfig, LaidTrainer

SIZES = {"student": (2, 2), "teacher": (3, 3)}  # layers, heads


def tiny(name, seed=None):
    "A random model of a few heads; the same weights for the same name."
    layers, heads = SIZES[name]
    config = anchor_config(name, build_processor().tokenizer).to_dict()
    config["text_config"] |= dict(hidden_size=32*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None)
    config["text_config"]["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 4, 8])
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=32*heads, fullatt_block_indexes=[0])
    torch.manual_seed(len(name) if seed is None else seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


@pytest.fixture(scope="module")
def processor(): return build_processor()


@pytest.fixture(scope="module")
def haystacks(): return [picture_haystack(i, n_images=2 + i % 3, n_questions=3) for i in range(6)]


@pytest.fixture(scope="module")
def pool(processor, haystacks): return precompute(haystacks, HaystackCollator(processor), tiny("student"), tiny("teacher"), progress=False)


class Reads:
    "How often a model was called."
    def __init__(self, model):
        self.number = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_): self.number += 1


@pytest.fixture
def run(processor, pool, tmp_path):
    "run(**settings) -> (trainer after training, forward passes of the teacher): two epochs of six samples."
    def make(teacher=None, data=None, student=None, reads=processor, steps=None, resume=None, **settings):
        quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=1,
                     gradient_accumulation_steps=1, learning_rate=1e-3, mixing_learning_rate=1e-2, num_train_epochs=2)
        simulation = WindowSimulation(**{k: settings.pop(k) for k in ("max_gap", "max_multiplicity", "ramp") if k in settings})
        teacher = tiny("teacher") if teacher is None else teacher
        counted = Reads(teacher)
        folder = settings.pop("folder", tmp_path/"run")
        made = LaidTrainer(student or tiny("student"), LaidConfig(str(folder), **quiet | settings), data or pool, reads, teacher, simulation=simulation)
        made.train(resume_from_checkpoint=resume)
        return made, counted.number
    return make


def logged(made, name): return [h[name] for h in made.state.log_history if name in h]


def losses(made): return {name: logged(made, name) for name in made.state.log_history[0] if name.startswith("loss")}


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- the same losses, and the teacher read once ---------------------------------
@pytest.mark.parametrize("settings", [
    dict(method="kd"), dict(method="laid"), dict(method="laid+"), dict(method="laid", lambda_hidden=.3, layers="0:1,1:2"),
    dict(method="laid", lambda_images=.3)], ids=lambda s: s["method"] + "".join(k for k in s if k.startswith("lambda")))
def test_a_cached_run_is_the_run(run, tmp_path, settings):
    plain, reads = run(**settings)
    cached, first = run(teacher_cache=str(tmp_path/"cache"), **settings)
    again, later = run(teacher_cache=str(tmp_path/"cache"), **settings)
    start = reads - 12
    assert (first, later) == (start + 6, 0) and (cached.cached.asked, again.cached.asked) == (6, 0)
    assert losses(plain).keys() == losses(cached).keys()
    for name, values in losses(plain).items():
        assert losses(cached)[name] == pytest.approx(values, rel=1e-6), name
        assert losses(again)[name] == losses(cached)[name], name
    assert same(cached.model, again.model)


def test_batches_of_other_neighbours_find_their_samples(run, tmp_path):
    "The sampler shuffles: in the second epoch a sample has other neighbours and another padding."
    how = dict(per_device_train_batch_size=2, num_train_epochs=3)
    plain, _ = run(**how)
    cached, _ = run(teacher_cache=str(tmp_path/"cache"), **how)
    assert cached.cached.asked == 6 and cached.cached.found == 12
    for name, values in losses(plain).items(): assert losses(cached)[name] == pytest.approx(values, rel=2e-5), name
