"""Nothing silently wrong: each fault of an objective or a number is planted, and must be named."""
import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, SmolLM3Config, SmolLM3ForCausalLM, TrainerCallback

import families
from laid_nb import capture, check, cli, inputs, losses, parts, train
from laid_nb.accuracy import Results, count
from laid_nb.align import build_mixing
from laid_nb.benchmarks import read_haystacks
from laid_nb.check import CHECKS, Case, NotTried, run_checks
from laid_nb.gain import fold_gain, rope_gains
from laid_nb.haystack import Haystack, Passage, Question, picture_haystack
from laid_nb.inputs import FAMILIES, HaystackCollator, encode, precompute, prompt_inputs, question_ids
from laid_nb.limits import limit_pixels
from laid_nb.parts import GainPart, MixingPart
from laid_nb.store import load_model, save_model
from laid_nb.train import LaidConfig, LaidTrainer
from refusals import refused

QUIET = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=2,
             gradient_accumulation_steps=1, learning_rate=1e-3, mixing_learning_rate=1e-2, max_steps=1, warmup_steps=0)


@pytest.fixture
def trainer(processor, tiny, haystacks, tmp_path):
    "trainer(**settings): a LaidTrainer of tiny models on four haystacks of unequal size."
    def make(student=None, teacher=None, data=None, **settings):
        more = {name: settings.pop(name) for name in ("teacher_processing_class", "data_collator") if name in settings}
        return LaidTrainer(student or tiny("student"), LaidConfig(str(tmp_path/"run"), **QUIET | settings), data or haystacks[:4], processor,
                           teacher or tiny("teacher"), **more)
    return make


@pytest.fixture
def case(processor, tiny, haystacks, tmp_path):
    "case(**settings): what `laid check` looks at; models and data may be given."
    made = []
    def make(student=None, teacher=None, data=None, teacher_processor=None, **settings):
        args = LaidConfig(str(tmp_path/"run"), **QUIET | dict(max_steps=20) | settings)
        made.append(Case(student or tiny("student"), processor, data or haystacks[:3], args, teacher or tiny("teacher"), teacher_processor))
        return made[-1]
    yield make
    for each in made: each.close()


def look(case, name): return CHECKS[name].look(case)


# --- what a model reads ---------------------------------------------------------
def test_a_mask_that_is_dropped(trainer, monkeypatch):
    real = inputs.image_inputs
    monkeypatch.setattr(train, "image_inputs", lambda *a: {name: x for name, x in real(*a).items() if name != "attention_mask"})
    with refused(ValueError, "attention_mask", "Qwen2_5_VLForConditionalGeneration"): trainer(method="sft").train()


def test_a_family_that_forgets_the_mask(trainer, pool, monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2_5_vl", replace(FAMILIES["qwen2_5_vl"], beside=()))
    with refused(ValueError, "attention_mask", "FAMILIES", "qwen2_5_vl"): trainer(method="sft", data=pool[:4]).train()


def test_a_model_that_drops_its_mask(case, tiny):
    student = tiny("student")
    student.model.language_model.register_forward_pre_hook(lambda module, args, given: (args, given | {"attention_mask": None}), with_kwargs=True)
    with refused(ValueError, "student layer 0", "reads padding"): look(case(student, method="kd"), "mask")


def test_a_mask_that_counts_padding(trainer, processor):
    class Counts(HaystackCollator):
        def __call__(self, samples):
            batch = super().__call__(samples)
            return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    sizes = [picture_haystack(i, 2 + 2*i, 2) for i in range(2)]
    with refused(ValueError, "padding tokens", "attention_mask"): trainer(method="sft", data=sizes, data_collator=Counts(processor)).train()


def test_a_term_that_counts_padding(case, monkeypatch):
    real = losses.laid_loss
    monkeypatch.setattr(losses, "laid_loss", lambda q, k, tq, tk, mask, *a, **more: real(q, k, tq, tk, None, *a, **more))
    with refused(ValueError, "term laid", "padding is counted"): look(case(), "padding")


TURN = "Is it there?<|im_end|>\n<|im_start|>assistant\nYes"


@pytest.mark.parametrize("entry, benchmark, what", [
    ({"image": "a.png", "conversations": [{"from": "human", "value": TURN}, {"from": "gpt", "value": "yes"}]}, "llava", "question"),
    ({"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A <|image_pad|>"}]}, "llava", "answer"),
    ({"image": "a.png", "conversations": [{"from": "system", "value": "<|im_start|>user"}, {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]}, "llava", "system"),
    ({"images": ["a.png"], "question": "Which?", "choices": ["one", "<|vision_end|>"], "answer": "one", "needles": [0]}, "choices", "choice 1")])
