"""Which layers attend causally to all tokens: held against the weights that eager attention returns."""
import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from laid_nb.align import check_full_attention
from laid_nb.attention import attention_kinds, layers_left_out, said_of_layers
from laid_nb.capture import capture
from test_capture import FAMILIES, TEXT

BOTH = ["sliding_attention", "full_attention"]
MOE = dict(num_local_experts=2, num_experts_per_tok=1)
OTHERS = dict(
    mistral=TEXT | dict(sliding_window=5), phi3=TEXT | dict(sliding_window=5), starcoder2=TEXT | dict(sliding_window=5), gemma2=TEXT | dict(sliding_window=5),
    qwen2=TEXT | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), gpt_oss=TEXT | MOE | dict(sliding_window=5, layer_types=BOTH),
    cohere2=TEXT | dict(sliding_window=5, layer_types=BOTH), gemma3_text=TEXT | dict(sliding_window=5, layer_types=BOTH), granite=TEXT | dict(attention_multiplier=.3),
    llama4_text=TEXT | dict(attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=32, moe_layers=[0]))
CASES = {f"{name} as it comes": (name, settings) for name, settings in FAMILIES.items()} | {f"{name} changed": (name, settings) for name, settings in OTHERS.items()}


def build(family, settings, attention="eager", dtype=torch.float32):
    "A random model whose attention is sharp."
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy(settings))
    auto = AutoModelForImageTextToText if config.get_text_config() is not config else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .3)
    return model.to(dtype)


def text(model, n=12):
    "Words, with those of an image in their midst where the family marks them."
    ids, marked = torch.randint(3, 49, (1, n), generator=torch.Generator().manual_seed(1)), torch.zeros(1, n, dtype=torch.long)
    marked[:, 3:8] = 1
    marks = {"gemma3": "token_type_ids", "paligemma": "token_type_ids"}.get(model.config.model_type)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | ({marks: marked} if marks else {})


def gaps(model, inputs):
    "Largest difference between the model's own attention weights and causal softmax of what was captured, by layer."
    with torch.no_grad(), capture(model) as cache: weights = model(**inputs, output_attentions=True).attentions
    found = {}
    for layer, own in zip(cache.layers, weights, strict=True):
        q, k = cache["q", layer], cache["k", layer]
        logits = q @ k.repeat_interleave(q.shape[1]//k.shape[1], 1).mT * cache.scaling[layer]
        plain = logits.masked_fill(~torch.ones(logits.shape[-2:]).bool().tril(), -torch.inf).softmax(-1)
        found[layer] = (own - plain).abs().max().item()
    return found


@pytest.mark.parametrize("case", CASES)
def test_plain_layers_are_those_whose_weights_are_causal_softmax(case):
    model = build(*CASES[case])
    inputs, kinds = text(model), attention_kinds(model)
    plain = {layer: gap < 1e-4 for layer, gap in gaps(model, inputs).items()}
    assert {layer: kind.plain(12) for layer, kind in kinds.items()} == plain
    left_out = layers_left_out(model, inputs)
    assert all(plain[layer] != (layer in left_out) for layer in plain) and set(left_out) | set(plain) == set(range(model.config.get_text_config().num_hidden_layers))
    for layer, is_plain in plain.items():
        if is_plain: assert check_full_attention(model, {layer}, "student", tokens=12) in (None, 4096)
        else:
            with pytest.raises(ValueError, match=f"student layer {layer} "): check_full_attention(model, {layer}, "student")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_answer_does_not_depend_on_precision_or_kernel(attention, dtype):
    for name in ("llama", "gemma3", "paligemma", "qwen2_5_vl"):
        assert attention_kinds(build(name, FAMILIES[name], attention, dtype)) == attention_kinds(build(name, FAMILIES[name]))


@pytest.mark.parametrize("name, words", [("mistral", "window or chunk of 5 tokens"), ("gpt_oss", "more than its keys in the softmax .s_aux"), ("gemma2", "caps or rescales its logits .softcap")])
def test_what_differs_is_said(name, words):
    with pytest.raises(ValueError, match=f"teacher layer 0 .*{words}"): check_full_attention(build(name, OTHERS[name]), {0}, "teacher")


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_image_tokens_that_see_both_ways_are_found(name):
    model = build(name, FAMILIES[name])
    with pytest.raises(ValueError, match="student layer 1 sees later tokens"): check_full_attention(model, {1}, "student")
    words = {key: x for key, x in text(model).items() if key != "token_type_ids"}
    assert check_full_attention(model, {1}, "student", tokens=12, inputs=words) is None


def test_dropout_counts_in_training_alone():
    model = build("llama", TEXT | dict(attention_dropout=.1))
    assert check_full_attention(model, {0, 1}, "teacher") is None
    with pytest.raises(ValueError, match="student layer 0 drops attention at random .dropout=0.1"): check_full_attention(model, {0, 1}, "student")
    assert not any(m.training for m in model.modules())


def test_a_mask_that_a_model_adds_to_is_read(monkeypatch):
    "ALiBi, in a family that has none: what counts is the mask of the call, not the config."
    from transformers.models.llama import modeling_llama
    stock = modeling_llama.create_causal_mask
    def with_alibi(**kwargs):
        mask = stock(**kwargs)
        return mask - .1*(torch.arange(mask.shape[-2])[:, None] - torch.arange(mask.shape[-1])).clamp(min=0)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", with_alibi)
    assert attention_kinds(build("llama", TEXT))[0].differs == ("has a bias on its logits",)


def test_layers_without_self_attention_are_left_out_by_name():
    model = build("mllama", FAMILIES["mllama"])
    left_out = layers_left_out(model, text(model))
    assert left_out == {1: "has no self-attention"} and said_of_layers(left_out | {0: "x", 2: "x"}) == "layer 1 has no self-attention; layers 0, 2 x"
    with pytest.raises(ValueError, match="teacher layer 1 has no self-attention"): check_full_attention(model, {0, 1}, "teacher")
