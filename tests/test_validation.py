"Evaluation during training: what it logs, of which student, and that it leaves no trace in what is learnt."
import pytest
import torch
from transformers import PrinterCallback

from laid_nb import validation
from laid_nb.haystack import Haystack, Question, drawn_test, picture_haystack
from laid_nb.inputs import HaystackCollator
from laid_nb.simulate import WindowSimulation
from laid_nb.train import LaidConfig, LaidTrainer
from laid_nb.validation import Validation, log_numbers

TESTS = drawn_test([1, 2], 6)


def trainer(folder, processor, tiny, tests=TESTS, prompt="", teacher=None, **settings):
    plain = dict(method="sft", max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=1, learning_rate=1e-2,
                 mixing_learning_rate=.1, warmup_steps=0, logging_steps=1)
    made = LaidTrainer(tiny("student"), LaidConfig(str(folder), **plain | settings), [picture_haystack(i, 2, 2) for i in range(4)], processor, teacher=teacher,
                       data_collator=HaystackCollator(processor, prompt=prompt))
    made.remove_callback(PrinterCallback)
    if tests: Validation(made, tests)
    return made


def evaluations(made): return {h["step"]: h for h in made.state.log_history if any(k.startswith("eval_") for k in h)}


@pytest.mark.parametrize("settings", [dict(gain=True, lora_rank=2), dict(method="kd", dropout=.5)], ids=["gain-lora", "dropout"])
def test_the_weights_are_those_of_a_training_without(settings, processor, tiny, tmp_path):
    "Bit for bit; window simulation and dropout draw random numbers at every step."
    dropout, found, logs = settings.pop("dropout", 0), [], []
    for tests in (TESTS, None):
        made = trainer(tmp_path/str(bool(tests)), processor, tiny, tests, teacher=tiny("teacher"), eval_steps=2, **settings)
        made.simulation = WindowSimulation(max_gap=50*bool(dropout))
        for module in made.model.modules():
            if hasattr(module, "attention_dropout"): module.attention_dropout = dropout
        made.train()
        found.append(made.model.state_dict())
        logs.append([{k: x for k, x in h.items() if "loss" in k or k == "grad_norm"} for h in made.state.log_history if "loss" in h])
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert found[0].keys() == found[1].keys() and all(torch.equal(a, found[1][name]) for name, a in found[0].items())
    before = tiny("student").state_dict()
    assert any(name in before and not torch.equal(a, before[name]) for name, a in found[0].items())


def test_the_log_says_what_laid_eval_would_say_of_the_student_that_is_saved(processor, tiny, tmp_path, monkeypatch):
    "With a gain that has moved: folded into the weights it gives the numbers that it gave before."
    seen, real, prompt = [], validation.evaluate, "Yes or no? "
    monkeypatch.setattr(validation, "evaluate", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    made = trainer(tmp_path, processor, tiny, gain=True, prompt=prompt)
    weight, was = made.model.model.language_model.layers[0].self_attn.q_proj.weight, []
    hook = made.model.register_forward_hook(lambda *_: was.append(weight.detach().clone()))
    made.train()
    hook.remove()
    after = real(made.model, processor, TESTS, batch=12, prompt=prompt, progress=False)
    assert (was[-1] - made.model.model.language_model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-3  # it was folded since
    assert [r["margin"] for r in seen[-1]] == pytest.approx([r["margin"] for r in after], abs=1e-4)
    assert evaluations(made)[4].items() >= log_numbers(after).items() and "eval_window" in evaluations(made)[4]


@pytest.mark.parametrize("eval_steps, steps", [(None, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3, 4]), (.5, [0, 2, 4])])
def test_it_is_asked_when_it_should_be(eval_steps, steps, processor, tiny, tmp_path):
    made = trainer(tmp_path, processor, tiny, eval_steps=eval_steps)
    made.train()
    assert list(evaluations(made)) == steps


def test_a_training_that_goes_on_asks_for_what_is_left(processor, tiny, tmp_path):
    first = trainer(tmp_path, processor, tiny, eval_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    again = trainer(tmp_path, processor, tiny, eval_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path/"checkpoint-2"))
    assert evaluations(again).keys() == {0, 2, 4} and evaluations(again)[4] == evaluations(first)[4]


def test_the_student_learns_on_as_it_was(processor, tiny, tmp_path):
    made = trainer(tmp_path, processor, tiny)
    made.model.train()
    made.model.model.visual.eval()
    before = {name: part.training for name, part in made.model.named_modules()}
    Validation(made, TESTS).measure()
    assert {name: part.training for name, part in made.model.named_modules()} == before
    assert all(p.grad is None for p in made.model.parameters())


def test_one_size_has_no_window(processor, tiny, tmp_path):
    made = trainer(tmp_path, processor, tiny, drawn_test([2], 4), max_steps=1)
    made.train()
    assert {k for k in evaluations(made)[1] if k.startswith("eval")} == {"eval_accuracy_2"}


def test_free_answers_are_written(processor, tiny, tmp_path):
    free = Haystack(picture_haystack(0, 2).images, (Question("", "", "free", "a cup", (), "What?", ()),), "free")
    made = trainer(tmp_path, processor, tiny, [free], max_steps=1)
    made.train()
    assert evaluations(made)[1]["eval_accuracy_2"] in (0, 1)
