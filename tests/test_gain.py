"RoPE gain against weights scaled by hand, on tiny random models of many families."
import copy
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from families import checkpointing
from laid_nb.capture import capture
from laid_nb.gain import RopeGain, fold_gain, folded_parameters, folded_state, gain_folds, plot_gain, rope_gains
from laid_nb.rope import RopeSpec, rope_spec

TEXT = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
            initializer_range=.15, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=100., mrope_section=[1, 1, 2]))
CLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
QWEN = dict(depth=1, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, hidden_size=16, intermediate_size=16, out_hidden_size=32)
IDS = dict(image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53)
NAMED = dict(   # the families that the notebook names
    qwen2_vl=dict(text_config=TEXT | MROPE, vision_config=dict(depth=1, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, embed_dim=16, hidden_size=32, mlp_ratio=1), **IDS),
    qwen2_5_vl=dict(text_config=TEXT | MROPE, vision_config=QWEN | dict(window_size=56, fullatt_block_indexes=[0]), **IDS),
    qwen3_vl=dict(text_config=TEXT | MROPE, vision_config=QWEN | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]), **IDS),
    llama=TEXT,
    gemma3=dict(text_config=TEXT | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]), vision_config=CLIP, mm_tokens_per_image=4, image_token_index=50))
OTHERS = dict(
    glm=TEXT | dict(partial_rotary_factor=.5, attention_bias=True),              # neighbours pair up, half of the head turns
    olmo2=TEXT, phi3=TEXT | dict(partial_rotary_factor=.5), qwen3=TEXT, hunyuan_v1_dense=TEXT,
    cohere=TEXT | dict(use_qk_norm=True, logit_scale=1.), phi=TEXT | dict(qk_layernorm=True, partial_rotary_factor=.5), smollm3=TEXT | dict(no_rope_layers=[1, 0]),
    cohere2=TEXT | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),  # no RoPE in the full layer
    exaone4=TEXT | dict(sliding_window=4, sliding_window_pattern=2, layer_types=["sliding_attention", "full_attention"]))
FAMILIES = NAMED | OTHERS
HEADS = dict.fromkeys(("qwen3_vl", "gemma3", "qwen3", "hunyuan_v1_dense", "phi", "exaone4"), 1)
NOPE = "smollm3", "cohere2", "exaone4"  # their layer 1 has no RoPE

def build(family, dtype=torch.float32, **change):
    "A random model of `family`, sdpa, whose biases and norms are not at their defaults."
    torch.manual_seed(0)
    settings = copy.deepcopy(FAMILIES[family])
    config = AutoConfig.for_model(family, **settings | change)
    model = (AutoModelForImageTextToText if "text_config" in settings else AutoModelForCausalLM).from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1: p.add_(torch.randn_like(p) * .2)
    return model.to(dtype)

def shake(gains):
    "Random gains, mostly between 0.3 and 3."
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for gain in gains.values(): gain.raw.copy_(torch.randn(gain.raw.shape, generator=g))
    return gains

def text(n=12):
    ids, mask = torch.randint(3, 49, (2, n), generator=torch.Generator().manual_seed(1)), torch.ones(2, n, dtype=torch.long)
    mask[1, :3] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)

def logits(model, inputs):
    with torch.no_grad(): return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]

SPECS = dict(halves=RopeSpec(100. ** (-torch.arange(4) / 4), torch.tensor([0, 1, 1, 2]), 8), adjacent=RopeSpec(100. ** (-torch.arange(4) / 4), torch.zeros(4, dtype=torch.long), 8, adjacent=True),
             partial=RopeSpec(100. ** (-torch.arange(2) / 2), torch.zeros(2, dtype=torch.long), 8), partial_adjacent=RopeSpec(100. ** (-torch.arange(2) / 2), torch.zeros(2, dtype=torch.long), 8, adjacent=True))

# --- RopeGain ---------------------------------------------------------------------------------------------------------------------------------
def test_it_starts_at_one_and_is_positive():
    gain = RopeGain(SPECS["halves"], 4)
    assert gain.gain().shape == (4, 4) and (gain.gain() == 1).all()
    q = torch.randn(2, 4, 5, 8)
    assert torch.equal(gain(q), q) and torch.equal(gain(q.bfloat16()), q.bfloat16())
    with torch.no_grad(): gain.raw.fill_(-50)
    assert (gain.gain() > 0).all()
    assert list(gain.state_dict()) == ["raw"]

@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", SPECS)
def test_every_band_of_the_product_is_multiplied(layout, heads):
    "By pairs of the spec itself, and what does not turn is untouched; grouped keys."
    spec = SPECS[layout]
    gain = shake({"0": RopeGain(spec, heads).double()})["0"]
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64).repeat_interleave(2, 1)
    bands = lambda q: (spec.pairs(q) * spec.pairs(k)).sum(-1)
    torch.testing.assert_close(bands(gain(q)), gain.gain()[None, :, None] * bands(q), rtol=1e-12, atol=1e-12)
    assert torch.equal(gain(q)[..., spec.rotary_dim:], q[..., spec.rotary_dim:])

