"Distance responses against the sum over all pairs, spectra against Parseval and single cosines, band energies against rotations, attention by distance against eager attention."
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from laid_nb.capture import capture
from laid_nb.rope import RopeSpec
from laid_nb.spectra import (
    HeadStats,
    _attention,
    _attention_sums,
    _fast_length,
    attention_by_distance,
    band_energy,
    band_response,
    distance_response,
    in_bins,
    key_activation,
    local_global,
    log_edges,
    plot_band_energy,
    plot_by_distance,
    plot_distance_response,
    plot_head_map,
    plot_key_activation,
    plot_power_spectrum,
    power_spectrum,
    real_tokens,
)


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_a_mask_may_be_of_whole_numbers(dtype):
    q, k = random_qk()
    mask = masks(33)["left"]
    assert torch.equal(real_tokens(mask.to(dtype), q), mask)
    assert torch.equal(distance_response(q, k, mask.to(dtype)), distance_response(q, k, mask))


def test_a_mask_that_is_added_to_logits_is_refused():
    q, _ = random_qk()
    added = torch.zeros(2, 33).masked_fill(masks(33)["left"], -torch.inf)
    with pytest.raises(ValueError, match="expected bool or whole numbers"): real_tokens(added, q)


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


def random_model_spec(head_dim=8, bands=None): return RopeSpec(torch.logspace(0, -2, bands or head_dim//2), torch.zeros(bands or head_dim//2, dtype=torch.long), head_dim)


@pytest.mark.parametrize("n", [1, 16, 17, 4096, 4097, 18_001, 53_910])
def test_fast_lengths(n):
    length = _fast_length(n)
    rest = length//16
    for p in (2, 3, 5):
        while rest % p == 0: rest //= p
    assert length % 16 == 0 and rest == 1 and n <= length < max(33, 1.2*n)


class Elements(TorchDispatchMode):
    "Counts what operations put out: the largest output, the largest complex one, and the numbers that transforms put out."

    def __init__(self):
        super().__init__()
        self.largest, self.complex, self.transformed = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.complex = max(self.complex, x.numel()*x.is_complex())
                self.transformed += x.numel()*("fft" in str(function))
        return out


def test_response_transforms_each_query_and_key_once():
    "A transform of N numbers for each dimension of each query head and KV head, not more: N log N in all, keys shared by their group."
    heads, kv_heads, tokens, dims = 6, 2, 4096, 16
    q, k = random_qk(1, heads, kv_heads, tokens, dims, torch.float32)
    with Elements() as count: distance_response(q, k)
    assert (heads + kv_heads)*dims*tokens < count.transformed < 1.2*(heads + kv_heads)*dims*tokens


def test_response_and_its_gradient_hold_one_piece_at_a_time():
    q, k = (x.requires_grad_() for x in random_qk(1, 4, 2, 8192, 64, torch.float32))
    with Elements() as count: distance_response(q, k).sum().backward()
    assert 0 < count.complex <= 2**19 < q.numel()


def test_far_distances_of_biased_heads():
    "Large constant queries and keys: sums of 10^7 beside single pairs; the far distances are computed in float64."
    q, k = (x + 20 for x in random_qk(1, 1, 1, 3000, 16, torch.float32))
    logits = (q[0, 0].double() @ k[0, 0].double().T)/4
    expected = torch.stack([logits.diagonal(-d).mean() for d in range(3000)])
    torch.testing.assert_close(distance_response(q, k)[0].double(), expected, rtol=1e-5, atol=0)


def test_gradient_in_float32():
    q, k = random_qk(1, 2, 1, 700, 8)
    weight = torch.randn(2, 700, dtype=torch.float64)
    def gradients(q, k):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        (distance_response(q, k)*weight.to(q.dtype)).sum().backward()
        return q.grad.double(), k.grad.double()
    for single, double in zip(gradients(q.float(), k.float()), gradients(q, k)): torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-5*double.abs().max().item())


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_band_response_is_the_response_of_its_dimensions(adjacent, padding):
    q, k = random_qk(heads=6, kv_heads=2, tokens=21, head_dim=10)
    mask = masks(21)[padding]
    spec = RopeSpec(torch.tensor([1., .1, .01, .001]), torch.zeros(4, dtype=torch.long), head_dim=10, adjacent=adjacent)  # two dimensions do not turn
    found = band_response(q, k, spec, mask, max_distance=9)
    assert found.shape == (6, 5, 10)
    for band in range(5):
        dims = [8, 9] if band == 4 else [2*band, 2*band + 1] if adjacent else [band, band + 4]
        torch.testing.assert_close(found[:, band], by_pairs(q[..., dims], k[..., dims], mask)[:, :10]*math.sqrt(2/10), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.sum(1), distance_response(q, k, mask, 9), rtol=1e-10, atol=1e-10)


def test_band_response_is_differentiable():
    q, k = (x.requires_grad_() for x in random_qk(1, 2, 1, 5, 4))
    assert torch.autograd.gradcheck(lambda q, k: band_response(q, k, random_model_spec(4)), (q, k))


def test_band_response_refuses_another_head_dim():
    with pytest.raises(ValueError, match="head_dim 6"): band_response(*random_qk(head_dim=8), SPEC)


@pytest.mark.parametrize("still", [0, 2])
def test_shares_of_energy(still):
    x, _ = random_qk(head_dim=6 + still)
    spec = RopeSpec(SPEC.inv_freq, SPEC.axis, head_dim=6 + still)
    share = band_energy(x, spec, masks(33)["holes"], share=True)
    real = x.transpose(1, 2)[masks(33)["holes"]]
    torch.testing.assert_close(share.sum(1), real[..., :6].square().sum((0, 2))/real.square().sum((0, 2)))


def attention_weights(q, k, mask, scaling):
    "Softmax over the visible keys, all at once; rows of padded queries are 0."
    k = k.repeat_interleave(q.shape[1]//k.shape[1], 1)
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() & mask[:, None, None]
    weights = (q @ k.mT*scaling).masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask[:, None, :, None], 0)


@pytest.mark.parametrize("limit", [1, 2000, 2**22])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_attention_in_blocks_equals_all_at_once(padding, limit):
    q, k = random_qk(heads=4, kv_heads=2, tokens=33)
    mask = masks(33)[padding]
    found = _attention(_attention_sums(q, k, mask, .5, limit))
    weights = attention_weights(q, k, mask, .5)
    first = torch.stack([w[:, :, int(m.nonzero()[0])].sum(-1) for w, m in zip(weights, mask)]).sum(0)/mask.sum()
    rest = torch.stack([w.index_fill(-1, m.nonzero()[0], 0) for w, m in zip(weights, mask)])
    mass = torch.stack([rest.diagonal(-d, -2, -1).sum((0, 2)) for d in range(33)], -1)/mask.sum()
    entropy = torch.special.entr(weights).sum((0, 2, 3))/mask.cumsum(1)[mask].double().log().sum()
    for got, expected in zip(found, (mass, first, entropy)): torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def test_attention_by_distance_of_eager_attention():
    "The weights that transformers' own eager attention returns, with left padding and grouped queries."
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=50, initializer_range=.5)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids, mask = torch.randint(0, 50, (2, 24)), masks(24)["left"]
    with torch.no_grad(), capture(model) as cache: weights = model(input_ids=ids, attention_mask=mask.long(), output_attentions=True).attentions[0]*mask[:, None, :, None]
    found = attention_by_distance(cache["q", 0], cache["k", 0], mask, cache.scaling[0])
    by_distance = torch.stack([weights.diagonal(-d, -2, -1).sum((0, 2)) for d in range(24)], -1)/mask.sum()
    on_first = torch.zeros(4, 24)
    for w, first in zip(weights, mask.int().argmax(1)): on_first[:, :24 - first] += w[:, first:, first]/mask.sum()
    torch.testing.assert_close(found.mass, by_distance - on_first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sink, on_first.sum(1), rtol=1e-4, atol=1e-6)


