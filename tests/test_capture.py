"Capture against eager attention's own weights, in float64, on tiny random models of many families."
import copy
import gc
import weakref

import pytest
import torch
from torch.nn.functional import softmax
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    T5Config,
    T5ForConditionalGeneration,
)

from families import checkpointing
from laid_nb import capture as module
from laid_nb.capture import _extend_heads, capture, captures_of, intercept, residual_streams, text_attentions

TEXT = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=100., mrope_section=[1, 1, 2]))
CLIP = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
QWEN = dict(depth=1, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
IDS = dict(image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53)
FAMILIES = dict(
    llama=TEXT, smollm3=TEXT | dict(no_rope_layers=[1, 0]), qwen2=TEXT, qwen3=TEXT, mistral=TEXT, phi3=TEXT, glm=TEXT,
    qwen2_vl=dict(text_config=TEXT | MROPE, vision_config=QWEN | dict(embed_dim=16, hidden_size=32, mlp_ratio=1), **IDS),
    qwen2_5_vl=dict(text_config=TEXT | MROPE, vision_config=QWEN | dict(hidden_size=16, intermediate_size=16, out_hidden_size=32, window_size=56, fullatt_block_indexes=[0]), **IDS),
    qwen3_vl=dict(text_config=TEXT | MROPE, vision_config=QWEN | dict(hidden_size=16, intermediate_size=16, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]), **IDS),
    glm4v=dict(text_config=TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=100., partial_rotary_factor=.5, mrope_section=[1, 1, 0])),
               vision_config=QWEN | dict(hidden_size=16, intermediate_size=16, out_hidden_size=32, image_size=28), **IDS),
    llava=dict(text_config=TEXT | dict(model_type="llama"), vision_config=CLIP | dict(model_type="clip_vision_model"), image_token_index=50),
    internvl=dict(text_config=TEXT | dict(model_type="qwen2"), vision_config=CLIP | dict(image_size=[28, 28], patch_size=[14, 14]), image_token_id=50),
    gemma3=dict(text_config=TEXT | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=5),
                vision_config=CLIP | dict(model_type="siglip_vision_model"), mm_tokens_per_image=4, image_token_index=50),
    paligemma=dict(text_config=TEXT | dict(model_type="gemma"), vision_config=CLIP | dict(model_type="siglip_vision_model"), image_token_index=50),
    smolvlm=dict(text_config=TEXT | dict(model_type="llama"), vision_config=CLIP, image_token_id=50, scale_factor=2),
    idefics3=dict(text_config=TEXT | dict(model_type="llama"), vision_config=CLIP, image_token_id=50, scale_factor=2),
    mllama=dict(text_config=TEXT | dict(model_type="mllama_text_model", cross_attention_layers=[1], num_hidden_layers=3, rope_theta=100.),
                vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_global_layers=1, attention_heads=2, image_size=28,
                                   patch_size=14, max_num_tiles=1, vision_output_dim=32, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]]), image_token_index=50),
)

def build(family, attn="eager", seed=0):
    "A random float64 model of `family`."
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **copy.deepcopy(FAMILIES[family]))
    auto = AutoModelForImageTextToText if config.get_text_config() is not config else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attn).eval().double()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .2)       # sharp attention and biases that are not zero
    return model

def batch(padding, n=9, pad=3):
    "Two rows of text, the second padded on the given side."
    ids = torch.randint(3, 49, (2, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, n, dtype=torch.long)
    if padding == "left": mask[1, :pad] = 0
    if padding == "right": mask[1, -pad:] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)

def visible(mask, window=None):
    "[batch, 1, n, n]: causal, not padding, within the window."
    i = torch.arange(mask.shape[1])
    see = i[:, None] >= i
    if window: see = see & (i[:, None] - i < window)
    return see & mask[:, None, None].bool()

def weights(cache, layer, see):
    q, k = cache["q", layer], cache["k", layer]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * cache.scaling[layer]
    return scores.masked_fill(~see, -torch.inf).softmax(-1)

@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch):
    """Eager attention takes its softmax in float32; here in the model's own float64. (In float32 the mask of a float64 model, the smallest
    float64, becomes -inf, so stock eager gives NaN in rows of left padding.)"""
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim))

