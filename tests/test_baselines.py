"Training-free baselines against definitions written out pair by pair, other configs and whole attention matrices."
import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from families import build
from laid_nb import baselines
from laid_nb.anchors import anchor_config
from laid_nb.baselines import (
    _sort_images,
    ask_sorted,
    evaluate_with,
    image_attention,
    log_scaling,
    self_extend,
    small_steps,
    yarn,
)
from laid_nb.capture import _changes as interceptions
from laid_nb.capture import capture
from laid_nb.evaluate import ask, ask_many, evaluate, read_records
from laid_nb.haystack import Haystack, Question, picture_haystack
from laid_nb.inputs import OURS, HaystackCollator, encode, image_inputs, precompute_prompts, read_positions
from laid_nb.rope import RopeSpec
from laid_nb.simulate import image_groups

LLAMA = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=60, pad_token_id=0, bos_token_id=None, eos_token_id=None)

def sharpened(model):
    "Weights larger than usual, so that attention is far from uniform and a mistake in a position shows."
    for name, p in model.named_parameters():
        if p.ndim == 2 and ("q_proj" in name or "k_proj" in name): torch.nn.init.normal_(p, std=.5)
    return model.eval()

def llama(seed=0, attention="sdpa", **kwargs):
    torch.manual_seed(seed)
    return sharpened(LlamaForCausalLM._from_config(LlamaConfig(**LLAMA | kwargs), attn_implementation=attention))

def vision_model(processor, **text):
    config = anchor_config("student", processor.tokenizer).to_dict()
    config["text_config"] |= dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, layer_types=None,
                                  rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}) | text
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=128, fullatt_block_indexes=[0])
    torch.manual_seed(0)
    return sharpened(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)))

@pytest.fixture(scope="module")
def model(processor): return vision_model(processor)

@pytest.fixture(scope="module")
def haystack(): return picture_haystack(0, 6, 4, "val")

def owners(model, inputs):
    "Which image each token belongs to, by the tokens around an image."
    return image_groups(inputs["input_ids"], *(getattr(model.config, f"{name}_token_id") for name in ("image", "vision_start", "vision_end")))

def prompt(processor, haystack, turn=0): return {k: v for k, v in encode(processor, haystack, [turn], answers=False).items() if k not in OURS}

def logits(model, inputs, **kwargs):
    with torch.no_grad(): return model(**inputs, **kwargs).logits

class Largest(TorchDispatchMode):
    "Elements of the largest tensor made inside the block."
    elements = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.untyped_storage().nbytes()//t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out

# ---------------------------------------------------------------- YaRN

@pytest.mark.parametrize("factor, original", [(2., None), (4., 1300)])
def test_yarn_is_a_model_loaded_with_such_a_config(model, processor, haystack, factor, original):
    parameters = dict(rope_type="yarn", factor=factor, original_max_position_embeddings=original or 32768, rope_theta=1e6, mrope_section=[4, 6, 6])
    other = vision_model(processor, rope_parameters=parameters)
    other.load_state_dict(model.state_dict())
    inputs = prompt(processor, haystack)
    before = logits(model, inputs)
    with yarn(model, factor, original): torch.testing.assert_close(logits(model, inputs), logits(other, inputs), rtol=0, atol=0)
    assert torch.equal(logits(model, inputs), before) and not torch.allclose(logits(other, inputs), before, atol=.01)

def test_yarn_of_one_axis():
    model, ids = llama(), torch.randint(1, 60, (2, 30))
    other = llama(rope_parameters=dict(rope_type="yarn", rope_theta=10_000., factor=3., original_max_position_embeddings=40))
    with yarn(model, 3., 40): assert torch.equal(logits(model, dict(input_ids=ids)), logits(other, dict(input_ids=ids)))

def test_yarn_factor_1_changes_nothing(model, processor, haystack):
    inputs = prompt(processor, haystack)
    with yarn(model, 1.): torch.testing.assert_close(logits(model, inputs), logits(model, inputs), rtol=0, atol=0)

def test_yarn_leaves_after_an_error():
    model = llama()
    rotary, parameters = model.model.rotary_emb, dict(model.config.rope_parameters)
    with pytest.raises(ZeroDivisionError), yarn(model, 2.): 1/0
    assert model.model.rotary_emb is rotary and model.config.rope_parameters == parameters

def test_yarn_refuses_a_scaled_model():
    model = llama(rope_parameters=dict(rope_type="linear", rope_theta=10_000., factor=2.))
    with pytest.raises(ValueError, match="not scaled yet"), yarn(model, 2.): pass

@pytest.mark.parametrize("factor, original", [(.5, None), (math.nan, None), (math.inf, None), (2., 0)])
def test_yarn_refuses_values(factor, original):
    with pytest.raises(ValueError, match="factor of 1 or more"), yarn(llama(), factor, original): pass

