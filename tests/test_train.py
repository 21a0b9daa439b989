"""Training: Eq. 8 against direct sums, what both models read, checkpoints, and what is refused."""
import copy
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    TrainerCallback,
)

from laid_nb import align, losses
from laid_nb.align import needle_pair, needle_scores
from laid_nb.capture import capture
from laid_nb.checkpoint import RUN_FILE, checkpoints
from laid_nb.haystack import haystack_dataset, picture_haystack
from laid_nb.inputs import OURS, HaystackCollator, image_inputs, read_groups, read_positions
from laid_nb.losses import attention_match_loss, fourier_loss
from laid_nb.parts import GainPart, MixingPart, StreamPart, _add_lora, _lora_state, _merge_lora
from laid_nb.pictures import BadPicture
from laid_nb.recompose import PieceEncoder, Recomposed, unlabelled
from laid_nb.rope import rope_spec
from laid_nb.simulate import WindowSimulation
from laid_nb.stop import Stopped, stop_requests
from laid_nb.store import load_model, save_model
from laid_nb.train import LaidConfig, LaidTrainer, StopAfterStep, step_generator


@pytest.fixture
def trainer(processor, tiny, pool, haystacks, tmp_path):
    "trainer(**settings): a LaidTrainer of tiny models, on the precomputed pool unless `data` is given (\"pixels\": the same haystacks)."
    def make(student=None, teacher=None, data=None, folder=None, teacher_processing_class=None, eval_dataset=None, **settings):
        quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                     learning_rate=1e-3, mixing_learning_rate=1e-2, max_steps=2)
        simulation = WindowSimulation(**{k: settings.pop(k) for k in ("max_gap", "max_multiplicity", "ramp", "thin") if k in settings})
        data = pool if data is None else haystacks if data == "pixels" else data
        return LaidTrainer(student or tiny("student"), LaidConfig(str(folder or tmp_path/"run"), **quiet | settings), data, processor,
                           teacher or tiny("teacher"), teacher_processing_class, simulation, eval_dataset=eval_dataset)
    return make


def mixing_of(made): return made.part(MixingPart) and made.part(MixingPart).mixing


def gains_of(made): return made.part(GainPart).gains


def projections_of(made): return made.part(StreamPart).projections


def logged(made, name): return [h[name] for h in made.state.log_history if name in h]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


OLDER = dict(allow_changed=RUN_FILE)  # go on from a checkpoint that does not say which run it is of


def older(folder):
    "A checkpoint as it was written before it said which run it is of: what its parts refuse is seen."
    (folder/RUN_FILE).unlink(missing_ok=True)
    return str(folder)


# --- data ---------------------------------------------------------------------
def test_precomputed_features_give_the_losses_of_the_pixels(trainer, pool, haystacks):
    runs = [trainer(data=data, max_gap=100, max_multiplicity=4) for data in (pool, haystacks)]
    for r in runs: r.train()
    for name in ("loss_sft", "loss_kl", "loss_laid"): assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), rel=1e-4)


# --- the loss -----------------------------------------------------------------
def direct_terms(student, teacher, batch, mix, temperature=2.):
    "Eq. 8's terms from whole logits and from projections before RoPE (rotation leaves Eq. 7 as it is)."
    seen, logits = {}, {}
    for role, model in (("student", student), ("teacher", teacher)):
        attention = model.model.language_model.layers[-1].self_attn
        hooks = [getattr(attention, f"{x}_proj").register_forward_hook(lambda m, i, o, key=(role, x): seen.__setitem__(key, o.unflatten(-1, (-1, 32)).transpose(1, 2))) for x in "qk"]
        logits[role] = model(**{k: v for k, v in batch.items() if k not in OURS}).logits
        for h in hooks: h.remove()
    sft, kl, n = 0., 0., 0
    for b, row in enumerate(batch["labels"]):
        for i in range(1, len(row)):
            if row[i] == -100: continue
            p_s, p_t = ((logits[r][b, i - 1]/temperature).softmax(-1) for r in ("student", "teacher"))
            sft, n = sft - logits["student"][b, i - 1].log_softmax(-1)[row[i]], n + 1
            kl = kl + temperature**2*(p_t*(p_t/p_s).log()).sum()
    laid, real = 0., batch["attention_mask"].bool()
    for x, w, scale in zip("qk", mix.weights(), (mix.scale_q, mix.scale_k)):
        target = torch.einsum("ij,bjsd->bisd", w, seen["teacher", x])
        laid = laid + (seen["student", x] - target).transpose(1, 2)[real].square().mean()/scale
    return {"sft": sft/n, "kl": kl/n, "laid": laid}


def test_loss_is_equation_8(trainer, processor, haystacks, tiny):
    student, teacher = tiny("student").double(), tiny("teacher").double()
    made = trainer(student, teacher, haystacks, lambda_laid=.2)
    mixing_of(made).double()
    made.start()
    batch = HaystackCollator(processor)(haystacks[:3])
    with made.captured(): loss = made.compute_loss(student, batch)
    terms = direct_terms(student, teacher, batch, mixing_of(made)["1-2"])
    for name, term in terms.items(): torch.testing.assert_close(made.sums[f"loss_{name}"].double(), term.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), .7*terms["sft"] + .3*terms["kl"] + .2*terms["laid"], rtol=1e-5, atol=0)


def test_plus_adds_each_term_with_its_weight(trainer, processor, haystacks, tiny):
    student, teacher = tiny("student").double(), tiny("teacher").double()
    made = trainer(student, teacher, haystacks, method="laid+", lambda_fourier=.2, lambda_attention=.4, beta=3., ramp=0., gain=False)
    mixing_of(made).double()
    made.start()
    batch, mix = HaystackCollator(processor)(haystacks[:3]), mixing_of(made)["1-2"]
    with made.captured():
        loss = made.compute_loss(student, batch)
        (s, t), mask = made.caches, batch["attention_mask"]
        heads = s["q", 1], s["k", 1], *mix(t["q", 2], t["k", 2])
        terms = direct_terms(student, teacher, batch, mix)
    terms["fourier"] = sum(fourier_loss(*(x[b:b + 1] for x in (*heads, mask)), spec=rope_spec(student)) for b in range(3))/3  # each sample alone
    terms["attention"] = attention_match_loss(*heads, mask, positions=read_positions(student, batch), beta=3.)
    for name, term in terms.items(): torch.testing.assert_close(made.sums[f"loss_{name}"].double(), term.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), sum(w*terms[name] for name, w in dict(sft=.7, kl=.3, laid=.3, fourier=.2, attention=.4).items()), rtol=1e-5, atol=0)


def test_beta_grows_over_the_ramp(trainer, monkeypatch):
    seen, match = [], losses.attention_match_loss
    monkeypatch.setattr(losses, "attention_match_loss", lambda *a, **k: seen.append(k["beta"]) or match(*a, **k))
    trainer(method="laid+", beta=4., ramp=.5, max_steps=4).train()
    assert seen == [0, 2, 4, 4]


def test_terms_of_weight_zero_are_not_computed(trainer, monkeypatch):
    for name in ("laid_loss", "fourier_loss"): monkeypatch.setattr(losses, name, lambda *a, **k: pytest.fail("computed"))
    made = trainer(method="laid+", lambda_laid=0., lambda_fourier=0.)
    made.train()
    assert logged(made, "loss_attention") and not logged(made, "loss_laid")


