"""LiveView: it records what is measured, touches nothing, and draws only where there is a notebook."""
import random

import pytest
import torch
from transformers import PrinterCallback

from laid_nb import live
from laid_nb.haystack import drawn_test, picture_haystack
from laid_nb.inputs import HaystackCollator, precompute
from laid_nb.live import LiveView, plot_training
from laid_nb.mixing_inspector import kept_weights, read_mixing
from laid_nb.parts import MixingPart
from laid_nb.simulate import WindowSimulation
from laid_nb.store import load_model
from laid_nb.train import LaidConfig, LaidTrainer
from laid_nb.validation import Validation


@pytest.fixture(scope="module")
def made():
    "teacher, processor, precomputed samples"
    teacher, processor = load_model("teacher", torch.float32)
    haystacks = [picture_haystack(i, n_images=1 + i % 2, n_questions=2) for i in range(6)]
    return teacher, processor, precompute(haystacks, HaystackCollator(processor, turns=2), load_model("student", torch.float32)[0], teacher, progress=False)


@pytest.fixture(scope="module")
def trainer(made, tmp_path_factory):
    "trainer(**settings): a short training of the embedded pair."
    teacher, processor, pool = made
    def make(**settings):
        simulation = WindowSimulation(settings.pop("max_gap", 50), settings.pop("max_multiplicity", 2))
        quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1,
                     per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=3, learning_rate=1e-3,
                     mixing_learning_rate=1e-2, method="laid+")
        config = LaidConfig(str(tmp_path_factory.mktemp("run")), **(quiet | settings))
        trainer = LaidTrainer(load_model("student", torch.float32)[0], config, pool, processor, teacher, simulation=simulation)
        trainer.remove_callback(PrinterCallback)
        return trainer
    return make


class Shown:
    "Stands for a notebook: counts what is displayed."
    def __init__(self): self.displayed, self.updated = [], []

    def __call__(self, widget, display_id):
        self.displayed.append(widget)
        return self

    def update(self, widget): self.updated.append(widget._repr_mimebundle_()["image/png"])


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown := Shown())
    return shown


@pytest.fixture(scope="module")
def whole(trainer):
    "A view whose training is over."
    view = LiveView(trainer(layers="1:2,2:3"), every=1)
    view.trainer.train()
    return view


@pytest.fixture
def trained(whole):
    "The same, in the state in which a training leaves it."
    whole.pair, whole.which, whole.student_head, whole.step = "2-3", "q", 0, 3
    return whole


def losses(trainer): return [{k: v for k, v in h.items() if k.startswith("loss")} for h in trainer.state.log_history if "loss" in h]


def weights(trainer): return [x for module in (trainer.model, trainer.part(MixingPart).mixing) for x in module.state_dict().values()]


def random_states(): return random.getstate(), torch.random.get_rng_state()


# --- it touches nothing ---------------------------------------------------------
@pytest.mark.parametrize("settings", [dict(), dict(form="complex", constraint="free", layers="1:2,2:3"), dict(method="laid", lora_rank=2, max_gap=0, max_multiplicity=1)])
def test_losses_and_weights_are_the_same_to_the_bit(trainer, notebook, settings):
    alone, watched = trainer(**settings), trainer(**settings)
    LiveView(watched, every=1)
    alone.train(), watched.train()
    assert notebook.displayed and losses(alone) == losses(watched) and len(losses(alone)) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(watched), strict=True))


def test_no_random_number_is_drawn(trained):
    before = random_states()
    trained.read(3)
    trained.redraw()
    after = random_states()
    assert before[0] == after[0] and torch.equal(before[1], after[1])


def test_a_student_in_training_stays_in_training(trained):
    trained.trainer.model.train()
    trained.read(3)
    assert trained.trainer.model.training


# --- what is kept ---------------------------------------------------------------
def test_what_is_measured_is_what_read_mixing_says(trainer, made):
    watched = trainer(gain=False)
    view = LiveView(watched, every=2)
    watched.train()
    expected = read_mixing(kept_weights({3: watched.part(MixingPart).mixing}), {3: watched.model.eval()}, made[0], made[1], made[2][:2], by_band=False)
    for a, b in zip(view.views, expected, strict=True):
        assert a.steps.tolist() == [0, 2, 3]
        for name in ("weights", "mixture", "own", "energy", "own_energy", "explained"): torch.testing.assert_close(getattr(a, name)[-1:], getattr(b, name))


def test_the_gain_is_read_with(trainer):
    watched = trainer(mixing_learning_rate=.5)
    view = LiveView(watched, every=3)
    watched.train()  # folds the gain into the student at its end
    now = view.views[0].own[-1]
    view.read(3)
    torch.testing.assert_close(view.views[0].own[-1], now, atol=1e-4, rtol=1e-4)


def test_every_term_that_is_logged_is_kept(trainer):
    view = LiveView(trainer(lambda_hidden=.1))
    view.trainer.train()
    assert [h["step"] for h in view.losses] == [1, 2, 3] and view.losses[0].keys() == {"step", "loss", *(f"loss_{x}" for x in ("sft", "kl", "laid", "fourier", "attention", "hidden"))}


