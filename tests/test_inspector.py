"""The inspector of heads, without a browser: reading, files, state, pictures, and what goes to the page."""
import base64
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t
from transformers import AutoModelForImageTextToText, AutoProcessor

import families
from laid_nb.align import turning_pairs
from laid_nb.attention import said_of_layers
from laid_nb.capture import capture
from laid_nb.haystack import Haystack, passage_haystack, picture_haystack
from laid_nb.inputs import encode, image_inputs, read_groups, read_positions
from laid_nb.inspector import _MAPS, HeadGrid, HeadInspector, HeadSpectra, _png, head_limits, plot_head, read_heads
from laid_nb.parts import MixingPart
from laid_nb.rope import RopeSpec
from laid_nb.spectra import position_response
from laid_nb.store import data_path
from laid_nb.train import quiet_training
from laid_nb.viewer import ImageAttention, look, read_attention

SHIPPED = [HeadSpectra.load(data_path("spectra", f"heads-{name}-{n}.safetensors")) for name in ("teacher", "student", "distilled") for n in (5, 20)]


@pytest.fixture(scope="module")
def student(): return AutoModelForImageTextToText.from_pretrained(data_path("anchors", "student")).eval(), AutoProcessor.from_pretrained(data_path("anchors", "student"))


@pytest.fixture
def inspector(): return HeadInspector(SHIPPED)


def fake(name, layers, heads, kv_heads, distances, frequencies=100):
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.rand(*shape, generator=g)
    spec = RopeSpec(1e6**(-torch.arange(64)/64), torch.tensor([0]*16 + [1]*24 + [2]*24), 128)
    edges, wavelength = torch.arange(distances + 1), torch.logspace(3, .3, frequencies)
    one = (r(layers, heads, distances), edges, r(layers, heads, distances), wavelength, r(layers, heads, frequencies), wavelength, r(layers, heads, frequencies))
    return HeadSpectra(name, 50, spec, edges, r(layers, heads, distances), *one, r(layers, heads, 64), r(layers, kv_heads, 64), *(r(layers, heads) for _ in range(5)))


