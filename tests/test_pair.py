"""Whether two processors read the same: every field that can differ is found and named."""
import copy
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor

import families
from laid_nb.anchors import CHAT_TEMPLATE, build_processor
from laid_nb.haystack import passage_haystack, picture_haystack
from laid_nb.inputs import HaystackCollator, messages, precompute, read_positions
from laid_nb.losses import fourier_loss, kl_loss
from laid_nb.pair import PairCollator, check_same_reading, read_pair
from laid_nb.train import LaidConfig, LaidTrainer


@pytest.fixture(scope="module")
def qwen(): return build_processor()


@pytest.fixture(scope="module")
def llava(qwen):
    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(pictures, qwen.tokenizer, patch_size=28, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
                          image_token="<|image_pad|>", num_additional_image_tokens=1)


def changed(processor, **settings):
    "A copy whose image processor is set otherwise."
    other = copy.deepcopy(processor)
    for name, value in settings.items():
        assert getattr(other.image_processor, name) != value
        setattr(other.image_processor, name, value)
    return other


COMMON = [dict(image_mean=[.5]*3), dict(image_std=[.5]*3), dict(rescale_factor=1/128), dict(do_convert_rgb=False), dict(do_normalize=False), dict(do_rescale=False), dict(resample=0)]
QWEN = [dict(size={"shortest_edge": 56*56, "longest_edge": 28*28*4}), dict(size={"shortest_edge": 112*112, "longest_edge": 1003520}), dict(patch_size=16), dict(merge_size=1), dict(temporal_patch_size=1)]
LLAVA = [dict(size={"shortest_edge": 84}), dict(crop_size={"height": 84, "width": 84}), dict(do_center_crop=False)]


def told(student, teacher):
    with pytest.raises(ValueError, match="student and teacher do not read the same") as e: check_same_reading(student, teacher)
    return str(e.value)


@pytest.mark.parametrize("settings", COMMON + QWEN, ids=str)
def test_a_setting_of_images_that_differs_is_named(qwen, settings):
    words = told(qwen, changed(qwen, **settings))
    assert f"image_processor.{next(iter(settings))} is" in words and "of a " in words  # the setting, and what it does to a picture


@pytest.mark.parametrize("settings", COMMON + LLAVA, ids=str)
def test_likewise_in_a_family_of_one_size(llava, settings): assert f"image_processor.{next(iter(settings))} is" in told(llava, changed(llava, **settings))


def test_a_limit_that_no_small_picture_meets(qwen):
    other = changed(qwen, size={"shortest_edge": 56*56, "longest_edge": 12845056})
    assert "image_processor.size is" in told(qwen, other) and "of a " not in told(qwen, other)


def test_what_a_processor_itself_counts_with(llava):
    other = copy.deepcopy(llava)
    other.patch_size = 14
    assert "patch_size is 28 for the student, 14 for the teacher" in told(llava, other) and "input_ids of a small picture" in told(llava, other)


@pytest.mark.parametrize("old, new", [("helpful", "able"), ("<|vision_end|>", "<|vision_end|>\n")])
def test_templates(qwen, old, new):
    other = copy.deepcopy(qwen)
    other.chat_template = qwen.chat_template.replace(old, new)
    assert other.chat_template != qwen.chat_template and "chat template" in told(qwen, other)


def test_one_that_cannot_read_a_haystack(qwen):
    other = copy.deepcopy(qwen)
    other.chat_template = qwen.chat_template.replace("<|im_start|>assistant", "<|im_start|>model")  # where it waits, and not in a turn
    with pytest.raises(ValueError, match="the teacher's processor cannot read a haystack: the chat template does not keep turn 0"): read_pair(qwen, other)


def test_one_without_a_template(qwen):
    other = copy.deepcopy(qwen)
    other.chat_template = None
    with pytest.raises(ValueError, match="the teacher's processor has no chat template, and the two differ"): check_same_reading(qwen, other)


def test_merges_that_no_short_text_meets(qwen):
    whole, other = json.loads(qwen.tokenizer.backend_tokenizer.to_str()), copy.deepcopy(qwen)
    whole["model"]["merges"] = whole["model"]["merges"][:-1]
    other.tokenizer = type(qwen.tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(whole)), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert "tokenizer.merges is" in told(qwen, other)


