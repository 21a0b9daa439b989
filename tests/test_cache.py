"""What was computed once: the same losses, no second reading of the teacher, and nothing found that does not belong."""
import copy
import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.cache import cached_teacher, draw_subset, from_bits, to_bits, token_counts
from laid_nb.cli import main
from laid_nb.folder import Damaged
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, StoredSamples, image_inputs, precompute
from laid_nb.losses import laid_loss
from laid_nb.parts import MixingPart
from laid_nb.simulate import WindowSimulation
from laid_nb.store import save_model
from laid_nb.train import LaidConfig, LaidTrainer

SIZES = {"student": (2, 2), "teacher": (3, 3)}  # layers, heads


made_processor = functools.lru_cache(build_processor)  # of those who change none


def tiny(name, seed=None):
    "A random model of a few heads; the same weights for the same name."
    return copy.deepcopy(_tiny(name, len(name) if seed is None else seed))


@functools.lru_cache
def _tiny(name, seed):
    layers, heads = SIZES[name]
    config = anchor_config(name, made_processor().tokenizer).to_dict()
    config["text_config"] |= dict(hidden_size=32*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None)
    config["text_config"]["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 4, 8])
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=32*heads, fullatt_block_indexes=[0])
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


@pytest.fixture(scope="module")
def processor(): return made_processor()


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
        folder = settings.pop("folder", tmp_path/"run")
        made = LaidTrainer(student or tiny("student"), LaidConfig(str(folder), **quiet | settings), data or pool, reads, teacher, simulation=simulation)
        counted = Reads(teacher)  # from here: a new trainer tries the teacher's attention on short texts
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
    tried = 2 if cached.part(MixingPart) and cached.part(MixingPart).sees_attention else 0  # on a few words, when a start is loaded
    assert (first, later) == (start + 6, tried) and (cached.cached.asked, again.cached.asked) == (6, 0)
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


def test_storing_is_exact(run, tmp_path):
    "What is kept whole is what the teacher said, bit for bit; a batch of one has no neighbour to round with."
    made, _ = run(teacher_cache=str(tmp_path/"cache"), method="laid")
    seen = []
    made.model.eval()
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[0]]))
    found = {}
    for cached in (made.cached, None):
        made.cached = cached
        made.read_teacher = lambda *args: seen.append(type(made).read_teacher(made, *args)) or seen[-1]
        with torch.no_grad(), made.captured(): found[cached is None] = made.terms(*made.evidence(made.model, batch)[:2])
    kept, read = seen
    assert read.keys() == kept.keys() == {"logits", "q.2", "k.2", "scaling.2"}
    for name, x in read.items(): assert torch.equal(kept[name], x) if name != "logits" else torch.allclose(kept[name], x, rtol=1e-5, atol=1e-6), name
    assert found[True].keys() == found[False].keys() == {"sft", "kl", "laid"}