def test_sft_is_the_models_own_loss(trainer, processor, haystacks, tiny):
    student, batch = tiny("student"), HaystackCollator(processor)(haystacks[:2])
    made = trainer(student, data=haystacks, method="sft")
    with made.captured(): loss = made.compute_loss(student, batch)
    own = student(**{k: v for k, v in batch.items() if k in ("labels", *image_inputs(student, batch, "student"))}).loss
    torch.testing.assert_close(loss, own)


def test_only_supervised_columns_get_logits(trainer, processor, haystacks):
    made = trainer(data=haystacks, method="kd")
    batch = HaystackCollator(processor)(haystacks[:1])
    with made.captured(): _, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert outputs.logits.shape[1] == (batch["labels"] != -100).sum() == 6  # three answers and the token that ends each


def test_accumulation_gives_the_gradient_of_the_whole_batch(trainer, processor, tiny):
    alike = [picture_haystack(i, n_images=3, n_questions=3) for i in range(4)]
    assert len({HaystackCollator(processor)([h])["input_ids"].shape for h in alike}) == 1
    runs = [trainer(data=alike, per_device_train_batch_size=b, gradient_accumulation_steps=4//b, optim="sgd", learning_rate=.1, mixing_learning_rate=.1, lr_scheduler_type="constant", warmup_steps=0,
                    max_grad_norm=0, max_steps=2) for b in (4, 1)]
    for r in runs: r.train()
    for of in (lambda r: r.model, mixing_of):
        for x, y in zip(of(runs[0]).parameters(), of(runs[1]).parameters()): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-4)


@pytest.mark.parametrize("method", ["laid", "laid+"])
def test_gradient_checkpointing_gives_the_same_gradient_under_simulation(trainer, method):
    settings = dict(method=method, max_gap=100, max_multiplicity=8, ramp=0., optim="sgd", learning_rate=.1, max_steps=1)
    whole, checkpointed = (trainer(**settings, **more) for more in ({}, {"gradient_checkpointing": True}))
    for r in (whole, checkpointed): r.train()
    for x, y in zip(whole.model.parameters(), checkpointed.model.parameters()): torch.testing.assert_close(x, y)
    assert same(mixing_of(whole), mixing_of(checkpointed))
    if method == "laid+":
        for x, y in zip(gains_of(whole).parameters(), gains_of(checkpointed).parameters()): torch.testing.assert_close(x, y)


def test_teacher_and_student_read_the_same_window(trainer):
    made, read = trainer(max_gap=500, max_multiplicity=8, ramp=0., max_steps=1), []
    for model in (made.model, made.teacher):
        model.model.language_model.register_forward_pre_hook(lambda m, a, kw: read.append((kw["position_ids"], made.caches)), with_kwargs=True)
    plain = [read_positions(made.model, made.data_collator([s])).max() for s in made.train_dataset]
    made.start()
    read.clear()
    super(LaidTrainer, made).train()
    (positions_s, caches), (positions_t, _) = read
    assert torch.equal(positions_s, positions_t) and positions_s.max() > max(plain)
    assert caches[0].bias is caches[1].bias and caches[0].bias[0].max() > 0


def test_the_ramp_follows_the_steps(trainer, monkeypatch):
    from laid_nb.simulate import WindowSimulation
    seen, sample = [], WindowSimulation.sample
    monkeypatch.setattr(WindowSimulation, "sample", lambda self, *a: seen.append(a[3]) or sample(self, *a))
    trainer(max_gap=100, method="kd", max_steps=4, gradient_accumulation_steps=2).train()
    assert seen == [0, 0, .25, .25, .5, .5, .75, .75]


