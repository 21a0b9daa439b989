"Statistics against direct computations, and questions asked on shared images against whole prompts."
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import (CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration)

from laid_nb import evaluate as module
from laid_nb.anchors import CHAT_TEMPLATE, build_processor
from laid_nb.accuracy import (
    Counts, HALF, by_depth, by_size, effective_window, mean_relative_gain, plot_accuracy, plot_depth, wilson,
    window_ratio
)
from laid_nb.evaluate import ask, evaluate, read_records
from laid_nb.haystack import haystack_fingerprint
from laid_nb.store import model_fingerprint
from laid_nb.vhs import vhs_entry, write_vhs
from laid_nb.haystack import Haystack, picture_haystack
from laid_nb.inputs import messages, precompute_prompts

# ---------------------------------------------------------------- statistics

@pytest.mark.parametrize("confidence", [.8, .95, .99])
def test_wilson_is_scipys(confidence):
    k, n = np.array([0, 1, 7, 50, 99, 100]), np.array([1, 3, 7, 100, 100, 100])
    reference = [binomtest(int(a), int(b)).proportion_ci(confidence, "wilson") for a, b in zip(k, n)]
    low, high = wilson(k, n, confidence)
    np.testing.assert_allclose(low, [r.low for r in reference], atol=1e-12)
    np.testing.assert_allclose(high, [r.high for r in reference], atol=1e-12)

@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5), ([1, 9], [5, 5])])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"): wilson(k, n)

def window(accuracy, threshold=.5, sizes=(1, 10, 100), **kwargs): return effective_window(sizes, np.array(accuracy)*1000, [1000]*len(sizes), threshold, **kwargs)

def test_window_by_hand():
    assert window([.9, .6, .4]).size == pytest.approx(10*10**.5)
    assert window([.9, .6, .4], .75).size == pytest.approx(10**.5)
    assert window([.9, .4, .9]).size == pytest.approx(10**.8)  # the first crossing, whatever comes later

def test_window_that_touches_the_threshold_goes_on():
    assert window([.9, .5, .4]).size == pytest.approx(10)
    w = window([.9, .7, .5])
    assert w.size == 100 and w.censored

def test_window_out_of_sight():
    high, low = window([.9, .9, .9]), window([.4, .9, .9])
    assert (high.size, high.censored, high.failed, str(high)) == (100, True, False, "≥100 [≥100, ≥100]")
    assert (low.size, low.censored, low.failed, str(low)) == (1, False, True, "<1 [<1, <1]")

def test_window_of_one_size():
    assert window([.9], sizes=[5]).censored and window([.4], sizes=[5]).failed

def test_window_interval_is_the_bootstraps():
    sizes, total, accuracy, rng = [1, 10, 100], 50, np.array([.9, .7, .3]), np.random.default_rng(7)
    draws = []
    for row in rng.binomial(total, accuracy, (400, 3))/total:  # the same generator, one redraw at a time
        if row[0] < .5: draws.append(1); continue
        i = next((i for i, a in enumerate(row) if a < .5), None)
        draws.append(100 if i is None else 10**(i - 1 + (row[i - 1] - .5)/(row[i - 1] - row[i])))
    w = effective_window(sizes, accuracy*total, [total]*3, samples=400, seed=7)
    np.testing.assert_allclose([w.low, w.high], np.quantile(draws, [.025, .975]))

def test_window_is_reproducible_and_narrows():
    assert window([.9, .6, .4]) == window([.9, .6, .4])
    few = effective_window([1, 10, 100], [18, 12, 8], [20]*3)
    assert few.low < window([.9, .6, .4]).low < window([.9, .6, .4]).high < few.high

@pytest.mark.parametrize("sizes, correct, total, threshold, word", [
    ([1, 1], [1, 1], [2, 2], .5, "increasing"), ([0, 1], [1, 1], [2, 2], .5, "positive"), ([], [], [], .5, "increasing"), ([1, 2], [1], [2, 2], .5, "one count"),
    ([1, 2], [1, 3], [2, 2], .5, "correct <= total"), ([1, 2], [0, 0], [2, 0], .5, "total >= 1"), ([1, 2], [1, 1], [2, 2], 75, "threshold")])
def test_window_refuses(sizes, correct, total, threshold, word):
    with pytest.raises(ValueError, match=word): effective_window(sizes, correct, total, threshold)

def counts(*accuracy): return Counts(np.array([1, 10, 100]), np.array(accuracy)*1000, np.full(3, 1000))

@pytest.mark.parametrize("base, other, value, bound", [
    ((.9, .6, .4), (.9, .9, .4), 10**.3, ""), ((.9, .6, .4), (.9, .9, .9), 10**.5, "≥"), ((.4, .4, .4), (.9, .6, .4), 10**1.5, "≥"),
    ((.9, .9, .9), (.9, .6, .4), 10**-.5, "≤"), ((.9, .9, .9), (.9, .9, .9), 1, "?")])