def test_yarn_needs_a_rotary_embedding():
    with pytest.raises(ValueError, match="0 text models"), yarn(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=10)), 2.): pass

# ---------------------------------------------------------------- small position steps

#        word  <  .  .  .  .  .  .  >  word  <  .  .  >  word word: an image of 2 x 3 patches, one of 1 x 2
BY_HAND = [[0, .25, .5, .5, .5, .50, .50, .5, 1.25, 2.25, 2.5, 2.75, 2.75, 3.25, 4.25, 5.25],
           [0, .25, .5, .5, .5, .75, .75, .75, 1.25, 2.25, 2.5, 2.75, 2.75, 3.25, 4.25, 5.25],
           [0, .25, .5, .75, 1, .5, .75, 1., 1.25, 2.25, 2.5, 2.75, 3., 3.25, 4.25, 5.25]]

def two_images(model):
    "Arguments of `get_rope_index` for the prompt of `BY_HAND`, and twice more with padding, at the left and at the right."
    patch, opens, closes = (getattr(model.config, f"{name}_token_id") for name in ("image", "vision_start", "vision_end"))
    ids = torch.tensor([5, opens, *[patch]*6, closes, 5, opens, patch, patch, closes, 5, 6])
    ids = torch.stack([F.pad(ids, pads) for pads in ((0, 3), (3, 0), (0, 3))])
    return dict(input_ids=ids, attention_mask=(ids > 0).long(), mm_token_type_ids=(ids == patch).long(), image_grid_thw=torch.tensor([[1, 4, 6], [1, 2, 4]]*3))

def test_small_steps_by_hand(model):
    inputs, by_hand = two_images(model), torch.tensor(BY_HAND)
    with small_steps(model, 1/4): positions, behind = model.model.get_rope_index(**inputs)
    for row, pads in enumerate(((0, 3), (3, 0), (0, 3))): assert torch.equal(positions[:, row], F.pad(by_hand, pads))  # padding stays at 0
    assert behind.tolist() == [[6.25 - 16]]*3  # what is added to the number of real tokens for the next position
    alone = {k: v[:1, :16] for k, v in inputs.items() if k != "image_grid_thw" and k != "attention_mask"} | {"image_grid_thw": inputs["image_grid_thw"][:2]}
    with small_steps(model, 1/4): assert torch.equal(read_positions(model, alone)[:, 0], by_hand)  # there need be no mask

def test_small_steps_that_end_at_an_image(model):
    "Padding right behind an image, and none."
    inputs = {k: v[:1, :14] if v.shape[1] > 3 else v[:2] for k, v in two_images(model).items()}
    for pads in (0, 4):
        given = {k: F.pad(v, (0, pads)) if v.shape[1] > 3 else v for k, v in inputs.items()}
        with small_steps(model, 1/4): positions, behind = model.model.get_rope_index(**given)
        assert torch.equal(positions[:, 0], F.pad(torch.tensor(BY_HAND)[:, :14], (0, pads))) and behind.tolist() == [[4.25 - 14]]

def test_small_steps_of_1_change_nothing(model, processor, haystack):
    inputs = prompt(processor, haystack)
    plain, asked = logits(model, inputs), ask(model, processor, haystack, batch=3)[0]
    with small_steps(model, 1): assert torch.equal(logits(model, inputs), plain) and torch.equal(ask(model, processor, haystack, batch=3)[0], asked)

def test_small_steps_are_words_alone_where_there_is_no_image(model):
    ids = torch.randint(7, 40, (2, 9))
    given = dict(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), image_grid_thw=torch.zeros(0, 3, dtype=torch.long))
    with small_steps(model, 1/4): positions, behind = model.model.get_rope_index(**given)
    assert torch.equal(positions, torch.arange(9.).expand(3, 2, -1)) and behind.tolist() == [[0], [0]]

def test_small_steps_leave_after_an_error(model, processor, haystack):
    inputs = prompt(processor, haystack)
    plain, positions, state = logits(model, inputs), read_positions(model, inputs), {k: v for k, v in vars(model.model).items()}
    with pytest.raises(ZeroDivisionError), small_steps(model, 1/4):
        assert not torch.allclose(logits(model, inputs), plain, atol=1e-3)
        1/0
    assert vars(model.model) == state and torch.equal(read_positions(model, inputs), positions) and torch.equal(logits(model, inputs), plain)

def test_small_steps_do_not_nest(model):
    with small_steps(model, 1/2):
        with pytest.raises(RuntimeError, match="changed already"), small_steps(model, 1/2): pass
        assert "get_rope_index" in vars(model.model)  # the outer block lasts

