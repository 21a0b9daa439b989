"Questions asked on shared images against whole prompts, choices against whole conversations, and records."
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from laid_nb import evaluate as module
from laid_nb.anchors import CHAT_TEMPLATE
from laid_nb.evaluate import _named, answer_ids, ask, evaluate, read_answer, read_records
from laid_nb.haystack import Haystack, Question, haystack_fingerprint, picture_haystack
from laid_nb.inputs import messages, precompute_prompts
from laid_nb.store import model_fingerprint

# models

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, initializer_range=.3, max_position_embeddings=4096, bos_token_id=None)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION = {
    "qwen2": dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=1),
    "qwen2_5": dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
                    fullatt_block_indexes=[0]),
    "qwen3": dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14,
                  deepstack_visual_indexes=[0], num_position_embeddings=64),
    "llava": dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, image_size=56, patch_size=28, projection_dim=32),
}
CLASSES = {
    "qwen2": (Qwen2VLForConditionalGeneration, Qwen2VLConfig),
    "qwen2_5": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    "qwen3": (Qwen3VLForConditionalGeneration, Qwen3VLConfig),
    "llava": (LlavaForConditionalGeneration, LlavaConfig),
}


def tiny(family, processor, attention="sdpa", seed=0):
    "A random model in float64."
    token = processor.tokenizer.convert_tokens_to_ids
    ids = dict(image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
               vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    text = dict(TEXT, vocab_size=len(processor.tokenizer), rope_parameters=MROPE,
                eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    family, _, sliding = family.partition(" ")
    if sliding: text |= dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    if family == "llava":  # no M-RoPE: positions are token counts
        text |= dict(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        ids = dict(image_token_index=ids["image_token_id"])
    torch.manual_seed(seed)
    model, config = CLASSES[family]
    model = model(config(text_config=text, vision_config=VISION[family], **ids))
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.generation_config.pad_token_id = text["pad_token_id"]
    model.set_attn_implementation(attention)
    return model.double().eval()


def llava_processor(processor):
    image = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(image, processor.tokenizer, patch_size=28, vision_feature_select_strategy="default",
                          chat_template=CHAT_TEMPLATE, image_token="<|image_pad|>", num_additional_image_tokens=1)


@pytest.fixture(scope="session")
def model(processor): return tiny("qwen2_5", processor)


# whole prompts, one by one

def whole(processor, haystack, i, answers=False):
    return processor.apply_chat_template(messages(haystack, [i], answers), tokenize=True, return_dict=True,
                                         return_tensors="pt", add_generation_prompt=not answers)


@torch.no_grad()
def alone(model, processor, haystack):
    words = [processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
    return torch.stack([model(**whole(processor, haystack, i)).logits[0, -1].log_softmax(-1)[words]
                        for i in range(len(haystack.questions))])


@torch.no_grad()
def choices_alone(model, processor, haystack, i):
    "Log-probability of each choice as the whole answer, from a conversation with that answer in it."
    start, found = whole(processor, haystack, i)["input_ids"].shape[1], []
    for choice in haystack.questions[i].choices:
        said = replace(haystack, questions=(replace(haystack.questions[i], answer=choice),))
        inputs = whole(processor, said, 0, answers=True)
        ids = processor.tokenizer(choice, add_special_tokens=False).input_ids
        log_p = model(**inputs).logits[0, start - 1:].log_softmax(-1)
        end = inputs["input_ids"][0, start + len(ids)]
        found.append(sum(log_p[j, token] for j, token in enumerate(ids)) + log_p[len(ids), end])
    return torch.stack(found)


def ragged(haystack):
    "The same questions, longer and longer in an irregular way."
    words = ["Look. "*(3*i % 5) + q.text for i, q in enumerate(haystack.questions)]
    return replace(haystack, questions=tuple(replace(q, wording=w) for q, w in zip(haystack.questions, words)))


def with_choices(haystack, *choices):
    "The same haystack, its questions with the given choices in turn."
    asked = [replace(q, kind="choice", wording=q.text, answer=c[0], choices=c)
             for q, c in zip(haystack.questions, (choices*len(haystack.questions)))]
    return replace(haystack, questions=tuple(asked))


STACK = picture_haystack(5, 5, 5, split="test")
RAGGED = ragged(STACK)
TEXTS = ("a cup", "a tie and a wine glass", "a tie")
FAMILIES = [("qwen2_5", "sdpa"), ("qwen2_5", "eager"), ("qwen2_5 sliding", "eager"), ("qwen2", "sdpa"),
            ("qwen3", "sdpa"), ("llava", "sdpa")]


@pytest.fixture(params=FAMILIES, ids="-".join)
def pair(request, processor):
    "A model of each family and its processor."
    family, attention = request.param
    model = tiny(family, processor, attention)
    if family.endswith("sliding"):
        assert model.config.text_config.layer_types == ["full_attention", "sliding_attention"]
    return model, llava_processor(processor) if family == "llava" else processor


def close(found, expected, model=None):
    "Equal but for rounding: eager attention takes its softmax in float32, of a model in float64 too."
    eager = model is not None and "eager" in model.config.text_config._attn_implementation
    torch.testing.assert_close(found, expected, atol=1e-5 if eager else 1e-10, rtol=0)


@pytest.mark.parametrize("stack", [STACK, RAGGED], ids=["equal", "ragged"])
def test_shared_images_are_exact(pair, stack):
    model, processor = pair
    reference = alone(model, processor, stack)
    assert (reference - reference[0]).abs().max() > 1e-3  # the questions matter, or nothing is shown
    for batch in (1, 3, 8): close(ask(model, processor, stack, batch=batch)[0], reference, model)


def test_ragged_questions_are_ragged(processor):
    lengths = [whole(processor, RAGGED, i)["input_ids"].shape[1] for i in range(5)]
    assert len(set(lengths)) == 5 and lengths != sorted(lengths)


def shift_pads(inputs, tails):
    "Positions that count the pads."
    pads = torch.tensor([max(map(len, tails)) - len(t) for t in tails])
    return inputs | {"position_ids": inputs["position_ids"] + pads[:, None]}


def show_pads(inputs, tails): return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}


@pytest.mark.parametrize("spoil", [shift_pads, show_pads])
def test_what_padding_must_not_do_is_noticed(model, processor, monkeypatch, spoil):
    "Positions that count the pads, or pads that are seen, are noticed by the comparison above."
    real = module._continued
    monkeypatch.setattr(module, "_continued", lambda prefix, tails, *owners: spoil(real(prefix, tails, *owners), tails))
    off = (ask(model, processor, RAGGED)[0] - alone(model, processor, RAGGED)).abs().amax(1)
    longest = max(range(5), key=lambda i: len(RAGGED.questions[i].text))
    assert off[longest] < 1e-10 < 1e-6 < off[[i for i in range(5) if i != longest]].min()


def test_positions_matter(model, processor, monkeypatch):
    "A continuation that starts one position late is noticed too."
    real = module.read_prefix
    monkeypatch.setattr(module, "read_prefix", lambda *a: (p := real(*a))._replace(start=p.start + 1))
    assert (ask(model, processor, STACK)[0] - alone(model, processor, STACK)).abs().max() > 1e-6


def test_multi_needle_and_some_turns(model, processor):
    stack = picture_haystack(1, 9, 3, kind="multi")
    close(ask(model, processor, stack, turns=[2, 0])[0], alone(model, processor, stack)[[2, 0]])


def test_float32_scores_and_no_gradient(processor):
    log_p, replies = ask(tiny("qwen2_5", processor).to(torch.bfloat16), processor, STACK)
    assert log_p.dtype == torch.float32 and log_p.shape == (5, 2) and not log_p.requires_grad and replies is None


# choices

@pytest.mark.parametrize("batch", [1, 2, 8])
def test_whole_choices_are_exact(pair, batch):
    model, processor = pair
    stack = with_choices(RAGGED, TEXTS)
    expected = torch.stack([choices_alone(model, processor, stack, i) for i in range(5)])
    close(ask(model, processor, stack, batch=batch)[0], expected, model)


def test_letters_are_scored_by_their_token(model, processor):
    letters = ("A", "B", "C", "D")
    ids = [processor.tokenizer(c, add_special_tokens=False).input_ids[0] for c in letters]
    stack = with_choices(RAGGED, letters)
    with torch.no_grad():
        log_p = [model(**whole(processor, stack, i)).logits[0, -1].log_softmax(-1) for i in range(5)]
    expected = torch.stack(log_p)[:, ids]
    close(ask(model, processor, stack)[0], expected)


def test_different_choices_in_one_haystack(model, processor):
    stack = with_choices(RAGGED, TEXTS, ("A", "B"))
    log_p = ask(model, processor, stack)[0]
    assert log_p.shape == (5, 3) and log_p[1::2, 2].isinf().all() and log_p[:, :2].isfinite().all()
    for i in (0, 2, 4): close(log_p[i], choices_alone(model, processor, stack, i))
    close(log_p[1::2, :2], ask(model, processor, with_choices(RAGGED, ("A", "B")))[0][1::2])


def test_whole_choices_are_different_answers(model, processor):
    "All answers of one word that begin with 'a', and the rest of them: probabilities that add up."
    vocabulary = len(processor.tokenizer)
    tails = [module.question_ids(processor, STACK, 0)]
    with torch.no_grad():
        prefix = module.read_prefix(model, module.prompt_inputs(processor, STACK, 56))
        a, end = answer_ids(processor.tokenizer, ("a", "<|im_end|>"))
        begins = module.continue_prefix(model, prefix, tails, 0, ())[0][0, a].exp()
        ended = module._score_whole(model, prefix, tails[0], [[a]], {end}).exp().sum()
        goes_on = sum(module._score_whole(model, prefix, tails[0], [[a, t] for t in range(i, min(i + 500, vocabulary))
                                                                    if t != end], range(vocabulary)).exp().sum()
                      for i in range(0, vocabulary, 500))  # any token may follow, so the third is worth 1
    assert ended + goes_on == pytest.approx(float(begins))


def test_all_tokens_that_end_an_answer_count(model, processor):
    stack, ends = with_choices(STACK, TEXTS), model.generation_config.eos_token_id
    one = ask(model, processor, stack)[0]
    try:
        model.generation_config.eos_token_id = [ends, 40]
        assert (ask(model, processor, stack)[0] > one).all()
    finally: model.generation_config.eos_token_id = ends


def test_first_tokens_that_agree_are_named(processor):
    with pytest.raises(ValueError, match="begins a cup and a tie with the same token"):
        answer_ids(processor.tokenizer, ("a cup", "a tie"))


# written answers

def test_generation_is_the_models_own(model, processor):
    _, replies = ask(model, processor, RAGGED, batch=3, max_new_tokens=6)
    for i, reply in enumerate(replies):
        inputs = whole(processor, RAGGED, i)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == reply


def test_generation_stops_at_the_end_token(model, processor):
    tokenizer = processor.tokenizer
    _, (long,) = ask(model, processor, STACK, turns=[0], max_new_tokens=4)
    first = tokenizer(long, add_special_tokens=False).input_ids[0]
    ends = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [ends, first]
        assert ask(model, processor, STACK, turns=[0], max_new_tokens=4)[1] == [""]
    finally: model.generation_config.eos_token_id = ends


LETTERED = Question("dog", "", "choice", "B", (0,), "Which?\nA. a glass\n(B) a wine glass\nC: 1\nD. 10", tuple("ABCD"))
AS_TEXTS = replace(LETTERED, answer="10", wording="Which?", choices=("a glass", "a wine glass", "1", "10"))

@pytest.mark.parametrize("said, letters, texts", [
    ("B", "B", []), ("b", "B", []), ("(b).", "B", []), ("B.", "B", []), ("Answer: D", "D", []), ("B and C", "BC", []),
    ("A is right", "A", []), ("A glass.", "A", ["a glass"]), ("a wine glass", "B", ["a wine glass"]),
    ("A Wine Glass", "B", ["a wine glass"]), ("A wine glass, not a glass", "AB", ["a glass", "a wine glass"]),
    ("B, a glass", "AB", ["a glass"]), ("1", "C", ["1"]), ("It is 10", "D", ["10"]), ("101", "", []), ("", "", []),
    ("ABCD", "", []), ("A cat", "", []), ("glasses", "", [])])
def test_choices_that_an_answer_names(said, letters, texts):
    assert _named(LETTERED, said) == set(letters) and _named(AS_TEXTS, said) == set(texts)


@pytest.mark.parametrize("said, compliant, correct", [
    ("B", True, True), ("C", True, False), ("B or C", True, False), ("the second", False, False)])
def test_the_right_choice_and_no_other(said, compliant, correct):
    assert read_answer(LETTERED, said) == dict(response=said, compliant=compliant, correct=correct)


@pytest.mark.parametrize("said, compliant, correct", [
    ("Yes.", True, True), ("yes, no doubt", True, True), ("NO", True, False), ("yesterday", False, False)])
def test_the_rule_of_vhs_for_yes_and_no(said, compliant, correct):
    q = Question("dog", "cup", "single", True, (0,))
    assert read_answer(q, said) == dict(response=said, compliant=compliant, correct=correct)


# pictures seen before

def test_seen_pictures_give_the_same_records_without_the_tower(model, processor, monkeypatch):
    stacks = [picture_haystack(s, n, 4) for s, n in ((0, 1), (1, 6))]
    expected = evaluate(model, processor, stacks, progress=False)
    seen = precompute_prompts(model, processor, stacks, progress=False)
    monkeypatch.setattr(type(model), "get_image_features", lambda *a, **k: pytest.fail("the vision tower was used"))
    monkeypatch.setattr(type(stacks[0]), "image", lambda *a: pytest.fail("a picture was drawn"))
    got = evaluate(model, processor, stacks, progress=False, features=seen)
    assert [r["correct"] for r in got] == [r["correct"] for r in expected]
    close(torch.tensor([r["margin"] for r in got]), torch.tensor([r["margin"] for r in expected]))


def test_pictures_of_another_tower_are_refused(model, processor):
    seen = precompute_prompts(model, processor, [STACK], progress=False)
    with pytest.raises(ValueError, match="another vision tower"):
        evaluate(tiny("qwen2_5", processor, seed=1), processor, [STACK], progress=False, features=seen)


# records

STACKS = [picture_haystack(seed, n, 3, split="test") for n in (1, 3) for seed in range(2)]

def run(model, processor, stacks=STACKS, path=None, **kwargs):
    return evaluate(model, processor, stacks, path, progress=False, **kwargs)


@pytest.fixture
def asked(monkeypatch):
    "The turns of each haystack that was asked."
    calls, real = [], module.ask_many
    def spy(model, processor, haystacks, turns, *rest):
        calls.extend((h.id, list(t)) for h, t in zip(haystacks, turns))
        return real(model, processor, haystacks, turns, *rest)
    monkeypatch.setattr(module, "ask_many", spy)
    return calls


def answers_of(monkeypatch, log_p, replies=None):
    "Let these log-probabilities be those of every question."
    def spy(model, processor, haystacks, turns, *rest):
        return [(torch.tensor([log_p]*len(asked)), replies and [next(replies) for _ in asked]) for asked in turns]
    monkeypatch.setattr(module, "ask_many", spy)


def test_records(model, processor):
    records = run(model, processor)
    log_p = alone(model, processor, STACKS[3])
    for r, (yes, no), q in zip(records[-3:], log_p.tolist(), STACKS[3].questions):
        assert r["margin"] == pytest.approx(yes - no) and r["correct"] == ((yes > no) == q.answer)
        assert r["mass"] == pytest.approx(math.exp(yes) + math.exp(no))
        assert r["size"] == 3 and r["needles"] == list(q.needles) and "choices" not in r
    assert [(r["haystack"], r["question"]) for r in records] == [(h.id, t) for h in STACKS for t in range(3)]


def test_records_of_choices(model, processor, tmp_path):
    stack = with_choices(STACKS[3], TEXTS)
    records = run(model, processor, [stack], tmp_path/"a.jsonl")
    for i, r in enumerate(records):
        right, *others = choices_alone(model, processor, stack, i).tolist()  # the first is right
        assert r["margin"] == pytest.approx(right - max(others)) and r["correct"] == (right > max(others))
        assert r["mass"] == pytest.approx(math.exp(right) + sum(map(math.exp, others)))
        assert r["answer"] == TEXTS[0] and r["choices"] == list(TEXTS)
        assert r["chosen"] == TEXTS[[right, *others].index(max(right, *others))]
    assert read_records(tmp_path/"a.jsonl")[1] == records == run(model, processor, [stack], tmp_path/"a.jsonl")


def test_resume_asks_only_what_is_missing(model, processor, tmp_path, asked):
    path = tmp_path/"new"/"a.jsonl"
    records = run(model, processor, path=path)
    text = path.read_text()
    cut = text[:[i for i, c in enumerate(text) if c == "\n"][4] + 20]  # four records and a piece of the fifth
    path.write_text(cut)
    asked.clear()
    again = run(model, processor, path=path)
    assert asked == [(STACKS[1].id, [1, 2]), (STACKS[2].id, [0, 1, 2]), (STACKS[3].id, [0, 1, 2])]
    assert [r["margin"] for r in again] == pytest.approx([r["margin"] for r in records])
    assert read_records(path)[1] == again
    asked.clear()
    assert run(model, processor, path=path) == again and not asked


def test_resume_with_more_haystacks(model, processor, tmp_path, asked):
    run(model, processor, STACKS[:2], tmp_path/"a.jsonl")
    asked.clear()
    assert len(run(model, processor, STACKS, tmp_path/"a.jsonl")) == 12 and len(asked) == 2


def test_the_bar_shows_the_accuracy_of_all_records(model, processor, tmp_path, monkeypatch):
    records = run(model, processor, path=tmp_path/"a.jsonl")
    lines = (tmp_path/"a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path/"a.jsonl").write_text("".join(lines[:5]))
    shown = []
    monkeypatch.setattr(module.tqdm, "set_postfix", lambda self, **values: shown.append(values["accuracy"]))
    run(model, processor, path=tmp_path/"a.jsonl", batch=3)
    assert shown == [f"{sum(r['correct'] for r in records[:n])/n:.3f}" for n in (6, 9, 12)]


@pytest.mark.parametrize("change, word", [
    ("model", "another model"), ("config", "another model"), ("prompt", "another prompt"),
    ("generate", "another generate"), ("fewer", "not among|which is not"), ("content", "not the same"),
    ("choices", "not the same")])
def test_resume_refuses_another(change, word, processor, tmp_path):
    path, model, stacks, more = tmp_path/"a.jsonl", tiny("qwen2_5", processor), STACKS, {}
    run(model, processor, path=path)
    before = path.read_bytes()
    if change == "model": model.lm_head.weight.data += 1e-3
    if change == "config": model.config.text_config.rope_parameters = MROPE | {"rope_theta": 2e4}
    if change == "prompt": more = dict(prompt="Look. ")
    if change == "generate": more = dict(generate=True)
    if change == "fewer": stacks = STACKS[1:]
    if change == "content": stacks = [replace(STACKS[0], questions=STACKS[0].questions[:2]), *STACKS[1:]]
    if change == "choices": stacks = [with_choices(STACKS[0], TEXTS), *STACKS[1:]]
    with pytest.raises(ValueError, match=word): run(model, processor, stacks, path, **more)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["not json\n", '{"a": 1}\n', "[1]\n"])
def test_refuses_another_file(text, model, processor, tmp_path):
    (tmp_path/"a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not an evaluation"): run(model, processor, path=tmp_path/"a.jsonl")
    assert (tmp_path/"a.jsonl").read_text() == text


UNKNOWN = tuple(replace(q, answer=None) for q in STACKS[0].questions)
LISTED = (Question("dog", "", "list", "a cup", (0,)),)

@pytest.mark.parametrize("stacks, word", [
    ([], "unique ids"), ([STACKS[0]]*2, "unique ids"), ([Haystack((), STACKS[0].questions, "a")], "0 images"),
    ([Haystack(STACKS[0].images, (), "a")], "0 questions"),
    ([Haystack(STACKS[0].images, UNKNOWN, "a")], "not answered by yes or no"),
    ([Haystack(STACKS[0].images, LISTED, "a")], "not answered by yes or no"),
    ([replace(STACKS[0], questions=(replace(LETTERED, answer=None),))], "by one of its choices")])
def test_refuses_haystacks(stacks, word, model, processor):
    with pytest.raises(ValueError, match=word): run(model, processor, stacks)


@pytest.mark.parametrize("stack", [STACKS[0], with_choices(STACKS[0], TEXTS)], ids=["yes-no", "choices"])
def test_nan_is_named_and_not_recorded(stack, processor, tmp_path):
    model = tiny("qwen2_5", processor).train()
    model.lm_head.weight.data.fill_(math.nan)
    named = f"question 0 of haystack 'test-single-1-0' are not finite: log p.{stack.questions[0].choices[0]}. = nan"
    with pytest.raises(FloatingPointError, match=named): run(model, processor, [stack], path=tmp_path/"a.jsonl")
    assert model.training and not (tmp_path/"a.jsonl").exists()


def test_written_answers(model, processor, monkeypatch):
    answers_of(monkeypatch, [0., 0.], iter(["Yes.", "NO", "Nothing there"]*4))
    records = run(model, processor, generate=True)
    first, second, _ = STACKS[0].questions
    assert [r["compliant"] for r in records[:3]] == [True, True, False]
    assert [r["correct"] for r in records[:3]] == [first.answer, not second.answer, False]


def test_written_choices(model, processor, monkeypatch):
    answers_of(monkeypatch, [-1., -2., -3.], iter([TEXTS[0], "A tie.", "a bus"]))
    records = run(model, processor, [with_choices(STACKS[2], TEXTS)], generate=True)
    assert [(r["compliant"], r["correct"]) for r in records] == [(True, True), (True, False), (False, False)]
    assert records[0]["response"] == "a cup" and records[0]["margin"] == 1


@pytest.mark.parametrize("stacks", [STACKS, [with_choices(STACKS[2], TEXTS)]], ids=["yes-no", "choices"])
def test_a_tie_is_wrong(stacks, model, processor, monkeypatch):
    answers_of(monkeypatch, [0., 0., 0.][:len(stacks[0].questions[0].choices)])
    assert not any(r["correct"] for r in run(model, processor, stacks))


def test_fingerprints(model, processor):
    assert model_fingerprint(model, processor) != model_fingerprint(tiny("qwen2_5", processor).float(), processor)
    assert len({haystack_fingerprint(h) for h in STACKS}) == 4


def test_records_are_json(model, processor, tmp_path):
    run(model, processor, path=tmp_path/"a.jsonl")
    header, *rows = map(json.loads, (tmp_path/"a.jsonl").read_text().splitlines())
    assert header["laid_evaluation"] == 1 and len(rows) == 12


# free answers, and yes and no as the toolkit reads them

NLTK = {  # what NLTKWordTokenizer (nltk 3.9) finds in small letters: words among yes and no
    "no-one": [], "yes/no": [], "**no**": ["no"], "*Yes*": ["yes"], "No.": ["no"], "'no'": ["no"], '"no"': ["no"],
    "(no)": ["no"], "NO,": ["no"], "no!": ["no"], "cannot": [], "no: x": ["no"], "yes...": ["yes"],
    "no--yes": ["no", "yes"], "_no_": [], "it's no": ["no"], "no's": ["no"], "n/a": [], "yes—no": ["no", "yes"],
    "no:5": [], "a.no": [], "answer:no": ["no"], "<no>": ["no"], "#no": ["no"], "none": [], "yes.no": [], "non-yes": []}


def test_yes_and_no_are_read_as_the_toolkit_reads_them():
    for text, words in NLTK.items():
        for answer in (True, False):
            read = read_answer(Question("dog", "cup", "single", answer, (0,)), text)
            assert read["compliant"] == bool(words) and read["correct"] == (("yes" if answer else "no") in words), text


@pytest.mark.parametrize("answer, text, correct, exact", [
    ("A red cup.", "the red cup", True, True), ("A red cup.", "I see a Red  cup, I think", True, False),
    ("red", "It is colored", False, False), ("red", "", False, False), ("3", "3", True, True), ("3", "13", False, False),
    ("红色", "它是红色的", True, False), ("!", "!", False, True)])
def test_free_answers_are_matched_by_their_words(answer, text, correct, exact):
    read = read_answer(Question("", "", "free", answer, (), "What?", ()), text)
    assert (read["correct"], read["exact"], read["response"]) == (correct, exact, text)


def test_free_questions_need_something_written(model, processor):
    h = Haystack(picture_haystack(0, 2).images, (Question("", "", "free", "a cup", (), "What?", ()),
                                                 picture_haystack(0, 2).questions[0]), "free")
    with pytest.raises(ValueError, match="'free'.*--generate"): evaluate(model, processor, [h], progress=False)
    free, other = evaluate(model, processor, [h], generate=True, progress=False)
    assert free["correct"] == ("cup" in free["response"].split()) and free["mass"] == 0 and "exact" in free
    alone = evaluate(model, processor, [replace(h, questions=h.questions[1:])], generate=True, progress=False)[0]
    assert abs(alone["margin"] - other["margin"]) < 1e-5 and alone["response"] == other["response"]
    placed = replace(h, questions=(replace(h.questions[0], wording="Is <image> like <image>?"),))
    with pytest.raises(ValueError, match="between the words"):
        evaluate(model, processor, [placed], generate=True, progress=False)
