"RopeSpec against the stock rotary modules and attention of transformers; the series and its leakage against direct sums."
import importlib
import math
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.masking_utils import sdpa_mask

from laid_nb.rope import RopeSpec, leakage, plot_bands, resolved_bands, rope_series, rope_spec, shared_rope

SIZES = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2, max_position_embeddings=64)
TRAINED = dict(factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
YARN = TRAINED | dict(rope_type="yarn")
LONGROPE = TRAINED | dict(rope_type="longrope", short_factor=[1 + .02 * b for b in range(16)], long_factor=[1 + .5 * b for b in range(16)])
DYNAMIC = dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)
FAMILIES = {   # name: (family, rope_parameters, stock class, three axes)
    "llama": ("llama", dict(rope_type="default", rope_theta=5e5), "LlamaRotaryEmbedding", False),
    "qwen2": ("qwen2", dict(rope_type="default", rope_theta=1e6), "Qwen2RotaryEmbedding", False),
    "linear": ("llama", dict(rope_type="linear", factor=3.0, rope_theta=1e4), "LlamaRotaryEmbedding", False),
    "dynamic": ("llama", DYNAMIC, "LlamaRotaryEmbedding", False),
    "longrope": ("llama", LONGROPE, "LlamaRotaryEmbedding", False),
    "llama3": ("llama", TRAINED | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0), "LlamaRotaryEmbedding", False),
    "proportional": ("llama", dict(rope_type="proportional", rope_theta=1e4, partial_rotary_factor=0.25), "LlamaRotaryEmbedding", False),
    "yarn": ("qwen2", YARN, "Qwen2RotaryEmbedding", False),
    "yarn partial": ("stablelm", YARN | dict(partial_rotary_factor=0.5), "StableLmRotaryEmbedding", False),
    "partial": ("phi3", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "Phi3RotaryEmbedding", False),
    "stablelm": ("stablelm", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25), "StableLmRotaryEmbedding", False),
    "glm": ("glm", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "GlmRotaryEmbedding", False),
    "cohere": ("cohere", dict(rope_type="default", rope_theta=1e4), "CohereRotaryEmbedding", False),
    "gpt_oss": ("gpt_oss", YARN | dict(truncate=False), "GptOssRotaryEmbedding", False),
    "qwen2_vl": ("qwen2_vl", dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]), "Qwen2VLRotaryEmbedding", True),
    "qwen2_5_vl": ("qwen2_5_vl", dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]), "Qwen2_5_VLRotaryEmbedding", True),
    "qwen2_5_vl yarn": ("qwen2_5_vl", YARN | dict(mrope_section=[4, 6, 6]), "Qwen2_5_VLRotaryEmbedding", True),
    "qwen2_5_vl dynamic": ("qwen2_5_vl", DYNAMIC | dict(mrope_section=[4, 6, 6]), "Qwen2_5_VLRotaryEmbedding", True),
    "qwen3_vl": ("qwen3_vl", dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5]), "Qwen3VLTextRotaryEmbedding", True),
    "qwen3_vl_moe": ("qwen3_vl_moe", dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5]), "Qwen3VLMoeTextRotaryEmbedding", True),
    "qwen3_5": ("qwen3_5", dict(rope_type="default", rope_theta=5e6, mrope_section=[3, 3, 2], partial_rotary_factor=0.5), "Qwen3_5TextRotaryEmbedding", True),
    "glm4v": ("glm4v", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 3, 3]), "Glm4vTextRotaryEmbedding", True),
    "ernie4_5_vl": ("ernie4_5_vl_moe", dict(rope_type="default", rope_theta=1e4, mrope_section=[5, 5, 6]), "Ernie4_5_VLMoeTextRotaryEmbedding", True),
}

def stock_module(text, name):
    return getattr(importlib.import_module(type(text).__module__.replace("configuration_", "modeling_")), name)(text)

def make(name):
    family, params, stock, axes = FAMILIES[name]
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    sizes = SIZES | dict(rope_parameters=dict(params)) | ({"partial_rotary_factor": params["partial_rotary_factor"]} if "partial_rotary_factor" in params else {})
    config = type(config)(text_config=sizes) if text is not config else type(config)(**sizes)
    module = importlib.import_module(type(text).__module__.replace("configuration_", "modeling_"))
    return config, module, getattr(module, stock)(config.get_text_config()), axes