def test_small_steps_of_another_model(model, processor, haystack):
    other = copy.deepcopy(model)
    with small_steps(model, 1/4): assert torch.equal(read_positions(other, prompt(processor, haystack)), read_positions(copy.deepcopy(other), prompt(processor, haystack)))

@pytest.mark.parametrize("step", [0, -.5, 1.01, math.nan, math.inf])
def test_small_steps_refuse_values(step, model):
    with pytest.raises(ValueError, match="over 0 and at most 1 position"), small_steps(model, step): pass

def test_small_steps_refuse_models(model, monkeypatch):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no get_rope_index"), small_steps(llama(), 1/2): pass
    monkeypatch.setattr(baselines, "_DELIMITERS", (("im_start_id", "im_end_id"),))  # names that the model's config does not have
    with pytest.raises(ValueError, match="config of Qwen2_5_VLForConditionalGeneration has no im_start_id"), small_steps(model, 1/2): pass
    assert "get_rope_index" not in vars(model.model)

def test_small_steps_generate_in_a_padded_batch(model, processor):
    alone = [prompt(processor, picture_haystack(seed, n, 1, "val")) for seed, n in ((0, 2), (1, 5))]
    longest = max(x["input_ids"].shape[1] for x in alone)
    both = {k: torch.cat([F.pad(x[k], (longest - x["input_ids"].shape[1], 0)) if k in ("input_ids", "attention_mask", "mm_token_type_ids") else x[k] for x in alone]) for k in alone[0]}
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with small_steps(model, 1/4):
        together = torch.stack(model.generate(**both, **settings).logits)
        for row, inputs in enumerate(alone): torch.testing.assert_close(together[:, row], torch.cat(model.generate(**inputs, **settings).logits), atol=1e-4, rtol=0)