@pytest.mark.parametrize("share", [.1, .4, 1.])
def test_a_subset_is_eq_7_in_expectation(share):
    "The mean over all subsets of the loss, and of its gradient, against the loss on all tokens."
    torch.manual_seed(3)
    lengths, mask = (9, 6), torch.tensor([[1]*9, [1]*6 + [0]*3])
    heads = [torch.randn(2, h, 9, 4, dtype=torch.float64).requires_grad_() for h in (3, 1, 3, 1)]
    whole = sum(laid_loss(*heads, mask, 1.3, .7))
    gradient, = torch.autograd.grad(whole, heads[0])
    losses, mean = [], torch.zeros_like(gradient)
    for seed in range(600):
        at = [draw_subset(n, share, 2*seed + b) for b, n in enumerate(lengths)]
        assert all(len(a) == -(-share*n//1) and a.unique().numel() == len(a) and a.max() < n for a, n in zip(at, lengths))
        counts = token_counts(at, [n/len(a) for n, a in zip(lengths, at)], 9)
        part = sum(laid_loss(*heads, mask, 1.3, .7, counts=(counts, counts)))
        losses.append(part.item())
        mean += torch.autograd.grad(part, heads[0])[0]/600
    spread = torch.tensor(losses).std()/600**.5
    assert abs(torch.tensor(losses).mean() - whole.item()) <= 4*spread + 1e-6
    assert (mean - gradient).norm() <= (.3 if share < 1 else 1e-6)*gradient.norm()


def test_every_subset_is_equally_likely():
    drawn = Counter(tuple(draw_subset(5, .4, seed).tolist()) for seed in range(4000))
    assert len(drawn) == 10 and max(abs(n - 400) for n in drawn.values()) < 100  # 5 standard deviations


def test_eight_bits_are_off_by_half_a_step():
    x = torch.randn(4, 50, 16)*torch.tensor([1e-3, 1., 50., 0.])[:, None, None]
    small, scale = to_bits(x)
    assert small.dtype == torch.int8 and small.abs().max() == 127
    assert ((from_bits(small, scale) - x).abs().amax((1, 2)) <= .5*x.abs().amax((1, 2))/127 + 1e-9).all()


@pytest.mark.parametrize("kept, near", [
    (dict(teacher_cache_bits=8), 2e-3), (dict(teacher_cache_heads="subset", teacher_cache_share=.5), .15),
    (dict(teacher_cache_heads="rows"), None)], ids=["8", "subset", "rows"])
def test_keeping_less(run, tmp_path, kept, near):
    "8 bits: Eq. 7 within 0.2%. Half of the tokens: within 15% on six samples. Rows: the same in every epoch and run."
    plain, _ = run(method="laid", learning_rate=0., mixing_learning_rate=0.)
    first, _ = run(method="laid", learning_rate=0., mixing_learning_rate=0., teacher_cache=str(tmp_path/"cache"), **kept)
    again, later = run(method="laid", learning_rate=0., mixing_learning_rate=0., teacher_cache=str(tmp_path/"cache"), **kept)
    assert later == 0 and losses(first) == losses(again)
    assert sorted(logged(first, "loss_laid")[:6]) == pytest.approx(sorted(logged(first, "loss_laid")[6:]), rel=1e-6)
    assert logged(first, "loss_kl") == pytest.approx(logged(plain, "loss_kl"), rel=1e-5)
    a, b = (torch.tensor(logged(made, "loss_laid")).mean() for made in (first, plain))
    assert near is None or abs(a/b - 1) < near


def test_rows_compare_the_queries_of_questions_and_answers(run, tmp_path):
    made, _ = run(method="laid", teacher_cache=str(tmp_path/"cache"), teacher_cache_heads="rows")
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in (0, 2)]))
    made.model.eval()
    with torch.no_grad(), made.captured(): _, pairs, _ = made.evidence(made.model, batch)
    evidence, = pairs.values()
    assert torch.equal(evidence.counts[0] > 0, batch["turn"] >= 0) and torch.equal(evidence.counts[1] > 0, batch["attention_mask"] > 0)
    q, k, tq, tk = evidence.heads
    chosen, real = batch["turn"] >= 0, batch["attention_mask"].bool()
    expected = ((q - tq).transpose(1, 2)[chosen].square().mean()/evidence.scales[0], (k - tk).transpose(1, 2)[real].square().mean()/evidence.scales[1])
    with torch.no_grad(): found = made.terms(*[type(evidence)(made.args, logits=torch.randn(2, 5), teacher_logits=torch.randn(2, 5), answers=torch.tensor([0, 1])), pairs])
    torch.testing.assert_close(found["laid"], sum(expected))


# --- what may not be reused ------------------------------------------------------
def test_each_wrong_key_is_refused_by_name(run, processor, haystacks, pool, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="laid", max_steps=2)
    run(**cache)
    files = sorted((tmp_path/"cache").rglob("*"))
    another = tiny("teacher")
    another.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"made for something else: teacher is \S+ here and \S+ there\. "): run(teacher=another, **cache)
    other = build_processor()
    other.image_processor.size["longest_edge"] //= 2
    with pytest.raises(ValueError, match=r"something else: processor is \S+ here and \S+ there\. "): run(reads=other, **cache)
    with pytest.raises(ValueError, match=r'something else: data is "5 samples \w+" here and "6 samples \w+" there\. '): run(data=pool[:5], **cache)
    flipped = [h.__class__(h.images, tuple(q.__class__(**{**vars(q), "answer": not q.answer}) for q in h.questions), h.id) for h in haystacks]
    with pytest.raises(ValueError, match=r'something else: data is "6 samples \w+" here'): run(data=flipped, **cache)
    for setting, name in ((dict(layers="1:1"), "layers"), (dict(teacher_cache_bits=8), "bits"), (dict(teacher_cache_heads="rows"), "heads"),
                          (dict(lambda_hidden=.1), "streams"), (dict(method="kd"), "layers")):
        with pytest.raises(ValueError, match=rf"something else: settings\.{name} is "): run(**cache | setting)
    kept = sorted((tmp_path/"cache").rglob("*"))
    assert [f for f in kept if "said" in f.parts] == [f for f in files if "said" in f.parts]