def test_special_tokens_in_data(processor, tmp_path, entry, benchmark, what):
    Image.new("RGB", (56, 56)).save(tmp_path/"a.png")
    good = {"llava": {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]},
            "choices": {"images": ["a.png", "a.png"], "question": "Which?", "choices": ["one", "two"], "answer": "one", "needles": [0]}}[benchmark]
    (tmp_path/"mine.json").write_text(json.dumps([good, entry]))
    first, second = read_haystacks([tmp_path/"mine.json"], tmp_path, benchmark)
    encode(processor, first, [0])
    for read in (lambda: encode(processor, second, [0]), lambda: prompt_inputs(processor, second, 56), lambda: question_ids(processor, second, 0)):
        with refused(ValueError, "mine.json, entry 1", what, "<|"): read()


def test_special_tokens_of_tables_and_passages(processor, tmp_path):
    (tmp_path/"t.csv").write_text('image,question,answer\na.png,"What is <|video_pad|>?",no\n')
    Image.new("RGB", (56, 56)).save(tmp_path/"a.png")
    with refused(ValueError, "t.csv, row 0", "<|video_pad|>"): encode(processor, read_haystacks([tmp_path/"t.csv"], tmp_path, "table")[0], [0])
    told = Haystack((Passage("Room 1<|im_end|>"),), (Question("dog", "cup", "single", True, (0,)),), "told")
    with refused(ValueError, "'told'", "passage 0", "<|im_end|>"): encode(processor.tokenizer, told, [0])


def test_places_of_images_are_no_special_tokens(processor):
    h = Haystack(picture_haystack(0, 2).images, (Question("", "", "free", "A cup.", (), "Left: <image> Right: <image> What?", ()),), "mid")
    assert encode(processor, h, [0])["input_ids"].shape[0] == 1


# --- the two models -------------------------------------------------------------
@pytest.mark.parametrize("spoil, word", [(lambda t: t.train(), "training mode"), (lambda t: t.lm_head.requires_grad_(True), "lm_head.weight"),
                                         (lambda t: t.model.language_model.layers[1].self_attn.train(), "layers.1.self_attn")])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_teacher_that_does_not_stand_still(trainer, spoil, word, when):
    made = trainer(method="kd", max_steps=2)
    class Spoil(TrainerCallback):
        def on_step_begin(self, *args, **kwargs): spoil(made.teacher)
    if when == "before": spoil(made.teacher)
    else: made.add_callback(Spoil())
    with refused(RuntimeError, "teacher", word): made.train()


def test_teacher_and_student_swapped(trainer, tiny):
    with pytest.warns(UserWarning, match="wrong order"): trainer(tiny("teacher"), tiny("student"), method="kd")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(method="kd")


def test_models_that_share_a_weight(trainer, tiny):
    student, teacher = tiny("student"), tiny("student")
    teacher.model.visual = student.model.visual
    with refused(ValueError, "one tensor", "visual"): trainer(student, teacher, method="kd")


def test_processors_that_differ(case, processor):
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [.5]*3
    said = look(case(teacher_processor=other), "processors")
    assert "image_mean" in said and "compared: kl on" in said  # each is given what its own processor makes
    other.image_processor.size = {"shortest_edge": 56*56, "longest_edge": 28*28*4}
    with refused(ValueError, "lambda_laid=0"): look(case(method="laid", teacher_processor=other), "processors")
    told = case(method="kd", teacher_processor=other)
    assert "compared: kl" in look(told, "processors")
    with refused(NotTried, "other tokens"): look(told, "pair")


