"""MixingInspector: its numbers against direct sums, its state, what is refused."""
import math

import pytest
import torch
from matplotlib.figure import Figure

from laid_nb.align import fit_mixing
from laid_nb.capture import capture
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, image_inputs
from laid_nb.mixing import mixings
from laid_nb.mixing_inspector import (
    MixingInspector,
    MixingView,
    join_views,
    kept_weights,
    load_views,
    plot_mixture,
    plot_mixture_response,
    read_mixing,
    save_views,
)
from laid_nb.rope import RopeSpec, rope_spec
from laid_nb.store import data_path, load_model


@pytest.fixture(scope="module")
def pair():
    "student, teacher, processor"
    (student, processor), (teacher, _) = load_model("student", torch.float32), load_model("teacher", torch.float32)
    return student, teacher, processor


@pytest.fixture(scope="module")
def haystacks(): return [picture_haystack(i, n, n_questions=2, split="val") for i, n in enumerate((3, 2))]


@pytest.fixture(scope="module")
def fitted(pair, haystacks):
    "fitted(form, tied): mixing of the last layers at the ridge start, and what read_mixing makes of it."
    student, teacher, processor = pair
    def make(form="scalar", tied=False, constraint="free"):
        mixing = mixings(student.config, teacher.config, [(2, 3)], constraint, tied, form, True)
        stats = fit_mixing(mixing, student, teacher, [HaystackCollator(processor)([h]) for h in haystacks])
        views = read_mixing(kept_weights({5: mixing}), {5: student}, teacher, processor, haystacks)
        return mixing["2-3"], stats[2, 3], views
    return make


def heads(model, layer, batch):
    with torch.no_grad(), capture(model, layer) as cache: model(**image_inputs(model, batch, "student"))
    return cache["q", layer][0].double(), cache["k", layer][0].double(), cache.scaling[layer]


def direct(queries, keys, scalings, edges):
    "Mean logit in bins of distance, one head, by a sum over all pairs: lists over haystacks of [tokens, head_dim]."
    total, count = torch.zeros(2, int(edges[-1]), dtype=torch.float64)
    for q, k, scaling in zip(queries, keys, scalings):
        for m in range(len(q)):
            for n in range(m + 1):
                total[m - n] += (q[m] @ k[n])*scaling
                count[m - n] += 1
    mean = total/count
    return torch.stack([mean[a:b].mean() for a, b in zip(edges[:-1], edges[1:])]).float()


def made_up(form="scalar", which="q", pair="2-3", times=3, rows=4, columns=6, bands=8, bins=5, steps=(0, 10, 20)):
    rand = torch.randn
    w = rand(times, rows, columns, *([] if form == "scalar" else [bands]))
    if form == "complex":
        w = torch.complex(w, rand(*w.shape))
    spec = RopeSpec(1e4**-(torch.arange(bands)/bands), torch.arange(bands) % 3, 2*bands)
    own = rand(times, rows, bands + 1, bins)
    own[1] = torch.nan
    mixture, energy, own_energy = rand(times, rows, bands + 1, bins), *(rand(times, rows, bands)**2 for _ in range(2))
    return MixingView(pair, which, spec, torch.tensor(steps[:times]), w, torch.arange(bins + 1), mixture, own,
                      energy, own_energy, torch.rand(times, rows))


@pytest.fixture
def inspector():
    views = [made_up(form, which) for form in ("scalar", "band", "complex") for which in "qk"]
    return MixingInspector(views + [made_up(pair="0-1", rows=2, steps=(0, 7, 14))])


# --- numbers --------------------------------------------------------------------
def test_response_of_the_sum_is_that_of_a_direct_sum(pair, haystacks, fitted):
    mixing, _, (view, _) = fitted()
    w_q, w_k = (w.detach().double() for w in mixing.weights())
    read = [heads(pair[1], 3, HaystackCollator(pair[2])([h])) for h in haystacks]
    queries = [torch.einsum("j,jnd->nd", w_q[1], q) for q, _, _ in read]
    keys = [torch.einsum("j,jnd->nd", w_k[0], k) for _, k, _ in read]
    expected = direct(queries, keys, [s for *_, s in read], view.edges)
    torch.testing.assert_close(view.mixture[0, 1, -1], expected, atol=1e-4, rtol=1e-4)