def test_a_picture_that_changed_is_other_data(run, processor, haystacks, tmp_path):
    "The same names, other pixels: other data."
    folder, stacks = tmp_path/"pictures", []
    folder.mkdir()
    for h in haystacks[:2]:
        paths = [str(folder/f"{h.id}-{i}.png") for i in range(len(h.images))]
        for i, path in enumerate(paths): h.image(i).save(path)
        stacks.append(replace(h, images=tuple(paths)))
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="kd", num_train_epochs=1, data=stacks)
    assert run(**cache)[1] == 2 and run(**cache)[1] == 0
    haystacks[5].image(1).save(stacks[0].images[0])
    with pytest.raises(ValueError, match="something else: data is"): run(**cache)


def test_simulated_readings_are_found_by_the_same_draw_only(run, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="kd", max_gap=300, max_multiplicity=4, ramp=0)
    plain = run(method="kd", max_gap=300, max_multiplicity=4, ramp=0)
    with pytest.warns(UserWarning, match="no other epoch"): first, reads = run(**cache)
    again, later = run(**cache)
    other, anew = run(**cache, seed=1)
    assert (reads, later, anew) == (12, 0, 12)
    for name, values in losses(plain[0]).items(): assert losses(first)[name] == losses(again)[name] == pytest.approx(values, rel=1e-6)


def test_recomposed_samples_are_read_fresh(run, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="kd", recompose=.5)
    plain, _ = run(method="kd", recompose=.5)
    made, reads = run(**cache)
    again, later = run(**cache)
    kept = [f for f in (tmp_path/"cache"/"said").glob("*.safetensors") if f.stem != "head"]
    assert 0 < len(kept) < 6 and 0 < later < reads <= 12
    for name, values in losses(plain).items(): assert losses(made)[name] == pytest.approx(values, rel=1e-6) and losses(made)[name] == losses(again)[name]


@pytest.mark.parametrize("settings, says", [
    (dict(teacher_cache="x", method="sft"), "has no teacher"), (dict(teacher_cache="x", method="laid+", teacher_cache_heads="rows"), "'fourier' needs the queries and keys of all tokens"),
    (dict(teacher_cache="x", teacher_cache_heads="subset", lambda_images=.1), "'images' needs"), (dict(teacher_cache_share=0.), "share above 0"),
    (dict(teacher_cache_gb=0.), "need more than 0"), (dict(teacher_cache_bits=4), "one of 0, 8"), (dict(teacher_cache_heads="some"), "one of all, rows, subset")])
def test_settings_that_cannot_be_meant(settings, says):
    with pytest.raises(ValueError, match=says): LaidConfig(use_cpu=True, report_to="none", **settings)


def test_logits_that_are_not_the_heads_are_refused(run, tmp_path):
    scaled = tiny("teacher")
    whole = scaled.forward
    def larger(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.logits = out.logits*1.001
        return out
    scaled.forward = larger
    with pytest.raises(ValueError, match="not what its head makes"): run(teacher=scaled, teacher_cache=str(tmp_path/"cache"), method="kd", num_train_epochs=1)


# --- interrupted, shared, bounded, damaged --------------------------------------
class Stop(TrainerCallback):
    "Kills the process as `kill -9` does, once a step is done."
    def __init__(self, step): self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)