def test_ratio(base, other, value, bound):
    r = window_ratio(counts(*base), counts(*other))
    assert r.value == pytest.approx(value) and r.bound == bound and r.low <= r.value <= r.high

def test_gain_of_table_1():
    images = [1, 5, 10, 20, 50, 100, 150]
    base, laid = dict(zip(images, [80.22, 68.45, 62.19, 57.21, 54.73, 51.08, 47.43])), dict(zip(images, [92.83, 83.26, 80.46, 74.09, 67.04, 63.37, 60.17]))
    gain = mean_relative_gain(base, laid)
    assert (round(100*gain["short"], 1), round(100*gain["long"], 1)) == (24.1, 24.5)
    assert math.isnan(mean_relative_gain({1: .5}, {1: .6})["long"])

def test_gain_refuses():
    with pytest.raises(ValueError, match="unequal sizes"): mean_relative_gain({1: .5}, {2: .5})
    with pytest.raises(ValueError, match="not over 0"): mean_relative_gain({1: 0.}, {1: .5})

# ---------------------------------------------------------------- asking

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=.3, max_position_embeddings=4096, bos_token_id=None)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

@pytest.fixture(scope="session")
def processor(): return build_processor()

def tiny(family, processor, attention="sdpa", seed=0):
    "A random model in float64."
    token = processor.tokenizer.convert_tokens_to_ids
    ids = dict(image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    text = dict(TEXT, vocab_size=len(processor.tokenizer), rope_parameters=MROPE, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    torch.manual_seed(seed)
    if family.startswith("qwen2_5"):
        if family.endswith("sliding"): text |= dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0]), **ids))
    elif family == "qwen2":
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=1), **ids))
    elif family == "qwen3":
        vision = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=14, deepstack_visual_indexes=[0], num_position_embeddings=64)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    elif family == "llava":  # no M-RoPE: positions are token counts
        vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=28, projection_dim=32)
        text |= dict(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=ids["image_token_id"]))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = text["eos_token_id"], text["pad_token_id"]
    model.set_attn_implementation(attention)
    return model.double().eval()

def llava_processor(processor):
    image = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(image, processor.tokenizer, patch_size=28, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE, image_token="<|image_pad|>", num_additional_image_tokens=1)

@pytest.fixture(scope="session")
def model(processor): return tiny("qwen2_5", processor)

