"""The inspector of heads, without a browser: reading, files, state, pictures, and what goes to the page."""
import base64
import copy
import io
import json
import re
from dataclasses import replace

import ipywidgets as widgets
import numpy as np
import pytest
import torch
import transformers as t
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import families
from laid_nb.align import turning_pairs
from laid_nb.capture import capture
from laid_nb.haystack import Haystack, passage_haystack, picture_haystack
from laid_nb.inputs import encode, image_inputs, read_groups, read_positions
from laid_nb.inspector import (
    HeadGrid,
    HeadInspector,
    HeadSpectra,
    Inspector,
    _passes,
    best_head,
    head_limits,
    plot_head,
    read_heads,
)
from laid_nb.page import embedded
from laid_nb.parts import MixingPart
from laid_nb.rope import RopeSpec, rope_spec
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


# --- state ---------------------------------------------------------------------
def test_it_opens_on_each_models_best_head_at_the_largest_size(inspector):
    assert inspector.images == 20
    for s, layer, head in inspector.heads():
        assert s.needle[layer, head] == s.needle.max() and s.images == 20


def test_layers_that_were_not_measured_are_never_the_best():
    s = fake("teacher", 3, 2, 1, 16)
    needle = s.needle.clone()
    needle[1] = torch.nan
    assert best_head(replace(s, needle=needle))[0] != 1
    assert best_head(replace(s, needle=torch.full_like(needle, torch.nan))) == [0, 0]


@pytest.mark.parametrize("name, value", [("images", 5), ("unit", "positions"), ("map", "slow"), ("chosen", dict(teacher=[0, 0], student=[2, 1], distilled=[1, 0]))])
def test_a_trait_is_state_of_the_page(inspector, name, value):
    assert inspector.state[name] != value
    setattr(inspector, name, value)
    assert inspector.state[name] == value and inspector.get_state()[name] == value


def test_another_head_of_one_model_leaves_the_others(inspector):
    before = dict(inspector.chosen)
    inspector.choose("student", 2, 1)
    assert inspector.chosen == before | {"student": [2, 1]} and "student, layer 2, head 1" in inspector.describe()


@pytest.mark.parametrize("name, value, message", [
    ("images", 7, "images 7 is not there: 5, 20 are possible"), ("unit", "miles", "unit 'miles' is not there"), ("map", "sky", "map 'sky' is not there"),
    ("chosen", dict(teacher=[0, 0]), "expected a head of each of teacher, student, distilled"),
    ("chosen", dict(teacher=[4, 0], student=[0, 0], distilled=[0, 0]), r"teacher has no head \[4, 0\]: layer 0 to 3"),
    ("chosen", dict(teacher=[0, 0], student=[0, -1], distilled=[0, 0]), r"student has no head \[0, -1\]")])
def test_what_is_not_there_is_refused_and_changes_nothing(inspector, name, value, message):
    before = inspector.state
    with pytest.raises(ValueError, match=message): setattr(inspector, name, value)
    assert inspector.state == before


# --- what goes to the page -------------------------------------------------------
def unpacked(one):
    return np.frombuffer(base64.b64decode(one["base64"]), {"f4": "<f4", "f2": "<f2"}[one["type"]]).reshape(one["shape"])


@pytest.mark.parametrize("name", ["response", "mass", "q_energy", "k_energy", "needle", "far", "edges", "position_wavelength"])
def test_the_page_gets_the_arrays(inspector, name):
    for model in inspector.view["models"]:
        for size, packed in model["sizes"].items():
            value = getattr(inspector.spectra[model["name"], int(size)], name)
            np.testing.assert_allclose(unpacked(packed[name]), value.numpy(), rtol=1e-3, atol=1e-6)


def test_power_goes_as_its_logarithm(inspector):
    packed = inspector.view["models"][0]["sizes"]["5"]["log_power"]
    np.testing.assert_allclose(10.**unpacked(packed).astype(float), SHIPPED[0].power.numpy(), rtol=1e-2)