def test_attention_never_holds_all_pairs():
    tokens, heads = 2048, 8
    q, k = random_qk(1, heads, 2, tokens, 8, torch.float32)
    with Elements() as count: attention_by_distance(q, k)
    assert count.largest <= 2*2**22 < heads*tokens**2/3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype):
    q, k = random_qk(dtype=dtype)
    spec = random_model_spec()
    for name, value in dict(response=lambda q, k: distance_response(q, k), band=lambda q, k: band_response(q, k, spec), energy=lambda q, k: band_energy(q, spec), mass=lambda q, k: attention_by_distance(q, k).mass).items():
        assert value(q, k).dtype == torch.float32
        torch.testing.assert_close(value(q, k), value(q.float(), k.float()), rtol=1e-4, atol=1e-5, msg=name)


def test_even_attention_has_entropy_one_and_a_single_key_zero():
    q, k = random_qk(1, 2, 1, 40)
    assert attention_by_distance(torch.zeros_like(q), k).entropy.tolist() == pytest.approx([1, 1], abs=1e-6)
    k = torch.zeros_like(k)
    k[:, :, 0] = 1e4
    only_first = attention_by_distance(torch.ones_like(q), k)
    assert only_first.entropy.abs().max() < 1e-6 and only_first.sink.tolist() == pytest.approx([1, 1]) and only_first.mass.abs().max() < 1e-6


@pytest.mark.parametrize("near, far", [(0, 5), (6, 5), (2, 40)])
def test_scores_refuse_windows_that_divide_nothing(near, far):
    with pytest.raises(ValueError, match="do not divide"): local_global(torch.ones(2, 40), near, far)