def whole(processor, haystack, i): return processor.apply_chat_template(messages(haystack, [i], answers=False), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")

@torch.no_grad()
def alone(model, processor, haystack):
    words = [processor.tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
    return torch.stack([model(**whole(processor, haystack, i)).logits[0, -1].log_softmax(-1)[words] for i in range(len(haystack.questions))])

STACK = picture_haystack(5, 5, 5, split="test")

@pytest.mark.parametrize("family, attention", [("qwen2_5", "sdpa"), ("qwen2_5", "eager"), ("qwen2_5_sliding", "eager"), ("qwen2", "sdpa"), ("qwen3", "sdpa"), ("llava", "sdpa")])
def test_shared_images_are_exact(family, attention, processor):
    if family == "llava": processor = llava_processor(processor)
    model = tiny(family, processor, attention)
    if family.endswith("sliding"): assert model.config.text_config.layer_types == ["full_attention", "sliding_attention"]
    reference = alone(model, processor, STACK)
    assert (reference - reference[0]).abs().max() > 1e-3  # the questions matter, or nothing is shown
    for batch in (1, 3, 8): torch.testing.assert_close(ask(model, processor, STACK, batch=batch)[0], reference, atol=1e-10, rtol=0)

def test_multi_needle_and_some_turns(model, processor):
    stack = picture_haystack(1, 9, 3, kind="multi")
    torch.testing.assert_close(ask(model, processor, stack, turns=[2, 0])[0], alone(model, processor, stack)[[2, 0]], atol=1e-10, rtol=0)

def test_positions_matter(model, processor, monkeypatch):
    "A branch that starts one position late is seen by the comparison above."
    plant = module._plant
    monkeypatch.setattr(module, "_plant", lambda *a: (t := plant(*a))._replace(start=t.start + 1))
    assert (ask(model, processor, STACK)[0] - alone(model, processor, STACK)).abs().max() > 1e-6

def test_generation_is_the_models_own(model, processor):
    _, replies = ask(model, processor, STACK, batch=3, max_new_tokens=6)
    for i, reply in enumerate(replies):
        inputs = whole(processor, STACK, i)
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

def test_float32_scores_and_no_gradient(processor):
    log_p, replies = ask(tiny("qwen2_5", processor).to(torch.bfloat16), processor, STACK)
    assert log_p.dtype == torch.float32 and log_p.shape == (5, 2) and not log_p.requires_grad and replies is None

# ---------------------------------------------------------------- pictures seen before

def test_seen_pictures_give_the_same_records_without_the_tower(model, processor, monkeypatch):
    stacks = [picture_haystack(s, n, 4) for s, n in ((0, 1), (1, 6))]
    expected, seen = evaluate(model, processor, stacks, progress=False), precompute_prompts(model, processor, stacks, progress=False)
    monkeypatch.setattr(type(model), "get_image_features", lambda *a, **k: pytest.fail("the vision tower was used"))
    monkeypatch.setattr(type(stacks[0]), "image", lambda *a: pytest.fail("a picture was drawn"))
    got = evaluate(model, processor, stacks, progress=False, features=seen)
    assert [r["correct"] for r in got] == [r["correct"] for r in expected]
    torch.testing.assert_close(torch.tensor([r["margin"] for r in got]), torch.tensor([r["margin"] for r in expected]), atol=1e-10, rtol=0)

def test_pictures_of_another_tower_are_refused(model, processor):
    seen = precompute_prompts(model, processor, [STACK], progress=False)
    with pytest.raises(ValueError, match="another vision tower"): evaluate(tiny("qwen2_5", processor, seed=1), processor, [STACK], progress=False, features=seen)

# ---------------------------------------------------------------- records

STACKS = [picture_haystack(seed, n, 3, split="test") for n in (1, 3) for seed in range(2)]

def run(model, processor, stacks=STACKS, path=None, **kwargs): return evaluate(model, processor, stacks, path, progress=False, **kwargs)

@pytest.fixture
def asked(monkeypatch):
    "The turns of each call of `ask`."
    calls, real = [], module.ask
    def spy(model, processor, haystack, turns, *rest): calls.append((haystack.id, list(turns))); return real(model, processor, haystack, turns, *rest)
    monkeypatch.setattr(module, "ask", spy)
    return calls

def test_records(model, processor):
    records = run(model, processor)
    log_p = alone(model, processor, STACKS[3])
    for r, (yes, no), q in zip(records[-3:], log_p.tolist(), STACKS[3].questions):
        assert r["margin"] == pytest.approx(yes - no) and r["correct"] == ((yes > no) == q.answer) and r["size"] == 3 and r["needles"] == list(q.needles)
    assert [(r["haystack"], r["question"]) for r in records] == [(h.id, t) for h in STACKS for t in range(3)]

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

@pytest.mark.parametrize("change, word", [("model", "another model"), ("config", "another model"), ("prompt", "another prompt"), ("generate", "another generate"), ("fewer", "not among|which is not"), ("content", "not the same")])
def test_resume_refuses_another(change, word, processor, tmp_path):
    path, model, stacks, more = tmp_path/"a.jsonl", tiny("qwen2_5", processor), STACKS, {}
    run(model, processor, path=path)
    before = path.read_bytes()
    if change == "model": model.lm_head.weight.data += 1e-3
    if change == "config": model.config.text_config.rope_parameters = MROPE | {"rope_theta": 2e4}
    if change == "prompt": more = dict(prompt="Look. ")
    if change == "generate": more = dict(generate=True)
    if change == "fewer": stacks = STACKS[1:]
    if change == "content": stacks = [Haystack(STACKS[0].images, STACKS[0].questions[:2], STACKS[0].id), *STACKS[1:]]
    with pytest.raises(ValueError, match=word): run(model, processor, stacks, path, **more)
    assert path.read_bytes() == before

@pytest.mark.parametrize("text", ["not json\n", '{"a": 1}\n', "[1]\n"])
def test_refuses_another_file(text, model, processor, tmp_path):
    (tmp_path/"a.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not an evaluation"): run(model, processor, path=tmp_path/"a.jsonl")
    assert (tmp_path/"a.jsonl").read_text() == text

@pytest.mark.parametrize("stacks, word", [([], "unique ids"), ([STACKS[0]]*2, "unique ids"), ([Haystack((), STACKS[0].questions, "a")], "0 images"), ([Haystack(STACKS[0].images, (), "a")], "0 questions")])
def test_refuses_haystacks(stacks, word, model, processor):
    with pytest.raises(ValueError, match=word): run(model, processor, stacks)

def test_nan_is_named_and_not_recorded(processor, tmp_path):
    model = tiny("qwen2_5", processor).train()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="test-single-1-0"): run(model, processor, path=tmp_path/"a.jsonl")
    assert model.training and read_records(tmp_path/"a.jsonl")[1] == []

def test_written_answers(model, processor, monkeypatch):
    replies = iter(["Yes.", "NO", "Nothing there"]*4)
    monkeypatch.setattr(module, "ask", lambda m, p, h, turns, *rest: (torch.zeros(len(turns), 2), [next(replies) for _ in turns]))
    records = run(model, processor, generate=True)
    assert [r["compliant"] for r in records[:3]] == [True, True, False]
    assert [r["correct"] for r in records[:3]] == [STACKS[0].questions[0].answer, not STACKS[0].questions[1].answer, False]
    np.testing.assert_allclose(by_size(records, "compliant").accuracy, 2/3)

def test_a_tie_is_wrong(model, processor, monkeypatch):
    monkeypatch.setattr(module, "ask", lambda m, p, h, turns, *rest: (torch.zeros(len(turns), 2), None))
    assert not any(r["correct"] for r in run(model, processor))

def test_fingerprints(model, processor):
    assert model_fingerprint(model, processor) != model_fingerprint(tiny("qwen2_5", processor).float(), processor)
    assert len({haystack_fingerprint(h) for h in STACKS}) == 4

def test_counts_by_size_and_depth():
    records = [dict(size=n, needles=[i], correct=i < n/2) for n in (1, 4, 10) for i in range(n)]
    c = by_size(records)
    assert c.sizes.tolist() == [1, 4, 10] and c.correct.tolist() == [1, 2, 5] and c.total.tolist() == [1, 4, 10]
    sizes, correct, total = by_depth(records + [dict(size=4, needles=[0, 1], correct=True)], bins=5)
    assert total.tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2], [0, 1, 2]] and correct[:, 2].tolist() == [2, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="compliant"): by_size(records, "compliant")
    with pytest.raises(ValueError, match="depth"): by_depth([dict(size=4, needles=[0, 1], correct=True)])