def test_another_family(qwen, llava): assert "image_grid_thw" in told(qwen, llava) or "patch_size" in told(qwen, llava)


def test_copies_read_the_same(qwen, llava, tmp_path):
    for processor in (qwen, llava):
        check_same_reading(processor, processor)
        check_same_reading(processor, copy.deepcopy(processor))
        processor.save_pretrained(tmp_path)
        check_same_reading(processor, type(processor).from_pretrained(tmp_path))  # lists for tuples, defaults written out
        check_same_reading(processor.tokenizer, copy.deepcopy(processor.tokenizer))  # a pair of models of text alone


# --- each model reads what its own processor makes ---------------------------
@pytest.mark.parametrize("settings, kind", [(s, "pixels") for s in COMMON] + [(s, "tokens") for s in QWEN], ids=str)
def test_what_differs_is_pixels_or_tokens(qwen, settings, kind): assert read_pair(qwen, changed(qwen, **settings)).kind == kind


def test_other_templates_and_vocabularies(qwen):
    other = copy.deepcopy(qwen)
    other.chat_template = qwen.chat_template.replace("helpful", "able")
    assert read_pair(qwen, other).kind == "tokens"
    other.chat_template = qwen.chat_template.replace("<|im_end|>", "<|endoftext|>")  # answers end in another token
    found = read_pair(qwen, other)
    assert found.kind == "vocabulary" and "answers are the tokens" in found.said
    assert read_pair(qwen, families.internvl()[0]).kind == "vocabulary"
    assert read_pair(*(families.FAMILIES[name]()[0] for name in ("smollm2", "llama"))).kind == "tokens"  # one of them begins with <s>


def alone(model, processor, haystack, temperature=1.):
    "Log-probabilities of the tokens of each answer, and the rows that say them, from the stock reading of a whole conversation with one question."
    rows = []
    chat = messages(haystack, range(len(haystack.questions)))
    whole, labels = (processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt"), [])
    with torch.no_grad(): logits = model(**whole).logits[0]
    ids, end = whole["input_ids"][0].tolist(), 0
    for question in haystack.questions:  # a reply is found as a run of its tokens behind the one before
        said = processor.tokenizer(question.reply, add_special_tokens=False).input_ids + [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        start = next(i for i in range(end, len(ids)) if ids[i:i + len(said)] == said)
        end = start + len(said)
        rows.append(logits[start - 1:end - 1])
        labels += said
    return torch.cat(rows), torch.tensor(labels)


def trainer_of(student, teacher, reads, other, data, tmp_path, **settings):
    quiet = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=1, warmup_steps=0,
                 learning_rate=1e-3)
    return LaidTrainer(student, LaidConfig(str(tmp_path/"run"), **quiet | settings), data, reads, teacher, other)


def step(made):
    "The terms of the first micro-batch, unweighted, and what they were made of."
    batch = made._prepare_inputs(made.data_collator([made.train_dataset[i] for i in range(2)]))
    made.model.eval()
    made.start()
    with made.captured():
        answers, pairs, _ = made.evidence(made.model, batch)
        return {name: x.item() for name, x in made.terms(answers, pairs).items()}, answers, pairs, batch


HOW = [dict(image_mean=[.5]*3, image_std=[.25]*3), dict(size={"shortest_edge": 112*112, "longest_edge": 1003520}), dict(patch_size=14, template="helpful")]


@pytest.mark.parametrize("settings", HOW, ids=("mean and std", "size", "template"))
def test_each_model_gets_its_own_and_kl_is_that_of_two_whole_readings(qwen, tiny, settings, tmp_path):
    student, teacher, stacks = tiny("student"), tiny("student"), [picture_haystack(i, 2 + i, 3) for i in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))
    settings, other = dict(settings), copy.deepcopy(qwen)
    if "template" in settings: other.chat_template = qwen.chat_template.replace(settings.pop("template"), "able and quick")
    else: other = changed(qwen, **settings)
    with pytest.warns(UserWarning, match="each read what their own processor makes.*Compared: kl on the tokens of answers"):
        made = trainer_of(student, teacher, qwen, other, stacks, tmp_path, method="kd", temperature=1.)
    terms, answers, _, batch = step(made)
    own = batch["teacher"]
    if "image_mean" in settings: assert torch.equal(own["input_ids"], batch["input_ids"]) and (own["pixel_values"] - batch["pixel_values"]).abs().max() > .1
    elif settings.get("size"): assert len(own["pixel_values"]) == 4*len(batch["pixel_values"]) and own["input_ids"].shape != batch["input_ids"].shape
    else: assert torch.equal(own["pixel_values"], batch["pixel_values"]) and own["input_ids"].shape != batch["input_ids"].shape
    (mine, said), (theirs, heard) = (map(torch.cat, zip(*(alone(m, p, h) for h in stacks))) for m, p in ((student, qwen), (teacher, other)))
    assert torch.equal(said, heard) and torch.equal(said, answers.answers)
    assert terms["kl"] > 1e-4
    expected = kl_loss(mine.requires_grad_(), theirs, 1.).item()
    assert terms["kl"] == pytest.approx(expected, rel=1e-3)
    blind = trainer_of(student, tiny("student"), qwen, None, stacks, tmp_path, method="kd", temperature=1.)
    assert step(blind)[0]["kl"] == pytest.approx(0, abs=1e-6)  # given the student's inputs, equal weights say the same