@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_attention(family, padding):
    model, inputs = build(family), batch(padding)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
        with capture(model) as cache: model(**inputs)
    layers = [0, 2] if family == "mllama" else [0, 1]
    assert cache.layers == layers
    real = inputs["attention_mask"].bool()
    for a, l in zip(expected, layers):
        see = visible(inputs["attention_mask"], window=4 if family == "gemma3" and l == 0 else None)
        torch.testing.assert_close(weights(cache, l, see).transpose(1, 2)[real], a.transpose(1, 2)[real], rtol=0, atol=1e-10)

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llama", "smolvlm"])
def test_logits_do_not_notice(family, padding, attn):
    model, inputs = build(family, attn), batch(padding)
    before = model(**inputs).logits
    with capture(model): inside = model(**inputs).logits
    assert torch.equal(before, inside) and torch.equal(before, model(**inputs).logits)

@pytest.mark.parametrize("padding", ["none", "left"])
def test_sdpa_and_eager_capture_the_same(padding):
    got = []
    for attn in ("sdpa", "eager"):
        model, inputs = build("qwen2_5_vl", attn), batch(padding)
        with capture(model, 1) as cache: model(**inputs)
        got.append(cache["q", 1].transpose(1, 2)[inputs["attention_mask"].bool()])
    torch.testing.assert_close(*got, rtol=0, atol=1e-5)

def test_images_leave_the_vision_tower_alone():
    model = build("qwen2_5_vl", "sdpa")
    ids = torch.tensor([[3, 52, 50, 53, 4, 5, 52, 50, 53, 6]])
    inputs = dict(input_ids=ids, mm_token_type_ids=(ids == 50).int(), image_grid_thw=torch.tensor([[1, 2, 2]] * 2), pixel_values=torch.randn(8, 3 * 2 * 14 * 14).double())
    seen, vision = [], model.model.visual
    hook = vision.register_forward_hook(lambda m, a, o: seen.append((m.config._attn_implementation, o.pooler_output if hasattr(o, "pooler_output") else o)))
    model(**inputs)
    with capture(model, bias=torch.full((1, 1, 10, 10), 3.).tril()) as cache: model(**inputs)
    hook.remove()
    assert [s[0] for s in seen] == ["sdpa", "sdpa"]
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=0, atol=0)
    assert cache["q", 0].shape == (1, 4, 10, 8) and cache["k", 0].shape == (1, 2, 10, 8)

def test_cross_attention_is_left_alone():
    "Layer 1 of this Mllama looks at image states: not captured, not biased."
    text = build("mllama").model.language_model
    x, states = torch.randn(1, 5, 32).double(), torch.randn(1, 7, 32).double()
    def run(): return text(inputs_embeds=x, cross_attention_states=states, use_cache=False).last_hidden_state
    before = run()
    with capture(text) as cache: inside = run()
    assert torch.equal(before, inside) and cache.layers == [0, 2]
    with capture(text, [], bias=torch.rand(1, 1, 5, 5)): assert run().shape == before.shape      # a bias of 5 x 5 would not fit the 7 image states

@pytest.mark.parametrize("family", ["smollm3", "mllama", "qwen3_vl", "gemma3"])
def test_text_attentions_are_those_that_are_captured(family):
    "With RoPE or without it; neither cross-attention nor the vision tower."
    model = build(family)
    with capture(model) as cache: model(**batch("none"))
    found = text_attentions(model)
    assert list(found) == cache.layers and all(m.layer_idx == layer and m.config is model.config.get_text_config() for layer, m in found.items())

# --- interception -----------------------------------------------------------------------------------------------------------------------------
def halve(call, module, query, *rest, **kwargs): return call(module, query / 2, *rest, **kwargs)

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "mllama"])
def test_a_change_stands_for_the_stock_function(family, padding, attn):
    "Halved queries, against q_proj halved; both masks and cross-attention as they were."
    model, other, inputs = build(family, attn), build(family, attn), batch(padding)
    with torch.no_grad():
        for m in text_attentions(other).values():
            for p in (m.qkv_proj if hasattr(m, "qkv_proj") else m.q_proj).parameters(): p.mul_(.5)
        before = model(**inputs).logits
        with intercept(model, halve): inside = model(**inputs).logits
        assert torch.equal(inside, other(**inputs).logits) and torch.equal(model(**inputs).logits, before) and not torch.allclose(inside, before)