def test_figures_draw():
    records = [dict(size=n, needles=[i], correct=i % 3 > 0) for n in (3, 10) for i in range(n)]
    figure = plot_accuracy({"a": by_size(records), "b": by_size(records)}, HALF)
    assert figure.axes[0].get_xscale() == "log" and [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["3", "10"]
    assert plot_depth(records).axes[0].images[0].get_clim() == (0, 1)
    figure.canvas.draw()


def test_a_second_way_has_the_colour_of_the_first():
    counts = by_size([dict(size=n, needles=[0], correct=True) for n in (3, 10)])
    lines = {l.get_label(): (l.get_color(), l.get_linestyle()) for l in plot_accuracy(dict.fromkeys(("a", "a + b", "c + b"), counts), dashed=" + b").axes[0].lines}
    assert [lines[name] for name in ("a", "a + b", "c + b")] == [("C0", "-"), ("C0", "--"), ("C1", "--")]

# ---------------------------------------------------------------- Visual Haystacks

def test_vhs_layout(model, processor, tmp_path):
    stacks = STACKS + [picture_haystack(0, 6, 2, kind="multi")]
    records = run(model, processor, stacks)
    folder = write_vhs(records, stacks, tmp_path/"result")
    assert {p.name: len(list(p.glob("*.json"))) for p in folder.iterdir()} == {"oracle_images": 6, "3_images": 6, "6_images": len(stacks[-1].questions)}
    for size, right in zip((1, 3, 6), by_size(records).correct):
        found = [json.loads(p.read_text()) for p in folder.glob(f"{'oracle' if size == 1 else size}_images/*.json")]
        assert sum(e["conversations"][1]["value"] in e["result"]["response"].lower().split() for e in found) == right  # the toolkit's rule
        assert all(sorted(e["pos_image"] + e["neg_image"]) == sorted(e["result"]["image_paths"]) and len(e["result"]["image_paths"]) == size for e in found)

def test_vhs_needle_place(model, processor):
    record = run(model, processor)[-1]
    entry = vhs_entry(record, STACKS[3])
    assert entry["result"]["image_paths"].index(entry["pos_image"][0]) == STACKS[3].questions[2].needles[0]
    assert entry["conversations"][0]["value"] == STACKS[3].questions[2].text and entry["conversations"][1]["value"] in ("yes", "no")

def test_vhs_is_all_or_nothing(model, processor, tmp_path, monkeypatch):
    records = run(model, processor)
    with pytest.raises(ValueError, match="not among those given"): write_vhs(records, STACKS[1:], tmp_path/"a")
    real = module.vhs_entry
    monkeypatch.setattr(module, "vhs_entry", lambda r, h: real(r, h) if r is not records[-1] else 1/0)
    with pytest.raises(ZeroDivisionError): write_vhs(records, STACKS, tmp_path/"a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path/"a").mkdir()
    with pytest.raises(ValueError, match="exists"): write_vhs(records, STACKS, tmp_path/"a")