def test_scores():
    mass = torch.arange(10.)[None]
    assert [x.item() for x in local_global(mass, 2, 8)] == [1, 17]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_streaming_equals_one_batch(order):
    spec = random_model_spec()
    q, k = random_qk(batch=3, tokens=33)
    mask = torch.arange(33) < torch.tensor([33, 12, 20])[:, None]
    stats = HeadStats(spec)
    for row in order:
        n = int(mask[row].sum())
        stats.update(q[row:row + 1, :, :n], k[row:row + 1, :, :n])
    close = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    close(stats.response, distance_response(q, k, mask))
    close(stats.energy("q"), band_energy(q, spec, mask))
    close(stats.energy("k", share=True), band_energy(k, spec, mask, share=True))
    for a, b in zip(stats.attention, attention_by_distance(q, k, mask)): close(a, b)


def test_streaming_keeps_gaps_as_nan():
    stats = HeadStats(random_model_spec(), attention=False)
    q, k = random_qk(1, 2, 1, 6)
    stats.update(q, k, torch.tensor([[True, False, False, False, False, True]]))
    assert stats.response.isnan().tolist() == [[False, True, True, True, True, False]]*2
    stats.update(q[:, :, :2], k[:, :, :2])
    assert stats.response.isnan().tolist() == [[False, False, True, True, True, False]]*2


def test_streaming_refuses():
    stats = HeadStats(random_model_spec(), attention=False)
    with pytest.raises(RuntimeError, match="call update first"): stats.response
    stats.update(*random_qk())
    with pytest.raises(ValueError, match="not the same heads"): stats.update(*random_qk(heads=2))
    with pytest.raises(RuntimeError, match="attention=True"): stats.attention


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_key_activation(padding):
    q, k = random_qk(heads=4, kv_heads=2, tokens=33)
    mask = masks(33)[padding]
    needle, asked = torch.zeros(2, 33, dtype=torch.bool), torch.zeros(2, 33, dtype=torch.bool)
    needle[0, 6:9], needle[1, [8, 31]], asked[0, 20:], asked[1, [12, 15, 32]] = True, True, True, True
    found = key_activation(q, k, needle, asked, mask, scaling=.7)
    weights = attention_weights(q, k, mask, .7)
    expected = torch.stack([w[:, a & m][:, :, n].sum(-1).amax(1) for w, a, m, n in zip(weights, asked, mask, needle)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change, message", [
    (dict(needle=torch.zeros(2, 33, dtype=torch.bool)), "needle has shape"), (dict(asked=torch.ones(2, 33)), "asked has shape"), (dict(asked=torch.ones(2, 3, dtype=torch.bool)), "asked has shape"),
    (dict(mask=torch.ones(2, 3, dtype=torch.bool)), "mask has shape"),
])
def test_key_activation_refuses_bad_input(change, message):
    q, k = random_qk()
    every = torch.ones(2, 33, dtype=torch.bool)
    with pytest.raises(ValueError, match=message): key_activation(**{**dict(q=q, k=k, needle=every, asked=every), **change})


@pytest.mark.parametrize("distances, per_octave", [(2, 1), (100, 4), (2224, 4), (54_000, 8)])
def test_bins_of_distances(distances, per_octave):
    edges = log_edges(distances, per_octave)
    assert edges[0] == 0 and edges[-1] == distances and (edges.diff() > 0).all()
    wide = edges[1:].double()/edges[:-1]
    assert (wide[edges[:-1] > 8*per_octave] < 2**(1.5/per_octave)).all()
    x = torch.randn(3, distances, dtype=torch.float64)
    torch.testing.assert_close(in_bins(x, edges), torch.stack([x[:, a:b].sum(1) for a, b in zip(edges, edges[1:])], 1))
    with pytest.raises(ValueError, match=f"{distances + 1} distances"): in_bins(torch.ones(distances + 1), edges)


def test_line_and_map_figures():
    edges = log_edges(100)
    figure = plot_by_distance(torch.randn(2, len(edges) - 1), edges, ["a", "b"], (-3, 2), "mean logit", "two heads")
    assert figure.axes[0].get_ylim() == (-3, 2) and "tokens" in figure.axes[0].get_xlabel()
    with pytest.raises(ValueError): plot_by_distance(torch.randn(2, len(edges) - 1), edges, ["a"], (-3, 2), "mean logit", "a name short")
    figure = plot_head_map({"local": torch.rand(3, 4), "global": torch.rand(3, 4)}, (0, 1), "share")
    assert [axes.images[0].get_clim() for axes in figure.axes[:2]] == [(0, 1)]*2 and figure.axes[0].images[0].get_array().shape == (3, 4)
    figure = plot_key_activation({"teacher": torch.rand(2, 3, 4)}, [1, 5, 10, 50])
    assert len(figure.axes[0].lines) == 2*3 + 1 and figure.axes[0].get_ylim() == (0, 1.02)
    figure.canvas.draw()