def train_in_process(folder, rank, stop=None):
    "One epoch with a cache, in a process of its own; how often the teacher was read is written beside it."
    torch.set_num_threads(1)
    processor = build_processor()
    stacks = [picture_haystack(i, n_images=2 + i % 3, n_questions=3) for i in range(6)]
    config = LaidConfig(f"{folder}/run-{rank}", method="kd", use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", num_train_epochs=1,
                        per_device_train_batch_size=1, gradient_accumulation_steps=1, teacher_cache=f"{folder}/cache", seed=rank)
    made = LaidTrainer(tiny("student"), config, stacks, processor, tiny("teacher"), callbacks=[Stop(stop)] if stop else [])
    made.train()
    Path(folder, f"asked-{rank}").write_text(str(made.cached.asked))


def entries(folder): return sorted(f for f in Path(folder, "said").glob("*.safetensors") if f.stem != "head")


def start_process(*args):
    code = "import sys; sys.path.insert(0, 'tests'); import test_cache; test_cache.train_in_process(*eval(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", code, repr(args)], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"})


def test_killed_and_gone_on_with(tmp_path):
    assert start_process(str(tmp_path), 0, 3).wait(300) == -signal.SIGKILL
    assert len(entries(tmp_path/"cache")) == 3
    train_in_process(str(tmp_path), 0)
    assert len(entries(tmp_path/"cache")) == 6 and (tmp_path/"asked-0").read_text() == "3"


def test_two_processes_share_a_folder(tmp_path):
    "Of different seeds, so in different orders, at once; afterwards nobody reads the teacher."
    workers = [start_process(str(tmp_path), rank) for rank in (1, 2)]
    assert [w.wait(300) for w in workers] == [0, 0]
    assert len(entries(tmp_path/"cache")) == 6 and not list((tmp_path/"cache"/"said").glob(".*"))
    assert all(6 >= int((tmp_path/f"asked-{rank}").read_text()) for rank in (1, 2))
    train_in_process(str(tmp_path), 3)
    assert (tmp_path/"asked-3").read_text() == "0"


def test_no_more_than_the_bound(run, tmp_path):
    whole, _ = run(method="laid", teacher_cache=str(tmp_path/"whole"))
    head = (tmp_path/"whole"/"said"/"head.safetensors").stat().st_size
    limit = (head + 3.5*max(f.stat().st_size for f in entries(tmp_path/"whole")) + 5000)/1e9
    with pytest.warns(UserWarning, match="the teacher is read each time for what is not in it") as said:
        part, reads = run(method="laid", teacher_cache=str(tmp_path/"part"), teacher_cache_gb=limit)
    assert len([w for w in said if "read each time" in str(w.message)]) == 1
    assert 3 <= len(entries(tmp_path/"part")) < 6 and part.cached.folder.size() <= limit*1e9
    assert part.cached.asked == 12 - len(entries(tmp_path/"part"))
    assert losses(part) == losses(whole)