def positions_of(axes, largest=32):
    return torch.randint(0, largest, (3, 2, 7) if axes else (2, 7), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize("name", [f for f in FAMILIES if f not in ("glm", "gpt_oss")])      # these modules list the bands in another order, their application reorders
def test_cos_sin_equal_stock_module(name):
    config, _, stock, axes = make(name)
    for a, b in zip(rope_spec(config).cos_sin(positions_of(axes)), stock(torch.zeros(1), positions_of(axes))): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

@pytest.mark.parametrize("name", FAMILIES)
def test_rotate_equals_stock_application(name):
    config, module, stock, axes = make(name)
    spec, positions = rope_spec(config), positions_of(axes)
    x = torch.randn(2, 4, 7, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = (t / spec.scaling for t in stock(torch.zeros(1), positions))
    turned, _ = module.apply_rotary_pos_emb(x[..., :spec.rotary_dim], x[:, :2, :, :spec.rotary_dim], cos, sin)
    torch.testing.assert_close(spec.rotate(x, positions), torch.cat([turned, x[..., spec.rotary_dim:]], -1), rtol=0, atol=1e-5)

@pytest.mark.parametrize("name", ["dynamic", "longrope", "qwen2_5_vl dynamic", "yarn"])
@pytest.mark.parametrize("length", [7, 32, 33, 64, 65, 300])      # LongRoPE is trained to 32 here, dynamic to 64
def test_length_equals_stock_module_at_that_length(name, length):
    config, _, stock, axes = make(name)
    positions = positions_of(axes, length)
    positions[..., 0, 3] = length - 1
    for a, b in zip(rope_spec(config, length=length).cos_sin(positions), stock(torch.zeros(1), positions)): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

def test_length_changes_only_what_depends_on_it():
    changed = {name: not torch.equal(rope_spec(make(name)[0], length=300).inv_freq, rope_spec(make(name)[0]).inv_freq) for name in ("llama", "linear", "yarn", "llama3", "dynamic", "longrope")}
    assert changed == dict(llama=False, linear=False, yarn=False, llama3=False, dynamic=True, longrope=True)
    with pytest.raises(ValueError, match="length is 0 positions"): rope_spec(make("dynamic")[0], length=0)

@pytest.mark.parametrize("full", [dict(rope_type="linear", factor=8.0, rope_theta=1e6), YARN, DYNAMIC])
@pytest.mark.parametrize("layer", [0, 5])
def test_gemma3_layers_differ(layer, full):
    params = dict(sliding_attention=dict(rope_type="default", rope_theta=1e4), full_attention=dict(full))
    config = AutoConfig.for_model("gemma3", text_config=SIZES | dict(num_hidden_layers=6, rope_parameters=params))
    text = config.get_text_config()
    stock = stock_module(text, "Gemma3RotaryEmbedding")(torch.zeros(1), torch.arange(50)[None], text.layer_types[layer])
    for a, b in zip(rope_spec(config, layer).cos_sin(torch.arange(50)[None]), stock): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="name a layer"): rope_spec(config)

@pytest.mark.parametrize("layer", [0, 5])
def test_gemma4_layers_differ_in_head_dim(layer):
    text = AutoConfig.for_model("gemma4").get_text_config()
    spec, stock = rope_spec(text, layer), stock_module(text, "Gemma4TextRotaryEmbedding")(torch.zeros(1), torch.arange(50)[None], text.layer_types[layer])
    for a, b in zip(spec.cos_sin(torch.arange(50)[None]), stock): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert spec.head_dim == spec.rotary_dim == text.per_layer_config[layer].head_dim

@pytest.mark.parametrize("family, axes", [("qwen2_vl", "T" * 16 + "H" * 24 + "W" * 24), ("qwen2_5_vl", "T" * 16 + "H" * 24 + "W" * 24), ("qwen3_vl", "THW" * 20 + "TTTT"), ("glm4v", "T" * 8 + "H" * 12 + "W" * 12)])
def test_default_sections_are_the_stock_ones(family, axes):
    "A config without mrope_section gets its family's own."
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    text.head_dim = 64 if family == "glm4v" else 128
    assert "mrope_section" not in text.rope_parameters
    assert "".join("THW"[a] for a in rope_spec(config).axis) == axes

TINY = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=32, vocab_size=64, num_hidden_layers=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=512, num_local_experts=2, num_experts_per_tok=1)

