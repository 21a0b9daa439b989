"""A Llama with a vision tower: the same text model, the tower but for its last layer, and a projector by least squares."""
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration

from laid_nb.capture import capture
from laid_nb.haystack import OBJECTS, Scene, render
from laid_nb.sighted import _family_config, _scenes, _take_text, _with_marks, name_embeddings, projector, sighted
from laid_nb.store import data_path, load_model, save_model


def llama(**more):
    words = AutoTokenizer.from_pretrained(data_path("anchors", "student"))
    torch.manual_seed(1)
    sizes = dict(hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, **sizes | dict(vocab_size=len(words)) | more)).eval(), words


@pytest.fixture(scope="module")
def made():
    plain, words = llama(tie_word_embeddings=False)
    return plain, words, *sighted(plain, words)


def test_text_is_read_to_the_bit_and_queries_and_keys_are_the_same(made):
    plain, words, model, _ = made
    ids = torch.randint(0, len(words), (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(plain) as one, capture(model) as other:
        assert torch.equal(plain(ids).logits, model(input_ids=ids).logits[..., :len(words)])
    for layer in (0, 1):
        for what in "qk": torch.testing.assert_close(one[what, layer], other[what, layer], atol=0, rtol=0)


@pytest.mark.parametrize("tied, rows", [(True, 700), (False, 595)])
def test_new_tokens_start_at_the_mean_and_all_others_stay(tied, rows):
    "With as many rows as tokens, and with more."
    plain, words = llama(tie_word_embeddings=tied, vocab_size=rows)
    model, processor = sighted(plain, words)
    before, now = plain.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(now[:595], before[:595]) and len(now) == max(rows, len(processor.tokenizer))
    assert (model.lm_head.weight is now) == tied and torch.equal(model.lm_head.weight[:595], plain.lm_head.weight[:595])


def test_words_of_another_model_are_refused():
    plain, words = llama()
    words.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="the tokenizer has 596 tokens, and the model 595: not its own"): sighted(plain, words)


def test_the_tower_is_the_donor_s_but_for_its_last_layer(made):
    plain, words, model, processor = made
    donor, given = load_model("student", torch.float32)
    own, theirs = model.model.visual.state_dict(), donor.model.visual.state_dict()
    differ = {k for k in theirs if own[k].shape != theirs[k].shape or not torch.equal(own[k], theirs[k])}
    assert differ == {"merger.mlp.2.weight", "merger.mlp.2.bias"} and own.keys() == theirs.keys()
    weight, bias, explained = projector(donor.model.visual, given.image_processor, name_embeddings(plain, words))
    made = given.image_processor([render(Scene(("dog", "cup"), 5, "val"))], return_tensors="pt")
    with torch.no_grad():
        wanted = donor.model.visual(made["pixel_values"], made["image_grid_thw"]).pooler_output @ weight.T + bias
        torch.testing.assert_close(model.model.visual(made["pixel_values"], made["image_grid_thw"]).pooler_output, wanted, atol=1e-5, rtol=1e-4)
    assert .5 < explained < 1


def test_the_projector_is_a_ridge_regression():
    "Its residuals, on its own pictures: what they are made of pulls as hard as the ridge."
    plain, words = llama()
    donor, given = load_model("student", torch.float32)
    names = name_embeddings(plain, words)
    weight, bias, _ = projector(donor.model.visual, given.image_processor, names, 60)
    scenes, shown = _scenes(60)
    pixels = given.image_processor([render(s) for s in scenes], return_tensors="pt")
    with torch.no_grad(): x = donor.model.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output.double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1).numpy()
    y = torch.stack([names[torch.as_tensor(s)].sum(0)/len(s)**.5 for s in shown]).repeat_interleave(4, 0).double().numpy()
    found = torch.cat([weight.T, bias[None]]).double().numpy()
    ridge = 1e-3*(x**2).sum(0).mean()
    np.testing.assert_allclose(x.T @ (y - x @ found), ridge*found, atol=1e-3*abs(ridge*found).max())


def test_pictures_start_at_the_words_of_what_they_show(made):
    plain, words, model, processor = made
    names, right = name_embeddings(plain, words), 0
    for i, name in enumerate(OBJECTS[:20]):
        pixels = processor.image_processor([render(Scene((name,), i, "val"))], return_tensors="pt")
        with torch.no_grad(): seen = model.model.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output.mean(0)
        right += OBJECTS[torch.cosine_similarity(seen, names).argmax()] == name
    assert right >= 18


def test_what_is_saved_is_a_stock_model(made, tmp_path):
    *_, model, processor = made
    save_model(model, processor, tmp_path/"sighted")
    again, words = load_model(str(tmp_path/"sighted"))
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert words.tokenizer.convert_ids_to_tokens(again.config.image_token_id) == "<|image_pad|>" == words.image_token


def test_weights_without_a_place_are_refused():
    plain, words = llama(mlp_bias=True)
    with pytest.raises(ValueError, match="no place for 'layers.0.mlp"): sighted(plain, words)


@pytest.mark.parametrize("kind", ["Mistral", "Gemma"])
def test_models_that_compute_otherwise_with_the_same_weights_are_refused(kind):
    "A window that slides; embeddings that are scaled."
    import transformers
    _, words = llama()
    sizes = dict(hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    other = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(vocab_size=len(words), **sizes))
    with pytest.raises(ValueError, match=f"a {kind}ForCausalLM is no Llama: give a LlamaForCausalLM"): sighted(other, words)


def test_heads_that_do_not_share_the_hidden_size_are_refused():
    with pytest.raises(ValueError, match="4 heads of 16 do not make up the hidden size 96"): sighted(*llama(head_dim=16))


def test_eyes_of_another_family_are_refused(monkeypatch):
    from families import build
    other, make = build("qwen2_vl")
    monkeypatch.setattr("laid_nb.sighted.load_model", lambda *_: (make("student"), other))
    with pytest.raises(ValueError, match="the eyes 'them' are a qwen2_vl's: give a Qwen2.5-VL"): sighted(*llama(), "them")


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_positions_are_kept(kind):
    more = dict(original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
    keys = dict(linear=(), llama3=more, yarn=("original_max_position_embeddings",))[kind]
    rope = dict(rope_theta=1e4, rope_type=kind, factor=8.0, **{k: more[k] for k in keys})
    plain, words = llama(rope_parameters=rope, max_position_embeddings=512)
    ids = torch.randint(0, len(words), (1, 100), generator=torch.Generator().manual_seed(0))
    bare = Qwen2_5_VLForConditionalGeneration(_family_config(plain.config, load_model("student")[0].config.vision_config, _with_marks(words))).eval()
    _take_text(bare, plain, len(words))
    with torch.no_grad(): assert torch.equal(plain(ids).logits, bare(input_ids=ids).logits[..., :len(words)])