def test_features_of_the_student_for_a_teacher(trainer, tiny, haystacks, processor):
    alone = precompute(haystacks[:2], HaystackCollator(processor), tiny("student"), progress=False)
    with refused(ValueError, "teacher_features", "student_features"): trainer(method="kd", data=alone).train()
    twice = precompute(haystacks[:2], HaystackCollator(processor), tiny("student"), tiny("student"), progress=False)
    with refused(ValueError, "teacher_features", "they are the student's"): trainer(method="kd", data=twice).train()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_tower_that_changed_after_precompute(trainer, tiny, haystacks, processor, role, folder, tmp_path):
    models = {"student": tiny("student"), "teacher": tiny("teacher")}
    data = precompute(haystacks[:2], HaystackCollator(processor), *models.values(), progress=False, folder=tmp_path/"kept" if folder else None)
    models[role].model.visual.patch_embed.proj.weight.data[0] += .1
    with refused(ValueError, f"{role}_features", "precompute"): trainer(**models, method="kd", data=data).train()


def test_a_tower_in_another_precision_is_the_same(trainer, tiny, haystacks, processor):
    student = tiny("student").bfloat16()
    data = precompute(haystacks[:2], HaystackCollator(processor), student, progress=False)
    trainer(student, method="sft", data=data).train()


# --- the objective ----------------------------------------------------------------
def test_a_capture_outside_the_graph(trainer, monkeypatch):
    real = capture.Cache._record
    monkeypatch.setattr(capture.Cache, "_record", lambda self, module, q, k, scaling: real(self, module, q.detach(), k.detach(), scaling))
    with refused(ValueError, "carry no gradient"): trainer().train()