def test_response_of_the_student_is_that_of_a_direct_sum(pair, haystacks, fitted):
    _, _, (view, keys) = fitted()
    read = [heads(pair[0], 2, HaystackCollator(pair[2])([h])) for h in haystacks]
    one_key, scalings = [k[0] for _, k, _ in read], [s for *_, s in read]
    both = [direct([q[i] for q, _, _ in read], one_key, scalings, view.edges) for i in range(2)]
    torch.testing.assert_close(view.own[0, :, -1], torch.stack(both), atol=1e-4, rtol=1e-4)
    # a KV head: mean over the query heads that read it
    torch.testing.assert_close(keys.own[0, 0, -1], (both[0] + both[1])/2, atol=1e-4, rtol=1e-4)


def test_response_of_one_band_with_complex_weights(pair, haystacks, fitted):
    mixing, _, (view, _) = fitted("complex")
    band, spec = 4, rope_spec(pair[1], 3)
    weights = [w.detach().to(torch.complex128) for w in mixing.weights()]

    def turned(heads, w):
        as_complex = torch.view_as_complex(spec.pairs(heads).contiguous())[:, :, band]
        return torch.view_as_real(torch.einsum("j,jn->n", w, as_complex).contiguous())

    read = [heads(pair[1], 3, HaystackCollator(pair[2])([h])) for h in haystacks]
    queries = [turned(q, weights[0][0, :, band]) for q, _, _ in read]
    keys = [turned(k, weights[1][0, :, band]) for _, k, _ in read]
    expected = direct(queries, keys, [s for *_, s in read], view.edges)
    torch.testing.assert_close(view.mixture[0, 0, band], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", ["scalar", "band", "complex"])
def test_bands_add_up_to_the_head(fitted, form):
    for view in fitted(form)[2]:
        torch.testing.assert_close(view.mixture[:, :, :-1].sum(2), view.mixture[:, :, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form, tied", [
    ("scalar", False), ("band", False), ("complex", False), ("scalar", True), ("complex", True)])
def test_share_explained_is_that_of_the_mixing(fitted, form, tied):
    mixing, stats, views = fitted(form, tied)
    for view, share in zip(views, mixing.explained(stats)):
        torch.testing.assert_close(view.explained[0], share.float(), atol=1e-4, rtol=1e-4)


def test_energy_is_the_mean_square_of_the_mixed_heads(pair, haystacks, fitted):
    mixing, _, (view, _) = fitted()
    w, queries = mixing.weights()[0].detach().double(), []
    for h in haystacks:
        queries.append(heads(pair[1], 3, HaystackCollator(pair[2])([h]))[0])
    mixed = torch.einsum("ij,jnd->ind", w, torch.cat(queries, 1))
    expected = rope_spec(pair[1], 3).pairs(mixed).square().sum(-1).mean(1).float()
    torch.testing.assert_close(view.energy[0], expected, atol=1e-5, rtol=1e-4)


def test_tied_weights_have_a_row_for_each_query_head(fitted):
    q, k = fitted(tied=True)[2]
    assert k.weights.shape == q.weights.shape and torch.equal(k.mixture, q.mixture)


def test_whole_heads_alone_are_the_same_without_bands(pair, haystacks):
    student, teacher, processor = pair
    weights = kept_weights({0: mixings(student.config, teacher.config, [(2, 3)])})
    full, whole = (read_mixing(weights, {0: student}, teacher, processor, haystacks, by_band=by_band)[0]
                   for by_band in (True, False))
    assert whole.bands == 0
    torch.testing.assert_close(whole.mixture[:, :, 0], full.mixture[:, :, -1], atol=1e-4, rtol=1e-4)


def test_joined_times_are_what_is_read_at_once(pair, haystacks):
    student, teacher, processor = pair
    at = {step: mixings(student.config, teacher.config, [(2, 3)], constraint)
          for step, constraint in ((0, "convex"), (4, "free"))}

    def keys(*steps):
        weights = kept_weights({step: at[step] for step in steps})
        return read_mixing(weights, dict.fromkeys(steps, student), teacher, processor, haystacks)[1]

    apart, together = join_views([keys(0), keys(4)]), keys(0, 4)
    assert apart.steps.tolist() == [0, 4]
    for name in ("weights", "mixture", "own", "energy", "own_energy", "explained"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name))