def test_haystacks_are_encoded_once(trainer, monkeypatch):
    watched = trainer()
    view = LiveView(watched, [picture_haystack(1, 1, n_questions=1)], every=1)
    calls, encode = [], watched.data_collator.encode
    monkeypatch.setattr(watched.data_collator, "encode", lambda h: calls.append(h) or encode(h))
    watched.train()
    assert len(calls) == 1 and view.steps == [0, 1, 2, 3]


def test_haystacks_stay_when_samples_are_recomposed(trainer, made):
    assert LiveView(trainer(recompose=.5)).haystacks[0] is made[2][0]


def test_a_training_without_mixtures_keeps_its_losses(trainer, notebook):
    view = LiveView(trainer(method="kd", max_gap=0, max_multiplicity=1))
    view.trainer.train()
    assert view.views == [] and len(view.losses) == 3 and len(view.draw().axes) == 1 and view.choices["step"].disabled


def test_a_resumed_run_goes_on(trainer):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    first = trainer(**saving)
    first.train()
    view = LiveView(trainer(**saving), every=1)
    view.trainer.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert view.steps == [2, 3, 4] and [h["step"] for h in view.losses] == [1, 2, 3, 4]


def test_the_same_view_forgets_what_was_not_saved(trainer):
    view = LiveView(trainer(save_strategy="steps", save_steps=2, max_steps=4, gain=False), every=1)
    view.trainer.train()
    before = dict(view.history)
    view.trainer.train(resume_from_checkpoint=f"{view.trainer.args.output_dir}/checkpoint-2")
    assert view.steps == [0, 1, 2, 3, 4] and [step for step in view.steps if view.history[step] is before[step]] == [0, 1]


# --- where it draws -------------------------------------------------------------
def test_without_a_notebook_it_records_and_draws_nothing(trainer, monkeypatch):
    view = LiveView(trainer(), every=1)
    monkeypatch.setattr(view, "draw", lambda: pytest.fail("drawn"))
    view.trainer.train()
    assert view.steps == [0, 1, 2, 3] and not live.in_notebook() and view.seconds["drawing"] == 0


def test_a_process_that_is_not_the_first_does_nothing(trainer, notebook):
    view = LiveView(trainer())
    for event in ("on_train_begin", "on_step_end", "on_log", "on_train_end"):
        getattr(view, event)(view.trainer.args, type("State", (), dict(is_world_process_zero=False, global_step=0)), None)
    assert not view.history and not notebook.displayed


def test_in_a_notebook_the_last_picture_stays(trainer, notebook):
    view = LiveView(trainer(), every=1)
    view.trainer.train()
    assert notebook.displayed == [view] and notebook.updated == [view._repr_mimebundle_()["image/png"]]
    assert view.step == 3 and 'alt="training at step 3' in view.picture.value


def test_drawing_waits_when_pictures_take_long(trained, monkeypatch):
    monkeypatch.setattr(trained, "_handle", "shown")
    trained._drawn = trained._drawn[0], 1e6
    trained.picture.value = "old"
    trained.on_log(trained.trainer.args, trained.trainer.state, None)
    assert trained.picture.value == "old"


# --- state ----------------------------------------------------------------------
def test_going_back_shows_that_step(trained):
    last = trained.picture.value
    trained.choices["step"].value = 1
    assert trained.step == 1 and trained.picture.value != last and "at step 1" in trained.describe()


def test_the_state_sets_the_controls(trained):
    trained.pair, trained.which = "1-2", "k"
    assert (trained.choices["pair"].value, trained.choices["which"].value, trained.student_head) == ("1-2", "k", 0)


@pytest.mark.parametrize("name, value, allowed", [("step", 9, "0, 1, 2, 3"), ("pair", "0-0", "'1-2', '2-3'"), ("which", "v", "'q', 'k'"), ("student_head", 2, "0, 1")])
def test_state_that_is_not_there_is_refused_by_name(trained, name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} is {value!r}: need one of {allowed}"): setattr(trained, name, value)


def test_every_must_be_a_step(trainer):
    with pytest.raises(ValueError, match="every is 0"): LiveView(trainer(), every=0)


def test_curves_are_those_that_were_measured(trained):
    view, figure = trained.views[2], plot_training(trained.losses, trained.views[2], 2, 1)
    losses, weights, response, _ = figure.axes
    assert losses.lines[0].get_ydata().tolist() == [h["loss"] for h in trained.losses]
    assert all((weights.lines[j].get_ydata() == view.weights[:, 1, j].numpy()).all() for j in range(4))
    assert (response.patches[0].get_data().values == view.mixture[2, 1, -1].numpy()).all()


def test_accuracies_stand_beside_the_losses(trainer):
    view = LiveView(trainer(method="sft", max_steps=2, eval_steps=1))
    assert view.evaluations == [] and "accuracy" not in view.describe()
    Validation(view.trainer, drawn_test([1, 2], 4))
    view.trainer.train()
    assert [h["step"] for h in view.evaluations] == [0, 1, 2]
    figure, last = view.draw(), view.evaluations[-1]
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[1].lines}
    assert lines == {str(n): [h[f"eval_accuracy_{n}"] for h in view.evaluations] for n in (1, 2)}
    assert f"window {last['eval_window']:.3g} images" in figure.axes[1].get_title()
    assert f"2 images {last['eval_accuracy_2']:.0%}, window {last['eval_window']:.3g}" in view.describe()
    assert len(view.losses) == 2 and len(plot_training(view.losses).axes) == 1