def queries_by_layer(model, positions):
    "The query that each layer's attention gets, where attention itself does nothing: so layers see positions only through their own RoPE."
    found = {}
    def attention(module, query, key, value, mask, **kwargs):
        found[module.layer_idx] = query
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    AttentionInterface.register("rope_test", attention)
    AttentionMaskInterface.register("rope_test", sdpa_mask)
    try:
        model.set_attn_implementation("rope_test")
        with torch.no_grad(): model(input_ids=torch.tensor([[7, 3, 9, 30, 17]]), position_ids=positions)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface): del interface._global_mapping["rope_test"]
    return found

@pytest.mark.parametrize("family", ["llama", "phi3", "glm4", "cohere2", "smollm3", "exaone4", "stablelm", "gemma3", "granite", "gpt_oss", "qwen2_vl", "qwen3_vl", "glm4v", "olmo3"])
def test_spec_is_what_every_layers_attention_does(family):
    "Either rotate gives the queries of the stock model, or the layer is refused and its queries do not move with position."
    text = AutoConfig.for_model(family).get_text_config()
    params = text.rope_parameters
    sections = {"qwen2_vl": [2, 3, 3], "qwen3_vl": [4, 2, 2], "glm4v": [1, 1, 2]}.get(family)
    sizes = TINY | ({"rope_parameters": params | dict(mrope_section=sections) | ({"partial_rotary_factor": .5} if family == "glm4v" else {})} if sections else {})
    sizes |= {k: 2 for k in ("original_max_position_embeddings",) if hasattr(text, k)} | ({"sliding_window": 8, "layer_types": None} if hasattr(text, "layer_types") else {})
    model = AutoModel.from_config(type(text)(**sizes)).eval()
    positions = torch.tensor([[3, 9, 2, 30, 17]])
    if sections: positions = torch.stack([positions, positions + 4, positions.flip(-1)])
    still, moved = (queries_by_layer(model, p) for p in (torch.zeros_like(positions), positions))
    assert len(still) == 4
    for layer in still:
        try: expected = rope_spec(model, layer).rotate(still[layer], positions)
        except ValueError as e:
            assert "has no RoPE" in str(e) and family in ("cohere2", "smollm3", "exaone4") and layer == 3
            expected = still[layer]
        torch.testing.assert_close(moved[layer], expected, rtol=0, atol=1e-5)

def test_dot_product_depends_on_the_difference_of_positions():
    spec = rope_spec(make("qwen2_5_vl")[0])
    q, k = torch.randn(2, 1, 1, 5, 32, dtype=torch.float64)
    m, n = torch.randint(0, 50, (2, 3, 1, 5))
    a, b = ((spec.rotate(q, m + s) * spec.rotate(k, n + s)).sum(-1) for s in (0, 37))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    torch.testing.assert_close(spec.rotate(spec.rotate(q, m), n), spec.rotate(q, m + n), rtol=0, atol=1e-4)
    torch.testing.assert_close(spec.rotate(spec.rotate(q, m), -m), q)

@pytest.mark.parametrize("name", ["llama", "partial", "glm", "qwen3_vl"])
def test_pairs_are_what_turns_together(name):
    "The length of a pair does not change under rotation, and pairs cover rotary_dim once."
    spec = rope_spec(make(name)[0])
    x = torch.randn(1, 2, 5, 32)
    torch.testing.assert_close(spec.pairs(spec.rotate(x, torch.arange(5)[None] * 7)).norm(dim=-1), spec.pairs(x).norm(dim=-1))
    assert sorted(spec.pairs(torch.arange(32.)).flatten().tolist()) == list(range(spec.rotary_dim))
    torch.testing.assert_close(spec.wavelength * spec.inv_freq, torch.full_like(spec.inv_freq, 2 * torch.pi))

def test_model_gives_its_configs_spec():
    from transformers import AutoModelForCausalLM
    config = AutoConfig.for_model("llama", **SIZES | dict(vocab_size=20, intermediate_size=16))
    model = AutoModelForCausalLM.from_config(config)
    spec = rope_spec(model)
    assert torch.equal(spec.inv_freq, model.model.rotary_emb.inv_freq) and spec.head_dim == 32
    assert torch.equal(RopeSpec.from_config(config, length=40).inv_freq, spec.inv_freq)