def test_needle_and_attention_are_those_of_eager(student):
    model, processor = student
    haystack = picture_haystack(3, 4, 1, "val")
    read = read_heads(model, processor, [haystack], "student")
    sample = encode(processor, haystack, [0], answers=False)
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad(): weights = torch.cat(model(**image_inputs(model, sample, "student"), output_attentions=True).attentions)  # [layers, heads, tokens, tokens]
    finally: model.set_attn_implementation({"text_config": "sdpa"})
    needle = read_groups(model, sample)[0] == sample["needles"][0][0]
    torch.testing.assert_close(read.needle, weights[..., needle].sum(-1)[..., sample["turn"][0] >= 0].amax(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read.sink, weights[..., 0].mean(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read.mass[..., 0], weights.diagonal(dim1=-2, dim2=-1)[..., 1:].sum(-1)/weights.shape[-1], atol=1e-5, rtol=1e-4)


def test_two_haystacks_are_the_mean_of_each(student):
    a, b = (picture_haystack(seed, 3, 1, "val") for seed in (0, 1))
    both, one, other = (read_heads(*student, some, "student") for some in ([a, b], [a], [b]))
    torch.testing.assert_close(both.needle, (one.needle + other.needle)/2)
    assert both.images == 3 and both.heads == (3, 2, 1)


def test_one_image_that_is_most_of_the_input(student, tmp_path):
    drawn = picture_haystack(0, 1, 1, "val")
    drawn.image(0).resize((280, 280)).save(tmp_path/"large.png")
    read = read_heads(*student, [Haystack((tmp_path/"large.png",), drawn.questions, "large")], "student")
    assert int(read.edges[-1]) == 133  # tokens, of which the image has 102
    torch.testing.assert_close(read.local + read.far + read.sink, torch.ones(3, 2))  # nothing between nearby and far


def test_position_response_under_mrope(student):
    model, processor = student
    sample = encode(processor, picture_haystack(0, 3, 1, "val"), [0], answers=False)
    with torch.no_grad(), capture(model) as cache: model(**image_inputs(model, sample, "student"), use_cache=False)
    q, k, places = cache["q", 1], cache["k", 1], read_positions(model, sample)[0]
    logits, apart = (q @ k.repeat_interleave(2, 1).mT/8)[0].double(), places[0][:, None] - places[0]
    found = position_response(q, k, places)
    for d in range(1, int(apart.max()) + 1):
        if (apart == d).any(): torch.testing.assert_close(found[:, d].double(), logits[:, apart == d].mean(1), atol=1e-4, rtol=1e-4)
        else: assert found[:, d].isnan().all()


@pytest.mark.parametrize("positions, message", [(torch.zeros(1, 5), "expected"), (torch.tensor([[0, 1, 2, 1, 3, 4]]), "positions fall")])
def test_position_response_refuses(positions, message):
    with pytest.raises(ValueError, match=message): position_response(torch.zeros(1, 2, 6, 4), torch.zeros(1, 1, 6, 4), positions)


def test_file_round_trip(tmp_path):
    SHIPPED[0].save(tmp_path/"a.safetensors")
    again = HeadSpectra.load(tmp_path/"a.safetensors")
    for name, value in vars(SHIPPED[0]).items():
        if torch.is_tensor(value): assert torch.equal(value.nan_to_num(), getattr(again, name).nan_to_num())
    assert (again.name, again.images, again.spec.head_dim) == ("teacher", 5, 64)


def test_another_file_is_refused():
    with pytest.raises(ValueError, match="pair.safetensors does not hold the spectra of heads"): HeadSpectra.load(data_path("spectra", "pair.safetensors"))


@pytest.mark.parametrize("spectra, message", [([], "one or more"), (SHIPPED[:1]*2, "once"), ([SHIPPED[0], SHIPPED[3]], r"missing.*\('teacher', 20\)")])
def test_what_cannot_be_shown_together(spectra, message):
    with pytest.raises(ValueError, match=message): HeadInspector(spectra)


@pytest.mark.parametrize("name, value", [("model", "student"), ("images", 5), ("unit", "positions"), ("layer", 0), ("head", 0), ("overlay", False)])
def test_a_trait_moves_its_control_and_the_picture(inspector, name, value):
    if name == "model": inspector.overlay = False  # else the same three heads stay
    before = inspector.picture.value
    assert getattr(inspector, name) != value
    setattr(inspector, name, value)
    assert inspector.controls[name].value == value and inspector.picture.value != before and not inspector.message.value


@pytest.mark.parametrize("name, value", [("model", "distilled"), ("images", 5), ("unit", "positions"), ("layer", 1), ("overlay", False)])
def test_a_control_moves_its_trait(inspector, name, value):
    if name == "model": inspector.overlay = False
    before = inspector.picture.value
    inspector.controls[name].value = value
    assert getattr(inspector, name) == value and inspector.picture.value != before


@pytest.mark.parametrize("name", _MAPS)
def test_the_grid_shows_the_map(inspector, name):
    inspector.map = name
    assert np.array_equal(np.frombuffer(inspector.grid.values, np.float32), getattr(inspector.shown, _MAPS[name]).numpy().ravel()) and name in inspector.grid.title
    assert (inspector.grid.low, inspector.grid.high) == (0, 1)


def test_hover_previews_and_a_click_stays(inspector):
    chosen = inspector.picture.value
    inspector.grid.hovered = [0, 1]
    assert "teacher, layer 0, head 1" in inspector.picture.value
    inspector.grid.hovered = []
    assert inspector.picture.value == chosen
    inspector.grid.selected = [1, 2]
    assert (inspector.layer, inspector.head) == (1, 2) and inspector.kv_grid.selected == [1, 1]
    inspector.kv_grid.selected = [3, 0]
    assert (inspector.layer, inspector.head, inspector.grid.selected) == (3, 0, [3, 0])


def test_another_model_keeps_the_place(inspector):
    inspector.layer, inspector.head = 3, 3
    inspector.model = "student"
    assert (inspector.layer, inspector.head, inspector.grid.selected) == (2, 1, [2, 1]) and (inspector.grid.rows, inspector.grid.columns) == (3, 2)
    assert [(s.name, *cell) for s, *cell in inspector.heads()] == [("teacher", 3, 3), ("student", 2, 1), ("distilled", 2, 1)]
    inspector.model = "teacher"
    assert (inspector.layer, inspector.head) == (3, 3)


@pytest.mark.parametrize("name, value", [("model", "uncle"), ("images", 7), ("layer", 4), ("head", -1), ("unit", "miles"), ("map", "sky")])
def test_what_is_not_there_is_refused_and_changes_nothing(inspector, name, value):
    before = getattr(inspector, name), inspector.picture.value
    with pytest.raises(ValueError, match=f"{name} .* is not there: .* are possible"): setattr(inspector, name, value)
    assert (getattr(inspector, name), inspector.picture.value) == before


def test_an_error_is_shown_raised_and_forgotten(inspector, tmp_path):
    inspector.file.value = str(tmp_path/"head.docx")
    inspector.button.click()  # ipywidgets prints what a callback raises
    assert "laid-error" in inspector.message.value and "docx" in inspector.message.value
    inspector.head = 0
    assert not inspector.message.value


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_button_writes_the_picture(inspector, tmp_path, ending, start):
    inspector.file.value = str(tmp_path/f"head.{ending}")
    inspector.button.click()
    assert (tmp_path/f"head.{ending}").read_bytes().startswith(start) and "written" in inspector.message.value


def test_a_picture_stands_beside_the_live_view(inspector):
    bundle = inspector._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == _png(plot_head(inspector.heads(), inspector.limits, inspector.unit))
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"] == inspector.describe()


def test_ranges_hold_every_head_and_do_not_move(inspector):
    axes = [a.get_ylim() for a in inspector.draw().axes]
    inspector.model, inspector.images, inspector.layer = "student", 5, 0
    assert [a.get_ylim() for a in inspector.draw().axes] == axes
    limits = head_limits(SHIPPED)
    assert all(limits["response"][1] >= s.response.abs().max() and limits["energy"][1] >= s.q_energy.max() for s in SHIPPED)


def test_only_what_is_seen_goes_to_the_page():
    "64 layers of 40 heads and 2,048 distances are 21 MB; a grid is 4 bytes a head, a picture a PNG."
    inspector = HeadInspector([fake("teacher", 64, 40, 8, 2048)])
    sent = sum(len(v) for w in (inspector.grid, inspector.kv_grid, inspector.picture) for v in w.get_state().values() if isinstance(v, (bytes, memoryview, str)))
    assert len(inspector.grid.values) == 4*64*40 and sent < 250_000


def test_thousands_of_distances_are_drawn_as_few():
    s = fake("teacher", 2, 2, 1, 2048)
    figure = plot_head([(s, 0, 0)], head_limits([s]))
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) <= 257 and line.get_xdata()[-1] == 2049
    assert np.isclose(figure.axes[3].lines[0].get_ydata()[:-1].sum(), float(s.mass[0, 0].sum()), rtol=1e-5)


def test_models_without_sections_and_with_every_head_its_own_keys():
    s = fake("text", 2, 4, 4, 64)
    s = replace(s, spec=RopeSpec(s.spec.inv_freq, torch.zeros(64, dtype=torch.long), 128))
    inspector = HeadInspector([s])
    assert (inspector.grid.group, inspector.kv_grid.columns) == (1, 4)


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(1, 2, 3)])
def test_grid_refuses_what_is_no_matrix(values):
    with pytest.raises(ValueError, match=r"expected \[rows, columns\]"): HeadGrid(values, (0, 1))