@pytest.mark.parametrize("layout", SPECS)
def test_it_commutes_with_rope(layout):
    spec, m = SPECS[layout], torch.randint(0, 500, (3, 2, 5))
    gain, q = shake({"0": RopeGain(spec, 4).double()})["0"], torch.randn(2, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(spec.rotate(gain(q), m), gain(spec.rotate(q, m)), rtol=0, atol=1e-12)

def test_gradient_by_finite_differences():
    gain, q = shake({"0": RopeGain(SPECS["partial_adjacent"], 3).double()})["0"], torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda raw, q: torch.func.functional_call(gain, {"raw": raw}, (q,)), (gain.raw, q))

@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 4, 5, 6), (4, 5, 8)])
def test_wrong_queries_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs \[batch, 4, tokens, 8\]"): RopeGain(SPECS["halves"], 4)(torch.randn(shape))

# --- in a model -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_heads_as_can_be_folded(family):
    model = build(family)
    gains = rope_gains(model)
    assert list(gains) == (["0"] if family in NOPE else ["0", "1"])
    for layer, gain in gains.items(): assert gain.gain().shape == (HEADS.get(family, 4), len(rope_spec(model, int(layer)).inv_freq))
    inputs = text()
    before = logits(model, inputs)
    with capture(model, [], gain=gains): assert torch.equal(logits(model, inputs), before)

@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_logit(family):
    model, inputs = build(family), text()
    gains, before = shake(rope_gains(model)), logits(model, inputs)
    with capture(model, [], gain=gains): inside = logits(model, inputs)
    expected = folded_parameters(model, gains)
    old = {n: p.clone() for n, p in model.named_parameters()}
    fold_gain(model, gains)
    torch.testing.assert_close(logits(model, inputs), inside, rtol=0, atol=1e-5)
    assert (inside - before).abs().max() > 1e-3
    assert [n for n, p in model.named_parameters() if not torch.equal(p, old[n])] == [n for n in old if n in expected] != []

@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_folding_with_images(family):
    "M-RoPE with positions that differ by axis."
    model, ids = build(family), torch.tensor([[3, 52, 50, 53, 4, 5, 52, 50, 53, 6]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 50).int(), image_grid_thw=torch.tensor([[1, 2, 2]] * 2), pixel_values=torch.randn(8, 3 * 2 * 14 * 14))
    gains = shake(rope_gains(model))
    with capture(model, [], gain=gains): inside = logits(model, inputs)
    fold_gain(model, gains)
    torch.testing.assert_close(logits(model, inputs), inside, rtol=0, atol=1e-5)

def test_a_folded_checkpoint_is_stock(tmp_path):
    "Five families, saved folded, read by a process without laid_nb."
    inputs = {k: v[:1] for k, v in text().items()}
    save_file(inputs, tmp_path / "inputs")
    for family in NAMED:
        model = build(family)
        with torch.no_grad(): plain = model(**inputs).logits
        fold_gain(model, shake(rope_gains(model)))
        model.save_pretrained(tmp_path / family)
        with torch.no_grad(): save_file(dict(plain=plain, folded=model(**inputs).logits), tmp_path / family / "logits")
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
folder = Path(sys.argv[1])
for family in sys.argv[2:]:
    model = (AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText).from_pretrained(folder / family).eval()
    saved = load_file(folder / family / "logits")
    with torch.no_grad(): logits = model(**load_file(folder / "inputs")).logits
    assert torch.equal(logits, saved["folded"]) and not torch.allclose(logits, saved["plain"], atol=1e-3), family
assert "laid_nb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, tmp_path, *NAMED], check=True, cwd=tmp_path)