def test_every_process_and_step_draws_a_window_of_its_own(trainer, monkeypatch):
    made = trainer(method="kd", max_gap=500, ramp=0.)
    batch = made.data_collator(made.train_dataset[:2])
    def drawn(process, *place):
        monkeypatch.setattr(LaidConfig, "process_index", process)
        made.place = place
        return made.reading(batch)[0]
    made.model.train()
    first = drawn(0, 0, 0)
    assert torch.equal(first, drawn(0, 0, 0)) and not any(torch.equal(first, drawn(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


def test_every_epoch_has_an_order_of_its_own(trainer):
    made = trainer()
    def order(epoch):
        made.state.epoch = epoch
        return list(made._get_train_sampler())
    assert order(0.) == order(.5) and order(0.) != order(1.) and sorted(order(0.)) == sorted(order(1.))


def test_a_generator_depends_on_its_place_only():
    draw = lambda *p: torch.rand(1, generator=step_generator(*p)).item()
    assert draw(3, 1, 4, 1) == draw(3, 1, 4, 1)
    assert len({draw(s, t, m, r) for s in (0, 1) for t in (0, 1) for m in (0, 1) for r in (0, 1)}) == 16


def test_the_teachers_share_comes_from_one_method(trainer):
    "What `read_teacher` gives is all that is used of the teacher: handed back, it stands in for the forward pass."
    runs, share = [trainer(method="laid+", max_gap=100, max_multiplicity=4, max_steps=3) for _ in range(2)], {}
    first, second = runs
    def keep(*args):
        share[first.place] = type(first).read_teacher(first, *args)
        return share[first.place]
    first.read_teacher = keep
    def hand_back(*args): return share[second.place]
    second.read_teacher = hand_back
    for made in runs: made.start()
    second.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was read"))
    for made in runs: super(LaidTrainer, made).train()
    assert len(share) == 3 and same(first.model, second.model) and same(mixing_of(first), mixing_of(second))
    assert {name: tuple(x.shape) for name, x in share[0, 0].items() if name != "logits"}.keys() == {"q.2", "k.2", "scaling.2"}


def test_what_moves_and_what_does_not(trainer, tiny):
    for data in (None, [picture_haystack(0, 2, 2), picture_haystack(1, 2, 2)]):  # features, pixels
        made = trainer(data=data)
        made.train()
        before = tiny("student").state_dict()
        moved = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
        assert not any("visual" in k for k in moved) and any("q_proj" in k for k in moved)
        assert same(made.teacher, tiny("teacher")) and not made.teacher.training and all(p.grad is None for p in made.teacher.parameters())


def test_mixing_has_its_own_learning_rate(trainer):
    made = trainer(learning_rate=0., mixing_learning_rate=.1, lr_scheduler_type="constant", warmup_steps=0)
    made.train()
    start = trainer()
    start.start()
    assert [g["lr"] for g in made.optimizer.param_groups] == [0, 0, .1]
    assert not torch.equal(mixing_of(made)["1-2"].q_convex, mixing_of(start)["1-2"].q_convex)


@pytest.mark.parametrize("init", ["uniform", "random"])
def test_every_start_measures_the_scales(trainer, init):
    made, ridge = trainer(mixing_init=init), trainer()
    for m in (made, ridge): m.start()
    assert mixing_of(made)["1-2"].scale_q == mixing_of(ridge)["1-2"].scale_q > 0
    if init == "uniform": assert torch.allclose(mixing_of(made)["1-2"].weights()[0], torch.tensor(1/3))


def test_bf16(trainer):
    made = trainer(method="laid+", bf16=True, max_gap=100, max_multiplicity=4)
    made.train()
    assert all(math.isfinite(x) for name in made.args.weights for x in logged(made, f"loss_{name}"))
    assert {p.dtype for p in [*made.model.parameters(), *mixing_of(made).parameters(), *gains_of(made).parameters()]} == {torch.float32}


@pytest.mark.parametrize("form", ["band", "complex"])
def test_forms_of_mixing(trainer, form):
    made = trainer(form=form, max_steps=3, mixing_learning_rate=.1)
    made.train()
    w, start = mixing_of(made)["1-2"].weights()[0], trainer(form=form)
    start.start()
    assert w.shape == (2, 3, 16) and w.is_complex() == (form == "complex") and not torch.equal(w, mixing_of(start)["1-2"].weights()[0])
    assert all(math.isfinite(x) for x in logged(made, "loss_laid"))


def test_a_pair_that_differs_in_head_dimension_and_rope(trainer, tiny):
    made = trainer(teacher=tiny("teacher", head_dim=16, theta=1e4), data="pixels", method="laid+", lambda_laid=0., mixing_init="uniform")
    made.train()
    assert all(math.isfinite(x) for name in ("fourier", "attention") for x in logged(made, f"loss_{name}"))


# --- the gain -----------------------------------------------------------------
def answers(model, sample):
    with torch.no_grad(): return model.eval()(**image_inputs(model, sample, "student"), position_ids=read_positions(model, sample)).logits


@pytest.mark.parametrize("method", ["sft", "laid+"])
def test_the_gain_learns_and_is_folded_at_the_end(trainer, pool, method):
    made = trainer(method=method, gain=True, mixing_learning_rate=.1, save_strategy="steps", save_steps=2, max_steps=2, lr_scheduler_type="constant", warmup_steps=0)
    seen = []
    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            with made.captured(): seen.append(answers(made.model, pool[0]))
    made.add_callback(Watch())
    made.train()
    gains = torch.stack([g.gain() for g in gains_of(made).values()])
    assert gains.shape == (2, 2, 16) and (gains - 1).abs().min() > 0
    torch.testing.assert_close(answers(made.model, pool[0]), seen[-1], rtol=1e-4, atol=1e-5)  # stock, as it was with the gain in its attention
    saved = type(made.model).from_pretrained(made.args.output_dir + "/checkpoint-2")
    assert same(saved, made.model)


def test_saving_leaves_the_student_as_it_was(trainer, tmp_path):
    made = trainer(method="laid+")
    with torch.no_grad():
        for p in gains_of(made).parameters(): p.add_(1.)
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.save_model(str(tmp_path/"saved"))
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())
    assert not same(type(made.model).from_pretrained(tmp_path/"saved"), made.model)


def test_gain_has_the_mixing_learning_rate(trainer):
    made = trainer(method="laid+", learning_rate=0., mixing_learning_rate=.1, weight_decay=.1, lr_scheduler_type="constant", warmup_steps=0)
    made.train()
    assert [(g["lr"], len(g["params"])) for g in made.optimizer.param_groups][2] == (.1, 2 + 2)  # two mixings, a gain for each layer
    assert [g["weight_decay"] for g in made.optimizer.param_groups] == [.1, 0, 0]  # a mixture of none and a gain of 1 are no prior
    assert all((g.gain() != 1).all() for g in gains_of(made).values())
    with pytest.raises(RuntimeError, match="another LaidTrainer"): made.train()


def test_resume_with_another_form(trainer, tmp_path):
    trainer(folder=tmp_path/"a", layers="best", save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="another form"): trainer(folder=tmp_path/"b", **OLDER, layers="best", form="band").train(resume_from_checkpoint=older(tmp_path/"a/checkpoint-1"))


def test_attention_that_cannot_be_matched(trainer, tiny, haystacks, processor):
    config = tiny("student").config
    config.text_config.update(dict(use_sliding_window=True, sliding_window=64, layer_types=["full_attention", "sliding_attention"]))
    student = Qwen2_5_VLForConditionalGeneration(config).eval()
    tokens = max(HaystackCollator(processor)([h])["input_ids"].shape[1] for h in haystacks)
    assert tokens > 64
    with pytest.raises(ValueError, match="student layer 1 attends in a window or chunk of 64 tokens"): trainer(student, data="pixels", method="laid+").train()
    trainer(student, data="pixels", method="laid+", lambda_attention=0.).train(), trainer(student, data="pixels", method="laid+", layers="0:0").train()
    config.text_config.sliding_window = tokens
    trainer(Qwen2_5_VLForConditionalGeneration(config), data="pixels", method="laid+").train()  # up to its window a layer attends to all


def test_a_batch_longer_than_a_window_is_refused(trainer, tiny):
    made = trainer(tiny("student"), method="laid+")
    made.part(MixingPart).reach = 64
    with pytest.raises(ValueError, match="layers 1-2 attend to all tokens only up to 64"): made.part(MixingPart).check_length(torch.ones(1, 65, dtype=torch.long))
    made.part(MixingPart).check_length(torch.cat([torch.ones(1, 64, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)], 1))


def test_resume_that_drops_the_gain(trainer, tmp_path):
    trainer(folder=tmp_path/"a", method="laid+", save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="trained with a gain"): trainer(folder=tmp_path/"b", **OLDER).train(resume_from_checkpoint=older(tmp_path/"a/checkpoint-1"))


def test_resume_without_a_gain(trainer, tmp_path):
    trainer(folder=tmp_path/"a", save_strategy="steps", save_steps=1).train()
    with pytest.raises(FileNotFoundError, match="gain.safetensors"): trainer(folder=tmp_path/"b", **OLDER, gain=True).train(resume_from_checkpoint=older(tmp_path/"a/checkpoint-1"))


def test_another_family(trainer, haystacks, tiny):
    made = trainer(tiny("student", Qwen2VLForConditionalGeneration), tiny("teacher", Qwen2VLForConditionalGeneration), haystacks, max_gap=100, max_multiplicity=4)
    made.train()
    assert all(math.isfinite(x) for x in logged(made, "loss_laid"))


# --- labels -------------------------------------------------------------------
def test_rows_without_labels_carry_the_kl_term_alone(trainer, processor, haystacks, tiny):
    h = haystacks[0]
    half = replace(h, questions=(h.questions[0], *unlabelled([h])[0].questions[1:]))
    made = trainer(method="kd", data=[half], per_device_train_batch_size=1, max_steps=1, optim="sgd")
    made.train()
    batch, student, teacher = HaystackCollator(processor)([half]), tiny("student"), tiny("teacher")
    s, t = (m(**image_inputs(m, batch, "student")).logits[0].log_softmax(-1) for m in (student, teacher))
    replies = batch["replies"][0].nonzero()[:, 0].tolist()
    known = [i for i in replies if batch["labels"][0, i] != -100]
    assert (len(known), len(replies)) == (2, 6)
    assert logged(made, "loss_sft") == [pytest.approx(-sum(s[i - 1, batch["input_ids"][0, i]] for i in known).item()/6, rel=1e-4)]
    soft = [[x[i - 1].div(2).log_softmax(-1) for i in replies] for x in (s, t)]
    assert logged(made, "loss_kl") == [pytest.approx(4*sum((b.exp()*(b - a)).sum() for a, b in zip(*soft)).item()/6, rel=1e-3)]


def test_a_coins_reply_has_no_gradient_of_its_own(trainer, haystacks):
    "Whatever the coins say, a student whose teacher terms weigh next to nothing does not move."
    nobody = unlabelled(haystacks)
    made = trainer(method="laid", data=nobody, max_steps=2, lambda_kl=0., lambda_laid=0., lambda_attention=1e-30, optim="sgd", learning_rate=1.)
    before = copy.deepcopy(made.model)
    made.train()
    assert logged(made, "loss_sft") == [0, 0]
    for x, y in zip(before.parameters(), made.model.parameters()): torch.testing.assert_close(x, y, rtol=0, atol=1e-20)


def test_unlabelled_questions_are_refused_where_only_labels_count(trainer, haystacks, pool, processor):
    for data in (unlabelled(haystacks), pool[:3] + [PieceEncoder(pool, HaystackCollator(processor))(h) for h in unlabelled(haystacks[3:4])]):
        for settings in (dict(method="sft"), dict(method="kd", lambda_kl=0.)):
            with pytest.raises(ValueError, match="nobody has answered"): trainer(data=data, **settings)
    trainer(data=unlabelled(haystacks), method="kd")


def test_recompose_is_refused():
    for settings, words in ((dict(method="sft", recompose=.5), "recomposed samples have no label"), (dict(method="kd", recompose=1.5), "recompose is 1.5"),
                            (dict(method="kd", recompose=.5, dataloader_num_workers=1, dataloader_persistent_workers=True), "persistent workers")):
        with pytest.raises(ValueError, match=words): LaidConfig(use_cpu=True, **settings)


@pytest.mark.parametrize("data", [None, "pixels"])
def test_recomposed_training_resumes_bit_for_bit(trainer, tmp_path, monkeypatch, data):
    from laid_nb import train
    epochs, read = set(), Recomposed.__getitem__
    monkeypatch.setattr(train.Recomposed, "__getitem__", lambda self, i: epochs.add(self.epoch()) or read(self, i))
    settings = dict(max_steps=10, save_strategy="steps", save_steps=1, save_total_limit=None, method="kd", recompose=.5, data=data)  # 6 steps an epoch
    whole = trainer(folder=tmp_path/"whole", **settings)
    whole.train()
    assert epochs == {0, 1}
    for step in (4, 6, 8):
        again = trainer(folder=tmp_path/f"again-{step}", **settings)
        again.train(resume_from_checkpoint=str(tmp_path/f"whole/checkpoint-{step}"))
        assert same(whole.model, again.model)


# --- the residual stream ------------------------------------------------------
def test_hidden_term_is_that_of_its_formula(trainer, processor, haystacks, tiny):
    made = trainer(lambda_hidden=.5, data=haystacks[:2], max_steps=1, optim="sgd")
    made.start()
    P = projections_of(made)["1-2"].weight.detach().double().clone()
    super(LaidTrainer, made).train()
    batch, streams = HaystackCollator(processor)(haystacks[:2]), []
    for role in ("student", "teacher"):
        model, held = tiny(role), []
        model.model.language_model.norm.register_forward_pre_hook(lambda m, a: held.append(a[0].detach().double()))  # what the last layer hands to the final norm
        model(**image_inputs(model, batch, role))
        streams.append(held[0]/held[0].square().mean(-1, keepdim=True).sqrt())
    real = batch["attention_mask"].bool()
    expected = (streams[0] - streams[1] @ P.T)[real].square().mean().item()
    assert logged(made, "loss_hidden") == [pytest.approx(expected, rel=1e-4)]
    best = (streams[0] - streams[1] @ torch.linalg.lstsq(streams[1][real], streams[0][real]).solution)[real].square().mean().item()
    assert best <= expected < 1.3*best  # damping costs little


def test_hidden_term_trains_layers_up_to_the_pair_and_its_projection(trainer, tiny):
    made = trainer(lambda_hidden=1., layers="0:1", alpha=1., lambda_kl=0., lambda_laid=0., mixing_init="uniform")
    made.train()
    start, after = tiny("student").state_dict(), made.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert any("layers.0.mlp" in name for name in moved) and not any("layers.1." in name or "norm.weight" == name[-11:] and "layers" not in name or "lm_head" in name for name in moved)
    assert made.optimizer.param_groups[2]["initial_lr"] == 1e-2 and any(p is projections_of(made)["0-1"].weight for p in made.optimizer.param_groups[2]["params"])


def test_hidden_term_under_gradient_checkpointing(trainer):
    settings = dict(lambda_hidden=.5, layers="0:1,1:2", optim="sgd", learning_rate=.1, max_steps=1)
    whole, checkpointed = (trainer(**settings, **more) for more in ({}, {"gradient_checkpointing": True}))
    for r in (whole, checkpointed): r.train()
    for of in (lambda r: r.model, projections_of):
        for x, y in zip(of(whole).parameters(), of(checkpointed).parameters()): torch.testing.assert_close(x, y)


def test_hidden_term_resumes_bit_for_bit_or_is_refused(trainer, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, lambda_hidden=.5, layers="0:1,1:2")
    whole, again = trainer(folder=tmp_path/"whole", **settings), trainer(folder=tmp_path/"again", **settings)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path/"whole/checkpoint-2"))
    assert same(whole.model, again.model) and same(projections_of(whole), projections_of(again)) and logged(whole, "loss") == logged(again, "loss")
    trainer(folder=tmp_path/"plain", **settings | dict(lambda_hidden=None)).train()
    with pytest.raises(FileNotFoundError, match="compared no hidden states"): trainer(folder=tmp_path/"x", **settings, **OLDER).train(resume_from_checkpoint=older(tmp_path/"plain/checkpoint-2"))
    with pytest.raises(ValueError, match="go on with its lambda_hidden"): trainer(folder=tmp_path/"x", **settings | OLDER | dict(lambda_hidden=None)).train(resume_from_checkpoint=older(tmp_path/"whole/checkpoint-2"))