@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_small_steps_of_other_families(family):
    "Haystacks of unequal length together are whole prompts, and the last word is nearer by what the images take less."
    reads, make = build(family)
    other, stacks = make("student"), [picture_haystack(seed, n, 2, "val") for seed, n in ((0, 2), (1, 5))]
    yes_no = [reads.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No")]
    with small_steps(other, 1/4):
        together = ask_many(other, reads, stacks, [None, None])
        for stack, (found, _) in zip(stacks, together):
            inputs = [prompt(reads, stack, t) for t in range(2)]
            whole = torch.stack([logits(other, x, use_cache=False)[0, -1].log_softmax(-1)[yes_no] for x in inputs])
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
            last = read_positions(other, inputs[0]).max()
            grid = inputs[0]["image_grid_thw"]
    assert last == read_positions(other, inputs[0]).max() - 3/4*(grid[:, 1:].amax(1)//2 + 2).sum()

# ---------------------------------------------------------------- the changed attention

@pytest.mark.parametrize("way", [lambda m: log_scaling(m, .1, 5), lambda m: self_extend(m, 2, 5)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_models_own_again(way, attention):
    model, inputs = llama(attention=attention), dict(input_ids=torch.randint(1, 60, (1, 20)))
    before = logits(model, inputs)
    with pytest.raises(ZeroDivisionError), way(model):
        assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
        1/0
    assert torch.equal(logits(model, inputs), before) and not interceptions and not model.model._forward_hooks and not model.model.rotary_emb._forward_pre_hooks

def test_another_model_is_not_changed():
    model, other, inputs = llama(), llama(), dict(input_ids=torch.randint(1, 60, (1, 20)))
    before = logits(other, inputs)
    with self_extend(model, 2, 5): assert torch.equal(logits(other, inputs), before)

def test_changes_do_not_nest():
    model = llama()
    with log_scaling(model, .1, 5):
        with pytest.raises(RuntimeError, match="changed already"), self_extend(model, 2, 5): pass

def test_a_kernel_with_masks_of_its_own_is_refused():
    model = llama()
    with capture(model):
        with pytest.raises(ValueError, match='"laid_sdpa" cannot be changed'), log_scaling(model, .1, 5): pass

def test_capture_works_inside():
    model, inputs = llama(), dict(input_ids=torch.randint(1, 60, (1, 20)))
    with capture(model, 0) as plain: logits(model, inputs)
    with self_extend(model, 2, 5), capture(model, 0) as changed: logits(model, inputs)
    assert torch.equal(plain["q", 0], changed["q", 0])

def test_a_bias_in_the_mask_is_refused():
    model, ids = llama(), torch.randint(1, 60, (1, 4))
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~torch.ones(4, 4).bool().tril(), torch.finfo(torch.float32).min)
    with log_scaling(model, .1, 2):
        logits(model, dict(input_ids=ids, attention_mask=mask))
        mask[..., 1, 0] = .5
        with pytest.raises(ValueError, match="holds a bias"): logits(model, dict(input_ids=ids, attention_mask=mask))

# ---------------------------------------------------------------- log n

def weights(model, inputs):
    with torch.no_grad(): return model(**inputs, output_attentions=True).attentions[0]

def test_log_scaling_by_row_and_padding():
    model, ids = llama(attention="eager"), torch.randint(1, 60, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0  # padded on the left: rows of the second sample see fewer keys
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    plain = weights(model, inputs)
    with log_scaling(model, .7, 4): scaled = weights(model, inputs)
    for sample, pads in ((0, 0), (1, 5)):
        for row in range(pads, 12):
            n = row + 1 - pads
            power = plain[sample, :, row, pads:row + 1].double()**(1 + .7*math.log(max(n, 4)/4))  # softmax(f z) is softmax(z)^f, normalised
            torch.testing.assert_close(scaled[sample, :, row, pads:row + 1].double(), power/power.sum(-1, keepdim=True), atol=1e-5, rtol=0)

def test_slope_of_ssmax():
    "1/ln(start) is SSMax, divided by its value at start."
    model, ids = llama(attention="eager"), torch.randint(1, 60, (1, 30))
    with capture(model, 0) as cache: logits(model, dict(input_ids=ids))
    with log_scaling(model, 1/math.log(10), 10): scaled = weights(model, dict(input_ids=ids))
    z = cache["q", 0][0].view(2, 2, 30, 16)[:, :, -1:] @ cache["k", 0][0][:, None].mT * cache.scaling[0]
    torch.testing.assert_close(scaled[0, :, -1], (z*math.log(30)/math.log(10)).softmax(-1).flatten(0, 2))

def test_short_rows_are_left_alone():
    model, ids = llama(), torch.randint(1, 60, (1, 30))
    plain = logits(model, dict(input_ids=ids))
    with log_scaling(model, 3., 30): assert torch.equal(logits(model, dict(input_ids=ids)), plain)
    with log_scaling(model, 3., 20): scaled = logits(model, dict(input_ids=ids))
    torch.testing.assert_close(scaled[:, :20], plain[:, :20], atol=1e-6, rtol=0)
    assert not torch.allclose(scaled[:, 20:], plain[:, 20:], atol=1e-2)

@pytest.mark.parametrize("slope, start", [(-.1, 5), (math.inf, 5), (math.nan, 5), (.1, 0)])
def test_log_scaling_refuses_values(slope, start):
    with pytest.raises(ValueError, match="log scaling needs"), log_scaling(llama(), slope, start): pass

# ---------------------------------------------------------------- SelfExtend

def angles(spec, positions): return positions[spec.axis].movedim(0, -1).double()*spec.inv_freq.double()

def turned(spec, x, positions):
    "x [..., tokens, head_dim] turned by positions [3, tokens]."
    a, (u, v) = angles(spec, positions), x.chunk(2, -1)
    return torch.cat([u*a.cos() - v*a.sin(), u*a.sin() + v*a.cos()], -1)

def reference(spec, q, k, v, positions, seen, group, window, scaling):
    "SelfExtend pair by pair: unturned q, k [batch, heads, tokens, head_dim], positions [3, batch, keys], seen [batch, rows, keys]."
    out, repeat = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), q.shape[1]//k.shape[1]
    for b in range(len(q)):
        p = positions[:, b]
        for row in range(q.shape[2]):
            p_q, keys = p[:, p.shape[1] - q.shape[2] + row, None], seen[b, row].nonzero()[:, 0]
            if not len(keys): continue
            near = p_q[0] - p[0, keys] < window
            delta = torch.where(near, p_q - p[:, keys], p_q//group + window - window//group - p[:, keys]//group)
            for h in range(q.shape[1]):
                z = turned(spec, k[b, h//repeat, keys], -delta) @ q[b, h, row]*scaling
                out[b, h, row] = z.softmax(-1) @ v[b, h//repeat, keys]
    return out

EXACT = RopeSpec(2.**-torch.arange(8), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]), 16)  # products with whole positions are exact in float32

def sample(S_q=14, S_k=14, seed=0):
    "Random queries, keys and values, and positions of words, three images and words."
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, 16, generator=g, dtype=torch.float64) for heads, tokens in ((4, S_q), (2, S_k), (2, S_k)))
    t = torch.tensor([0, 1, 2, 2, 2, 2, 4, 9, 9, 9, 9, 11, 30, 31])
    y, x = t.clone(), t.clone()
    for first in (2, 7):
        y[first:first + 4] += torch.tensor([0, 0, 1, 1])
        x[first:first + 4] += torch.tensor([0, 1, 0, 1])
    positions = torch.stack([t, y, x])[:, None].expand(3, 2, -1).clone()
    positions[:, 1] += 3  # the samples of a batch need not agree
    return q, k, v, positions

@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_two_passes_are_the_pairs(group, window):
    q, k, v, positions = sample()
    rotated = [torch.stack([turned(EXACT, x[b], positions[:, b]) for b in range(2)]) for x in (q, k)]
    seen = torch.ones(14, 14).bool().tril().expand(2, -1, -1)
    found = baselines._extended(EXACT, *rotated, v, positions, None, group, window, .3)
    torch.testing.assert_close(found, reference(EXACT, q, k, v, positions, seen, group, window, .3), atol=1e-12, rtol=0)

@pytest.mark.parametrize("rows", [1, 2, 5])
def test_two_passes_with_padding_and_a_cache(rows, monkeypatch):
    "Five new rows behind nine cached keys, of which the second sample lacks three; in blocks of rows."
    monkeypatch.setattr(baselines, "_LOGITS", 2*4*14*rows)
    q, k, v, positions = sample(S_q=5)
    rotated = [torch.stack([turned(EXACT, x[b], positions[:, b, -x.shape[2]:]) for b in range(2)]) for x in (q, k)]
    seen = torch.ones(5, 14).bool().tril(9).repeat(2, 1, 1)
    seen[1, :, :3] = False
    for mask in (seen[:, None], torch.zeros(2, 1, 5, 14).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)):
        found = baselines._extended(EXACT, *rotated, v, positions, mask, 3, 6, .3)
        torch.testing.assert_close(found, reference(EXACT, q, k, v, positions, seen, 3, 6, .3), atol=1e-12, rtol=0)

def test_a_row_that_sees_nothing_is_zero():
    q, k, v, positions = sample()
    mask = torch.ones(14, 14).bool().tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :4] = False
    found = baselines._extended(EXACT, q, k, v, positions, mask, 3, 6, .3)
    assert found.isfinite().all() and (found[1, :, :4] == 0).all() and (found[1, :, 4:] != 0).any()

def test_one_axis_is_selfextend_as_published():
    "Relative positions of the paper's Figure 3: window 4, group 2, 10 tokens, read off one-hot values."
    p = torch.arange(10)
    paper = [[i - j if i - j < 4 else i//2 + 4 - 2 - j//2 for j in range(10)] for i in range(10)]
    spec = RopeSpec(torch.tensor([2.**-3]), torch.tensor([0]), 2)
    x = torch.tensor([1., 0.], dtype=torch.float64).expand(1, 1, 10, 2)
    rotated = turned(spec, x, p.expand(3, -1))
    found = baselines._extended(spec, rotated, rotated, torch.eye(10, dtype=torch.float64)[None, None], p.expand(3, 1, -1), None, 2, 4, 5.)
    direct = (torch.tensor(paper).double()/8).cos()*5
    torch.testing.assert_close(found[0, 0], direct.masked_fill(~torch.ones(10, 10).bool().tril(), -torch.inf).softmax(-1), atol=1e-12, rtol=0)

def test_memory_is_a_block_and_near_keys_are_a_band(monkeypatch):
    S, pairs, stock = 1500, [], baselines._pass
    q = torch.randn(1, 2, S, 4)
    def counted(q, k, v, seen, scaling):
        pairs.append(int(seen.any(0).any(0).sum())*q.shape[2])  # scored by this pass
        return stock(q, k, v, seen, scaling)
    monkeypatch.setattr(baselines, "_pass", counted)
    monkeypatch.setattr(baselines, "_LOGITS", 2*S*100)  # 100 rows at a time
    spec = RopeSpec(torch.tensor([1., .1]), torch.tensor([0, 0]), 4)
    with Largest() as largest: baselines._extended(spec, q, q, q, torch.arange(S).expand(3, 1, -1), None, 4, 32, .5)
    assert largest.elements <= baselines._LOGITS < 2*S*S
    near, far = sum(pairs[::2]), sum(pairs[1::2])
    assert near <= S*(32 + 100) and far <= S*(S + 100)/2  # a band; and no future beyond the block

def pairs_attention(module, query, key, value, mask, scaling, positions, spec, group, window, **kwargs):
    q, k = (torch.stack([turned(spec, x[b].double(), -positions[:, b]) for b in range(len(x))]) for x in (query, key))
    seen = torch.ones(q.shape[2], q.shape[2]).bool().tril().expand(len(q), -1, -1) if mask is None else mask[:, 0]
    return reference(spec, q, k, value.double(), positions, seen, group, window, scaling).to(value).transpose(1, 2), None

def test_a_whole_model_by_pairs(model, processor):
    "Every layer, by an attention function that knows the definition only."
    from functools import partial

    from laid_nb.rope import rope_spec
    inputs = prompt(processor, picture_haystack(0, 3, 2, "val"))
    spec = rope_spec(model)
    with self_extend(model, 3, 8): found = logits(model, inputs)
    AttentionInterface.register("pairs", partial(pairs_attention, positions=read_positions(model, inputs), spec=spec, group=3, window=8))
    AttentionMaskInterface.register("pairs", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation({"text_config": "pairs"})
    try: direct = logits(model, inputs)
    finally: model.set_attn_implementation({"text_config": "sdpa"})
    torch.testing.assert_close(found, direct, atol=1e-4, rtol=0)
    assert not torch.allclose(found, logits(model, inputs), atol=.05)

def test_inside_the_window_nothing_changes(model, processor, haystack):
    inputs = prompt(processor, haystack)
    last = int(read_positions(model, inputs).max())
    plain = logits(model, inputs)
    with self_extend(model, 5, last + 1): torch.testing.assert_close(logits(model, inputs), plain, atol=1e-4, rtol=0)
    with self_extend(model, 1, 3): torch.testing.assert_close(logits(model, inputs), plain, atol=1e-4, rtol=0)

WAYS = {"self_extend": lambda m: self_extend(m, 3, 8), "log_n": lambda m: log_scaling(m, .5, 12), "yarn": lambda m: yarn(m, 3., 40), "small_steps": lambda m: small_steps(m, .25)}

@pytest.mark.parametrize("way", WAYS)
def test_questions_on_a_cache_are_whole_prompts(way, model, processor, haystack):
    "Several questions of unequal length in one batch, on the shared keys of the images."
    yes_no = [processor.tokenizer(word).input_ids[0] for word in ("Yes", "No")]
    with WAYS[way](model):
        found = ask(model, processor, haystack, batch=3)[0]
        whole = torch.stack([logits(model, prompt(processor, haystack, t), use_cache=False)[0, -1].log_softmax(-1)[yes_no] for t in range(4)])
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    assert not torch.allclose(found, ask(model, processor, haystack)[0], atol=1e-3)

@pytest.mark.parametrize("way", WAYS)
def test_generation_is_reading_again(way, model, processor, haystack):
    inputs = prompt(processor, haystack)
    n = inputs["input_ids"].shape[1]
    with WAYS[way](model):
        out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
        more = dict(inputs, input_ids=out.sequences, attention_mask=F.pad(inputs["attention_mask"], (0, 6), value=1), mm_token_type_ids=F.pad(inputs["mm_token_type_ids"], (0, 6)))
        again = logits(model, more, use_cache=False)[0, n - 1:-1]
    torch.testing.assert_close(torch.cat(out.logits), again, atol=1e-3, rtol=0)

def test_generation_of_a_padded_batch():
    model, ids = llama(), torch.randint(1, 60, (2, 16))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :6] = 0
    with self_extend(model, 2, 4):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
        alone = model.generate(ids[1:, 6:], max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(both.logits)[:, 1], torch.stack(alone.logits)[:, 0], atol=1e-4, rtol=0)

def test_a_copied_and_a_cropped_cache():
    model, ids = llama(), torch.randint(1, 60, (1, 20))
    with self_extend(model, 2, 4):
        whole = logits(model, dict(input_ids=ids), use_cache=False)
        with torch.no_grad(): cache = model(input_ids=ids, use_cache=True).past_key_values
        cache = copy.deepcopy(cache)
        cache.crop(-5)
        rest = logits(model, dict(input_ids=ids[:, 15:], past_key_values=cache))
    torch.testing.assert_close(rest, whole[:, 15:], atol=1e-4, rtol=0)

def test_a_cache_from_outside_is_refused():
    model, ids, cache = llama(), torch.randint(1, 60, (1, 20)), DynamicCache()
    logits(model, dict(input_ids=ids, past_key_values=cache))
    with self_extend(model, 2, 4), pytest.raises(ValueError, match="holds 20 tokens, and the positions of 0"): logits(model, dict(input_ids=ids[:, :1], past_key_values=cache))

def test_a_cache_with_room_for_more_is_refused():
    model, ids = llama(), torch.randint(1, 60, (1, 20))
    with self_extend(model, 2, 4), pytest.raises(ValueError, match="keeps every token and nothing else"): model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)

def test_soft_caps_are_refused():
    gemma = Gemma2ForCausalLM._from_config(Gemma2Config(**LLAMA | dict(head_dim=16, query_pre_attn_scalar=16)), attn_implementation="eager").eval()
    with self_extend(gemma, 2, 4), pytest.raises(ValueError, match="uses softcap"): logits(gemma, dict(input_ids=torch.randint(1, 60, (1, 8))))

@pytest.mark.parametrize("group, window", [(0, 4), (2, 0), (2, 4.5), (-1, 4)])
def test_self_extend_refuses_values(group, window):
    with pytest.raises(ValueError, match="1 position or more"), self_extend(llama(), group, window): pass

def test_bfloat16_keeps_positions():
    "Large positions are turned in float32, whatever the model computes in."
    model = llama()
    ids, positions = torch.randint(1, 60, (1, 12)), 20_000 + 37*torch.arange(12)[None]
    with self_extend(model, 1, 4): exact = logits(model, dict(input_ids=ids, position_ids=positions))
    half = copy.deepcopy(model).bfloat16()
    plain = logits(half, dict(input_ids=ids, position_ids=positions))
    with self_extend(half, 1, 4): rounded = logits(half, dict(input_ids=ids, position_ids=positions))
    assert (rounded.float() - exact).abs().mean() < 1.5*(plain.float() - exact).abs().mean() + 1e-3

# ---------------------------------------------------------------- attention sorting

def eager_shares(model, arguments, groups, layers=slice(None)):
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad(): maps = torch.stack(model(**arguments, output_attentions=True).attentions)[layers].mean((0, 2))
    finally: model.set_attn_implementation({"text_config": "sdpa"})
    mask = arguments["attention_mask"]
    rows = [maps[b, mask[b].nonzero().max()] for b in range(len(mask))]
    return torch.stack([torch.stack([row[g == i].sum() for i in range(int(groups.max()) + 1)]) for row, g in zip(rows, groups)])

@pytest.mark.parametrize("layers, chosen", [(None, slice(None)), ("last", slice(1, 2)), ([0], slice(0, 1))])
def test_image_attention_is_the_eager_rows(model, processor, layers, chosen):
    batch = HaystackCollator(processor, turns=1)([picture_haystack(1, 2, 2, "val"), picture_haystack(2, 5, 2, "val")])
    arguments, groups = image_inputs(model, batch, "student") | {"position_ids": read_positions(model, batch)}, owners(model, batch)
    found = image_attention(model, arguments, groups, layers)
    torch.testing.assert_close(found, eager_shares(model, arguments, groups, chosen))
    assert (found[0, 2:] == 0).all() and (found[1] > 0).all()

def test_image_attention_of_left_padding(model, processor, haystack):
    inputs = prompt(processor, haystack)
    padded = {k: F.pad(v, (3, 0)) if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()}
    alone = image_attention(model, inputs | {"position_ids": read_positions(model, inputs)}, owners(model, inputs))
    found = image_attention(model, padded | {"position_ids": F.pad(read_positions(model, inputs), (3, 0))}, F.pad(owners(model, inputs), (3, 0), value=-1))
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-4)

def test_image_attention_makes_no_square(model, processor):
    inputs = prompt(processor, picture_haystack(0, 150, 2, "val"))
    tokens = inputs["input_ids"].shape[1]
    features = precompute_prompts(model, processor, [picture_haystack(0, 150, 2, "val")], progress=False)
    batch = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"student_features": next(v for k, v in features.items() if k != "tower")["features"]}
    arguments, groups = image_inputs(model, batch, "student") | {"position_ids": read_positions(model, inputs)}, owners(model, inputs)
    with Largest() as largest: image_attention(model, arguments, groups)
    assert largest.elements < tokens**2/4