def test_interceptions_of_other_names_nest_and_the_capture_among_them():
    model, inputs = build("qwen2_5_vl", "sdpa"), batch("left")
    double = {layer: lambda q: 2 * q for layer in (0, 1)}
    with torch.no_grad():
        before = model(**inputs).logits
        with intercept(model, halve), capture(model, gain=double) as cache:
            assert torch.equal(model(**inputs).logits, before)                # doubled, recorded, halved
            with intercept(model, halve, "outer"): assert not torch.allclose(model(**inputs).logits, before)
            assert model.config.text_config._attn_implementation == "laid_changed_sdpa" and captures_of(model) == [cache]
        with capture(model) as plain: model(**inputs)
    assert torch.equal(cache["q", 0], plain["q", 0]) and not module._changes and captures_of(model) == []

def test_a_name_is_taken_once_and_only_by_its_kernels():
    model, other = build("llava", "sdpa"), build("llava", "eager")
    with intercept(model, halve):
        for again in (model, model.model.language_model):
            with pytest.raises(RuntimeError, match=f"the attention of {type(again).__name__} is changed already"):
                with intercept(again, halve): pass
        with intercept(other, halve, kernels=("eager",)): assert len(module._changes) == 2
    with pytest.raises(ValueError, match='"sdpa" cannot be changed: load the model with attn_implementation="eager" or "flex"'):
        with intercept(model, halve, kernels=("eager", "flex")): pass
    assert not module._changes and set(implementations(model)) == {"sdpa"}

def test_an_interception_leaves_after_an_error():
    model = build("gemma3", "sdpa")
    before = implementations(model)
    with pytest.raises(ZeroDivisionError), intercept(model, lambda *args, **kwargs: 1 / 0): model(**batch("none"))
    assert implementations(model) == before and not module._changes

def test_a_dense_bias_is_refused_inside_an_interception():
    "Its kernel has another name, so nobody knows whether it takes a mask; factors enter as wide heads."
    model, inputs, (rows, keys) = build("llama", "sdpa"), batch("none"), factors()
    with torch.no_grad(), capture(model, [], bias=(rows, keys)): expected = model(**inputs).logits
    with torch.no_grad(), intercept(model, lambda call, *args, **kwargs: call(*args, **kwargs)), capture(model, [], bias=(rows, keys)) as cache:
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
        cache.bias = (rows @ keys.mT)[:, None]
        with pytest.raises(ValueError, match='"changed_sdpa" takes no dense bias'): model(**inputs)

# --- before RoPE ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl", "gemma3", "glm", "glm4v"])
def test_unrotated_equals_projection(family):
    "rotated=False is the output of q_proj (of q_norm, where the family has one)."
    model, inputs, out = build(family), batch("left"), {}
    attention = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 1 and hasattr(m, "q_proj"))
    hooks = [m.register_forward_hook(lambda m, a, o, key=name[0]: out.__setitem__(key, o)) for name, m in attention.named_children()
             if name in (("q_norm", "k_norm") if hasattr(attention, "q_norm") else ("q_proj", "k_proj"))]
    with torch.no_grad(), capture(model, 1, rotated=False) as cache: model(**inputs)
    for h in hooks: h.remove()
    for kind, heads in (("q", 4), ("k", 2)):
        o = out[kind] if out[kind].dim() == 4 else out[kind].unflatten(-1, (-1, 8))
        o = o if o.shape[1] == heads else o.transpose(1, 2)
        torch.testing.assert_close(cache[kind, 1], o, rtol=0, atol=2e-6)                    # cos and sin are float32