def test_with_other_pixels_every_term_is_to_be_had(qwen, tiny, tmp_path):
    stacks, other = [picture_haystack(i, 2, 2) for i in range(2)], changed(qwen, image_mean=[.5]*3)
    with pytest.warns(UserWarning, match="laid on all tokens, fourier on all tokens, attention on all tokens"):
        made = trainer_of(tiny("student"), tiny("teacher"), qwen, other, stacks, tmp_path, method="laid+")
    made.train()
    assert all(made.state.log_history[0][f"loss_{name}"] > 0 for name in ("sft", "kl", "laid", "fourier", "attention"))


def test_terms_that_compare_tokens_are_refused_before_the_first_step(qwen, tiny, tmp_path):
    stacks, other = [picture_haystack(i, 2, 2) for i in range(2)], changed(qwen, patch_size=16)
    for settings, words in ((dict(method="laid"), "laid cannot be had. Use method sft, kd, or laid\\+ with lambda_laid=0, mixing_init=uniform"),
                            (dict(method="laid+", lambda_laid=0., mixing_init="uniform", lambda_hidden=.1), "attention, hidden cannot be had"),
                            (dict(method="laid+", lambda_laid=0., lambda_attention=0.), "a ridge start cannot be had")):
        with pytest.raises(ValueError, match=words): trainer_of(tiny("student"), tiny("teacher"), qwen, other, stacks, tmp_path, **settings)


@pytest.mark.parametrize("name", ["internvl", "llava", "gemma3", "idefics3", "qwen2_5_vl"])
def test_another_family_teaches_by_spectra_on_the_images(qwen, tiny, name, tmp_path):
    "Other tokenizer, other RoPE, other number of tokens for an image."
    reads, make = families.build(name)
    stacks = [picture_haystack(i, 2 + i, 2) for i in range(2)]
    spectral = dict(method="laid+", lambda_kl=0., lambda_laid=0., lambda_attention=0., mixing_init="uniform")
    with pytest.raises(ValueError, match="other vocabularies .*kl, laid, attention cannot be had. Use method sft, or laid\\+ with lambda_kl=0, lambda_laid=0, lambda_attention=0, mixing_init=uniform"):
        trainer_of(tiny("student"), make("teacher"), qwen, reads, stacks, tmp_path, method="laid+")
    student, teacher = tiny("student"), make("teacher")
    with pytest.warns(UserWarning, match="Compared: fourier on the tokens of images"):
        made = trainer_of(student, teacher, qwen, reads, stacks, tmp_path, **spectral)
    terms, _, pairs, batch = step(made)
    (evidence,), expected = pairs.values(), 0
    for i, h in enumerate(stacks):  # by hand: each alone, image tokens cut out of the sequence
        one, heads = made.data_collator([h]), []
        for role in ("student", "teacher"):
            own = one.get("teacher") if role == "teacher" else one
            at = (own["image"][0] >= 0).nonzero()[:, 0]
            heads.append(slice(int(at[0]), int(at[-1]) + 1))
            assert (own["image"][0, heads[-1]] >= 0).all() or name == "idefics3"
        s, t = heads
        q, k, mixed_q, mixed_k = (x[i:i + 1] for x in evidence.heads)
        images = [(b["image"][i:i + 1] >= 0) for b in (batch, batch["teacher"])]
        expected += fourier_loss(q[:, :, s], k[:, :, s], mixed_q[:, :, t], mixed_k[:, :, t], images[0][:, s], *evidence.scalings, None, images[1][:, t]).item()/2
    assert terms["fourier"] == pytest.approx(expected, rel=1e-4)
    before = [p.clone() for p in made.model.parameters()]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters()))