@pytest.mark.parametrize("family", ["gpt2", "mpt", "opt", "granitemoehybrid"])
def test_no_rope_is_refused(family):
    with pytest.raises(ValueError, match=f"'{family}' has no RoPE"): rope_spec(AutoConfig.for_model(family))

@pytest.mark.parametrize("family", ["deepseek_v3", "llama4", "nanochat"])      # last part of a head; complex numbers; the other way round
def test_rope_of_another_form_is_refused(family):
    with pytest.raises(ValueError, match="not of a known form"): rope_spec(AutoConfig.for_model(family))

def test_alibi_and_layer_thetas_are_refused():
    falcon = AutoConfig.for_model("falcon", alibi=True)
    with pytest.raises(ValueError, match="'falcon' has no RoPE"): rope_spec(falcon)
    granite = AutoConfig.for_model("granite_swa", num_hidden_layers=2, layer_rope_theta=[1e4, 1e6])
    with pytest.raises(ValueError, match="different layer_rope_theta"): rope_spec(granite, 0)

def test_wrong_sections_shapes_and_layers():
    config = AutoConfig.for_model("qwen2_5_vl", text_config=SIZES | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4])))
    with pytest.raises(ValueError, match=r"'mrope_section': \[4, 4, 4\]"): rope_spec(config)
    spec = rope_spec(make("llama")[0])
    with pytest.raises(ValueError, match="layer 2 is outside the 2 text layers"): rope_spec(make("llama")[0], 2)
    with pytest.raises(ValueError, match=r"positions have shape \[2, 1, 5\]"): spec.cos_sin(torch.zeros(2, 1, 5))
    with pytest.raises(ValueError, match="16 dimensions a head"): spec.pairs(torch.zeros(1, 16))

def test_a_rope_is_shared_by_layout_and_frequencies_but_for_the_amplitude():
    spec = rope_spec(make("qwen2_5_vl")[0])
    assert shared_rope(spec, rope_spec(make("qwen2_vl")[0])) and shared_rope(spec, replace(spec, scaling=1.3))
    assert not any(shared_rope(spec, rope_spec(make(name)[0])) for name in ("llama", "partial", "qwen3_vl", "qwen2_5_vl yarn"))
    assert not shared_rope(spec, replace(spec, head_dim=40)) and not shared_rope(spec, replace(spec, adjacent=True))
    assert not shared_rope(spec, replace(spec, inv_freq=spec.inv_freq * 1.01))

# ---- series

BANDS = 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)

def test_series_equals_sum_over_bands():
    weights, distances = torch.randn(3, 8, dtype=torch.complex128), torch.tensor([-3, 0, 1, 50, 5000])
    direct = torch.tensor([[sum(abs(a) * math.cos(d * t + math.atan2(a.imag, a.real)) for a, t in zip(w, BANDS.tolist())) for d in distances.tolist()] for w in weights.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rope_series(BANDS, distances, weights), direct)
    torch.testing.assert_close(rope_series(BANDS, distances, weights.abs()), rope_series(BANDS, distances, weights.abs().to(torch.complex128)))
    torch.testing.assert_close(rope_series(BANDS, distances), rope_series(BANDS, distances, torch.ones(8)))

@pytest.mark.parametrize("name", ["llama", "partial", "glm"])
def test_series_is_the_logit_of_rotated_query_and_key(name):
    spec = rope_spec(make(name)[0])
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    a = torch.view_as_complex(spec.pairs(q).contiguous()) * torch.view_as_complex(spec.pairs(k).contiguous()).conj()
    passing = (q * k)[..., spec.rotary_dim:].sum()
    for m, n in ((0, 0), (30, 7), (7, 30)):
        logit = (spec.rotate(q, torch.tensor([[m]])) * spec.rotate(k, torch.tensor([[n]]))).sum()
        torch.testing.assert_close(rope_series(spec.inv_freq, torch.tensor([m - n]), a).squeeze() + passing, logit, rtol=0, atol=1e-4)

@pytest.mark.parametrize("head_dim, base", [(64, 1e4), (128, 1e6), (512, 1e6)])
def test_decay_is_logarithmic(head_dim, base):
    "In the mean over a stretch of distances f is the number of bands that have turned by less than exp(-gamma) radians, less a half."
    bands, d = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim), torch.arange(100, 2000)
    count = head_dim / 2 / math.log(base) * (math.log(base) - d.double().log() - .5772) - .5
    assert abs((rope_series(bands, d) - count).mean()) < .25