def test_unrotated_undoes_yarn_amplitude():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **TEXT | dict(rope_parameters=dict(rope_type="yarn", factor=4., rope_theta=100., original_max_position_embeddings=16)))
    model, out = AutoModelForCausalLM.from_config(config).eval().double(), []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, o: out.append(o))
    with capture(model, 0, rotated=False) as cache: model(**batch("none"))
    hook.remove()
    torch.testing.assert_close(cache["q", 0], out[0].unflatten(-1, (-1, 8)).transpose(1, 2), rtol=0, atol=2e-6)

def test_unrotate_refuses_decoding():
    model, ids = build("llama"), batch("none")["input_ids"]
    with capture(model, rotated=False) as cache:
        past = model(ids[:, :-1], use_cache=True).past_key_values
        model(ids[:, -1:], past_key_values=past)
    with pytest.raises(ValueError, match="1 queries and 9 keys"): cache["q", 0]

def test_unrotated_needs_rope():
    config = AutoConfig.for_model("gpt2", n_embd=16, n_head=2, n_layer=2, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with capture(model, rotated=False) as cache: model(batch("none")["input_ids"])
    with pytest.raises(RuntimeError, match="no RoPE to undo"): cache["q", 0]

# --- gradient ---------------------------------------------------------------------------------------------------------------------------------
def test_gradient_equals_handwritten_attention():
    "d loss / d q_proj.weight and d loss / d input, against q_proj and RoPE written out."
    model, inputs = build("qwen2_5_vl", "sdpa"), batch("left")
    attention = model.model.language_model.layers[1].self_attn
    probe, seen = torch.randn(2, 4, 9, 8, dtype=torch.float64), {}
    hook = attention.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    with capture(model, 1) as cache:
        model(**inputs)
        got = torch.autograd.grad((cache["q", 1] * probe).sum(), [attention.q_proj.weight, attention.q_proj.bias, seen["hidden_states"]])
    hook.remove()
    x = seen["hidden_states"].detach().requires_grad_()
    cos, sin = (t.double()[:, None] for t in seen["position_embeddings"])
    q = attention.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
    turned = q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin
    expected = torch.autograd.grad((turned * probe).sum(), [attention.q_proj.weight, attention.q_proj.bias, x])
    for a, b in zip(got, expected): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

def losses(model, inputs, cache):
    "An LM loss and a loss on captured queries and keys together."
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    return out.loss + sum(cache[x, l].pow(2).mean() for x in "qk" for l in cache.layers)

def gradients(model, inputs, **kw):
    model.zero_grad()
    with capture(model, **kw) as cache:
        loss = losses(model, inputs, cache)
        q = cache["q", 0]
        loss.backward()
        if cache.rotated: assert cache["q", 0] is q                          # the second run did not replace the first
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]

@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_checkpointing_gives_the_same_gradient(rotated, biased):
    model, inputs = build("qwen2_5_vl", "sdpa").train(), batch("left")
    kw = dict(rotated=rotated, bias=torch.rand(2, 1, 9, 9) if biased else None)
    plain = gradients(model, inputs, **kw)
    checkpointing(model)()
    again = gradients(model, inputs, **kw)
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