def test_gains_of_chosen_layers():
    model = build("llama")
    gains = rope_gains(model, [1])
    assert list(gains) == ["1"] and list(folded_parameters(model, gains)) == ["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match=r"layer 2.*\[0, 1\]"): rope_gains(model, [2])

def test_a_gain_for_all_heads_folds_into_a_projection_too():
    model, inputs = build("qwen2_5_vl"), text()
    gains = shake(torch.nn.ModuleDict({"1": RopeGain(rope_spec(model), 1)}))
    with capture(model, [], gain=gains): inside = logits(model, inputs)
    fold_gain(model, gains)
    torch.testing.assert_close(logits(model, inputs), inside, rtol=0, atol=1e-5)

def test_before_rope_the_gain_is_there_as_well():
    model, inputs = build("gemma3"), text()
    gains = shake(rope_gains(model))
    with torch.no_grad(), capture(model, 0, rotated=False) as plain: model(**inputs)
    with torch.no_grad(), capture(model, 0, rotated=False, gain=gains) as cache: model(**inputs)
    torch.testing.assert_close(cache["q", 0], gains["0"](plain["q", 0]), rtol=1e-4, atol=1e-5)

# --- learning ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "olmo2"])
def test_gradient_equals_that_of_scaled_weights(family):
    "d loss / d raw through the interface, against autograd through the weights that folding would make, put into the stock model."
    model, inputs = build(family).requires_grad_(False), text()
    gains = shake(rope_gains(model))
    real = inputs["attention_mask"].bool()
    with capture(model, [], gain=gains): got = torch.autograd.grad(model(**inputs).logits[real].pow(2).mean(), list(gains.parameters()))
    weights = {}
    for name, p in folded_parameters(model, gains).items():
        scale = gains[name.split("layers.")[1].split(".")[0]].by_dimension()
        one = 1 if family == "gemma3" else 0
        weights[name] = ((p + one).view(scale.numel(), -1) * scale.reshape(-1, 1)).view(p.shape) - one
    loss = torch.func.functional_call(model, weights, (), inputs).logits[real].pow(2).mean()
    for a, b in zip(got, torch.autograd.grad(loss, list(gains.parameters()))):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)

def test_gradient_under_checkpointing():
    model, inputs = build("qwen2_5_vl").train(), text()
    gains = shake(rope_gains(model))
    def gradients():
        with capture(model, gain=gains) as cache:
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss + cache["q", 0].pow(2).mean()
            return torch.autograd.grad(loss, list(gains.parameters()))
    plain = gradients()
    checkpointing(model)()
    for a, b in zip(plain, gradients()): torch.testing.assert_close(a, b)

@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision_leaves_the_gain_in_float32(how):
    model, inputs = build("qwen2_5_vl", torch.bfloat16 if how == "weights" else torch.float32), text()
    gains, exact = shake(rope_gains(model)), build("qwen2_5_vl")
    with capture(model, 0, gain=gains) as cache, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model(**inputs).logits.float().pow(2).mean()
        got = torch.autograd.grad(loss, gains["0"].raw)[0]
    with capture(exact, [], gain=gains): expected = torch.autograd.grad(exact(**inputs).logits.pow(2).mean(), gains["0"].raw)[0]
    assert gains["0"].raw.dtype == got.dtype == torch.float32
    if how == "weights": assert cache["q", 0].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > .99

def test_a_gain_between_two_bfloat16_numbers_acts_as_it_is():
    "1.006 lies between 1.0039 and 1.0078; the float32 product, rounded value by value, keeps it on average."
    gain, q = RopeGain(SPECS["halves"], 1), torch.randn(1, 4, 4096, 8).bfloat16()
    with torch.no_grad(): gain.raw.fill_(math.log(math.exp(1.006) - 1) - math.log(math.e - 1))
    assert gain(q).dtype == torch.bfloat16 and gain.gain().bfloat16().float().sub(1.006).abs().min() > 1e-3
    assert (gain(q).double().norm() / q.double().norm()).item() == pytest.approx(1.006, abs=3e-4)

# --- what cannot be folded --------------------------------------------------------------------------------------------------------------------
class Adapter(torch.nn.Module):
    "As LoRA wraps a layer."
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
    def forward(self, x): return self.base_layer(x)

def wrap(model): model.model.layers[0].self_attn.q_proj = Adapter(model.model.layers[0].self_attn.q_proj)
def quantise(model): torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
def tie(model): model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight

@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("break_it, message", [(wrap, "q_proj of LlamaAttention is Adapter, not torch.nn.Linear"), (quantise, "q_proj of LlamaAttention is .*not torch.nn.Linear")])
def test_other_projections_are_refused(break_it, message):
    model = build("llama")
    gains = rope_gains(model)
    break_it(model)
    for attempt in (lambda: rope_gains(model), lambda: fold_gain(model, gains)):
        with pytest.raises(ValueError, match=message): attempt()