def test_series_refuses_weights_of_another_head():
    with pytest.raises(ValueError, match=r"shape \[3, 7\], expected \[..., 8\]"): rope_series(BANDS, torch.arange(4), torch.ones(3, 7))

# ---- leakage

def on_bins(window, *bins): return torch.tensor([2 * math.pi * b / window for b in bins], dtype=torch.float64)

def leakage_by_sums(response, lines):
    "The definition, by direct sums over all bins of the full circle but the constant."
    w, off, total = len(response), 0., 0.
    for k in range(1, w):
        power = abs(sum(x * complex(math.cos(2 * math.pi * k * d / w), -math.sin(2 * math.pi * k * d / w)) for d, x in enumerate(response.tolist()))) ** 2
        total += power
        if all(abs(min(k, w - k) - t * w / 2 / math.pi) > 1 for t in lines.tolist()): off += power
    return off / total

@pytest.mark.parametrize("window", [4, 15, 64])
def test_leakage_equals_direct_sums(window):
    response, lines = torch.randn(window, dtype=torch.float64), torch.tensor([.9, .05], dtype=torch.float64)
    assert leakage(response, lines).item() == pytest.approx(leakage_by_sums(response, lines), abs=1e-12)

@pytest.mark.parametrize("window", [63, 64])
def test_lines_that_fit_the_window_do_not_leak(window):
    lines = on_bins(window, 3, 10, 31)
    response = 5 + rope_series(lines, torch.arange(window), torch.randn(4, 3, dtype=torch.complex128))
    assert leakage(response, lines).max() < 1e-20
    assert leakage(response, on_bins(window, 20)).min() > .9      # lines of another RoPE

@pytest.mark.parametrize("delta", [.1, .25, .5])
def test_one_line_leaks_as_the_dirichlet_kernel_says(delta):
    line = on_bins(1024, 200 + delta)
    kernel = 1 - (math.sin(math.pi * delta) / math.pi) ** 2 * (1 / delta**2 + 1 / (1 - delta) ** 2)
    assert leakage(rope_series(line, torch.arange(1024)), line).item() == pytest.approx(kernel, abs=1e-3)

def test_a_line_far_slower_than_the_window_leaks_like_a_ramp():
    line = on_bins(4096, .01)
    assert leakage(rope_series(line, torch.arange(4096), torch.tensor([1j], dtype=torch.complex128)), line).item() == pytest.approx(1 - 6 / math.pi**2, abs=2e-3)
    assert not resolved_bands(line, 4096).any() and resolved_bands(on_bins(4096, 1, 1.5), 4096).all()

def test_leakage_ignores_scale_and_constant_and_keeps_shape_and_gradient():
    response, lines = torch.randn(2, 3, 32, requires_grad=True), on_bins(32, 4)
    share = leakage(response, lines)
    assert share.shape == (2, 3) and share.dtype == torch.float64 and ((share > 0) & (share < 1)).all()
    torch.testing.assert_close(leakage(response * 7 - 3, lines), share, rtol=1e-4, atol=0)
    share.sum().backward()
    assert response.grad.isfinite().all() and response.grad.abs().max() > 0

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_leakage_of_a_constant_is_nan(dtype):
    "The rounding of a Fourier transform is no response: at 100 distances it is not exactly 0."
    both = torch.stack([torch.full((100,), .3), torch.randn(100)]).to(dtype)
    assert leakage(both, on_bins(100, 4)).isnan().tolist() == [True, False]

def test_leakage_refuses():
    with pytest.raises(ValueError, match=r"shape \[2, 3\]: a window of 3 distances"): leakage(torch.ones(2, 3), BANDS)
    with pytest.raises(ValueError, match="not finite"): leakage(torch.tensor([1., 2., float("nan"), 3.]), BANDS)

# ---- plots

def test_plot_bands_shows_every_turning_band_once():
    spec = rope_spec(make("proportional")[0])      # 4 of 16 bands turn
    axes = plot_bands(spec, 15).axes[0]
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert sorted(int(x) for line in dots for x in line.get_xdata()) == [0, 1, 2, 3]
    assert sum(len(line.get_xdata()) for line in dots if line.get_markerfacecolor() != "none") == int(resolved_bands(spec.inv_freq, 15).sum()) == 2      # 6.3 and 11.2; not 19.9, 35.3
    assert axes.get_ylim() == (1, 1e8)