def test_hidden_term_is_off_by_default_and_needs_aligned_layers():
    assert all("hidden" not in LaidConfig(use_cpu=True, method=m).weights for m in ("sft", "kd", "laid", "laid+")) and LaidConfig(use_cpu=True, method="laid+", lambda_hidden=.1).weights["hidden"] == .1
    with pytest.raises(ValueError, match="'kd' has no term 'hidden'"): LaidConfig(use_cpu=True, method="kd", lambda_hidden=.1)


# --- LoRA ---------------------------------------------------------------------
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

@pytest.mark.parametrize("method", ["sft", "kd", "laid"])
def test_lora_changes_the_text_layers_alone_and_by_its_rank(trainer, tiny, method):
    made = trainer(method=method, lora_rank=2, learning_rate=1e-2, max_steps=3)
    linear = [m for m in made.model.model.language_model.modules() if isinstance(m, LoraLayer)]
    assert sum(p.numel() for g in made.create_optimizer().param_groups[:2] for p in g["params"]) == sum(2*(m.in_features + m.out_features) for m in linear) and len(linear) == 2*7
    made.train()
    before, after = tiny("student").state_dict(), made.model.state_dict()
    assert before.keys() == after.keys() and type(made.model) is Qwen2_5_VLForConditionalGeneration
    for name, weight in after.items():
        adapted = name.endswith("weight") and name.split(".")[-2] in LINEAR and "language_model" in name
        assert torch.equal(weight, before[name]) != adapted, name
        if adapted: assert torch.linalg.matrix_rank(weight - before[name], atol=1e-5) <= 2