def test_reentrant_checkpointing_refused_on_entry():
    model = build("llama", "sdpa").train()
    checkpointing(model)({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        with capture(model): pass
    with capture(model, []): pass                                             # nothing recorded, nothing to lose
    model.eval()
    with capture(model): pass                                                 # a teacher in eval mode never checkpoints

def test_reentrant_checkpointing_refused_in_backward():
    model, inputs = build("llama", "sdpa").train(), batch("none")
    with capture(model) as cache:
        checkpointing(model)({"use_reentrant": True})
        loss = losses(model, inputs, cache)
        with pytest.raises(RuntimeError, match="use_reentrant"): loss.backward()

# --- lifetime ---------------------------------------------------------------------------------------------------------------------------------
def implementations(model): return [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]

@pytest.mark.parametrize("family", ["llama", "llava", "gemma3"])
def test_restored_after_exit_and_exception(family):
    model = build(family, "sdpa")
    before = implementations(model)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ZeroDivisionError):
        with capture(model, rotated=False):
            assert implementations(model) != before
            1 / 0
    assert implementations(model) == before and sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with capture(model): pass
    assert implementations(model) == before

def test_refused_entry_changes_nothing():
    model = build("llama", "sdpa")
    for bad, error in ((7, ValueError), (-1, ValueError), ([0, 2], ValueError), ("first", TypeError), (1.5, TypeError)):
        with pytest.raises(error):
            with capture(model, bad): pass
    assert set(implementations(model)) == {"sdpa"}

def test_nested_capture_refused():
    model = build("llava", "sdpa")
    with capture(model) as cache:
        for again in (model, model.model.language_model):
            with pytest.raises(RuntimeError, match="already being captured"):
                with capture(again): pass
        model(**batch("none"))
        assert cache.layers == [0, 1]
    with capture(model): pass

def test_two_models_at_once():
    a, b, inputs = build("llama", "sdpa"), build("qwen2_5_vl", "eager", seed=5), batch("left")
    alone = []
    for m in (a, b):
        with capture(m, "last") as cache: m(**inputs)
        alone.append(cache["k", 1])
    first, second = capture(a, "last"), capture(b, "last")
    ca, cb = first.__enter__(), second.__enter__()
    a(**inputs), b(**inputs)
    first.__exit__(None, None, None)                                          # not in the order of opening
    a.zero_grad(), b(**inputs)
    second.__exit__(None, None, None)
    assert torch.equal(ca["k", 1], alone[0]) and torch.equal(cb["k", 1], alone[1])
    assert set(implementations(a)) == {"sdpa"} and set(implementations(b)) == {"eager"}

def test_memory_is_released():
    model = build("llama", "sdpa")
    with capture(model) as cache: model(**batch("none"))
    ref = weakref.ref(cache)
    del cache, model
    gc.collect()
    assert ref() is None

# --- what is in it ----------------------------------------------------------------------------------------------------------------------------
def test_layers_clear_and_names():
    model, inputs = build("llama", "sdpa"), batch("none")
    with capture(model, [1]) as cache:
        with pytest.raises(RuntimeError, match="nothing captured"): cache["q", 1]
        model(**inputs)
        assert cache.layers == [1]
        with pytest.raises(KeyError, match="layer 0 was not captured"): cache["q", 0]
        with pytest.raises(KeyError, match="holds"): cache["v", 1]
        cache.clear()
        with pytest.raises(RuntimeError, match="nothing captured"): cache.layers
        model(**inputs)
    assert cache["q", 1].shape == (2, 4, 9, 8)
    with capture(model, []) as cache: model(**inputs)
    assert cache.layers == []

def test_model_outside_the_interface():
    config = AutoConfig.for_model("mpt", d_model=16, n_heads=2, n_layers=2, vocab_size=60, max_seq_len=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    with capture(model) as cache: model(batch("none")["input_ids"])
    with pytest.raises(RuntimeError, match="does not go through transformers' AttentionInterface"): cache.layers

def test_wrong_models():
    with pytest.raises(TypeError, match="Linear"):
        with capture(torch.nn.Linear(2, 2)): pass
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="encoder-decoder"):
        with capture(model): pass

def test_decoding_with_cache():
    model, inputs = build("qwen2_5_vl", "sdpa"), batch("left")
    with capture(model) as cache:
        whole = model(**inputs).logits[:, -1:]
        q, k, real = cache["q", 1], cache["k", 1], inputs["attention_mask"].bool()
        past = model(inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1], use_cache=True).past_key_values
        step = model(inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], past_key_values=past).logits
    torch.testing.assert_close(step, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(cache["q", 1], q[:, :, -1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cache["k", 1].transpose(1, 2)[real], k.transpose(1, 2)[real], rtol=0, atol=1e-5)

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generate_inside_capture(attn):
    model, inputs = build("llama", attn), batch("left")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with capture(model): inside = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, inside)

# --- residual streams -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen2_5_vl", "gemma3"])
def test_streams_are_the_hidden_states(family):
    "After each layer, with RoPE or without (layer 1 of SmolLM3 here); a model's own list has the norm on the last one."
    model, inputs = build(family), batch("left")
    with torch.no_grad(), residual_streams(model, [0, 1]) as streams: states = model(**inputs, output_hidden_states=True).hidden_states
    norm = getattr(model.model, "language_model", model.model).norm
    assert torch.equal(streams[0], states[1]) and torch.equal(norm(streams[1]), states[2])

def test_streams_end_with_their_block():
    model, inputs = build("llama"), batch("none")
    def hooks(): return sum(len(m._forward_hooks) for m in model.modules())
    before = hooks()
    with pytest.raises(ZeroDivisionError), residual_streams(model, [1]) as streams:
        model(**inputs)
        assert list(streams) == [1] and streams[1].requires_grad
        1 / 0
    with pytest.raises(KeyError):
        with residual_streams(model, [0, 2]): pass
    assert hooks() == before

# --- bias -------------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "gemma3"])
def test_bias_is_added_to_the_logits(family, attn, padding):
    "Weights of the first layer under a random bias, from captured q and k; eager returns its own, sdpa is compared by its logits."
    model, inputs = build(family, attn), batch(padding)
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), capture(model, 0, bias=bias) as cache:
        if attn == "eager":
            out = model(**inputs, output_attentions=True).attentions[0]
            see = visible(inputs["attention_mask"], window=4 if family == "gemma3" else None)
            q, k = cache["q", 0], cache["k", 0]
            expected = ((q @ k.repeat_interleave(2, 1).mT) * cache.scaling[0] + bias).masked_fill(~see, -torch.inf).softmax(-1)
            torch.testing.assert_close(out.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=0, atol=1e-10)
        else:
            logits = model(**inputs).logits
            model_eager = build(family, "eager")
            with capture(model_eager, [], bias=bias): expected = model_eager(**inputs).logits
            torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
            cache.bias = None
            assert not torch.allclose(model(**inputs).logits[real], expected[real], atol=1e-3)

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_zero_bias_changes_nothing(attn):
    model, inputs = build("gemma3", attn), batch("left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs).logits[real]
        with capture(model, [], bias=torch.zeros(1, 1, 9, 9)): zero = model(**inputs).logits[real]
    torch.testing.assert_close(zero, plain, rtol=0, atol=1e-6)

def test_half_precision_bias_keeps_padded_rows_finite():
    model, inputs = build("llama", "eager").to(torch.float16), batch("left")
    with capture(model, [], bias=torch.full((1, 1, 1, 9), -5.)): logits = model(**inputs).logits
    assert torch.isfinite(logits).all()

def test_wrong_bias_shape():
    model = build("llama", "sdpa")
    with capture(model, [], bias=torch.zeros(1, 1, 8, 8)), pytest.raises(ValueError, match=r"\[1, 1, 8, 8\].*\[2, 1, 9, 9\]"): model(**batch("none"))
    with capture(model, [], bias=torch.zeros(9, 9)), pytest.raises(ValueError, match=r"\[9, 9\]"): model(**batch("none"))

def maskless(family="llama"):
    "A model whose kernel takes no mask: it stops at one."
    def kernel(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None and key.shape[-1] == value.shape[-1] == query.shape[-1]
        return AttentionInterface()["sdpa"](module, query, key, value, None, **kwargs)
    AttentionInterface.register("flash_test", kernel)
    AttentionMaskInterface.register("flash_test", AttentionMaskInterface()["flash_attention_2"])
    model = build(family, "sdpa")
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values(): config._attn_implementation = "flash_test"
    return model

def test_dense_bias_refused_where_the_kernel_takes_no_mask():
    model = maskless()
    with capture(model, []) as cache:
        model(**batch("none"))
        cache.bias = torch.zeros(1, 1, 9, 9)
        with pytest.raises(ValueError, match='"flash_test" takes no dense bias'): model(**batch("none"))

# --- factors of a bias ------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def always_wide(monkeypatch):
    "These prompts are short; sdpa appends the factors to the heads all the same."
    monkeypatch.setattr("laid_nb.capture._wide_from", 0)

def factors(n=9, images=3, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    return torch.randn(batch, n, images, generator=g, dtype=torch.float64).to(dtype), torch.randn(batch, n, images, generator=g, dtype=torch.float64).to(dtype)

@pytest.mark.parametrize("head_dim, value_dim, images", [(8, 8, 8), (8, 8, 1), (6, 4, 3), (8, 24, 2)])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_extended_heads_hold_the_bias(head_dim, value_dim, images, dtype, atol):
    "Outputs and gradients of grouped attention, against softmax(s q k^T + rows keys^T) v written out."
    g, (rows, keys), s = torch.Generator().manual_seed(3), factors(images=images, dtype=dtype), .3
    x = [torch.randn(2, h, 9, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for h, d in ((4, head_dim), (2, head_dim), (2, value_dim))]
    q, k, v = _extend_heads(*x, rows, keys, s)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] < max(head_dim + images, value_dim) + 8
    wide = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s, enable_gqa=True)[..., :value_dim]
    k, v = (t.repeat_interleave(2, 1) for t in x[1:])
    logits = s * x[0] @ k.mT + (rows @ keys.mT)[:, None]
    expected = softmax(logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf), -1) @ v
    torch.testing.assert_close(wide, expected, rtol=0, atol=atol)
    probe = torch.randn(expected.shape, generator=g, dtype=torch.float64).to(dtype)
    for a, b in zip(torch.autograd.grad((wide * probe).sum(), x), torch.autograd.grad((expected * probe).sum(), x)):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)