@pytest.mark.parametrize("kind", ["tokens", "vocabulary"])
def test_passages(kind, tmp_path):
    "Of a template that begins with <s>, and of another tokenizer."
    (words, make), (other, make_other) = families.build("smollm2"), families.build("llama")
    if kind == "vocabulary": other = words_of_another()
    spectral = dict(method="laid+", lambda_laid=0., lambda_attention=0., mixing_init="random") | (dict(lambda_kl=0.) if kind == "vocabulary" else {})
    made = trainer_of(make("student"), make_other("teacher"), words, other, [passage_haystack(i, 2, 2) for i in range(2)], tmp_path, **spectral)
    made.train()
    assert made.read_alike.kind == kind and made.state.log_history[0]["loss_fourier"] > 0 and ("loss_kl" in made.state.log_history[0]) == (kind == "tokens")


def words_of_another():
    words = families.tokenizer(eos="<|end|>", pad="<pad>")
    words.chat_template = families.chat(close="<|end|>\n")
    return words


def test_both_read_the_same_window(qwen, tiny, tmp_path):
    stacks, other = [picture_haystack(i, 3, 2) for i in range(2)], changed(qwen, size={"shortest_edge": 112*112, "longest_edge": 1003520})
    settings, simulation = dict(method="kd"), dict(max_gap=300, max_multiplicity=8., ramp=0.)
    from laid_nb.simulate import WindowSimulation
    made = trainer_of(tiny("student"), tiny("teacher"), qwen, other, stacks, tmp_path, **settings)
    made.simulation, made.place = WindowSimulation(**simulation), (0, 0)
    made.model.train()
    batch = made.data_collator(stacks)
    def gaps(b, model):  # what every image was moved by, relative to where it stood
        positions, bias, _ = made.reading(b, model)
        moved = (positions - read_positions(model, b))[0]
        return [[int(moved[r][b["image"][r] == i][0]) for i in range(3)] for r in range(2)], bias[0].amax(1)
    (mine, counts), (theirs, others) = gaps(batch, made.model), gaps(batch["teacher"], made.teacher)
    assert mine == theirs and max(map(max, mine)) > 0
    torch.testing.assert_close(counts, others)


@pytest.mark.parametrize("settings", [dict(image_mean=[.5]*3), dict(size={"shortest_edge": 112*112, "longest_edge": 1003520})], ids=("pixels", "tokens"))
def test_features_and_what_the_teacher_said_may_be_kept(qwen, tiny, settings, tmp_path):
    stacks, other = [picture_haystack(i, 2 + i, 2) for i in range(2)], changed(qwen, **settings)
    def losses(data=stacks, **more):
        made = trainer_of(tiny("student"), tiny("teacher"), qwen, other, data, tmp_path, method="kd", max_steps=2, **more)
        made.train()
        return [h["loss_kl"] for h in made.state.log_history if "loss_kl" in h]
    direct = losses()
    pair = PairCollator(HaystackCollator(qwen), other, read_pair(qwen, other))
    assert losses(precompute(stacks, pair, tiny("student"), tiny("teacher"), progress=False)) == pytest.approx(direct, rel=1e-4)
    kept = dict(feature_cache=str(tmp_path/"features"), teacher_cache=str(tmp_path/"said"))
    for _ in range(2): assert losses(**kept) == pytest.approx(direct, rel=1e-4)
    with pytest.raises(ValueError, match="encoded for the student alone"):
        losses(precompute(stacks, HaystackCollator(qwen), tiny("student"), tiny("teacher"), progress=False))