# --- layers of which not everything can be told -------------------------------
NEAR_FAR, MOE = ["sliding_attention", "full_attention"], dict(num_local_experts=2, num_experts_per_tok=1)
UNEVEN = {  # family -> (classes, settings, layers without attention, layers without energy by band)
    "cohere2": ((t.Cohere2ForCausalLM, t.Cohere2Config), dict(sliding_window=24, layer_types=NEAR_FAR), [0], [1]),
    "exaone4": ((t.Exaone4ForCausalLM, t.Exaone4Config), dict(sliding_window=24, sliding_window_pattern="LG", layer_types=NEAR_FAR), [0], [1]),
    "gemma3": ((t.Gemma3ForCausalLM, t.Gemma3TextConfig), dict(sliding_window=24, layer_types=NEAR_FAR, query_pre_attn_scalar=8, rope_parameters=None), [0], [0]),
    "smollm3": ((t.SmolLM3ForCausalLM, t.SmolLM3Config), dict(no_rope_layers=[1, 0], use_sliding_window=False, layer_types=["full_attention"]*2), [], [1]),
    "gpt_oss": ((t.GptOssForCausalLM, t.GptOssConfig), MOE | dict(sliding_window=24, layer_types=NEAR_FAR), [0, 1], []),
    "mistral": ((t.MistralForCausalLM, t.MistralConfig), dict(sliding_window=24), [0, 1], []),
    "qwen2": ((t.Qwen2ForCausalLM, t.Qwen2Config), dict(use_sliding_window=True, sliding_window=24, max_window_layers=1), [1], []),
}