@pytest.mark.parametrize("attn, padding", [*((a, p) for a in ("sdpa", "eager") for p in ("none", "left", "right")), ("flash_test", "none")])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "gemma3"])
def test_factors_equal_the_dense_bias(family, attn, padding, always_wide):
    "Gemma 3 scales by query_pre_attn_scalar and not by its head_dim, and slides in layer 0 (over all 4 tokens here)."
    model, inputs = maskless(family) if attn == "flash_test" else build(family, attn), batch(padding, n=4 if attn == "flash_test" else 9, pad=2)
    real, (rows, keys) = inputs["attention_mask"].bool(), factors(inputs["input_ids"].shape[1])
    reference = build(family, "sdpa" if attn == "flash_test" else attn)
    with torch.no_grad(), capture(model, [], bias=(rows, keys)), capture(reference, [], bias=(rows @ keys.mT)[:, None]) as dense:
        logits, expected = model(**inputs).logits[real], reference(**inputs).logits[real]
        dense.bias = None
        assert not torch.allclose(reference(**inputs).logits[real], expected, atol=1e-3)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)                          # the families' RMSNorm is float32

def test_factors_leave_the_captured_tensors_alone(always_wide):
    model, inputs = build("llama", "sdpa"), batch("none")
    with torch.no_grad(), capture(model, 0) as plain: model(**inputs)
    with torch.no_grad(), capture(model, 0, bias=factors(batch=1)) as biased: model(**inputs)
    assert torch.equal(plain["q", 0], biased["q", 0]) and torch.equal(plain["k", 0], biased["k", 0]) and plain.scaling == biased.scaling

