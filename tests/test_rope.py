"RopeSpec against the stock rotary modules of transformers."
import importlib
import pytest, torch
from transformers import AutoConfig
from laid_nb.rope import RopeSpec, rope_spec

SIZES = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2, max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=1e4)
FAMILIES = {   # name: (family, rope_parameters, stock class, three axes)
    "llama": ("llama", dict(rope_type="default", rope_theta=5e5), "LlamaRotaryEmbedding", False),
    "qwen2": ("qwen2", dict(rope_type="default", rope_theta=1e6), "Qwen2RotaryEmbedding", False),
    "linear": ("llama", dict(rope_type="linear", factor=3.0, rope_theta=1e4), "LlamaRotaryEmbedding", False),
    "llama3": ("llama", dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_theta=1e4), "LlamaRotaryEmbedding", False),
    "yarn": ("qwen2", YARN, "Qwen2RotaryEmbedding", False),
    "partial": ("phi3", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "Phi3RotaryEmbedding", False),
    "glm": ("glm", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "GlmRotaryEmbedding", False),
    "cohere": ("cohere", dict(rope_type="default", rope_theta=1e4), "CohereRotaryEmbedding", False),
    "qwen2_vl": ("qwen2_vl", dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]), "Qwen2VLRotaryEmbedding", True),
    "qwen2_5_vl": ("qwen2_5_vl", dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]), "Qwen2_5_VLRotaryEmbedding", True),
    "qwen2_5_vl yarn": ("qwen2_5_vl", YARN | dict(mrope_section=[4, 6, 6]), "Qwen2_5_VLRotaryEmbedding", True),
    "qwen3_vl": ("qwen3_vl", dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5]), "Qwen3VLTextRotaryEmbedding", True),
    "qwen3_vl_moe": ("qwen3_vl_moe", dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5]), "Qwen3VLMoeTextRotaryEmbedding", True),
    "glm4v": ("glm4v", dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 3, 3]), "Glm4vTextRotaryEmbedding", True),
}

def make(name):
    family, params, stock, axes = FAMILIES[name]
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    sizes = SIZES | dict(rope_parameters=dict(params)) | ({"partial_rotary_factor": params["partial_rotary_factor"]} if "partial_rotary_factor" in params else {})
    config = type(config)(text_config=sizes) if text is not config else type(config)(**sizes)
    module = importlib.import_module(type(text).__module__.replace("configuration_", "modeling_"))
    return config, module, getattr(module, stock)(config.get_text_config()), axes

@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "glm"])      # GLM's module lists the bands in another order, its application reorders
def test_cos_sin_equal_stock_module(name):
    config, _, stock, axes = make(name)
    positions = torch.randint(0, 64, (3, 2, 7) if axes else (2, 7), generator=torch.Generator().manual_seed(0))
    for a, b in zip(rope_spec(config).cos_sin(positions), stock(torch.zeros(1), positions)): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

@pytest.mark.parametrize("name", FAMILIES)
def test_rotate_equals_stock_application(name):
    config, module, stock, axes = make(name)
    spec, positions = rope_spec(config), torch.randint(0, 64, (3, 2, 7) if axes else (2, 7), generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 7, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = stock(torch.zeros(1), positions)
    expected, _ = module.apply_rotary_pos_emb(x, x[:, :2], cos / spec.scaling, sin / spec.scaling)
    torch.testing.assert_close(spec.rotate(x, positions), expected, rtol=0, atol=1e-5)

@pytest.mark.parametrize("layer", [0, 5])
def test_gemma3_layers_differ(layer):
    config = AutoConfig.for_model("gemma3", text_config=SIZES | dict(num_hidden_layers=6))
    text = config.get_text_config()
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    positions = torch.arange(50)[None]
    stock = Gemma3RotaryEmbedding(text)(torch.zeros(1), positions, text.layer_types[layer])
    for a, b in zip(rope_spec(config, layer).cos_sin(positions), stock): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="name a layer"): rope_spec(config)

@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_default_sections_are_the_stock_ones(family):
    "A config without mrope_section gets its family's own."
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    text.head_dim = 64 if family == "glm4v" else 128
    module = importlib.import_module(type(text).__module__.replace("configuration_", "modeling_"))
    name = next(n for n in vars(module) if n.endswith("RotaryEmbedding") and "Vision" not in n)
    positions = torch.randint(0, 99, (3, 1, 5))
    for a, b in zip(rope_spec(config).cos_sin(positions), getattr(module, name)(text)(torch.zeros(1), positions)): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

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
    assert torch.equal(RopeSpec.from_config(config).inv_freq, spec.inv_freq)

@pytest.mark.parametrize("family", ["gpt2", "mpt", "opt"])
def test_no_rope_is_refused(family):
    with pytest.raises(ValueError, match=f"'{family}' has no RoPE"): rope_spec(AutoConfig.for_model(family))

def test_unknown_mrope_family_is_refused():
    with pytest.raises(ValueError, match="M-RoPE of 'ernie4_5_vl_moe_text' is not known"): rope_spec(AutoConfig.for_model("ernie4_5_vl_moe"))

def test_wrong_sections_and_shapes():
    config = AutoConfig.for_model("qwen2_5_vl", text_config=SIZES | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4])))
    with pytest.raises(ValueError, match="12 bands, head_dim 32 needs 16"): rope_spec(config)
    spec = rope_spec(make("llama")[0])
    with pytest.raises(ValueError, match=r"positions have shape \[2, 1, 5\]"): spec.cos_sin(torch.zeros(2, 1, 5))
    with pytest.raises(ValueError, match="16 dimensions a head"): spec.pairs(torch.zeros(1, 16))
