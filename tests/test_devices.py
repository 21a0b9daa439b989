"A teacher on another device than the student: what it reads is moved there, what it says is moved back, and the training is the same to the bit."
from contextlib import nullcontext

import pytest
import torch
from transformers import PrinterCallback

from devices import There, put_there, two_devices
from laid_nb.anchors import build_processor
from laid_nb.cache import has_body
from laid_nb.inputs import to_model
from laid_nb.simulate import WindowSimulation
from laid_nb.train import LaidConfig, LaidTrainer
from shard_worker import pool, tiny, uneven


def remote(mapped=True):
    "The teacher on the other device, as `device_map` loads it, or as it is after it was placed there."
    teacher = put_there(tiny("teacher", torch.float32))
    if mapped: teacher.hf_device_map = {"": "cpu:1"}
    return teacher


def train(folder, teacher, where, data=None, simulation=None, **settings):
    "Losses of two steps, and the weights that came of them."
    quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                 learning_rate=1e-3, mixing_learning_rate=1e-2, max_steps=2)
    with where():
        made = LaidTrainer(tiny("student", torch.float32), LaidConfig(str(folder), **quiet | settings), data or uneven(), build_processor(), teacher, simulation=WindowSimulation(**simulation or {}))
        made.remove_callback(PrinterCallback)
        made.train()
    return [{k: v for k, v in h.items() if k.startswith("loss")} for h in made.state.log_history if "loss" in h], made


@pytest.mark.parametrize("settings", [
    dict(method="laid+", lambda_hidden=.1, lambda_images=.1, simulation=dict(max_gap=500, max_multiplicity=8)), dict(method="laid", layers="needle", simulation=dict(thin=-3.)),
    dict(method="laid", layers="best")], ids=["terms", "needle", "best"])
def test_a_training_whose_teacher_is_elsewhere_is_the_same(tmp_path, settings):
    here, student = train(tmp_path/"here", tiny("teacher", torch.float32), nullcontext, **settings)
    there, other = train(tmp_path/"there", remote(), two_devices, **settings)
    assert len(here) == 2 and here == there
    assert all(torch.equal(x, y) for x, y in zip(student.model.state_dict().values(), other.model.state_dict().values(), strict=True))
    assert other.teacher.device.index == 1 and not any(isinstance(p, There) for p in other.model.parameters())


def test_features_and_the_cache_too(tmp_path):
    "Features made in advance, and answers that are kept: written by a teacher elsewhere, read by one here."
    features, runs = pool(), {}
    for name, teacher, where, cache in (("here", tiny("teacher", torch.float32), nullcontext, {}), ("there", remote(False), two_devices, dict(teacher_cache=str(tmp_path/"cache"), teacher_placement="cpu:1")),
                                        ("again", tiny("teacher", torch.float32), nullcontext, dict(teacher_cache=str(tmp_path/"cache")))):
        runs[name], made = train(tmp_path/name, teacher, where, features, method="laid", num_train_epochs=2, max_steps=-1, **cache)
    assert has_body(made.teacher) and made.cached.asked == 0 and made.cached.found == 8
    assert len(runs["here"]) == 4 and runs["there"] == runs["again"]
    for a, b in zip(runs["here"], runs["there"]): assert a == pytest.approx(b, rel=1e-4)


def test_the_fake_refuses_what_two_devices_refuse():
    "Else the tests above could not fail."
    teacher, ids = remote().eval(), torch.arange(10)[None]
    expected = tiny("teacher", torch.float32).eval()(ids, use_cache=False).logits
    with two_devices(), torch.no_grad():
        with pytest.raises(RuntimeError, match="embedding.default: tensors are on two devices"): teacher(ids, use_cache=False)
        logits = teacher(to_model(teacher, ids), use_cache=False).logits
        assert logits.device == torch.device("cpu:1") and torch.equal(logits.to("cpu"), expected)
        with pytest.raises(RuntimeError, match="mul.Tensor: tensors are on two devices"): logits*torch.ones(logits.shape)
        with pytest.raises(RuntimeError, match="index.Tensor: tensors are on two devices"): expected[torch.ones(1, 10, dtype=torch.bool).to("cpu:1")]
