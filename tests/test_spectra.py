"Distance responses against the sum over all pairs, spectra against Parseval and single cosines, band energies against rotations."
import math

import pytest
import torch

from laid_nb.rope import RopeSpec
from laid_nb.spectra import band_energy, distance_response, plot_band_energy, plot_distance_response, plot_power_spectrum, power_spectrum


def random_qk(batch=2, heads=4, kv_heads=2, tokens=33, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(batch, h, tokens, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return draw(heads), draw(kv_heads)


def by_pairs(q, k, mask):
    "Every pair of real tokens, one at a time."
    B, H, S, D = q.shape
    out = torch.full((H, S), torch.nan, dtype=torch.float64)
    for h in range(H):
        for distance in range(S):
            found = [torch.dot(q[b, h, m].double(), k[b, h*k.shape[1]//H, m - distance].double())/math.sqrt(D)
                     for b in range(B) for m in range(distance, S) if mask[b, m] and mask[b, m - distance]]
            if found: out[h, distance] = torch.stack(found).mean()
    return out


def masks(tokens):
    real = torch.ones(2, tokens, dtype=torch.bool)
    right, left, holes = real.clone(), real.clone(), real.clone()
    right[1, tokens//2:] = False
    left[0, :5], left[1, :tokens - 3] = False, False
    holes[0, 3:9], holes[1, ::2] = False, False
    return dict(none=real, right=right, left=left, holes=holes)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_fft_equals_all_pairs(heads, kv_heads, padding):
    q, k = random_qk(heads=heads, kv_heads=kv_heads, tokens=21)
    mask = masks(21)[padding]
    expected = by_pairs(q, k, mask)
    response = distance_response(q, k, mask)
    torch.testing.assert_close(response, expected[:, :response.shape[1]], rtol=1e-10, atol=1e-10)
    assert expected[:, response.shape[1]:].isnan().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_precision_at_many_tokens(dtype, tolerance):
    "The last distances rest on a handful of pairs out of 1,500: the mean over them must not drown in the transform's rounding."
    q, k = random_qk(batch=1, heads=2, kv_heads=1, tokens=1500, dtype=dtype)
    logits = q.double() @ k.double().mT/math.sqrt(8)
    expected = torch.stack([logits.diagonal(-d, -2, -1).mean(-1)[0] for d in range(1500)], -1)
    response = distance_response(q, k)
    assert response.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(response.double(), expected, rtol=tolerance, atol=tolerance)


def test_no_mask_means_all_real():
    q, k = random_qk()
    assert torch.equal(distance_response(q, k), distance_response(q, k, torch.ones(2, 33, dtype=torch.bool)))


def test_padding_may_hold_anything():
    q, k = random_qk()
    mask = masks(33)["right"]
    expected = distance_response(q, k, mask)
    q, k = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k))
    assert torch.equal(distance_response(q, k, mask), expected)


def test_max_distance_cuts():
    q, k = random_qk()
    torch.testing.assert_close(distance_response(q, k, max_distance=7), distance_response(q, k)[:, :8], rtol=1e-12, atol=1e-12)


def test_distance_without_pairs_is_nan():
    q, k = random_qk(batch=1, tokens=6)
    mask = torch.tensor([[True, True, False, False, False, True]])
    assert distance_response(q, k, mask).isnan().all(0).tolist() == [False, False, True, True, False, False]


def test_response_is_differentiable():
    q, k = (x.requires_grad_() for x in random_qk(batch=2, heads=2, kv_heads=1, tokens=7, head_dim=4))
    mask = masks(7)["right"]
    assert torch.autograd.gradcheck(lambda q, k: distance_response(q, k, mask), (q, k))


@pytest.mark.parametrize("change, message", [
    (dict(k=torch.zeros(2, 3, 33, 8)), "do not fit"),
    (dict(k=torch.zeros(2, 2, 32, 8)), "do not fit"),
    (dict(k=torch.zeros(2, 2, 33, 4)), "do not fit"),
    (dict(q=torch.zeros(4, 33, 8)), "do not fit"),
    (dict(mask=torch.ones(2, 32, dtype=torch.bool)), "mask has shape"),
    (dict(mask=torch.ones(2, 33)), "expected bool"),
    (dict(mask=torch.zeros(2, 33, dtype=torch.bool)), "no real token"),
    (dict(max_distance=33), r"outside 0\.\.32"),
    (dict(max_distance=-1), r"outside 0\.\.32"),
    (dict(mask=masks(33)["left"], max_distance=30), r"outside 0\.\.27"),
])
def test_response_refuses_bad_input(change, message):
    q, k = random_qk(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        distance_response(**{**dict(q=q, k=k), **change})


@pytest.mark.parametrize("n", [2, 17, 64])
def test_powers_add_up_to_the_mean_square(n):
    response = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequency, power = power_spectrum(response)
    assert frequency.shape == power.shape[1:] == (n//2 + 1,)
    torch.testing.assert_close(power.sum(1), response.square().mean(1), rtol=1e-12, atol=1e-12)


def test_a_cosine_has_its_power_at_its_frequency():
    distance = torch.arange(120, dtype=torch.float64)
    frequency, power = power_spectrum(3*torch.cos(2*math.pi*distance/6)[None] + 2)
    expected = torch.zeros(61, dtype=torch.float64)
    expected[0], expected[20] = 4, 4.5
    torch.testing.assert_close(power[0], expected, rtol=1e-12, atol=1e-12)
    assert frequency[20].item() == pytest.approx(2*math.pi/6)


@pytest.mark.parametrize("response, message", [
    (torch.zeros(5), "expected \\[heads, distances\\]"), (torch.zeros(2, 1), "2 distances"), (torch.tensor([[1., torch.nan]]), "no pair"),
])
def test_spectrum_refuses_bad_input(response, message):
    with pytest.raises(ValueError, match=message):
        power_spectrum(response)


SPEC = RopeSpec(inv_freq=torch.tensor([1., .1, .01]), axis=torch.tensor([0, 1, 2]), head_dim=6)


def test_band_energy_by_its_definition():
    x, _ = random_qk(head_dim=6)
    mask = masks(33)["right"]
    expected = torch.stack([torch.stack([x[b, :, m] for b in range(2) for m in range(33) if mask[b, m]]).square()[..., [i, i + 3]].sum(-1).mean(0) for i in range(3)], -1)
    torch.testing.assert_close(band_energy(x, SPEC, mask), expected)


@pytest.mark.parametrize("adjacent", [False, True])
def test_a_turn_keeps_band_energy(adjacent):
    x, _ = random_qk(head_dim=8)
    spec = RopeSpec(SPEC.inv_freq, SPEC.axis, head_dim=8, adjacent=adjacent)   # two dimensions do not turn
    positions = torch.randint(0, 500, (3, 2, 33), generator=torch.Generator().manual_seed(0))
    energy = band_energy(x, spec)
    torch.testing.assert_close(band_energy(spec.rotate(x, positions), spec), energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy.sum(1), x[..., :6].square().sum(-1).mean((0, 2)))


@pytest.mark.parametrize("x, mask, message", [
    (torch.zeros(1, 1, 5, 4), None, "head_dim 6"), (torch.zeros(1, 5, 6), None, "expected"), (torch.zeros(1, 1, 5, 6), torch.ones(1, 4, dtype=torch.bool), "mask has shape"),
])
def test_band_energy_refuses_bad_input(x, mask, message):
    with pytest.raises(ValueError, match=message):
        band_energy(x, SPEC, mask)


def figures(scale):
    response = scale*torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    yield plot_distance_response(response, 2.), (-2, 2), "tokens"
    yield plot_power_spectrum(power_spectrum(response)[1], (-5, 1)), (-5, 1), "tokens"
    yield plot_band_energy(response[:, :3].abs(), SPEC, 3.), (0, 3), "positions"


@pytest.mark.parametrize("scale", [.1, 10])
def test_figures_keep_their_colour_range_and_name_their_axes(scale):
    for figure, limits, unit in figures(scale):
        axes = figure.axes[0]
        assert axes.images[0].get_clim() == limits
        assert axes.get_ylabel() == "head" and unit in axes.get_xlabel() and axes.get_title() and figure.axes[1].get_ylabel()
        figure.canvas.draw()


def test_figures_are_small():
    image = plot_distance_response(torch.randn(2, 50_000), 1.).axes[0].images[0]
    assert image.get_array().shape == (2, 400) and list(image.get_extent()) == [-.5, 49_999.5, 1.5, -.5]


@pytest.mark.parametrize("limits", [(1., 1.), (2., 1.), (0., math.inf), (math.nan, 1.)])
def test_figures_refuse_a_range_that_is_none(limits):
    with pytest.raises(ValueError, match="colour range"):
        plot_power_spectrum(torch.ones(2, 9), limits)


def test_band_figure_refuses_another_spec():
    with pytest.raises(ValueError, match="5 bands but the spec has 3"):
        plot_band_energy(torch.ones(2, 5), SPEC, 1.)