def test_slow_energy_of_a_query_head_is_that_of_its_key(inspector):
    s, packed = SHIPPED[0], inspector.view["models"][0]["sizes"]["5"]["slow"]
    slow = (s.spec.inv_freq*int(s.position_edges[-1]) < 2*np.pi*(1 - 1e-6))
    expected = s.k_energy[..., slow].sum(-1)[:, [h*s.heads[2]//s.heads[1] for h in range(s.heads[1])]]
    np.testing.assert_allclose(unpacked(packed), expected.numpy(), rtol=1e-3, atol=1e-6)


def test_a_hundred_kilobytes_for_three_models(inspector):
    "Reduced arrays, never tokens x tokens."
    assert len(embedded(inspector.view)) < 100_000


def test_a_model_of_a_thousand_heads_is_packed_small():
    inspector = HeadInspector([fake("teacher", 28, 28, 4, 128)])
    assert len(embedded(inspector.view)) < 2.7*28*28*(4*128 + 2*100 + 2*64)


def test_html_stands_beside_the_live_view(inspector):
    bundle, _ = inspector._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"] == inspector.describe()
    state = json.loads(re.search(r'class="laid-data">(.*?)</script>', bundle["text/html"])[1])
    assert state == json.loads(embedded(inspector.state))
    picture = Image.open(io.BytesIO(base64.b64decode(re.search('src="data:image/png;base64,([^"]+)"', bundle["text/html"])[1])))
    assert picture.size == (688, 448)


def test_a_name_is_never_markup():
    name = '<img src=x onerror="alert(1)"></script>'
    html = HeadInspector([replace(SHIPPED[0], name=name)]).html()
    assert "<img src=x" not in html and html.count("</script>") == 2


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_saved(inspector, tmp_path, ending, start):
    inspector.save(tmp_path/f"head.{ending}")
    assert (tmp_path/f"head.{ending}").read_bytes().startswith(start)


# --- pictures -------------------------------------------------------------------
def test_ranges_hold_every_head_and_do_not_move(inspector):
    axes = [a.get_ylim() for a in inspector.draw().axes]
    inspector.images, inspector.chosen = 5, dict.fromkeys(inspector.names, [0, 0])
    assert [a.get_ylim() for a in inspector.draw().axes] == axes
    limits = head_limits(SHIPPED)
    assert all(limits["response"][1] >= s.response.abs().max() and limits["energy"][1] >= s.q_energy.max() for s in SHIPPED)


def test_thousands_of_distances_are_drawn_as_few():
    s = fake("teacher", 2, 2, 1, 2048)
    figure = plot_head([(s, 0, 0)], head_limits([s]))
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) <= 257 and line.get_xdata()[-1] == 2049
    assert np.isclose(figure.axes[3].lines[0].get_ydata()[:-1].sum(), float(s.mass[0, 0].sum()), rtol=1e-5)


def test_models_without_sections_and_with_every_head_its_own_keys():
    s = fake("text", 2, 4, 4, 64)
    s = replace(s, spec=RopeSpec(s.spec.inv_freq, torch.zeros(64, dtype=torch.long), 128))
    (model,) = HeadInspector([s]).view["models"]
    assert (model["heads"], model["kv_heads"]) == (4, 4) and set(model["rope"]["usual"]["axis"]) == {0}


# --- the widgets that the kernel draws --------------------------------------------
class Turns(Inspector):
    "A slider above a curve; seven is refused."
    def __init__(self):
        self.turns = widgets.IntSlider(3, 1, 9)
        self.turns.observe(self.redraw, "value")
        super().__init__(self.turns)
        self.redraw()

    def describe(self): return f"{self.turns.value} <b>turns"

    def draw(self):
        if self.turns.value == 7: raise ValueError("seven is refused")
        figure = Figure(figsize=(2, 1), dpi=80)
        figure.subplots().plot(np.sin(np.linspace(0, self.turns.value, 99)))
        return figure


def test_an_error_is_shown_raised_and_forgotten(tmp_path):
    inspector = Turns()
    inspector.file.value = str(tmp_path/"head.docx")
    inspector.button.click()  # ipywidgets prints what a callback raises
    assert "laid-error" in inspector.message.value and "docx" in inspector.message.value
    inspector.turns.value = 4
    assert not inspector.message.value


@pytest.mark.parametrize("ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_button_writes_the_picture(tmp_path, ending, start):
    inspector = Turns()
    inspector.file.value = str(tmp_path/f"head.{ending}")
    inspector.button.click()
    assert (tmp_path/f"head.{ending}").read_bytes().startswith(start) and "written" in inspector.message.value


def test_a_picture_stands_beside_the_live_view():
    inspector = Turns()
    bundle = inspector._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG") and bundle["text/plain"] == inspector.describe()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "<b>" not in inspector.picture.value


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(1, 2, 3)])
def test_grid_refuses_what_is_no_matrix(values):
    with pytest.raises(ValueError, match=r"expected \[rows, columns\]"): HeadGrid(values, (0, 1))