def test_long_factors_without_padding_make_no_mask():
    "Mask elements that the kernel is given: none from 1,024 keys on, [tokens, tokens] below and for a dense bias."
    model, masks = build("llama", "sdpa"), []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    def watched(q, k, v, attn_mask=None, **kw):
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return sdpa(q, k, v, attn_mask=attn_mask, **kw)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for n, expected in ((1024, 0), (1023, 1023**2)):
            rows, keys = factors(n, batch=1)
            with capture(model, [], bias=(rows, keys)) as cache:
                model(input_ids=torch.full((1, n), 5), use_cache=False)
                cache.bias = (rows @ keys.mT)[:, None]
                model(input_ids=torch.full((1, n), 5), use_cache=False)
            assert masks == [expected] * 2 + [n * n] * 2
            masks.clear()

def test_factors_under_checkpointing(always_wide):
    model, inputs = build("qwen2_5_vl", "sdpa").train(), batch("none")
    plain = gradients(model, inputs, bias=factors())
    checkpointing(model)()
    for a, b in zip(plain, gradients(model, inputs, bias=factors()), strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

@pytest.mark.parametrize("padding", ["none", "left"])
def test_wrong_factors(padding, always_wide):
    model, (rows, keys) = build("llama", "sdpa"), factors()
    for bad, message in (((rows[:, 1:], keys), r"rows of the bias has shape \[2, 8, 3\].*\[2, 9, 3\]"), ((rows, keys[..., 1:]), r"keys of the bias has shape \[2, 9, 2\]"),
                         ((rows[0], keys), "rows of the bias"), ((rows, keys.repeat(2, 1, 1)), "keys of the bias")):
        with capture(model, [], bias=bad), pytest.raises(ValueError, match=message): model(**batch(padding))
    with capture(model, [], bias=[rows, keys]), pytest.raises(TypeError, match=r"tuple \(rows, keys\), got list"): model(**batch(padding))

# --- gain -------------------------------------------------------------------------------------------------------------------------------------
class Scale(torch.nn.Module):
    "One factor per head."
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([.5, 1., 2., 3.], dtype=torch.float64))
    def forward(self, query): return query * self.weight[:, None, None]