def test_a_file_gives_back_what_was_saved(tmp_path):
    views = [made_up(form, x) for form in ("scalar", "complex") for x in "qk"]
    save_views(views, tmp_path/"views.safetensors", made="by a test")
    for a, b in zip(views, load_views(tmp_path/"views.safetensors"), strict=True):
        assert (a.pair, a.which, a.form) == (b.pair, b.which, b.form)
        assert (a.spec.head_dim, a.spec.adjacent) == (b.spec.head_dim, b.spec.adjacent)
        for name in ("steps", "weights", "edges", "mixture", "energy"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        torch.testing.assert_close(a.own, b.own, rtol=0, atol=0, equal_nan=True)
        assert b.explained[[0, 2]].isfinite().all() and b.explained[1].isnan().all()  # no student was read there


def test_shipped_views_hold_the_weights_of_the_training():
    from safetensors.torch import load_file
    kept = load_file(data_path("spectra", "training.safetensors"))
    for view in load_views(data_path("spectra", "mixing.safetensors"))[:2]:
        places = [kept["steps"].tolist().index(step) for step in view.steps.tolist()]
        assert torch.equal(view.weights, kept[f"{view.pair}/{view.which}"][places])


# --- matrices -------------------------------------------------------------------
def test_cells_of_all_bands_are_norms():
    view = made_up("complex")
    torch.testing.assert_close(view.cells(1)[2, 3], view.weights[1, 2, 3].norm())


def test_gain_and_phase_make_the_weight():
    view = made_up("complex")
    torch.testing.assert_close(torch.polar(view.cells(1, 5), view.phase(1, 5)), view.weights[1, :, :, 5])


def test_no_time_exceeds_the_colour_range():
    view = made_up("band")
    for band in (-1, 3):
        assert max(float(view.cells(t, band).abs().max()) for t in range(3)) <= view.limit(band)*(1 + 1e-6)


# --- state ----------------------------------------------------------------------
def test_a_click_chooses_both_heads_and_draws_once(inspector, monkeypatch):
    drawn = []
    monkeypatch.setattr(inspector, "show_picture", lambda: drawn.append(1))
    inspector.grids[0].selected = [3, 5]
    assert (inspector.student_head, inspector.teacher_head) == (3, 5)
    assert inspector.grids[1].selected == [3, 5] and len(drawn) == 1


def test_a_control_sets_the_state(inspector):
    inspector.choices["step"].value = 0
    inspector.choices["which"].value = "k"
    assert (inspector.step, inspector.which, inspector.view.which) == (0, "k", "k")


def test_the_state_sets_the_controls_and_the_picture(inspector):
    before = inspector.picture.value
    inspector.form, inspector.band = "complex", 3
    assert (inspector.choices["form"].value, inspector.choices["band"].value) == ("complex", 3)
    assert inspector.picture.value != before


def test_the_matrix_shows_the_weights_at_the_step(inspector):
    import numpy as np
    inspector.form, inspector.band, inspector.step = "band", 3, 10
    grid = inspector.grids[1]
    shown = np.frombuffer(grid.values, np.float32).reshape(grid.rows, grid.columns)
    np.testing.assert_array_equal(shown, inspector.view.weights[1, :, :, 3].numpy())


def test_phases_are_shown_for_complex_weights_alone(inspector):
    assert inspector.grids[2].layout.display == "none"
    inspector.form = "complex"
    assert inspector.grids[2].layout.display is None and math.isclose(inspector.grids[2].high, math.pi)


def test_other_layers_bring_their_own_forms_steps_and_heads(inspector):
    inspector.form, inspector.which, inspector.student_head = "complex", "k", 3
    inspector.pair = "0-1"
    assert (inspector.form, inspector.which, inspector.student_head, inspector.step) == ("scalar", "q", 1, 14)


def test_the_state_is_described(inspector):
    inspector.student_head, inspector.step = 2, 10
    assert "student head 2" in inspector.describe() and "step 10" in inspector.describe()
    assert inspector.describe() in inspector._repr_mimebundle_()["text/plain"]


@pytest.mark.parametrize("name, value, allowed", [
    ("step", 5, "0, 10, 20"), ("student_head", 4, "0 to 3"), ("teacher_head", -1, "0 to 5"), ("band", 8, "-1 to 7"),
    ("form", "matrix", "'scalar', 'band', 'complex'"), ("which", "v", "'q', 'k'"), ("pair", "9-9", "'2-3', '0-1'")])
def test_state_that_is_not_there_is_refused_by_name(inspector, name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} is .*{allowed}"): setattr(inspector, name, value)


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="no view"): MixingInspector([])