def test_image_attention_refuses(model, processor, haystack):
    inputs = prompt(processor, haystack)
    groups = owners(model, inputs)
    with pytest.raises(ValueError, match="groups have shape"): image_attention(model, inputs, groups[:, 1:])
    with pytest.raises(ValueError, match="name no image"): image_attention(model, inputs, torch.full_like(groups, -1))
    with pytest.raises(ValueError, match="the inputs"): image_attention(model, {k: v for k, v in inputs.items() if k != "attention_mask"}, groups[:, 1:])

def test_sorting_moves_needles_along():
    haystack = picture_haystack(4, 9, 3, "val", "multi")
    shares = torch.tensor([.3, .1, .1, .9, .0, .2, .8, .1, .5])
    for turn, question in enumerate(haystack.questions):
        better = _sort_images(haystack, turn, shares)
        assert better.images == tuple(haystack.images[i] for i in (4, 1, 2, 7, 5, 0, 8, 6, 3))  # equal ones keep their order
        assert {better.images[i] for i in better.questions[0].needles} == {haystack.images[i] for i in question.needles} and list(better.questions[0].needles) == sorted(better.questions[0].needles)
        assert better.questions == (replace(question, needles=better.questions[0].needles),) and better.id == haystack.id

def test_sorting_needs_a_share_for_each_image(haystack):
    with pytest.raises(ValueError, match=r"shape \(5,\).*6 images"): _sort_images(haystack, 0, torch.rand(5))