def test_a_damaged_entry_is_read_again_or_refused(run, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="kd", num_train_epochs=1)
    whole, _ = run(**cache)
    file = entries(tmp_path/"cache")[2]
    good = file.read_bytes()
    file.write_bytes(good[:-20] + bytes([good[-20] ^ 4]) + good[-19:])
    with pytest.raises(Damaged, match=file.name): run(teacher=cached_teacher(tmp_path/"cache"), **cache)
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged.* The teacher is read again"): again, reads = run(**cache)
    assert reads == 1 and file.read_bytes() == good and losses(again) == losses(whole)
    start = tmp_path/"laid"
    run(method="laid", num_train_epochs=1, teacher_cache=str(start))
    kept, = (start/"start").rglob("mixing.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match="The start is computed again"): assert run(method="laid", num_train_epochs=1, teacher_cache=str(start))[1] > 0


# --- a teacher without a body -----------------------------------------------------
def test_a_head_is_enough_for_what_is_kept(run, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="laid", lambda_hidden=.1)
    whole, _ = run(**cache)
    teacher = cached_teacher(tmp_path/"cache")
    real = [name for name, p in teacher.named_parameters() if not p.is_meta]
    assert real == ["lm_head.weight"]
    alone, reads = run(teacher=teacher, **cache)
    assert reads == 0 and losses(alone) == losses(whole) and same(alone.model, whole.model)


def test_a_head_is_not_enough_for_anything_else(run, haystacks, tmp_path):
    cache = dict(teacher_cache=str(tmp_path/"cache"), method="laid", num_train_epochs=1)
    run(**cache)
    missing = entries(tmp_path/"cache")[0]
    missing.rename(tmp_path/"away")
    with pytest.raises(ValueError, match="does not hold all that is read, and of this teacher there is only the head"): run(teacher=cached_teacher(tmp_path/"cache"), **cache)
    with pytest.raises(ValueError, match="does not hold how the mixing starts"): run(teacher=cached_teacher(tmp_path/"cache"), student=tiny("student", 5), **cache)
    with pytest.raises(ValueError, match="recomposed samples are new each time"): run(teacher=cached_teacher(tmp_path/"cache"), recompose=.5, **cache)
    another = tiny("teacher")
    another.lm_head.weight.data[0] += 1
    for name, teacher in (("one", another), ("two", tiny("teacher"))): run(teacher=teacher, method="kd", max_steps=1, teacher_cache=str(tmp_path/name))
    with pytest.raises(ValueError, match="something else: teacher is"): run(teacher=cached_teacher(tmp_path/"one"), method="kd", teacher_cache=str(tmp_path/"two"))
    with pytest.raises(ValueError, match="is no teacher cache"): cached_teacher(tmp_path)


# --- features -----------------------------------------------------------------------
def test_a_blind_teacher_is_refused(run, processor, haystacks):
    "Features of the student alone, in whatever method: the teacher would answer without seeing."
    blind = precompute(haystacks, HaystackCollator(processor), tiny("student"), progress=False)
    for method in ("kd", "laid"):  # the second before its first step
        with pytest.raises(ValueError, match="neither teacher_features nor pixel_values, only student_features: .* would answer without seeing"): run(method=method, data=blind)
    made, _ = run(method="sft", data=blind)
    assert len(logged(made, "loss_sft")) == 12
    teachers = [{k: x for k, x in s.items() if k != "student_features"} | {"teacher_features": torch.zeros(1)} for s in blind]
    with pytest.raises(ValueError, match="neither student_features nor pixel_values"): run(method="sft", data=teachers)


def test_a_text_without_images_needs_no_pixels(processor):
    ids = torch.tensor([processor.tokenizer("no image at all").input_ids])
    assert image_inputs(tiny("student"), {"input_ids": ids}, "student").keys() == {"input_ids"}


@pytest.mark.parametrize("method", ["sft", "laid"])
def test_a_frozen_tower_sees_each_picture_once(run, haystacks, tmp_path, method):
    student, teacher = tiny("student"), tiny("teacher")
    towers = [Reads(m.get_encoder(modality="image")) for m in (student, teacher)]
    plain, _ = run(data=haystacks, method=method)
    made, _ = run(data=haystacks, method=method, student=student, teacher=teacher, feature_cache=str(tmp_path/"features"))
    assert [t.number for t in towers] == [6, 6*(method == "laid")]
    for name, values in losses(plain).items(): assert losses(made)[name] == pytest.approx(values, rel=1e-5), name
    again = Reads(tiny("student").get_encoder(modality="image"))
    run(data=haystacks, method=method, feature_cache=str(tmp_path/"features"))
    assert again.number == 0
    with pytest.raises(ValueError, match="something else: (student|teacher)_features is"): run(data=haystacks, method="kd", student=tiny("student", 8), feature_cache=str(tmp_path/"features"))


def test_features_and_answers_together_leave_the_teacher_alone(run, haystacks, tmp_path):
    how = dict(data=haystacks, method="laid", feature_cache=str(tmp_path/"features"), teacher_cache=str(tmp_path/"cache"), per_device_train_batch_size=2)
    first, _ = run(**how)
    teacher = tiny("teacher")
    tower = Reads(teacher.get_encoder(modality="image"))
    again, reads = run(teacher=teacher, **how)
    assert reads == tower.number == 0 and losses(again) == losses(first)


def test_what_moves_is_not_kept(run, haystacks, tmp_path):
    "A part of the student that makes features and is trained."
    student = tiny("student")
    student.model.projector = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model.projector.weight is trained, so what it makes of pictures changes"):
        run(student=student, data=haystacks, method="kd", feature_cache=str(tmp_path/"features"))


def test_precompute_goes_on_where_it_was(processor, haystacks, pool, tmp_path):
    collate, student, teacher = HaystackCollator(processor), tiny("student"), tiny("teacher")
    def made(stacks=haystacks, student=student, teacher=teacher, collate=collate, **more): return precompute(stacks, collate, student, teacher, progress=False, folder=tmp_path/"pool", **more)
    made(haystacks[:2])
    tower = Reads(student.get_encoder(modality="image"))
    halves = [made(share=(i, 2)) for i in (0, 1)]
    assert tower.number == 4 and isinstance(halves[0], StoredSamples) and len(halves[0]) == 6
    for stored in halves:
        for a, b in zip(stored, pool, strict=True):
            assert a.keys() == b.keys() and a["needles"] == b["needles"] and all(torch.equal(x, b[k]) for k, x in a.items() if torch.is_tensor(x))
    other = build_processor()
    other.chat_template += " "
    for wrong, name in ((dict(student=tiny("student", 4)), "student_features"), (dict(teacher=None), "teacher_features"),
                        (dict(collate=HaystackCollator(other)), "processor"), (dict(collate=HaystackCollator(processor, turns=2)), "turns")):
        with pytest.raises(ValueError, match=f"something else: .*{name} is"): made(**wrong)
    file = next((tmp_path/"pool").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(Damaged, match="damaged"): [s for s in made()]
    file.unlink()
    with pytest.raises(ValueError, match="is not in .*: precompute it"): list(halves[0])
    assert len(list(made())) == 6


def test_a_stored_pool_trains_as_one_in_memory(run, processor, haystacks, pool, tmp_path):
    stored = precompute(haystacks, HaystackCollator(processor), tiny("student"), tiny("teacher"), progress=False, folder=tmp_path/"pool")
    for settings in (dict(method="laid"), dict(method="kd", recompose=.5)):
        a, b = run(data=stored, **settings)[0], run(data=pool, **settings)[0]
        assert losses(a) == losses(b)


# --- the command --------------------------------------------------------------------
def test_one_command_trains_with_a_cache_goes_on_with_it_and_refuses_another(tmp_path, capsys, processor):
    "Two epochs over drawn haystacks, in two orders; the run that goes on finds all that it reads."
    for name, seed in (("student", None), ("teacher", None), ("other", 9)): save_model(tiny(name.replace("other", "teacher"), seed), processor, tmp_path/name)
    plain = dict(student=tmp_path/"student", teacher=tmp_path/"teacher", sizes="2,3", haystacks=4, use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=2, gradient_accumulation_steps=1,
                 save_strategy="epoch", logging_steps=1, learning_rate=1e-3)
    def laid(out, **more):
        given = plain | dict(output_dir=tmp_path/out) | more
        code = main(["train", "--pictures", *(str(x) for name, value in given.items() for x in (f"--{name}", value))])
        if code: return capsys.readouterr().err
        state = json.loads((tmp_path/out/"checkpoint-8"/"trainer_state.json").read_text())["log_history"]
        return [h["loss"] for h in state if "loss" in h], load_file(tmp_path/out/"model"/"model.safetensors")
    cache = dict(teacher_cache=tmp_path/"cache")
    whole, first = laid("whole"), laid("first", **cache)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/"cache").rglob("*.safetensors")}
    again = laid("again", resume_from_checkpoint=tmp_path/"first"/"checkpoint-4", **cache)
    assert len(whole[0]) == 8 and first[0] == pytest.approx(whole[0], rel=1e-5) and again[0] == first[0]
    assert all(torch.equal(x, again[1][name]) for name, x in first[1].items())
    assert len(entries(tmp_path/"cache")) == 4 and kept == {f: f.stat().st_mtime_ns for f in (tmp_path/"cache").rglob("*.safetensors")}
    for field, more in (("teacher", dict(teacher=tmp_path/"other")), ("data", dict(seed=3)), ("settings.layers", dict(layers="0:1"))):
        said = laid("refused", **cache | more)
        assert "laid: error: " in said and f"was made for something else: {field} is " in said, said
        assert not (tmp_path/"refused").exists()