# --- picture --------------------------------------------------------------------
@pytest.mark.parametrize("form", ["scalar", "band", "complex"])
@pytest.mark.parametrize("band", [-1, 2])
def test_a_picture_of_every_form(form, band): assert isinstance(plot_mixture(made_up(form), 1, 10, band, 2), Figure)


def test_curves_of_the_picture_are_those_of_the_view():
    view = made_up()
    axes = plot_mixture(view, 2, 20, 3).axes[4]  # below, in the middle
    drawn = [p.get_data().values for p in axes.patches]
    expected = view.mixture[2, 2, 3], view.own[2, 2, 3]
    assert len(drawn) == 2 and all((a == b.numpy()).all() for a, b in zip(drawn, expected))


def test_several_times_of_the_student_beside_the_last_sum():
    axes, view = Figure().subplots(), made_up()
    plot_mixture_response(axes, view, 1, [0, 2])
    drawn = [p.get_data().values for p in axes.patches]
    expected = view.mixture[2, 1, -1], view.own[0, 1, -1], view.own[2, 1, -1]
    assert len(drawn) == 3 and all((a == b.numpy()).all() for a, b in zip(drawn, expected))


def test_all_heads_and_times_share_the_axes():
    view = made_up()
    figures = [plot_mixture(view, head, step) for head in (0, 3) for step in (10, 20)]
    assert len({tuple(f.axes[i].get_ylim() for i in range(6)) for f in figures}) == 1


@pytest.mark.parametrize("wrong, message", [
    (dict(head=4), "head is 4: need 0 to 3"), (dict(head=0, step=3), "step 3 was not kept: there are 0, 10, 20"),
    (dict(head=0, band=8), "band is 8: need -1 for all, or 0 to 7"),
    (dict(head=0, teacher_head=6), "teacher_head is 6: need 0 to 5")])
def test_a_picture_of_what_is_not_there_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message): plot_mixture(made_up(), **wrong)


# --- input ----------------------------------------------------------------------
@pytest.mark.parametrize("change, students, message", [
    (dict(), {3: 0}, "students are of steps \\[3\\], the weights of steps \\[0\\]"),
    (dict(), {}, "give a student"),
    ({"0-1/q": torch.zeros(1, 2, 4)}, {0: 0}, "need \"steps\" and"),
    ({"2-3/q": torch.zeros(1, 2, 5)}, {0: 0}, r"2-3/q have shape \[1, 2, 5\].*1 times, 2, 4 heads"),
    ({"2-3/k": torch.zeros(2, 1, 2)}, {0: 0}, r"2-3/k have shape \[2, 1, 2\]"),
    ({"2-9/q": torch.zeros(1, 2, 4), "2-9/k": torch.zeros(1, 1, 2)}, {0: 0}, "teacher layer 9 does not exist")])
def test_weights_of_other_models_are_refused(pair, haystacks, change, students, message):
    student, teacher, processor = pair
    weights = kept_weights({0: mixings(student.config, teacher.config, [(2, 3)])}) | change
    with pytest.raises(ValueError, match=message):
        read_mixing(weights, dict.fromkeys(students, student), teacher, processor, haystacks)


def test_arrays_that_do_not_fit_are_refused():
    from dataclasses import replace
    with pytest.raises(ValueError, match=r"explained of layers 2-3 has shape \[3, 9\], expected \[3, 4\]"):
        replace(made_up(), explained=torch.zeros(3, 9))
    with pytest.raises(ValueError, match="which is 'v'"): replace(made_up(), which="v")