@pytest.mark.parametrize("rounds", [1, 2])
def test_ask_sorted_by_hand(model, processor, haystack, rounds):
    found = ask_sorted(model, processor, haystack, [2, 0], rounds=rounds)[0]
    for line, turn in zip(found, (2, 0)):
        stack = replace(haystack, questions=(haystack.questions[turn],))
        for _ in range(rounds):
            inputs = prompt(processor, stack)
            stack = _sort_images(stack, 0, eager_shares(model, inputs, owners(model, inputs))[0])
        torch.testing.assert_close(line, ask(model, processor, stack)[0][0], atol=1e-5, rtol=0)

def test_ask_sorted_with_pictures_seen_before(model, processor, haystack):
    seen = precompute_prompts(model, processor, [haystack], progress=False)[haystack.id]
    a, b = (ask_sorted(model, processor, haystack, max_new_tokens=3, prompt="Look: ", features=s, rounds=2) for s in (None, seen))
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)
    assert a[1] == b[1] and len(a[1]) == 4
    assert not torch.allclose(a[0], ask_sorted(model, processor, haystack, rounds=2)[0], atol=1e-5)  # the prompt is read

def test_ask_sorted_takes_questions_with_unequal_numbers_of_choices(model, processor, haystack):
    few, many = (replace(q, choices=c, answer="A", kind="choice", wording=q.text) for q, c in zip(haystack.questions, (("A", "B"), ("A", "B", "C"))))
    found = ask_sorted(model, processor, replace(haystack, questions=(few, many)))[0]
    assert found.shape == (2, 3) and found[0, 2] == -math.inf and found[1].isfinite().all()
    for i, q in enumerate((few, many)):
        alone = ask_sorted(model, processor, replace(haystack, questions=(q,)))[0][0]
        torch.testing.assert_close(found[i, :len(q.choices)], alone)