def test_reentrant_checkpointing(trainer, tiny):
    with refused(ValueError, "reentrant"): LaidConfig(use_cpu=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    made = trainer()
    made.model.gradient_checkpointing_enable({"use_reentrant": True})
    made.model.train()
    with refused(ValueError, "reentrant"):
        with made.captured(): pass


def test_a_temperature_that_is_forgotten(case, monkeypatch):
    real = losses.kl_loss
    monkeypatch.setattr(losses, "kl_loss", lambda s, t, temperature, *more: real(s, t, temperature, *more)/temperature**2)
    with refused(ValueError, "term kl", "τ²"): look(case(method="kd"), "terms")


def test_accumulation_that_is_counted_twice(trainer):
    made = trainer(method="kd", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    made.model_accepts_loss_kwargs = False
    with refused(RuntimeError, "counted twice"): made.train()


def test_micro_batches_that_count_as_whole_steps(trainer, monkeypatch):
    monkeypatch.setattr(LaidTrainer, "_get_num_items_in_batch", lambda self, batches, device: losses.count_items(batches[:1]).to(device))
    with refused(RuntimeError, "replies", "instead of once"): trainer(method="kd", per_device_train_batch_size=1, gradient_accumulation_steps=3).train()


@pytest.mark.parametrize("part, settings", [(GainPart, dict(method="kd", gain=True)), (MixingPart, dict())])
def test_a_part_without_a_gradient(trainer, monkeypatch, part, settings):
    if part is GainPart: monkeypatch.setattr(GainPart, "around", lambda self, student, teacher: parts.nullcontext())
    else:
        real = MixingPart.show
        def show(self, evidence, pairs, said):
            return {pair: replace(e, heads=tuple(x.detach() if i > 1 else x for i, x in enumerate(e.heads))) for pair, e in real(self, evidence, pairs, said).items()}
        monkeypatch.setattr(MixingPart, "show", show)
    with refused(RuntimeError, "gain" if part is GainPart else "mixing weights", "no gradient"): trainer(**settings).train()


@pytest.mark.parametrize("constraint, form, is_open", [("convex", "scalar", False), ("norm", "band", False), ("free", "scalar", True), ("convex", "complex", True)])
def test_a_teacher_of_one_head_leaves_the_mixing_what_its_constraint_does(trainer, tiny, constraint, form, is_open):
    config = tiny("teacher").config
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 32  # the student's head dimension
    config.text_config.num_attention_heads = 1
    made = trainer(teacher=type(tiny("teacher"))(config), constraint=constraint, form=form)
    part = made.part(MixingPart)
    made.train()
    sizes = [w.detach().abs() for mixing in part.mixing.values() for w in mixing.weights()]
    assert part.learns is is_open and (is_open or all(torch.allclose(w, torch.ones_like(w)) for w in sizes))


def test_everything_frozen_but_the_gain(trainer, tiny):
    with refused(ValueError, "no weight of the student", "frozen"): trainer(tiny("student").requires_grad_(False), method="sft", gain=True)


# --- the weights --------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_would_not_move(trainer, dtype):
    made = trainer(method="sft")
    made.model.to(dtype)
    with refused(ValueError, "stand still", str(dtype).removeprefix("torch.")): made.train()


def test_weights_that_did_not_move(case, monkeypatch):
    tried = case(method="sft")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with refused(RuntimeError, "did not move", "float32"): look(tried, "step")


def test_a_gain_that_is_not_folded(trainer, tmp_path):
    made = trainer(method="sft", gain=True)
    with refused(RuntimeError, "gain", "missing from the student"): made.save_student(tmp_path/"result")
    assert not (tmp_path/"result").exists()


def test_a_gain_that_folds_wrongly(case, monkeypatch):
    tried = case(method="sft", gain=True, save_strategy="no")
    look(tried, "step")
    with torch.no_grad(): tried.student.model.language_model.layers[0].self_attn.q_proj.weight.mul_(1.2)
    with refused(ValueError, "not folded"): look(tried, "gain")


@pytest.mark.parametrize("factor, lost", [(1.0019, "0 only some"), (1.003, "0 change no bfloat16"), (1.01, None)])
def test_a_gain_below_the_precision_of_the_weights(tiny, factor, lost):
    model = tiny("student").bfloat16()
    gains, before = rope_gains(model), {n: p.clone() for n, p in model.named_parameters() if "q_proj.weight" in n}
    for gain in gains.values(): gain.raw.data.fill_(math.log(math.expm1(factor)) - math.log(math.e - 1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fold_gain(model, gains)
    changed = torch.stack([(model.get_parameter(n) != p).float().mean() for n, p in before.items()]).mean().item()
    assert (changed == 0, 0 < changed < 1, changed == 1) == (factor == 1.0019, factor == 1.003, factor == 1.01)
    assert [lost in str(w.message) and "given in float32" in str(w.message) for w in said] == [True]*(lost is not None)


def test_a_training_says_which_gains_its_result_loses(trainer, tiny):
    with pytest.warns(UserWarning, match="change no bfloat16 weight"): trainer(tiny("student").bfloat16(), method="sft", gain=True, mixing_learning_rate=1e-4).train()


class Break(TrainerCallback):
    "Makes a weight infinite after a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step: model.lm_head.weight.data[3, 1] = math.inf


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_weights_that_are_not_finite_after_the_last_step(trainer, tmp_path, saves):
    made = trainer(method="sft", max_steps=2, save_strategy=saves, save_steps=1)
    made.add_callback(Break(2))
    with refused(FloatingPointError, "lm_head.weight", "step 2"): made.train()
    assert [p.name for p in (tmp_path/"run").glob("checkpoint-*")] == (["checkpoint-1"] if saves == "steps" else [])


def test_weights_that_are_not_finite_are_not_saved(trainer, tmp_path):
    made = trainer(method="sft")
    made.train()
    made.model.lm_head.weight.data[0, 0] = math.nan
    for save in (made.save_model, made.save_student):
        with refused(FloatingPointError, "lm_head.weight"): save(str(tmp_path/"result"))
    assert not (tmp_path/"result").exists()


@pytest.mark.parametrize("name", ["learning_rate", "mixing_learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "adam_epsilon"])
@pytest.mark.parametrize("value", [math.inf, -1., math.nan])
def test_rates_that_cannot_be(name, value):
    with refused(ValueError, name, "finite"): LaidConfig(use_cpu=True, **{name: value})


# --- layers -------------------------------------------------------------------------
def test_layers_without_rope():
    config = SmolLM3Config(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                           no_rope_layers=[1, 0], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    pair = [SmolLM3ForCausalLM(config) for _ in range(2)]
    build_mixing(*pair, [(0, 0)])
    with refused(ValueError, "layer 1", "no RoPE"): build_mixing(*pair, [(1, 1)])


def test_attention_in_a_window_is_not_what_a_term_assumes(case, tiny):
    config = tiny("student").config
    config.text_config.update(dict(use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention"]))
    with refused(ValueError, "student layer 1", "window"): look(case(type(tiny("student"))(config), method="laid+"), "pair")
    assert "no term compares their attention" in look(case(type(tiny("student"))(config), method="laid", mixing_init="uniform"), "attention")


# --- numbers ------------------------------------------------------------------------
def test_a_window_of_one_size():
    results = Results({"a": count([20], [30], [40]), "b": count([20], [10], [40])}, base="b")
    assert "not measured" in str(results.window("a")) and "not measured" in str(results.ratio("a"))


def test_a_model_that_does_not_answer(case, capsys):
    with pytest.warns(UserWarning, match=r"gives Yes, No only \d+%"): look(case(method="kd"), "answers")
    cli._print_mass([dict(size=3, mass=.01)], thinks=False)
    assert "would say something else" in capsys.readouterr().out


# --- before a run -------------------------------------------------------------------
def test_a_generation_config_that_cannot_be_saved(trainer, tiny, tmp_path, processor, case):
    student = tiny("student")
    student.generation_config = GenerationConfig(do_sample=False, temperature=1e-6, top_p=.9, eos_token_id=3)
    with pytest.warns(UserWarning, match="temperature=1e-06, top_p=0.9"): made = trainer(student, method="sft", save_strategy="steps", save_steps=1)
    made.train()
    saved = json.loads((tmp_path/"run/checkpoint-1/generation_config.json").read_text())
    assert "temperature" not in saved and saved["eos_token_id"] == 3
    student.generation_config = GenerationConfig(do_sample=False, temperature=1e-6)
    with pytest.warns(UserWarning, match="temperature"): save_model(student, processor, tmp_path/"direct")
    student.generation_config.num_return_sequences = 4
    with refused(ValueError, "generation config"): look(case(student, method="sft"), "generation")


def test_samples_longer_than_a_context(case, tiny, haystacks):
    teacher = tiny("teacher")
    teacher.config.text_config.max_position_embeddings = 90
    with refused(ValueError, "teacher's context of 90 tokens", "longer", repr(haystacks[2].id)): look(case(teacher=teacher), "tokens")
    counted = case()
    counted.haystacks, counted.counted = counted.haystacks*30, 8
    assert "of 8 of 90 haystacks" in look(counted, "tokens")


def test_a_disk_that_is_too_small(case, monkeypatch):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with refused(OSError, "GB free", "--save_total_limit"): look(case(method="sft", save_strategy="steps", save_steps=1), "disk")


def test_a_broken_checkpoint(case, tiny):
    teacher = tiny("teacher")
    teacher.lm_head.weight.data[2, 2] = math.nan
    with refused(FloatingPointError, "lm_head.weight of the teacher"): look(case(teacher=teacher), "weights")


def test_a_checkpoint_that_is_not_what_was_saved(case, monkeypatch):
    tried = case(method="kd")
    real = train.full_state
    def halved(model): return {n: x/2 if n == "lm_head.weight" else x for n, x in real(model).items()}
    monkeypatch.setattr(train, "full_state", halved)
    look(tried, "step")
    with refused(ValueError, "differs by"): look(tried, "reload")


def test_a_training_that_goes_on_elsewhere(case, monkeypatch):
    tried = case(method="sft")
    look(tried, "step")
    monkeypatch.setattr(LaidTrainer, "restore", lambda self, folder: None)
    with refused(ValueError, "ends"): look(tried, "resume")


def test_all_checks_prove_what_they_say_and_leave_the_student(case, tiny):
    tried = case(method="laid+", gradient_accumulation_steps=2)
    report = run_checks(tried)
    assert [f.check for f in report if f.kind == "ok"] == list(CHECKS) and {f.kind for f in report} == {"ok", "warning"}, report
    assert {f.check for f in report if f.kind == "warning"} == {"answers"}
    assert all(torch.equal(x, y) for x, y in zip(tried.student.state_dict().values(), tiny("student").state_dict().values(), strict=True))


@pytest.fixture
def command(processor, tiny, tmp_path, monkeypatch, capsys):
    "command(name, *more): run `laid check` or `laid train` on files in a folder of its own -> (code, out, err)."
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"): save_model(tiny(name), processor, tmp_path/name)
    for name in "ab": Image.new("RGB", (56, 56)).save(f"{name}.png")
    def run(name, entries, *more):
        (tmp_path/"mine.json").write_text(json.dumps(entries))
        code = cli.main([name, "--teacher", "teacher", "--student", "student", "--data", "mine.json", "--image_root", ".", "--benchmark", "llava", "--use_cpu", "--report_to", "none",
                         "--disable_tqdm", "true", "--max_steps", "1", "--gradient_accumulation_steps", "1", "--output_dir", "run", "--method", "kd", *more])
        return code, *capsys.readouterr()
    return run


def entry(image, asked="Is there a cup?"): return {"image": image, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "yes"}]}


def test_laid_check_says_what_it_proved(command, tmp_path):
    code, out, err = command("check", [entry("a.png"), entry("b.png")])
    assert code == 0 and [line.split()[1] for line in out.splitlines() if line.startswith("ok")] == list(CHECKS), (out, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "mine.json", "student", "teacher"]  # the trial is gone


def test_laid_check_names_every_fault(command, tmp_path):
    for name in ("c.png", "d.png"): (tmp_path/name).write_bytes(b"none")
    code, out, err = command("check", [entry("a.png"), entry("c.png"), entry("d.png"), entry("b.png", TURN)])
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    faults = [(name, text) for kind, name, text in lines if kind == "fault"]
    assert code == 2 and err.count("\n") == 1 and "pictures, words" in err
    assert [name for name, _ in faults] == ["pictures", "pictures", "words"]
    assert all(word in text for word, (_, text) in zip(("c.png", "d.png", "mine.json, entry 3"), faults))


def test_laid_train_does_the_quick_part_first(command, tmp_path):
    code, out, err = command("train", [entry("a.png"), entry("b.png", TURN)])
    assert code == 2 and "mine.json, entry 1" in err and "<|im_end|>" in err and not (tmp_path/"run").exists()


# --- how large pictures may be --------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    "photos(n): a haystack of n large pictures on disk."
    def make(n):
        for i in range(n): Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path/f"photo{i}.png")
        return Haystack(tuple(tmp_path/f"photo{i}.png" for i in range(n)), (Question("dog", "cup", "single", True, (0,)),), f"photos-{n}")
    return make


def image_tokens(processor, haystack): return int((encode(processor, haystack, [0])["input_ids"] == processor.image_token_id).sum())


def test_limits_are_saved_with_the_student_and_hold_in_evaluation(processor, tiny, photos, tmp_path):
    reads, two, six = copy.deepcopy(processor), photos(2), photos(6)
    before = image_tokens(reads, two)
    args = LaidConfig(str(tmp_path/"run"), **QUIET | dict(method="sft", max_pixels=40*784, image_budget=60*784))
    made = LaidTrainer(tiny("student"), args, [two, six], reads)
    made.train()
    made.save_student(tmp_path/"result")
    _, again = load_model(str(tmp_path/"result"))
    assert image_tokens(reads, two) == image_tokens(again, two) <= 60 < before and 6 <= image_tokens(again, six) <= 60
    assert int((prompt_inputs(again, six, 56)["input_ids"] == again.image_token_id).sum()) == image_tokens(again, six)
    assert image_tokens(again, photos(1)) <= 40
    with refused(ValueError, "100 images", "image_budget", "min_pixels"): image_tokens(again, replace(six, images=six.images[:1]*100))


@pytest.mark.parametrize("family, name", [("llava", "LlavaProcessor"), ("idefics3", "Idefics3Processor"), ("gemma3", "Gemma3Processor"), ("internvl", "InternVLProcessor")])
def test_processors_without_limits_in_pixels_are_refused_by_name(family, name):
    for limit in (dict(max_pixels=10_000), dict(min_pixels=10_000), dict(image_budget=10_000)):
        with refused(ValueError, name, "no limits in pixels"): limit_pixels(getattr(families, family)()[0], **limit)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_limits_hold_in_every_family_that_has_them(family, photos):
    reads, _ = getattr(families, family)()
    four, token = photos(4), (reads.image_processor.patch_size*reads.image_processor.merge_size)**2
    limit_pixels(reads, min_pixels=token, max_pixels=30*token)
    free = image_tokens(reads, four)
    limit_pixels(reads, image_budget=40*token)
    assert 15*4 <= free <= 30*4 and 20 <= image_tokens(reads, four) <= 40


def test_limits_that_come_too_late(trainer, pool):
    with refused(ValueError, "encoded already", "max_pixels"): trainer(method="sft", data=pool[:2], max_pixels=10_000)


def test_limits_that_do_not_fit(processor):
    reads = copy.deepcopy(processor)
    for limits, words in ((dict(max_pixels=0), ("max_pixels is 0",)), (dict(min_pixels=5000, max_pixels=4000), ("5,000", "4,000"))):
        with refused(ValueError, *words): limit_pixels(reads, **limits)