@pytest.fixture(scope="module")
def uneven():
    "uneven(family): (tokenizer, model of two layers)."
    made = {}
    def build(name):
        if name not in made:
            (model, config), settings, *_ = UNEVEN[name]
            words, make = families.language_model(model, config, **settings)
            torch.manual_seed(0)
            made[name] = words, make("student").eval()
        return made[name]
    return build


@pytest.mark.parametrize("family", UNEVEN)
def test_layers_are_left_out_by_name_and_the_others_are_those_of_eager(uneven, family, tmp_path):
    words, model = uneven(family)
    haystack, (attend, bands) = passage_haystack(1, 3, 1), UNEVEN[family][2:]
    read = read_heads(model, words, [haystack], family)
    assert sorted(read.left_out) == sorted({*attend, *bands})
    for names, layers in ((("needle", "local", "far", "sink", "entropy", "mass"), attend), (("q_energy", "k_energy"), bands), (("response", "power", "position_response"), ())):
        for name in names: assert getattr(read, name).flatten(1).isnan().all(1).nonzero()[:, 0].tolist() == list(layers), name
    sample = encode(words, haystack, [0], answers=False)
    model.set_attn_implementation("eager")
    with torch.no_grad(): weights = torch.cat(model(**image_inputs(model, sample, "student"), output_attentions=True).attentions)[..., :sample["input_ids"].shape[1]]
    needle = (read_groups(model, sample)[0][:, None] == torch.tensor(sample["needles"][0])).any(1)
    for layer in {0, 1} - set(attend):
        torch.testing.assert_close(read.needle[layer], weights[layer][..., needle].sum(-1)[..., sample["turn"][0] >= 0].amax(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read.sink[layer], weights[layer, ..., 0].mean(-1), atol=1e-5, rtol=1e-4)
    read.save(tmp_path/"heads.safetensors")
    assert HeadSpectra.load(tmp_path/"heads.safetensors").left_out == read.left_out
    shown = HeadInspector([read])
    shown.layer = 0
    assert shown.note.value == (f"left out, grey: {said_of_layers(read.left_out)}" if read.left_out else "")
    assert ("not measured, as it " + read.left_out[0] if 0 in attend else "on the needle 0.") in shown.picture.value


@pytest.mark.parametrize("family", ["cohere2", "exaone4", "smollm3"])
def test_the_last_layer_that_has_rope_is_aligned_and_that_is_said(uneven, family):
    words, model = uneven(family)
    with pytest.warns(UserWarning, match="pairs 1:1 are not aligned: a layer of them has no RoPE; 0:0 is"):
        assert turning_pairs(model, model, "last") == [(0, 0)]
    with pytest.warns(UserWarning): assert turning_pairs(model, model, "depth") == [(0, 0)]
    with pytest.warns(UserWarning, match="0:0 is"):
        trained = quiet_training(copy.deepcopy(model), words, [passage_haystack(i, 2, 2) for i in range(2)], teacher=model, use_cpu=True, max_steps=1, method="laid", gain=True)
    assert list(trained.part(MixingPart).mixing) == ["0-0"]


def test_a_rope_of_another_form_is_refused_by_name():
    words, make = families.language_model(t.Llama4ForCausalLM, t.Llama4TextConfig, **MOE, attention_chunk_size=24, no_rope_layers=[1, 0], intermediate_size_mlp=32, moe_layers=[1],
                                          layer_types=["chunked_attention", "full_attention"])
    with pytest.raises(ValueError, match="the RoPE of 'llama4_text' is not of a known form"): read_heads(make("student"), words, [passage_haystack(1, 3, 1)], "llama4")


def test_a_viewer_passes_over_what_is_left_out():
    haystack = picture_haystack(4, 50, 6, "val")
    reading = ImageAttention.load(data_path("spectra", "viewer-teacher-50.safetensors"))
    found = read_attention(*(x.from_pretrained(data_path("anchors", "student")) for x in (AutoModelForImageTextToText, AutoProcessor)), picture_haystack(0, 2, 1, "val"), "student")
    assert found.left_out == {} and found.attention.isfinite().all()
    far = replace(reading, attention=reading.attention.clone(), left_out={0: "has a sink"})
    far.attention[:, :, 0] = torch.nan
    shares, words = look(far, 0, haystack.questions[0].needles)
    assert words.endswith("left out: layer 0 has a sink") and shares.isfinite().all()
    torch.testing.assert_close(look(far, 0, (0,), "answer", "mean", "mean")[0], reading.at(0)[-1, 1:].mean((0, 1)))
    assert look(far, 0, (0,), layer=0) == (None, "attention is not shown: layer 0 has a sink")