# --- layers of which not everything can be told -------------------------------
NEAR_FAR, MOE = ["sliding_attention", "full_attention"], dict(num_local_experts=2, num_experts_per_tok=1)
UNEVEN = {  # family -> (classes, settings, layers without attention, layers without energy by band)
    "cohere2": ((t.Cohere2ForCausalLM, t.Cohere2Config), dict(sliding_window=24, layer_types=NEAR_FAR), [0], [1]),
    "exaone4": ((t.Exaone4ForCausalLM, t.Exaone4Config), dict(sliding_window=24, sliding_window_pattern="LG", layer_types=NEAR_FAR), [0], [1]),
    "gemma3": ((t.Gemma3ForCausalLM, t.Gemma3TextConfig), dict(sliding_window=24, layer_types=NEAR_FAR, query_pre_attn_scalar=8, rope_parameters=None), [0], []),
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
    again = HeadSpectra.load(tmp_path/"heads.safetensors")
    assert again.left_out == read.left_out and list(again.ropes) == list(read.ropes) == ([0] if family == "gemma3" else [])
    shown = HeadInspector([read])
    shown.choose(family, 0, 0)
    assert ("not measured, as it " + read.left_out[0] if 0 in attend else "on the needle 0.") in shown.describe()
    assert shown.view["models"][0]["left_out"] == {str(layer): why for layer, why in read.left_out.items()}


def test_a_layer_with_its_own_rope_is_told_by_its_own_bands(uneven, tmp_path):
    words, model = uneven("gemma3")
    haystack = passage_haystack(1, 3, 1)
    read = read_heads(model, words, [haystack], "gemma3")
    read.save(tmp_path/"heads.safetensors")
    own, usual = read.rope(0), read.rope(1)
    assert torch.equal(own.inv_freq, rope_spec(model, 0).inv_freq) and torch.equal(usual.inv_freq, rope_spec(model, 1).inv_freq) and not torch.equal(own.inv_freq, usual.inv_freq)
    assert torch.equal(HeadSpectra.load(tmp_path/"heads.safetensors").rope(0).inv_freq, own.inv_freq)
    sample = encode(words, haystack, [0], answers=False)
    with torch.no_grad(), capture(model) as cache: model(**image_inputs(model, sample, "student"), use_cache=False)
    for layer in (0, 1):
        pairs = rope_spec(model, layer).pairs(cache["k", layer][0]).square().sum(-1).sum(1)  # [kv_heads, bands]
        torch.testing.assert_close(read.k_energy[layer], pairs/cache["k", layer][0].square().sum((1, 2))[:, None], atol=1e-5, rtol=1e-4)
    packed = HeadInspector([read]).view["models"][0]["rope"]
    assert packed.keys() == {"usual", "0"} and packed["0"]["wavelength"] != packed["usual"]["wavelength"]


def test_reading_in_passes_gives_the_same_numbers(student):
    haystack = picture_haystack(1, 3, 1, "val")
    whole, parts = (read_heads(*student, [haystack], "student", memory=memory) for memory in (4, 1e-6))
    assert _passes(student[0], 100, 1e-6) == [[0], [1], [2]]
    for name, value in vars(whole).items():
        if torch.is_tensor(value): assert torch.equal(value.nan_to_num(), getattr(parts, name).nan_to_num()), name


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
    haystack = picture_haystack(7, 50, 6, "val")
    reading = ImageAttention.load(data_path("spectra", "viewer-teacher-50.safetensors"))
    found = read_attention(*(x.from_pretrained(data_path("anchors", "student")) for x in (AutoModelForImageTextToText, AutoProcessor)), picture_haystack(0, 2, 1, "val"), "student")
    assert found.left_out == {} and found.attention.isfinite().all()
    far = replace(reading, attention=reading.attention.clone(), left_out={0: "has a sink"})
    far.attention[:, :, 0] = torch.nan
    shares, words = look(far, 0, haystack.questions[0].needles)
    assert words.endswith("left out: layer 0 has a sink") and shares.isfinite().all()
    torch.testing.assert_close(look(far, 0, (0,), "answer", "mean", "mean")[0], reading.at(0)[-1, 1:].mean((0, 1)))
    assert look(far, 0, (0,), layer=0) == (None, "attention is not shown: layer 0 has a sink")