def test_ask_sorted_refuses(model, processor, haystack, tmp_path):
    with pytest.raises(ValueError, match="1 round"): ask_sorted(model, processor, haystack, rounds=0)
    for i, size in enumerate((56, 112)): Image.new("RGB", (size, 56), (i*99, 0, 0)).save(tmp_path/f"{i}.png")
    mixed = Haystack((tmp_path/"0.png", tmp_path/"1.png"), (Question("cup", "dog", "single", True, (0,)),), "mixed")
    ask_sorted(model, processor, mixed)
    with pytest.raises(ValueError, match="pictures of one size"): ask_sorted(model, processor, mixed, features=precompute_prompts(model, processor, [mixed], progress=False)["mixed"])

# ---------------------------------------------------------------- evaluation

@pytest.mark.parametrize("method, values, text", [("yarn", (2., 40), "yarn 2:40"), ("self_extend", (3, 8), "self_extend 3:8"), ("log_n", (.5, 12), "log_n 0.5:12"), ("small_steps", (.25,), "small_steps 0.25"), ("sort", (1,), "sort 1")])
def test_evaluation_names_its_method(method, values, text, model, processor, haystack, tmp_path):
    path = tmp_path/"a.jsonl"
    records = evaluate_with(method, values, model, processor, [haystack], path, progress=False)
    if method == "sort": direct = ask_sorted(model, processor, haystack)[0]
    else:
        with baselines._METHODS[method](model, *values): direct = ask(model, processor, haystack)[0]
    np.testing.assert_allclose([r["margin"] for r in records], (direct[:, 0] - direct[:, 1]).tolist(), atol=1e-4)
    assert read_records(path)[0]["method"] == text
    with pytest.raises(ValueError, match="another .*method"): evaluate(model, processor, [haystack], path, progress=False)
    assert len(evaluate_with(method, values, model, processor, [haystack], path, progress=False)) == 4  # goes on

def test_a_file_of_the_plain_model_is_not_mixed_with_a_method(model, processor, haystack, tmp_path):
    path = tmp_path/"a.jsonl"
    evaluate(model, processor, [haystack], path, progress=False)
    with pytest.raises(ValueError, match="another method"): evaluate_with("log_n", (.5, 12), model, processor, [haystack], path, progress=False)
    path.write_text(path.read_text().replace(', "method": ""', "", 1))  # a file from before there were methods goes on as a plain one
    assert "method" not in read_records(path)[0] and len(evaluate(model, processor, [haystack], path, progress=False)) == 4

def test_methods_of_the_experiments(model, processor, haystack, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/"experiments"))
    import training_free
    assert training_free.TRIED.keys() == training_free.NAMES.keys() == {*baselines._METHODS, "sort"}
    for name, way in training_free.methods({"yarn": [2.], "self_extend": [3, 8], "log_n": [.5, 12], "small_steps": [.25], "sort": [1]}).items():
        records = way(model, processor, [haystack], tmp_path/f"{name}.jsonl")
        assert len(records) == 4 and read_records(tmp_path/f"{name}.jsonl")[0]["method"]