def test_lora_is_what_its_formula_says(tiny):
    model = tiny("student").double()
    adapters = _add_lora(model, 3)
    for layer in adapters.values(): layer.lora_B["default"].weight.data.normal_()
    name, layer = next(iter(adapters.items()))
    x, W, A, B = torch.randn(5, 64).double(), layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ (W + 2*B @ A).T + layer.base_layer.bias)
    merged, bias = _merge_lora(model.state_dict(), adapters), layer.base_layer.bias
    torch.testing.assert_close(torch.nn.functional.linear(x, merged[f"{name}.weight"], bias), layer(x))
    assert merged.keys() == tiny("student").state_dict().keys() and layer.base_layer.weight is W


def test_lora_of_a_bf16_student_learns_in_float32(trainer, tiny):
    made = trainer(tiny("student").bfloat16(), tiny("teacher").bfloat16(), data="pixels", method="kd", lora_rank=2)
    assert {p.dtype for p in _lora_state(made.model).values()} == {torch.float32}
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["sft", "laid"])
def test_lora_resumes_bit_for_bit(trainer, tmp_path, method):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, method=method, lora_rank=2, max_gap=100, learning_rate=1e-2)
    whole, again = trainer(folder=tmp_path/"whole", **settings), trainer(folder=tmp_path/"again", **settings)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path/"whole/checkpoint-2"))
    assert same(whole.model, again.model) and logged(whole, "loss") == logged(again, "loss")
    saved = type(whole.model).from_pretrained(tmp_path/"whole/checkpoint-4")
    for x, y in zip(saved.parameters(), whole.model.parameters()): torch.testing.assert_close(x, y)
    assert all(p.requires_grad for n, p in whole.model.named_parameters() if "visual" not in n)


def test_lora_resume_is_refused(trainer, tiny, tmp_path):
    settings = dict(method="sft", save_strategy="steps", save_steps=1)
    trainer(folder=tmp_path/"lora", lora_rank=2, **settings).train()
    trainer(folder=tmp_path/"plain", **settings).train()
    resume = lambda where, **more: trainer(folder=tmp_path/"x", **settings, **OLDER, **more).train(resume_from_checkpoint=older(tmp_path/where/"checkpoint-1"))
    with pytest.raises(ValueError, match="trained with LoRA adapters"): resume("lora")
    with pytest.raises(FileNotFoundError, match="trained no LoRA adapters"): resume("plain", lora_rank=2)
    with pytest.raises(ValueError, match="another rank"): resume("lora", lora_rank=3)
    other = tiny("student")
    other.lm_head.weight.data += .01
    with pytest.raises(ValueError, match="trained from another student"): resume("lora", lora_rank=2, student=other)


def test_lora_is_refused(trainer):
    with pytest.raises(ValueError, match="lora_rank is -1"): LaidConfig(use_cpu=True, lora_rank=-1)
    with pytest.raises(ValueError, match="LoRA finds nothing to adapt"): _add_lora(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50)), 2)
    made = trainer(method="sft", lora_rank=2)
    made.train()
    with pytest.raises(RuntimeError, match="merged into its student"): made.train()


# --- layers -------------------------------------------------------------------
@pytest.mark.parametrize("form", ["scalar", "complex"])
def test_layers_chosen_by_what_explains_them(trainer, monkeypatch, form):
    asked, real = [], align.explained_table
    def table(grams, form):
        asked.append((sorted(grams), form))
        assert real(grams, form).shape == (2, 3)
        return torch.tensor([[.1, .3, .2], [.6, .4, .5]])
    monkeypatch.setattr(align, "explained_table", table)
    made = trainer(layers="best", form=form)
    made.start()
    assert list(mixing_of(made)) == ["0-1", "1-0"] and list(made.part(MixingPart).specs) == [(0, 1), (1, 0)] and asked == [([(s, t) for s in range(2) for t in range(3)], form)]


def test_needle_scores_are_those_of_eager_attention(processor, haystacks, tiny):
    model, batch = tiny("student").double().eval(), HaystackCollator(processor)(haystacks[:2])
    groups, scores = read_groups(model, batch), needle_scores(model, [batch], "student")
    model.set_attn_implementation("eager")
    with torch.no_grad(): attentions = model(**image_inputs(model, batch, "student"), output_attentions=True).attentions
    expected = torch.zeros_like(scores)
    for t in range(3):
        rows = [(b, i) for b in range(2) for i in range(groups.shape[1]) if batch["turn"][b, i] == t]
        for l, a in enumerate(attentions):
            for b, i in rows: expected[l] += sum(a[b, :, i, groups[b] == n].sum(-1) for n in batch["needles"][b][t])/len(rows)/3
    torch.testing.assert_close(scores, expected)


def test_needle_pair_takes_the_best_head_of_each():
    assert needle_pair(torch.tensor([[.1, .5], [.3, .4]]), torch.tensor([[.2], [.1], [.9]])) == (0, 2)


# --- checkpoints --------------------------------------------------------------
@pytest.mark.parametrize("settings", [dict(method="sft"), dict(layers="needle"), dict(layers="1:2,0:1", constraint="norm", max_gap=100, max_multiplicity=8, gradient_accumulation_steps=2),
                                      dict(method="laid+", form="complex", layers="best", max_gap=100, max_multiplicity=8)],
                         ids=["sft", "needle", "simulation", "plus"])
def test_resume_is_bit_for_bit(trainer, tmp_path, settings):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, weight_decay=.1) | settings
    whole, again = trainer(folder=tmp_path/"whole", **settings), trainer(folder=tmp_path/"again", **settings)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path/"whole/checkpoint-2"))
    assert again.state.global_step == 4 and logged(whole, "loss") == logged(again, "loss")
    assert same(whole.model, again.model) and (mixing_of(whole) is None or list(mixing_of(whole)) == list(mixing_of(again)) and same(mixing_of(whole), mixing_of(again)))


@pytest.mark.parametrize("step", [3, 6, 8])
def test_resume_at_and_after_the_end_of_an_epoch(trainer, tmp_path, step):
    settings = dict(max_steps=10, save_strategy="steps", save_steps=1, save_total_limit=None, method="kd", max_gap=100)  # 6 steps an epoch
    whole, again = trainer(folder=tmp_path/"whole", **settings), trainer(folder=tmp_path/"again", **settings)
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path/f"whole/checkpoint-{step}"))
    assert same(whole.model, again.model)