def test_tied_weights_are_refused_and_nothing_is_written():
    model = build("llama")
    gains = shake(rope_gains(model))
    tie(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight are one parameter"): fold_gain(model, gains)
    assert all(map(torch.equal, before, model.parameters()))

MLA = {k: v for k, v in TEXT.items() if k != "head_dim"} | dict(num_key_value_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2)

@pytest.mark.parametrize("family, settings, message", [
    ("olmo", TEXT | dict(clip_qkv=2.), "clip_qkv"),
    ("gpt_neox", {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}, "q_proj of GPTNeoXAttention is missing"),
    ("stablelm", TEXT | dict(qk_layernorm=True), "q_layernorm .StableLmLayerNormPerHead."),
    ("deepseek_v3", MLA | dict(q_lora_rank=16), "RoPE of 'deepseek_v3' is not of a known form"),
])
def test_families_that_cannot_fold_are_refused(family, settings, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with pytest.raises(ValueError, match=message): rope_gains(model)

@pytest.mark.parametrize("family", NOPE)
def test_layers_without_rope_are_skipped_with_a_word(family):
    with pytest.warns(UserWarning, match="without RoPE: 1"): gains = rope_gains(build(family))
    assert list(gains) == ["0"]
    with pytest.raises(ValueError, match="layer 1 .* has no self-attention with RoPE"): rope_gains(build(family), [1])

def test_a_model_without_rope_has_no_gain():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", vocab_size=60, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32))
    with pytest.raises(ValueError, match="no layer of OPTForCausalLM"): rope_gains(model)

def test_a_norm_that_is_not_a_scale_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
        def forward(self, x): return x * self.weight.exp()
    model = build("qwen3")
    model.model.layers[0].self_attn.q_norm = Odd()
    with pytest.raises(ValueError, match="Odd multiplies by neither its weight nor 1"): rope_gains(model)

def test_gains_of_another_model_are_refused():
    with pytest.raises(ValueError, match="layer 0 has 4 heads, 1 can be folded"): fold_gain(build("qwen3"), rope_gains(build("llama")))
    with pytest.raises(ValueError, match=r"gains name layer 5.*\[0, 1\]"): fold_gain(build("llama"), {"5": RopeGain(SPECS["halves"], 4)})

# --- once -------------------------------------------------------------------------------------------------------------------------------------
def test_folding_twice_is_refused_until_the_weights_move():
    model, inputs = build("qwen2_5_vl"), text()
    gains = shake(rope_gains(model))
    fold_gain(model, gains)
    once = logits(model, inputs)
    with pytest.raises(RuntimeError, match="in model.language_model.layers.0.self_attn.q_proj.weight already"): fold_gain(model, gains)
    assert torch.equal(logits(model, inputs), once)
    fold_gain(build("qwen2_5_vl"), gains)                                                    # another model of the same kind
    with torch.no_grad(): model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(1), model.model.language_model.layers[0].self_attn.q_proj.bias.mul_(1)
    fold_gain(model, torch.nn.ModuleDict({"0": gains["0"]}))

def test_folding_under_its_own_capture_is_refused():
    model = build("llama")
    gains, before = shake(rope_gains(model)), [p.clone() for p in model.parameters()]
    with capture(model, [], gain=gains) as cache:
        with pytest.raises(RuntimeError, match="a capture applies a gain to LlamaForCausalLM"): fold_gain(model, gains)
        assert all(map(torch.equal, before, model.parameters()))
        cache.gain = None
        fold_gain(model, gains)

@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_folded_state_dict_is_the_folded_model(family):
    model, inputs = build(family), text()
    gains, before = shake(rope_gains(model)), {n: p.clone() for n, p in model.named_parameters()}
    with capture(model, [], gain=gains): expected = logits(model, inputs)
    stock = folded_state(model.state_dict(), gain_folds(model, gains))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())               # the model goes on as it is
    assert [n for n in before if not torch.equal(before[n], stock[n])] == list(folded_parameters(model, gains))
    model.load_state_dict(stock)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)

def test_half_precision_weights_round_once():
    "Folded bfloat16 weights are the float32 product, rounded."
    model = build("gemma3", torch.bfloat16)
    gains, norm = shake(rope_gains(model)), model.model.language_model.layers[0].self_attn.q_norm
    old = norm.weight.detach().double()
    fold_gain(model, gains)
    assert torch.equal(norm.weight, ((old + 1) * gains["0"].by_dimension()[0].double() - 1).float().bfloat16())

# --- picture ----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, n", [("qwen2_5_vl", 2), ("qwen3_vl", 2), ("smollm3", 1)])
def test_plot_has_one_panel_a_layer_in_one_range(family, n):
    gains = shake(rope_gains(build(family)))
    panels = [ax for ax in plot_gain(gains, limit=4).axes if ax.images]
    assert [ax.get_title() for ax in panels] == [f"layer {l}" for l in gains] and len(panels) == n
    for ax, gain in zip(panels, gains.values()):
        assert ax.images[0].get_clim() == (-2, 2)
        torch.testing.assert_close(torch.tensor(ax.images[0].get_array().data), gain.gain().detach().log2())
        assert ax.get_xticklabels()[-1].get_text() == f"{'THW'[gain.spec.axis[-1]]} {gain.spec.wavelength[-1]:.0f}"

@pytest.mark.parametrize("limit", [1, .5, math.inf, math.nan])
def test_plot_refuses_a_range_that_is_none(limit):
    with pytest.raises(ValueError, match="limit must be above 1"): plot_gain(rope_gains(build("llama")), limit)