@pytest.mark.parametrize("kind", [dict, torch.nn.ModuleDict])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "mllama"])
def test_gain_goes_into_queries_and_logits(family, kind):
    "Captured queries and logits, against q_proj rows scaled by hand; the other layer untouched."
    model, inputs, scale = build(family, "sdpa"), batch("left"), Scale()
    gain = kind({"0": scale}) if kind is torch.nn.ModuleDict else {0: scale}
    with torch.no_grad():
        with capture(model) as plain: model(**inputs)
        with capture(model, gain=gain) as cache: logits = model(**inputs).logits
        attention = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 0 and hasattr(m, "q_proj"))
        for p in attention.q_proj.parameters(): p.mul_(scale.weight.repeat_interleave(8).view(-1, *[1] * (p.dim() - 1)))
        with capture(model) as by_weights: expected = model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for l in cache.layers: torch.testing.assert_close(cache["q", l], by_weights["q", l], rtol=0, atol=1e-5)
    assert torch.equal(plain["k", 0], cache["k", 0]) and not torch.allclose(plain["q", 0], cache["q", 0])

def test_gain_learns_from_logits_and_from_captured_queries():
    model, inputs, scale = build("llama", "sdpa").requires_grad_(False), batch("none"), Scale()
    with capture(model, [], gain={0: scale}):
        assert torch.autograd.grad(model(**inputs).logits.pow(2).mean(), scale.weight)[0].abs().min() > 0
    with capture(model, 0, gain={0: scale}) as cache:
        model(**inputs)
        got = torch.autograd.grad(cache["q", 0].pow(2).sum(), scale.weight)[0]
    plain = cache["q", 0].detach() / scale.weight.detach()[:, None, None]
    torch.testing.assert_close(got, 2 * scale.weight.detach() * plain.pow(2).sum((0, 2, 3)), rtol=1e-10, atol=0)

def test_gain_under_checkpointing():
    model, inputs, scale = build("qwen2_5_vl", "sdpa").train(), batch("left"), Scale()
    def gradient():
        with capture(model, gain={0: scale, 1: scale}) as cache: return torch.autograd.grad(losses(model, inputs, cache), scale.weight)[0]
    plain = gradient()
    checkpointing(model)()
    torch.testing.assert_close(gradient(), plain, rtol=0, atol=1e-10)

def test_gain_may_change_and_wrong_ones_are_refused():
    model, inputs = build("llama", "sdpa"), batch("none")
    before = model(**inputs).logits
    with torch.no_grad(), capture(model, [], gain={0: lambda q: 0 * q}) as cache:
        assert not torch.allclose(model(**inputs).logits, before)
        cache.gain = None
        assert torch.equal(model(**inputs).logits, before)
        with pytest.raises(ValueError, match="layer 2.*text layers 0 to 1"): cache.gain = {2: lambda q: q}
        with pytest.raises(TypeError, match="list"): cache.gain = [lambda q: q]
    with pytest.raises(ValueError, match="layer -1"):
        with capture(model, gain={-1: lambda q: q}): pass
    assert set(implementations(model)) == {"sdpa"}