def test_checkpoint_is_stock(trainer, tmp_path):
    made = trainer()
    made.train()
    made.save_model(str(tmp_path/"result"))
    code = f"""
import sys; sys.modules["laid_nb"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained({str(tmp_path/"result")!r}), AutoProcessor.from_pretrained({str(tmp_path/"result")!r})
out = model(**processor(text="For the dog", return_tensors="pt")).logits
print(model.config._attn_implementation, out.double().sum().item())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad(): own = made.model.eval()(**made.processing_class(text="For the dog", return_tensors="pt")).logits.double().sum().item()
    assert done.stdout.split()[0] == "sdpa" and float(done.stdout.split()[1]) == pytest.approx(own, rel=1e-5)
    config = json.loads((tmp_path/"result/config.json").read_text())
    assert config.get("use_cache", True) and config["text_config"]["use_cache"]  # Trainer turns it off for itself
    assert (tmp_path/"result/mixing.safetensors").is_file() and "laid" not in (tmp_path/"result/config.json").read_text()


@pytest.mark.parametrize("gain", [False, True])
def test_best_model_is_loaded_at_the_end(trainer, pool, gain):
    made = trainer(method="kd", gain=gain, eval_dataset=pool[:2], eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=.5, max_steps=3)
    made.train()
    best = type(made.model).from_pretrained(made.state.best_model_checkpoint)
    assert made.state.best_model_checkpoint.endswith("-1") and same(best, made.model)


def test_evaluation_reads_without_simulation(trainer, pool):
    made, plain = (trainer(method="kd", eval_dataset=pool[:2], ramp=0., **more) for more in (dict(max_multiplicity=50), {}))
    assert made.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_only_the_teacher_reads_thinned(trainer, pool):
    "Its logits are those of a mask in which the log of the count stands; the student's are as without."
    made, plain = trainer(method="kd", thin=-3., max_multiplicity=8., ramp=0.), trainer(method="kd", max_multiplicity=8., ramp=0.)
    batch = made._prepare_inputs(made.data_collator([pool[0], pool[3]]))
    found = []
    for each in (made, plain):
        each.model.eval()  # no window simulation
        with torch.no_grad(), each.captured(): found.append(each.evidence(each.model, batch)[0])
    torch.testing.assert_close(found[0].logits, found[1].logits)
    assert found[0].bias is None and not torch.allclose(found[0].teacher_logits, found[1].teacher_logits, atol=1e-4)
    groups, n = read_groups(made.teacher, batch), batch["input_ids"].shape[1]
    mask = torch.full((len(groups), n, n), -torch.inf).triu(1)
    for b in range(len(groups)):
        for m in range(n):
            turn = int(batch["turn"][b, m])
            for g in range(int(groups[b].max()) + 1) if turn >= 0 else ():
                if g not in batch["needles"][b][turn]: mask[b, m, groups[b] == g] -= 3
    mask = mask.masked_fill((batch["attention_mask"] == 0)[:, None], -torch.inf)[:, None].clamp(min=torch.finfo(torch.float32).min)
    read = image_inputs(made.teacher, batch, "teacher") | dict(attention_mask=mask)
    with torch.no_grad(): logits = made.teacher(**read, position_ids=read_positions(made.teacher, batch)).logits
    rows = torch.nn.functional.pad(batch["replies"][:, 1:], (0, 1))
    torch.testing.assert_close(found[0].teacher_logits, logits[rows], rtol=1e-4, atol=1e-4)


def test_a_student_can_be_its_own_frozen_anchor(trainer, tiny):
    made = trainer(teacher=tiny("student"), data="pixels", method="kd", thin=-3., max_multiplicity=8., alpha=1., recompose=1.)
    before = copy.deepcopy(made.teacher.state_dict())
    made.train()
    assert all(torch.equal(w, before[k]) for k, w in made.teacher.state_dict().items())
    assert not same(made.model, made.teacher)


# --- settings -----------------------------------------------------------------
def test_defaults_are_the_papers():
    c = LaidConfig(use_cpu=True)
    assert (c.learning_rate, c.mixing_learning_rate, c.num_train_epochs, c.per_device_train_batch_size, c.gradient_accumulation_steps, c.warmup_steps) == (1e-5, 1e-4, 10, 1, 8, .05)
    assert (c.alpha, c.temperature, c.layers, c.method, c.report_to) == (.3, 2, "last", "laid", ["tensorboard"]) and "adamw" in c.optim


def test_flags_yaml_and_json(tmp_path):
    parser = HfArgumentParser((LaidConfig, WindowSimulation))
    (tmp_path/"a.yaml").write_text("method: kd\nmax_multiplicity: 16\nuse_cpu: true\n")
    (tmp_path/"a.json").write_text(json.dumps(dict(method="kd", max_multiplicity=16, use_cpu=True)))
    read = [parser.parse_args_into_dataclasses("--method kd --max_multiplicity 16 --use_cpu".split()), parser.parse_yaml_file(tmp_path/"a.yaml"), parser.parse_json_file(tmp_path/"a.json")]
    assert {(c.method, float(window.max_multiplicity), c.alpha) for c, window in read} == {("kd", 16., .3)}


def test_weights_of_the_terms():
    weights = lambda **k: LaidConfig(use_cpu=True, **k).weights
    assert weights() == {"sft": .7, "kl": .3, "laid": .3} and weights(method="sft") == {"sft": 1}
    assert weights(lambda_kl=0.) == {"sft": .7, "kl": 0, "laid": .3} and weights(method="kd", alpha=1.) == {"sft": 0, "kl": 1}
    assert weights(lambda_attention=.1) == {"sft": .7, "kl": .3, "laid": .3, "attention": .1}
    assert weights(method="laid+", lambda_fourier=1.) == {"sft": .7, "kl": .3, "laid": .3, "fourier": 1., "attention": .3}
    assert [LaidConfig(use_cpu=True, **k).gains for k in (dict(), dict(gain=True), dict(method="laid+"), dict(method="laid+", gain=False))] == [False, True, True, False]


# --- what is refused ----------------------------------------------------------
@pytest.mark.parametrize("settings, words", [(dict(alpha=1.5), "alpha is 1.5"), (dict(method="magic"), "method is 'magic'"), (dict(mixing_init="best"), "mixing_init"), (dict(label_smoothing_factor=.1), "label_smoothing"),
                                             (dict(form="matrix"), "form is 'matrix'"), (dict(beta=-1.), "beta is -1"), (dict(lambda_laid=-.1), "lambda_laid is -0.1"),
                                             (dict(method="sft", lambda_kl=.1), "'sft' has no term 'kl'"), (dict(method="kd", lambda_fourier=.1), "'kd' has no term 'fourier'"),
                                             (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}), "reentrant")])
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words): LaidConfig(use_cpu=True, **settings)


def test_no_teacher(processor, pool, tiny, tmp_path):
    for method in ("kd", "laid"):
        with pytest.raises(ValueError, match=f"method '{method}' needs a teacher"): LaidTrainer(tiny("student"), LaidConfig(str(tmp_path), use_cpu=True, method=method), pool, processor)


def test_no_data(trainer):
    with pytest.raises(ValueError, match="no haystack"): trainer(data=[])


def test_teacher_that_is_the_student(trainer, tiny):
    model = tiny("student")
    with pytest.raises(ValueError, match="same object"): trainer(model, model)


def test_unequal_tokenizers(trainer, processor):
    other = copy.deepcopy(processor)
    tokenizer = json.loads(other.tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = [k for k, v in vocabulary.items() if v in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    from tokenizers import Tokenizer
    other.tokenizer = type(processor.tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)))
    with pytest.raises(ValueError, match="other vocabularies .*tokenizers differ at id 300.*: kl, laid cannot be had"): trainer(teacher_processing_class=other)


def test_unequal_image_tokens(trainer, tiny):
    with pytest.raises(ValueError, match="image token is"): trainer(teacher=tiny("teacher", image_token_id=5))


def test_head_dimensions_that_differ(trainer, tiny):
    with pytest.raises(ValueError, match="head dimensions differ: student 32, teacher 16"): trainer(teacher=tiny("teacher", head_dim=16))


def test_rope_that_differs(trainer, tiny):
    with pytest.raises(ValueError, match="RoPE of student layer 1 and teacher layer 2 differ"): trainer(teacher=tiny("teacher", theta=1e4))


def test_a_model_without_rope(trainer):
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50))
    with pytest.raises(ValueError, match="no RoPE"): trainer(gpt, method="sft")


@pytest.mark.parametrize("layers, words", [("2:0", "student layer 2 does not exist"), ("0:3", "teacher layer 3 does not exist"), ("first", "first")])
def test_layers_that_are_not_there(trainer, layers, words):
    with pytest.raises(ValueError, match=words): trainer(layers=layers)


def test_no_supervised_token(trainer, pool):
    with pytest.raises(ValueError, match="supervise no token"): trainer(data=[s | {"replies": torch.zeros_like(s["replies"])} for s in pool[:2]], method="kd").train()


@pytest.mark.parametrize("who, method, term", [("student", "sft", "sft"), ("teacher", "kd", "kl")])
def test_nan_names_the_term(trainer, tiny, who, method, term):
    model = tiny(who)
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=f"loss term '{term}' is nan"): trainer(**{who: model}, method=method).train()


def test_nan_in_the_aligned_heads(trainer):
    made = trainer()
    made.start()
    mixing_of(made)["1-2"].q_convex.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss term 'laid' is nan"): super(LaidTrainer, made).train()


def test_after_an_error_both_models_are_as_before(trainer, tiny):
    student, teacher = tiny("student"), tiny("teacher")
    student.lm_head.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError): trainer(student, teacher).train()
    for model in (student, teacher):
        with capture(model): pass  # would refuse a model that is still captured
        assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_resume_without_mixing_weights(trainer, tmp_path):
    trainer(folder=tmp_path/"kd", method="kd", save_strategy="steps", save_steps=1).train()
    with pytest.raises(FileNotFoundError, match="mixing.safetensors"): trainer(folder=tmp_path/"laid", **OLDER).train(resume_from_checkpoint=older(tmp_path/"kd/checkpoint-1"))


def test_resume_with_other_layers(trainer, tmp_path):
    trainer(folder=tmp_path/"a", save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="other layers"): trainer(folder=tmp_path/"b", **OLDER, layers="0:1").train(resume_from_checkpoint=older(tmp_path/"a/checkpoint-1"))


# --- biases alone ---------------------------------------------------------------
@pytest.mark.parametrize("method", ["sft", "laid"])
def test_biases_alone_move_and_resume_to_the_bit(trainer, tiny, tmp_path, method):
    settings = dict(method=method, biases_only=True, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    whole = trainer(folder=tmp_path/"whole", **settings)
    whole.train()
    before = tiny("student").state_dict()
    moved = {k for k, v in whole.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(before[k].ndim == 1 and "visual" not in k for k in moved)
    again = trainer(folder=tmp_path/"again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path/"whole/checkpoint-2"))
    assert same(whole.model, again.model) and logged(whole, "loss") == logged(again, "loss")
    assert all(p.requires_grad for n, p in whole.model.named_parameters() if "visual" not in n)
    with pytest.raises(RuntimeError, match="free again"): whole.train()


def test_biases_alone_are_refused_beside_adapters_and_asked_for_on_resume(trainer, tmp_path):
    with pytest.raises(ValueError, match="lora_rank and biases_only both"): trainer(method="sft", lora_rank=2, biases_only=True)
    trainer(folder=tmp_path/"a", method="sft", biases_only=True, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="go on with biases_only=True"):
        trainer(folder=tmp_path/"b", **OLDER, method="sft", max_steps=2).train(resume_from_checkpoint=older(tmp_path/"a/checkpoint-1"))


def test_a_checkpoint_keeps_what_its_base_had_beside_the_weights(tiny, processor, haystacks, tmp_path):
    "Generation config, chat template, processor and config as they lay there, though Trainer aligns special tokens when it trains."
    base, tokens = tmp_path/"base", {"eos_token_id": [589, 588], "pad_token_id": 588, "do_sample": True, "temperature": 1e-6}
    save_model(tiny("student"), processor, base)
    (base/"generation_config.json").write_text(json.dumps(tokens))
    config = json.loads((base/"config.json").read_text())
    config["text_config"] |= {"pad_token_id": None, "eos_token_id": 588}
    (base/"config.json").write_text(json.dumps(config))
    student, own = load_model(str(base))
    made = LaidTrainer(student, LaidConfig(str(tmp_path/"run"), method="sft", max_steps=1, save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
                                           per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0, learning_rate=1e-3), haystacks[:2], own)
    made.train()
    save_model(student, own, tmp_path/"saved")
    for folder in (tmp_path/"run/checkpoint-1", tmp_path/"saved"):
        for path in base.glob("*.j*"):
            assert (folder/path.name).read_bytes() == path.read_bytes(), path.name
        assert not torch.equal(load_model(str(folder))[0].lm_head.weight, load_model(str(base))[0].lm_head.weight)


# streams

def test_a_stream_trains_as_the_list_in_its_order(trainer, tiny, haystacks):
    "Haystacks, rows and a generator, against a list of which every batch is given by hand."
    made, source = [], haystacks[:4]
    rows = haystack_dataset(source).to_iterable_dataset()
    for data in (iter(source), rows, StreamOf(source)):
        student = tiny("student")
        run = trainer(student=student, data=data, method="kd", max_steps=2)
        run.train()
        made.append(student)
    student = tiny("student")
    by_hand = trainer(student=student, data=source, method="kd", max_steps=2)
    by_hand._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(source)
    by_hand.train()
    assert all(same(other, student) for other in made) and not same(student, tiny("student"))


class StreamOf(torch.utils.data.IterableDataset):
    "A stream that can begin again."
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)


def test_a_stream_begins_again_where_it_can(trainer, haystacks):
    run = trainer(data=StreamOf(haystacks[:4]), method="sft", max_steps=5)
    run.train()
    assert run.state.global_step == 5


def test_what_is_measured_of_an_iterator_is_trained_on_too(trainer, haystacks):
    seen = []
    def spoken():
        for h in haystacks[:8]:
            seen.append(h.id)
            yield h
    run = trainer(data=spoken(), max_steps=4)  # method laid measures the first 16
    run.train()
    assert run.state.global_step == 4 and len(set(seen)) == len(seen) == 8


@pytest.mark.parametrize("settings, part", [
    (dict(max_steps=-1), "max_steps"), (dict(recompose=.5), "recompose"), (dict(dataloader_num_workers=2), "dataloader_num_workers")])
def test_what_a_stream_cannot_do(trainer, haystacks, settings, part):
    with pytest.raises(ValueError, match=part): trainer(data=iter(haystacks), **settings)


# pictures that go bad

@pytest.fixture
def files(tmp_path):
    "Haystacks of two pictures on disk each."
    made = []
    for i in range(8):
        h = picture_haystack(i, n_images=2, n_questions=2)
        names = tuple(tmp_path/f"{i}-{n}.png" for n in range(2))
        for n, name in enumerate(names): h.image(n).save(name)
        made.append(replace(h, images=names))
    return made


class Spoil(TrainerCallback):
    "After a step, empties every picture that is named."
    def __init__(self, step, images): self.step, self.images = step, images
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for image in self.images: image.write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_bad_costs_nothing_that_was_trained(trainer, tiny, files, tmp_path, workers):
    images = [image for h in files for image in h.images]
    before = {image: image.read_bytes() for image in images}
    student = tiny("student")
    run = trainer(student=student, data=files, method="kd", max_steps=6, dataloader_num_workers=workers, num_train_epochs=3)
    run.add_callback(Spoil(2, images))
    with pytest.raises(BadPicture, match=r"-\d.png.*empty"): run.train()
    step = run.state.global_step
    assert step >= 2 and (tmp_path/"run"/f"checkpoint-{step}"/"model.safetensors").is_file()
    for image, data in before.items(): image.write_bytes(data)
    again, whole = tiny("student"), tiny("student")
    trainer(student=again, data=files, method="kd", max_steps=6, num_train_epochs=3).train(resume_from_checkpoint=str(tmp_path/"run"/f"checkpoint-{step}"))
    trainer(student=whole, data=files, method="kd", max_steps=6, folder=tmp_path/"other").train()
    assert same(again, whole)


def test_a_bad_picture_is_left_out(trainer, files):
    run = trainer(data=files, method="kd", max_steps=8, on_bad_image="skip", per_device_train_batch_size=1)
    run.add_callback(Spoil(1, [files[0].images[1], files[3].images[0]]))
    with pytest.warns(UserWarning, match="left out: cannot read image .*png: the file is empty"): run.train()
    assert run.state.global_step == 8


def test_nothing_begins_with_a_bad_picture(trainer, files, tmp_path):
    files[1].images[0].write_bytes(b"no picture")
    run = trainer(data=files[:2])
    with pytest.raises(BadPicture, match="1-0.png"): run.train()
    assert not list((tmp_path/"run").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="on_bad_image"): trainer(on_bad_image="ignore")


# --- a run that is stopped, and one that goes on ---------------------------------
class Signal(TrainerCallback):
    "Asks this process to end, during a step."
    def __init__(self, step, number): self.step, self.number = step, number
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step: os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_with_a_checkpoint_to_go_on_from(trainer, tiny, tmp_path, number):
    student, whole = tiny("student"), tiny("student")
    with stop_requests() as request, pytest.raises(Stopped, match=number.name):
        made = trainer(student, max_steps=4)
        made.add_callback(Signal(1, number)), made.add_callback(StopAfterStep(request))
        made.train()
    assert [p.name for p in (tmp_path/"run").iterdir()] == ["checkpoint-2"]
    trainer(student := tiny("student"), max_steps=4).train(resume_from_checkpoint=True)
    trainer(whole, max_steps=4, folder=tmp_path/"whole").train()
    assert same(student, whole)


@pytest.fixture
def run_of_two(trainer, tmp_path):
    "settle(**changes): a run of two steps, saved after the first, goes on with other settings; only what is compared."
    settings = dict(method="kd", save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    trainer(folder=tmp_path/"a", **settings).train()
    return lambda folder="a", **changes: trainer(folder=tmp_path/folder, **settings | changes).settle_start(str(tmp_path/"a/checkpoint-1"))


def test_a_run_goes_on_as_itself_alone(run_of_two, tiny, processor, pool, monkeypatch):
    run_of_two("elsewhere", logging_steps=7, save_steps=5, dataloader_num_workers=1, run_name="tuesday")
    other = tiny("student")
    other.lm_head.weight.data[3, 5] += 1e-6
    for changes, said in ((dict(alpha=.5), "alpha was 0.3 and is 0.5"), (dict(seed=7), "seed was 42 and is 7"), (dict(temperature=1.), "temperature was 2.0 and is 1.0"),
                          (dict(gradient_accumulation_steps=4), "gradient_accumulation_steps was 2 and is 4"), (dict(max_gap=9), "max_gap was 0 and is 9"), (dict(max_steps=3), "max_steps was 2 and is 3"),
                          (dict(data=pool[:-1]), "data was \"12 samples"), (dict(student=other), "student was"), (dict(teacher=copy.deepcopy(other)), "teacher was")):
        with pytest.raises(ValueError, match=f"of another run: {said}"): run_of_two(**changes)
    monkeypatch.setattr(processor.image_processor, "image_mean", [.4, .4, .4])
    with pytest.raises(ValueError, match="processor was"): run_of_two()


def test_what_may_change_is_named_and_takes_effect(trainer, run_of_two, tmp_path, capsys):
    with pytest.raises(ValueError, match="'alpha' makes another run"): run_of_two(allow_changed="alpha")
    settings = dict(method="kd", save_strategy="steps", save_steps=1, max_steps=4, learning_rate=5e-3, warmup_steps=0, gradient_accumulation_steps=2)
    whole = trainer(folder=tmp_path/"whole", **settings)
    whole.train()
    trainer(folder=tmp_path/"b", **settings | dict(max_steps=2, learning_rate=1e-3)).train()
    again = trainer(folder=tmp_path/"b", **settings, allow_changed="max_steps, learning_rate")
    again.train(resume_from_checkpoint=str(tmp_path/"b/checkpoint-1"))
    assert "learning_rate was 0.001 until checkpoint-1 and is 0.005 from there on" in capsys.readouterr().out
    assert logged(again, "learning_rate")[1:] == logged(whole, "learning_rate")[1:] and again.state.global_step == 4
    trainer(folder=tmp_path/"b", **settings).settle_start(True)  # the new settings are the run's own now


def test_a_run_does_not_begin_over_another(trainer, tmp_path):
    settings = dict(method="sft", save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer(**settings).train()
    assert [p.name for p in checkpoints(tmp_path/"run")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="checkpoint-2 of an earlier run: go on with"): trainer(**settings).train()
    made = trainer(**settings, overwrite_output_dir=True, max_steps=1)
    made.train()
    assert [p.name for p in checkpoints(tmp_path/"run")] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over_or_names_it(trainer, tmp_path, name):
    settings = dict(method="sft", save_strategy="steps", save_steps=1)
    trainer(**settings).train()
    (tmp_path/"run/checkpoint-2"/name).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} is not there: go on from .*checkpoint-1"): trainer(**settings).train(resume_from_checkpoint=str(tmp_path/"run/checkpoint-2"))
    made = trainer(**settings)
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over"): made.settle_start(True)
    assert made.resumed.endswith("checkpoint-1")


class Bomb:
    def __reduce__(self): return os.mkdir, ("opened",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_is_unpickled_on_the_way(trainer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = dict(method="sft", save_strategy="steps", save_steps=1)
    trainer(**settings).train()
    folder = tmp_path/"run/checkpoint-1"
    torch.save(Bomb(), folder/name)
    older(folder)
    with pytest.raises(ValueError, match=f"{folder} cannot be read"): trainer(**settings, **OLDER).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path/"opened").exists() and not list((tmp_path/"run").rglob("*.bin"))


def test_weights_are_read_from_safetensors_alone(trainer, tmp_path):
    made = trainer(method="sft", save_strategy="steps", save_steps=1)
    made.train()
    (tmp_path/"run/checkpoint-1/model.safetensors").rename(tmp_path/"run/checkpoint-1/pytorch_model.bin")
    with pytest.raises(ValueError, match="model.safetensors is not there"): trainer(method="sft").train(resume_from_checkpoint=older(tmp_path/"run/checkpoint-1"))


def test_the_best_checkpoint_stays_and_is_known_by_its_name(trainer, haystacks, tmp_path):
    settings = dict(method="sft", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, save_total_limit=1, load_best_model_at_end=True, greater_is_better=True, max_steps=3)  # the loss falls
    made = trainer(data="pixels", eval_dataset=haystacks[:2], **settings)
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path/"run/checkpoint-1") and not list((tmp_path/"run").glob(".checkpoint*"))
    assert json.loads((tmp_path/"run/checkpoint-1/trainer_state.json").read_text())["best_model_checkpoint"] == str(tmp_path/"run/checkpoint-1")


def test_a_run_that_goes_on_from_its_last_step_takes_no_further_one(trainer, tiny, tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer(whole := tiny("student"), folder=tmp_path/"a", **settings).train()
    again = trainer(student := tiny("student"), folder=tmp_path/"a", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and same(student, whole)
