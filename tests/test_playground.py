"The RoPE playground: its state from code and from its controls, what it refuses, and its numbers against the formulas."
import math

import numpy as np
import pytest

import laid_nb.playground as playground
from laid_nb.playground import _LIMITS, _PRESETS, _SCALINGS, RopePlayground, plot_rope, rope_config
from laid_nb.rope import rope_spec


@pytest.fixture
def play(): return RopePlayground(theta=1e5, head_dim=64, sections=[8, 12, 12], window=512)

def by_hand(scaling, theta, dim, factor, window):
    "Frequencies [bands] in float64, by the papers' formulas; the model was trained on window / factor positions."
    band, trained = np.arange(dim//2), round(window/factor)
    if scaling == "dynamic": theta = theta*(factor*window/trained - factor + 1)**(dim/(dim - 2))
    plain = theta**(-2*band/dim)
    if scaling == "linear": return plain/factor
    if scaling != "yarn": return plain
    at = lambda turns: dim*math.log(trained/(turns*2*math.pi))/(2*math.log(theta))
    low, high = max(math.floor(at(32)), 0), min(math.ceil(at(1)), dim - 1)
    ramp = np.clip((band - low)/(high - low), 0, 1)
    return plain*(1 - ramp) + plain/factor*ramp

# ---- numbers

@pytest.mark.parametrize("sections", [[], [8, 12, 12]])
@pytest.mark.parametrize("scaling", _SCALINGS)
def test_frequencies_are_those_of_the_formulas(scaling, sections):
    spec = RopePlayground(theta=5e4, head_dim=64, sections=sections, scaling=scaling, factor=4., window=4096).spec
    np.testing.assert_allclose(spec.inv_freq.numpy(), by_hand(scaling, 5e4, 64, 4., 4096), rtol=2e-5)

def test_yarn_sharpens_the_logits():
    assert RopePlayground(scaling="yarn", factor=8.).spec.scaling == pytest.approx(1 + .1*math.log(8), abs=1e-6)

def test_axes_are_the_sections(play): assert play.spec.axis.tolist() == [0]*8 + [1]*12 + [2]*12

def test_leakage_is_the_share_off_the_lines(play):
    lines = by_hand("none", 1e5, 64, 1, 512)
    f = np.cos(np.arange(512)[:, None]*lines).sum(1)
    power = np.abs(np.fft.fft(f)[1:])**2
    k = np.minimum(np.arange(1, 512), 512 - np.arange(1, 512))
    off = np.abs(k[:, None] - lines*512/2/math.pi).min(1) > 1
    assert play.leakage == pytest.approx(power[off].sum()/power.sum(), rel=1e-5)

def test_octaves_keep_every_bin(play):
    on, off = playground._power_by_octave(play.spec, 512)
    assert len(on) == len(off) == 9 and float(on.sum() + off.sum()) == pytest.approx(1)

def test_the_first_octave_is_the_first_bin(play):
    f = np.cos(np.arange(512)[:, None]*by_hand("none", 1e5, 64, 1, 512)).sum(1)
    power = np.abs(np.fft.rfft(f)[1:])**2
    power[-1] /= 2
    on, off = playground._power_by_octave(play.spec, 512)
    assert float(on[0] + off[0]) == pytest.approx(power[0]/power.sum(), rel=1e-5)

@pytest.mark.parametrize("bands", [4, 6, 32, 48, 64, 128])
@pytest.mark.parametrize("name", [n for n in _PRESETS if not n.startswith("none")])
def test_presets_hand_out_every_band(name, bands):
    sections = _PRESETS[name](bands)
    assert len(sections) == 3 and sum(sections) == bands and min(sections) > 0

def test_the_preset_of_128_is_the_models_own(): assert _PRESETS["as Qwen2.5-VL"](64) == [16, 24, 24]

# ---- state

@pytest.mark.parametrize("name, value, shown", [("theta", 1e4, 1e4), ("head_dim", 64, 64), ("factor", 8., 8.), ("window", 1000, 1000), ("scaling", "yarn", "yarn"), ("sections", [10, 11, 11], "10,11,11")])
def test_code_moves_the_control(play, name, value, shown):
    setattr(play, name, value)
    assert getattr(play, name) == value
    found = play.controls[name].value
    assert found == shown if isinstance(shown, str) else round(found) == shown

@pytest.mark.parametrize("name, moved, value", [("theta", 1e6, 1e6), ("factor", 2., 2.), ("window", 2**10.125, 1117), ("scaling", "linear", "linear"), ("sections", "10, 11,11", [10, 11, 11]), ("sections", "10/11/11", [10, 11, 11]),
                                                ("sections", "", []), ("preset", "none (text)", []), ("preset", "thirds", [12, 10, 10])])
def test_a_control_sets_the_state(play, name, moved, value):
    play.controls[name].value = moved
    assert getattr(play, "sections" if name == "preset" else name) == value

def test_a_slider_between_whole_windows_stays_where_it_is(play):
    play.controls["window"].value = 2**10.125
    assert play.controls["window"].value == 2**10.125

def test_sections_of_a_preset_follow_head_dim(play):
    play.controls["head_dim"].value = 128
    assert play.sections == [16, 24, 24] and play.controls["preset"].value == "as Qwen2.5-VL" and play.controls["sections"].value == "16,24,24"

def test_typed_sections_show_as_typed(play):
    play.sections = [2, 15, 15]
    assert play.controls["preset"].value == "typed"

def test_factor_waits_for_a_scaling(play):
    assert play.controls["factor"].disabled
    play.scaling = "dynamic"
    assert not play.controls["factor"].disabled

def test_show_changes_what_only_fits_together(play):
    play.show(head_dim=32, sections=[4, 6, 6])
    assert (play.head_dim, play.sections) == (32, [4, 6, 6])

def test_settings_make_the_same_playground_again(play): assert RopePlayground(**play.settings).describe() == play.describe()

# ---- refusals

@pytest.mark.parametrize("settings, message", [
    (dict(theta=1.), "theta is 1.0, expected 100 to 100,000,000"), (dict(head_dim=512), "head_dim is 512, expected 8 to 256"), (dict(head_dim=20, sections=[]), "head_dim is 20, expected a multiple of 8"),
    (dict(window=8), "window is 8, expected 16 to 32,768"), (dict(factor=.5), "factor is 0.5, expected 1 to 32"), (dict(scaling="ntk"), "scaling is 'ntk', expected one of none, linear, dynamic, yarn"),
    (dict(sections=[16, 24, 24]), r"add up to 64; .* add up to 32, the bands of head_dim 64, such as \[8, 12, 12\]"), (dict(sections=[16, 16]), "three of 1 or more"), (dict(sections=[0, 16, 16]), "three of 1 or more"),
    (dict(head_dim=128), r"add up to 32; .* add up to 64"), (dict(base=3), "no setting 'base': one of theta")])
def test_show_refuses_and_changes_nothing(play, settings, message):
    before = play.settings
    with pytest.raises(ValueError, match=message): play.show(**settings)
    assert play.settings == before

def test_a_trait_is_refused_alike(play):
    with pytest.raises(ValueError, match="such as"): play.sections = [1, 2, 3]
    assert play.sections == [8, 12, 12]

def test_typed_nonsense_is_shown_in_red_and_stays_to_be_mended(play):
    with pytest.raises(ValueError, match="three whole numbers"): play.controls["sections"].value = "8,12,x"
    assert "laid-error" in play.message.value and play.controls["sections"].value == "8,12,x" and play.sections == [8, 12, 12]
    play.controls["sections"].value = "8,11,13"
    assert not play.message.value and play.sections == [8, 11, 13]

def test_a_refused_slider_goes_back(play):
    play.sections = [2, 15, 15]
    with pytest.raises(ValueError, match="add up to 64"): play.controls["head_dim"].value = 128
    assert play.controls["head_dim"].value == 64 and "laid-error" in play.message.value

# ---- work done

def test_rope_spec_is_asked_once_for_each_setting_it_depends_on(monkeypatch):
    asked = []
    monkeypatch.setattr(playground, "rope_spec", lambda config, length=None: asked.append(config) or rope_spec(config, length=length))
    playground._spec.cache_clear()
    play = RopePlayground(sections=[], window=512)
    counts = [len(asked)]
    for settings in (dict(window=600), dict(factor=2.), dict(theta=1e5), dict(theta=1e6), dict(scaling="linear"), dict(window=700), dict(scaling="yarn"), dict(window=800)):
        play.show(**settings)
        counts.append(len(asked))
    assert counts == [1, 1, 1, 2, 2, 3, 3, 4, 5]

def test_one_change_draws_once(play, monkeypatch):
    drawn = []
    monkeypatch.setattr(playground, "plot_rope", lambda *args: drawn.append(args) or plot_rope(*args))
    play.show(head_dim=128, sections=[16, 24, 24], window=600)
    assert len(drawn) == 1
    play.controls["head_dim"].value = 64                                   # moves the sections as well
    assert len(drawn) == 2

# ---- picture

def lines(axes): return {line.get_label(): line for line in axes.lines}

def test_the_picture_holds_the_series():
    spec = rope_spec(rope_config(1e4, 32))
    line = lines(plot_rope(spec, 256).axes[0])["all bands"]
    expected = np.cos(np.asarray(line.get_xdata())[:, None]*by_hand("none", 1e4, 32, 1, 256)).mean(1)
    np.testing.assert_allclose(line.get_ydata(), expected, atol=2e-2)      # float32 angles at a million positions

def test_every_axis_has_its_line(play): assert {"T", "H", "W", "all bands"} <= lines(play.draw().axes[0]).keys()

def test_a_text_has_none(play):
    play.sections = []
    assert not {"T", "H", "W"} & lines(play.draw().axes[0]).keys()

def test_scaling_is_compared_with_none(play):
    assert "without\nscaling" not in lines(play.draw().axes[0])
    play.scaling = "linear"
    assert "without\nscaling" in lines(play.draw().axes[0])

def test_ranges_do_not_move(play):
    limits = lambda: [(a.get_xlim(), a.get_ylim()) for a in (lambda axes: (axes[0], axes[2]))(play.draw().axes)]
    before = limits()
    play.show(theta=1e7, window=30000, scaling="yarn")
    assert limits() == before

def test_static_picture_and_words(play):
    bundle = play._repr_mimebundle_()
    assert "laid-fallback" in bundle["text/html"] and bundle["text/plain"].startswith("RoPE with theta 100,000, head_dim 64, sections 8/12/12: ") and f"leakage {play.leakage:.1%}" in bundle["text/plain"]

def test_limits_can_be_drawn():
    for theta in _LIMITS["theta"]:
        for dim in _LIMITS["head_dim"]:
            for window in _LIMITS["window"]: RopePlayground(theta=theta, head_dim=dim, sections=[], scaling="yarn", factor=32., window=window)
