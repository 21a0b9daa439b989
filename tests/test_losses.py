import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from laid_nb import losses
from laid_nb.align import needle_attention
from laid_nb.capture import capture
from laid_nb.losses import (
    attention_match_loss,
    check_same_tokens,
    fourier_loss,
    hidden_loss,
    kl_loss,
    laid_loss,
    supervised_rows,
    total_loss,
    unit_rms,
    weighted_power,
)
from laid_nb.mixing import repeat_kv
from laid_nb.rope import rope_spec
from laid_nb.simulate import multiplicity_bias


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def heads(dtype=torch.float64, tied=False):
    "student q, k with gradient, targets q, k, mask with padding on both sides"
    x = [normal(3, h, 6, 4, seed=h + s, dtype=torch.float64).to(dtype) for h, s in ((4, 0), (2, 0), (4, 10), (4 if tied else 2, 20))]
    return [t.requires_grad_() for t in x[:2]] + x[2:] + [torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 6])]


def direct(student, target, mask, scale=None):
    "Eq. 7 token by token in float64."
    student, target = student.detach().double(), target.double()
    parts = [(student[b, :, m] - target[b, :, m]).square().sum() for b in range(len(mask)) for m in range(mask.shape[1]) if mask[b, m]]
    return sum(parts) if scale is None else sum(parts) / (len(parts) * student.shape[1] * student.shape[3]) / scale


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
@pytest.mark.parametrize("norm, scales", [("mean", (2.5, 0.4)), ("sum", (None, None))])
@pytest.mark.parametrize("tied", [False, True])
def test_laid_loss_against_the_direct_sum(norm, scales, tied, dtype, tolerance):
    sq, sk, tq, tk, mask = heads(dtype, tied)
    loss_q, loss_k = laid_loss(sq, sk, tq, tk, mask, *scales, norm=norm)
    assert loss_q.dtype == torch.promote_types(dtype, torch.float32)
    for loss, expected in ((loss_q, direct(sq, tq, mask, scales[0])), (loss_k, direct(repeat_kv(sk, 4) if tied else sk, tk, mask, scales[1]))):
        assert abs(loss.item() / expected.item() - 1) < tolerance


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_laid_loss_gradient(norm, tied):
    sq, sk, tq, tk, mask = heads(tied=tied)
    assert gradcheck(lambda *x: laid_loss(*x, mask, 2.5, 0.4, norm=norm), (sq, sk, tq.requires_grad_(), tk.requires_grad_()))


def test_padding_changes_neither_value_nor_gradient():
    sq, sk, tq, tk, mask = heads()
    tq[0, :, :2], tk[1, :, 4:] = float("nan"), float("inf")
    loss_q, loss_k = laid_loss(sq, sk, tq, tk, mask, 1.0, 1.0)
    (loss_q + loss_k).backward()
    assert sq.grad.isfinite().all() and sk.grad.isfinite().all() and not sq.grad[0, :, :2].any() and not sk.grad[1, :, 4:].any()
    one = [laid_loss(sq[b:b + 1, :, m], sk[b:b + 1, :, m], tq[b:b + 1, :, m], tk[b:b + 1, :, m], None, 1.0, 1.0)[0] for b, m in enumerate(mask.bool())]
    torch.testing.assert_close(loss_q, sum(l * n for l, n in zip(one, (4, 4, 6))) / 14)


def test_mean_is_the_same_for_a_repeated_batch_and_sum_doubles():
    sq, sk, tq, tk, mask = heads()
    twice = [torch.cat([x, x]) for x in (sq, sk, tq, tk, mask)]
    for norm, factor in (("mean", 1), ("sum", 2)):
        torch.testing.assert_close(laid_loss(*twice, 1.0, 1.0, norm=norm)[0], factor * laid_loss(sq, sk, tq, tk, mask, 1.0, 1.0, norm=norm)[0])


def test_losses_run_without_gradients_in_evaluation():
    sq, sk, tq, tk, mask = heads()
    with torch.no_grad():
        assert laid_loss(sq.detach(), sk.detach(), tq, tk, mask, 1.0, 1.0)[0] > 0 and kl_loss(normal(2, 5), normal(2, 5, seed=1)) > 0


@pytest.mark.parametrize("change, message", [
    (dict(student_q=normal(3, 4, 6, 4)), r"student queries \(3, 4, 6, 4\) carry no gradient"),
    (dict(student_k=normal(3, 2, 6, 4)), r"student keys \(3, 2, 6, 4\) carry no gradient"),
    (dict(target_q=normal(3, 4, 6, 8)), "head dimensions differ: student queries"),
    (dict(target_k=normal(3, 3, 6, 4)), "student keys .* differ in heads"),
    (dict(target_q=normal(3, 4, 5, 4)), "differ in batch or tokens"),
    (dict(mask=torch.ones(3, 5)), "token mask has shape"),
    (dict(mask=torch.zeros(3, 6)), "no real token"),
    (dict(scale_q=None), "scale of the queries is None"),
    (dict(scale_k=torch.tensor(float("nan"))), "scale of the keys is nan"),
    (dict(scale_k=0.0), "scale of the keys is 0"),
    (dict(norm="max"), "norm 'max' is unknown"),
])
def test_laid_loss_refuses(change, message):
    names = ("student_q", "student_k", "target_q", "target_k", "mask")
    with pytest.raises(ValueError, match=message): laid_loss(**{**dict(zip(names, heads())), "scale_q": 1.0, "scale_k": 1.0, **change})


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("v_s, v_t", [(7, 7), (7, 10), (10, 7)])
def test_kl_against_the_direct_sum(v_s, v_t, tau):
    zs, zt, V = (3 * normal(5, v_s)).requires_grad_(), 3 * normal(5, v_t, seed=1), min(v_s, v_t)
    ps, pt = ((z[:, :V].detach() / tau).exp() for z in (zs, zt))
    ps, pt = ps / ps.sum(1, keepdim=True), pt / pt.sum(1, keepdim=True)
    torch.testing.assert_close(kl_loss(zs, zt, tau).detach(), tau ** 2 * (pt * (pt / ps).log()).sum(1).mean())
    assert gradcheck(lambda z: kl_loss(z, zt, tau), zs)


def test_kl_gradient_is_the_difference_of_softened_answers():
    zs, zt, tau = normal(4, 9).requires_grad_(), normal(4, 9, seed=1).requires_grad_(), 2.0
    kl_loss(zs, zt, tau).backward()
    torch.testing.assert_close(zs.grad, tau * ((zs / tau).softmax(-1) - (zt / tau).softmax(-1)).detach() / 4)
    assert zt.grad is None  # the teacher is a constant


def test_kl_of_bfloat16_logits_is_computed_in_float32():
    zs, zt = normal(3, 50).bfloat16().requires_grad_(), normal(3, 50, seed=1).bfloat16()
    loss = kl_loss(zs, zt)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - kl_loss(zs.double(), zt.double()).item()) < 1e-6


@pytest.mark.parametrize("student, teacher, tau, message", [
    (normal(3, 5).requires_grad_(), normal(2, 5), 2.0, "same n > 0 supervised rows"),
    (normal(1, 3, 5).requires_grad_(), normal(1, 3, 5), 2.0, "same n > 0 supervised rows"),
    (normal(0, 5).requires_grad_(), normal(0, 5), 2.0, "same n > 0 supervised rows"),
    (normal(3, 5), normal(3, 5), 2.0, "student logits .* carry no gradient"),
    (normal(3, 5).requires_grad_(), normal(3, 5), -1.0, "temperature is -1.0"),
])
def test_kl_refuses(student, teacher, tau, message):
    with pytest.raises(ValueError, match=message): kl_loss(student, teacher, tau)


def model(kind=Qwen2ForCausalLM, **kw):
    torch.manual_seed(0)
    config = {Qwen2ForCausalLM: Qwen2Config, LlamaForCausalLM: LlamaConfig}[kind]
    return kind(config(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40, pad_token_id=0,
                       initializer_range=0.3, **kw)).eval()


def test_supervised_rows_give_transformers_own_loss():
    ids = torch.arange(1, 15).reshape(2, 7)
    labels = torch.full_like(ids, -100)
    labels[0, [0, 2, 5]], labels[1, 6] = ids[0, [0, 2, 5]], ids[1, 6]  # the first token has no row that predicts it
    rows, targets = supervised_rows(labels)
    lm = model()
    torch.testing.assert_close(F.cross_entropy(lm(ids).logits[rows], targets), lm(ids, labels=labels).loss)
    assert targets.tolist() == [3, 6, 14]


@pytest.mark.parametrize("labels", [torch.full((2, 4), -100), torch.tensor([[5, -100, -100]]), torch.tensor([5, 6])])
def test_supervised_rows_refuse(labels):
    with pytest.raises(ValueError, match="labels"): supervised_rows(labels)


def tokenizer(*words):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])))


def test_same_tokens():
    assert check_same_tokens(tokenizer("a", "b"), tokenizer("a", "b", "c")) == 2
    with pytest.raises(ValueError, match="differ at id 1: 'b' against 'c'"): check_same_tokens(tokenizer("a", "b", "c"), tokenizer("a", "c", "b"))
    with pytest.raises(TypeError, match="NoneType is no tokenizer"): check_same_tokens(tokenizer("a"), None)


def test_total_is_the_weighted_sum_and_its_gradient():
    x = normal(4).requires_grad_()
    terms = lambda x: {"laid": x.square().sum(), "kl": x.exp().mean(), "sft": x.sin().sum()}
    weights = {"laid": 0.3, "kl": 0.0, "sft": 2.0}
    torch.testing.assert_close(total_loss(terms(x), weights), 0.3 * x.square().sum() + 2 * x.sin().sum())
    assert gradcheck(lambda x: total_loss(terms(x), weights), x)


@pytest.mark.parametrize("name", ["laid", "kl", "sft"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_no_number_is_named(name, value):
    terms = {"laid": torch.tensor(1.0), "kl": torch.tensor(1.0), "sft": torch.tensor(1.0), name: torch.tensor(value)}
    with pytest.raises(FloatingPointError, match=f"'{name}' is {value}"): total_loss(terms, {"laid": 1.0, "kl": 0.0, "sft": 1.0})


@pytest.mark.parametrize("terms, weights, message", [
    ({"sft": torch.ones(())}, {"SFT": 1.0}, "'sft' has no weight"),
    ({"sft": torch.ones(())}, {"sft": 1.0, "kl": 0.5}, "'kl' has weight 0.5 but was not computed"),
    ({"sft": torch.ones(())}, {"sft": -1.0}, "weight of loss term 'sft' is -1.0"),
    ({"sft": torch.ones(())}, {"sft": math.nan}, "weight of loss term 'sft' is nan"),
    ({"sft": torch.ones(3)}, {"sft": 1.0}, "need one number"),
    ({"sft": torch.ones(())}, {"sft": 0.0}, "no loss term has a weight above 0"),
    ({}, {}, "no loss term has a weight above 0"),
])
def test_total_refuses(terms, weights, message):
    with pytest.raises(ValueError, match=message): total_loss(terms, weights)


def spans(padding):
    mask = torch.ones(2, 20, dtype=torch.bool)
    if padding == "left": mask[0, :6] = False
    if padding == "right": mask[0, 14:] = False
    rows, needle = torch.zeros_like(mask), torch.zeros_like(mask)
    rows[0, 10:13] = rows[1, 12:20] = True
    needle[0, 6:12] = needle[1, 3:8] = True
    return mask, rows, needle


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_needle_attention_against_the_full_matrix(kv_heads, padding):
    q, k, (mask, rows, needle) = normal(2, 6, 20, 8), normal(2, kv_heads, 20, 8, seed=1), spans(padding)
    seen = torch.ones(20, 20).tril().bool() & mask[:, None, None]
    attention = (q @ repeat_kv(k, 6).mT * 0.35).masked_fill(~seen, -math.inf).softmax(-1)
    expected = (attention * needle[:, None, None]).sum(-1).transpose(1, 2)[rows].mean(0)
    for block in (1, 3, 256): torch.testing.assert_close(needle_attention(q, k, rows, needle, mask, 0.35, block), expected)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, LlamaForCausalLM])
def test_needle_attention_against_eager_models(kind, padding):
    lm, (mask, rows, needle) = model(kind, attn_implementation="eager"), spans(padding)
    ids = torch.randint(1, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(lm) as cache: lm(ids, attention_mask=mask.long())
    with torch.no_grad(): eager = lm(ids, attention_mask=mask.long(), output_attentions=True).attentions
    for layer, a in enumerate(eager):
        score = needle_attention(cache["q", layer], cache["k", layer], rows, needle, mask, cache.scaling[layer])
        torch.testing.assert_close(score, (a * needle[:, None, None]).sum(-1).transpose(1, 2)[rows].mean(0))


@pytest.mark.parametrize("change, message", [
    (dict(k=normal(2, 3, 20, 4)), "head dimensions differ"),
    (dict(rows=torch.zeros(2, 20, dtype=torch.bool)), "no rows are given"),
    (dict(needle=torch.zeros(2, 20, dtype=torch.bool)), "rows but no needle"),
    (dict(rows=torch.ones(2, 20, dtype=torch.bool)), "rows contain padding"),
    (dict(needle=torch.ones(2, 19, dtype=torch.bool)), "needle have shape"),
])
def test_needle_attention_refuses(change, message):
    mask, rows, needle = spans("left")
    with pytest.raises(ValueError, match=message):
        needle_attention(**{**dict(q=normal(2, 6, 20, 8), k=normal(2, 3, 20, 8), rows=rows, needle=needle, mask=mask, scaling=0.35), **change})


def response_by_pairs(q, k, real, scaling, n):
    "Mean logit at the distances 0..n-1, pair by pair: [heads, n]."
    k, out = repeat_kv(k, q.shape[1]), []
    for D in range(n):
        logits = [scaling * (q[b, :, m] * k[b, :, m - D]).sum(-1) for b in range(len(q)) for m in range(D, q.shape[2]) if real[b, m] and real[b, m - D]]
        out.append(sum(logits) / len(logits))
    return torch.stack(out, 1)


def power_by_sums(x, slope):
    "Σ over all n - 1 frequencies but 0 of |x̂|² over its (mirrored) frequency, with an explicit Fourier matrix."
    n = x.shape[-1]
    f = torch.arange(n, dtype=torch.float64)
    matrix = torch.exp(-2j * math.pi * f[:, None] * f / n)
    return ((x.to(matrix.dtype) @ matrix).abs()[..., 1:] ** 2 / torch.minimum(f, n - f)[1:] ** slope).sum()


def pair(tied=False, dims=(8, 6), tokens=(13, 13), dtype=torch.float64):
    "student q, k with gradient, targets q, k of another head_dim"
    x = [normal(2, h, n, d, seed=i).to(dtype) for i, (h, n, d) in enumerate(((4, tokens[0], dims[0]), (2, tokens[0], dims[0]), (4, tokens[1], dims[1]), (4 if tied else 2, tokens[1], dims[1])))]
    return [t.requires_grad_() for t in x[:2]] + x[2:]


def padded(n=13):
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, :3] = mask[1, -2:] = False
    return mask


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fourier_loss_against_pairs_and_an_explicit_transform(tied, slope, dtype, tolerance):
    x, mask, n = pair(tied, dtype=dtype), padded(), 6                           # longest distance 10 tokens, half of it and 0
    S, T = (response_by_pairs(q.detach().double(), k.detach().double(), mask, s, n) for q, k, s in ((*x[:2], .5), (*x[2:], .25)))
    expected = (power_by_sums(S - T, slope) / power_by_sums(T, slope)).item()
    assert abs(fourier_loss(*x, mask, .5, .25, slope=slope).item() / expected - 1) < tolerance


def test_fourier_loss_gradient_also_through_the_normaliser():
    sq, sk, tq, tk = pair()
    assert gradcheck(lambda q, k: fourier_loss(q, k, tq, tk, padded()), (sq, sk), fast_mode=True)
    tq.requires_grad_()
    loss = fourier_loss(sq, sk, tq, tk, padded())
    found, = torch.autograd.grad(loss, tq)
    S, T = (response_by_pairs(q, k, padded(), q.shape[-1] ** -.5, 6) for q, k in ((sq, sk), (tq, tk)))
    expected, = torch.autograd.grad(power_by_sums(S - T, 1.0) / power_by_sums(T, 1.0), tq)
    torch.testing.assert_close(found, expected)


def test_fourier_loss_is_0_for_the_target_and_1_for_silence():
    sq, sk, tq, tk = pair()
    assert fourier_loss(sq, sk, sq.detach(), sk.detach(), padded()) == 0
    torch.testing.assert_close(fourier_loss(sq * 0, sk, tq, tk, padded()).item(), 1.0)
    torch.testing.assert_close(fourier_loss(9 * sq, sk, 9 * tq, tk, padded()), fourier_loss(sq, sk, tq, tk, padded()))


def test_fourier_loss_does_not_see_a_constant_but_sees_phase():
    places = torch.arange(64.)[None, None, :, None]
    turn = lambda x, phase: torch.cat([torch.cos(x * math.pi / 4 + phase), torch.sin(x * math.pi / 4 + phase)], -1)   # R(Δ) = cos(πΔ/4 + phase)
    one = torch.ones_like(places)
    target = turn(places, 0), turn(places, 0)
    raised = torch.cat([turn(places, 0), 3 * one], -1), torch.cat([turn(places, 0), 2 * one], -1)                     # + 6 at every distance
    shifted = turn(places, math.pi), turn(places, 0)
    loss = lambda q, k: fourier_loss(q.requires_grad_(), k.requires_grad_(), *target, None, 1.0, 1.0).item()
    assert loss(*raised) < 1e-9
    assert abs(loss(*shifted) - 4) < 1e-4                                       # |−T − T|² / |T|²: same power, opposite sign


def test_octaves_count_alike():
    waves = [torch.cos(2 * math.pi * f * torch.arange(1024) / 1024) for f in range(1, 512)]
    power = torch.stack([weighted_power(w.double()) for w in waves])
    octaves = torch.stack([power[2 ** o - 1:2 ** (o + 1) - 1].sum() for o in range(4, 9)])
    assert (octaves / octaves.mean() - 1).abs().max() < .05


def test_fourier_loss_by_band_refuses_what_cancels_in_the_sum():
    spec = rope_spec(Qwen2Config(hidden_size=16, num_attention_heads=2, num_key_value_heads=1))
    sq, sk, tq, tk = pair(dims=(8, 8))
    S, T = (torch.stack([response_by_pairs(q.detach()[..., [b, b + 4]], k.detach()[..., [b, b + 4]], padded(), 8 ** -.5, 6) for b in range(4)]) for q, k in ((sq, sk), (tq, tk)))
    torch.testing.assert_close(fourier_loss(sq, sk, tq, tk, padded(), spec=spec).detach(), power_by_sums(S - T, 1.0) / power_by_sums(T, 1.0))
    # band 1 raised and band 0 lowered by the same response: equal sums, different bands
    wave = torch.cos(torch.arange(13.)).double()
    swapped = lambda b: torch.zeros(1, 1, 13, 8, dtype=torch.float64).index_fill(-1, torch.tensor([b]), 1) * wave[:, None]
    a, b = swapped(0).requires_grad_(), swapped(1)
    assert fourier_loss(a, a, b, b, None) < 1e-20 and fourier_loss(a, a, b, b, None, spec=spec) > 1


@pytest.mark.parametrize("tokens", [(121, 181), (181, 121)])
def test_responses_of_two_token_counts_are_compared_at_the_same_share_of_distance(tokens):
    def head(n, d, theta):  # the same smooth response on 0..1, whatever n and head_dim: a wave of two periods over the longest distance
        x = torch.linspace(0, 4 * math.pi, n, dtype=torch.float64)[None, None, :, None]
        return torch.nn.functional.pad(torch.cat([x.cos(), x.sin()], -1), (0, d - 2))
    s, t = head(tokens[0], 8, 1e4).requires_grad_(), head(tokens[1], 12, 1e6)
    assert fourier_loss(s, s, t, t, None, 1.0, 1.0) < 1e-4
    assert fourier_loss(s, s, t[:, :, ::2], t[:, :, ::2], None, 1.0, 1.0) < 1e-4
    assert fourier_loss(s, s, head(tokens[1] // 2, 12, 1e6) ** 3, t[:, :, : tokens[1] // 2], None, 1.0, 1.0) > .1


@pytest.mark.parametrize("change, message", [
    (dict(target_q=normal(2, 3, 13, 6)), "need 4 query heads and 2"),
    (dict(target_k=normal(2, 3, 13, 6)), "need 4 query heads and 2"),
    (dict(target_k=normal(2, 2, 13, 8)), "head dimensions differ"),
    (dict(student_q=normal(2, 4, 13, 8)), "carry no gradient"),
    (dict(target_q=torch.zeros(2, 4, 13, 6)), "weighted power 0.0"),
    (dict(target_q=torch.full((2, 4, 13, 6), math.nan)), "weighted power nan"),
    (dict(target_q=normal(2, 4, 9, 6), target_k=normal(2, 2, 9, 6)), "give target_mask"),
    (dict(reach=0.0), "reach is 0.0"),
    (dict(reach=0.1), "too few for a spectrum"),
])
def test_fourier_loss_refuses(change, message):
    with pytest.raises(ValueError, match=message): fourier_loss(**{**dict(zip(("student_q", "student_k", "target_q", "target_k"), pair())), "mask": padded(), **change})


def attention_by_rows(sq, sk, tq, tk, mask, scalings, positions=None, beta=0.0, gamma=1.0, bias=None, target_bias=None):
    "The definition row by row, float64 with autograd."
    sk, tk, rows = repeat_kv(sk, sq.shape[1]).double(), repeat_kv(tk, sq.shape[1]).double(), []
    for b in range(len(sq)):
        real = mask[b].nonzero()[:, 0].tolist()
        where = {n: torch.tensor([float(i)]) if positions is None else positions.reshape(-1, *mask.shape)[:, b, n].double() for i, n in enumerate(real)}
        far = max((where[m] - where[n]).abs().max().item() for m in real for n in real if n <= m)
        for m in real:
            seen = [n for n in real if n <= m]
            omega = torch.tensor([1 + beta * ((where[m] - where[n]).abs().max().item() / far) ** gamma for n in seen], dtype=torch.float64)
            extra = [0 if f is None else f[1][b, seen].double() @ f[0][b, m].double() for f in (bias, target_bias or bias)]
            s, t = ((k[b][:, seen] @ q[b, :, m, :, None].double())[..., 0] * c + x for q, k, c, x in ((sq, sk, scalings[0], extra[0]), (tq, tk, scalings[1], extra[1])))
            s, t = s.log_softmax(-1), t.log_softmax(-1)
            rows.append((omega * (t.exp() * (t - s) - t.exp() + s.exp())).sum(-1))
    return torch.stack(rows).mean()


def sharp(tied=False, dtype=torch.float32, kv=2):
    "student q, k and targets of another head_dim, all with gradient, logits of some size"
    return [(2 * normal(2, h, 13, d, seed=i)).to(dtype).requires_grad_() for i, (h, d) in enumerate(((4, 8), (kv, 8), (4, 6), (4 if tied else kv, 6)))]


MROPE = torch.stack([torch.arange(13) // 5 * 3, torch.arange(13) // 5 * 3 + torch.arange(13) % 5 // 2, torch.arange(13) // 5 * 3 + torch.arange(13) % 2])[:, None].expand(3, 2, 13)
BIAS = normal(2, 13, 3, seed=9).abs(), F.one_hot(torch.arange(13) // 5, 3).expand(2, -1, -1)
THIN = -2 * normal(2, 13, 3, seed=8).abs(), BIAS[1]


@pytest.mark.parametrize("how", [dict(), dict(beta=3.0), dict(beta=2.0, gamma=0.5), dict(beta=2.0, gamma=3.0, positions=MROPE), dict(beta=1.0, positions=MROPE[2]), dict(bias=BIAS),
                                 dict(beta=3.0, positions=MROPE, bias=BIAS), dict(target_bias=THIN), dict(beta=2.0, bias=BIAS, target_bias=THIN)], ids=lambda how: " ".join(how) or "KL")
@pytest.mark.parametrize("tied, kv", [(False, 2), (True, 2), (False, 4), (True, 1)])
def test_attention_match_against_rows_in_float64(tied, kv, how):
    x, mask = sharp(tied, kv=kv), padded()
    expected = attention_by_rows(*x, mask, (.4, .3), **how)
    wanted = torch.autograd.grad(expected, x)
    for block in (1, 6, 256):
        loss = attention_match_loss(*x, mask, .4, .3, block=block, **how)
        assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < 1e-5
        for found, g in zip(torch.autograd.grad(loss, x), wanted): assert (found - g).norm() < 1e-5 * g.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_attention_match_gradient(tied):
    x = sharp(tied, torch.float64)
    assert gradcheck(lambda *x: attention_match_loss(*x, padded(), .4, .3, MROPE, 2.0, 0.5, BIAS, block=6), x, fast_mode=True)


def test_attention_match_at_beta_0_is_torchs_own_kl():
    x = sharp()
    seen = torch.ones(13, 13).tril().bool()
    s, t = ((q * q.shape[-1] ** -.5 @ repeat_kv(k, 4).mT).masked_fill(~seen, -1e30).log_softmax(-1) for q, k in (x[:2], x[2:]))
    torch.testing.assert_close(attention_match_loss(*x, None), F.kl_div(s, t, log_target=True, reduction="sum") / (2 * 4 * 13))


def test_attention_match_is_never_negative_where_a_weighted_kl_is():
    "Two keys, the far one counting more: the student overshoots on it."
    q, k = torch.ones(1, 1, 2, 1), torch.tensor([1.4, 0.0]).reshape(1, 1, 2, 1)
    tq, tk = torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    s, t, omega = torch.tensor([1.4, 0.0]).softmax(0), torch.tensor([.5, .5]), torch.tensor([4.0, 1.0])
    assert (omega * t * (t / s).log()).sum() < 0
    loss = attention_match_loss(q.requires_grad_(), k.requires_grad_(), tq, tk, None, 1.0, 1.0, beta=3.0)
    torch.testing.assert_close(loss.detach(), (omega * (t * (t / s).log() - t + s)).sum() / 2)     # the first row sees one key: 0
    assert loss > 0


def test_attention_match_of_equal_attention_is_0_and_has_no_gradient():
    sq, sk, *_ = sharp(dtype=torch.float64)
    loss = attention_match_loss(sq, sk, sq.detach(), sk.detach(), padded(), beta=3.0)
    assert loss.abs() < 1e-14 and all(g.abs().max() < 1e-14 for g in torch.autograd.grad(loss, (sq, sk)))


def test_attention_match_ignores_padding_and_what_is_in_it():
    clean, mask = sharp(), padded()
    expected = attention_match_loss(*clean, mask, beta=2.0)
    dirty = [x.detach().masked_fill(~mask[:, None, :, None], math.nan).requires_grad_() for x in clean]
    loss = attention_match_loss(*dirty, mask, beta=2.0)
    torch.testing.assert_close(loss, expected)
    for g in torch.autograd.grad(loss, dirty): assert g.isfinite().all() and not g.transpose(1, 2)[~mask].any()
    alone = [attention_match_loss(*(x[b:b + 1, :, mask[b]] for x in clean), None, beta=2.0) * mask[b].sum() for b in range(2)]
    torch.testing.assert_close(expected, sum(alone) / mask.sum())                # a batch is the mean of its rows, however it is put together


@pytest.mark.parametrize("learns", [(True, False), (True, True)])
def test_attention_match_works_out_only_the_gradients_that_are_wanted(learns):
    class Products(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Products.count += func._schema.name in ("aten::bmm", "aten::baddbmm_", "aten::mm")
            return func(*args, **(kwargs or {}))
    x = [t.detach().requires_grad_(l) for t, l in zip(sharp(), (learns[0], learns[0], learns[1], learns[1]))]
    with Products(): attention_match_loss(*x, None).backward()
    assert Products.count == 2 * 2 * (2 + 2 * sum(learns))                       # samples x KV heads x (logits of both + two gradients each)
    with torch.no_grad(), Products():
        Products.count = 0
        attention_match_loss(*x, None)
    assert Products.count == 2 * 2 * 2


class LiveBytes(TorchDispatchMode):
    "Peak of the bytes that tensors made inside the block hold at a time."
    def __init__(self):
        super().__init__()
        self.live, self.peak = WeakIdKeyDictionary(), 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.live[t.untyped_storage()] = t.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_attention_match_memory_grows_with_tokens_not_their_square():
    def peak(loss, n):
        x = [normal(1, h, n, 8, seed=i, dtype=torch.float32).requires_grad_() for i, h in enumerate((8, 2, 8, 2))]
        with LiveBytes() as seen: loss(*x).backward()
        return seen.peak
    def whole(sq, sk, tq, tk):
        s, t = ((q @ repeat_kv(k, 8).mT).masked_fill_(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu_(1), -1e30).log_softmax(-1) for q, k in ((sq, sk), (tq, tk)))
        return (t.exp() * (t - s)).sum()
    blocks = lambda *x: attention_match_loss(*x, None, beta=1.0)
    one, two = peak(blocks, 1024), peak(blocks, 2048)
    assert 1.8 < two / one < 2.2
    assert peak(whole, 512) > 3.8 * peak(whole, 256)
    assert one < .1 * 4 * peak(whole, 512)                                      # at 1,024 tokens already; the share halves with every doubling


def test_attention_match_under_autocast_in_bfloat16_and_checkpointed():
    x = sharp()
    loss = attention_match_loss(*x, padded(), beta=2.0)
    expected = torch.autograd.grad(loss, x)
    with torch.autocast("cpu", torch.bfloat16): assert attention_match_loss(*x, padded(), beta=2.0) == loss
    again = checkpoint(lambda *x: attention_match_loss(*x, padded(), beta=2.0), *x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, x), expected): assert torch.equal(a, b)
    low = [t.detach().bfloat16().requires_grad_() for t in x]
    value = attention_match_loss(*low, padded(), beta=2.0)
    value.backward()
    exact = attention_match_loss(*(t.detach().double().requires_grad_() for t in low), padded(), beta=2.0)
    assert value.dtype == torch.float32 and abs(value.item() / exact.item() - 1) < 1e-5 and all(t.grad.dtype == torch.bfloat16 for t in low)


@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, LlamaForCausalLM])
def test_attention_match_against_eager_models(kind):
    lm, mask = model(kind, attn_implementation="eager"), spans("left")[0]
    ids = torch.randint(1, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    with capture(lm) as cache: s, t = lm(ids, attention_mask=mask.long(), output_attentions=True).attentions
    loss = attention_match_loss(cache["q", 0], cache["k", 0], cache["q", 1], cache["k", 1], mask, cache.scaling[0], cache.scaling[1])
    kl = torch.where(t > 0, t * (t / s.clamp(min=1e-30)).log(), 0).sum(-1).transpose(1, 2)[mask].mean()
    torch.testing.assert_close(loss, kl)


def test_bias_factors_are_extra_dimensions_and_the_window_s_matrix():
    groups = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 2, 2, 2, -1, -1]] * 2)
    asked = torch.zeros(2, 13, 3, dtype=torch.bool)
    asked[:, 11:, 1] = True
    c, member = torch.tensor([20.0, 3.0]), F.one_hot(groups + 1, 4)[..., 1:]
    factors = ~(member.bool() | asked) * c.log()[:, None, None], member.float()
    torch.testing.assert_close(factors[0] @ factors[1].mT, multiplicity_bias(groups, asked, c)[:, 0])
    x = sharp()
    wide = [torch.cat([y, e[:, None].expand(-1, y.shape[1], -1, -1)], -1) for y, e in zip(x, (factors[0] / .4, factors[1], factors[0] / .3, factors[1]))]
    torch.testing.assert_close(attention_match_loss(*wide, None, .4, .3, beta=2.0), attention_match_loss(*x, None, .4, .3, beta=2.0, bias=factors))


@pytest.mark.parametrize("change, message", [
    (dict(target_q=normal(2, 4, 12, 6), target_k=normal(2, 2, 12, 6)), "differ in tokens"),
    (dict(target_q=normal(2, 2, 13, 6)), "need 4 query heads and 2"),
    (dict(student_k=normal(2, 2, 13, 8)), "student keys .* carry no gradient"),
    (dict(beta=-1.0), "beta is -1.0"),
    (dict(gamma=math.nan), "gamma is nan"),
    (dict(block=0), "block is 0"),
    (dict(positions=torch.zeros(2, 2, 13)), "positions have shape"),
    (dict(bias=(torch.zeros(2, 13, 3), torch.zeros(2, 13, 2))), "bias factors have shapes"),
    (dict(mask=torch.zeros(2, 13)), "no real token"),
])
def test_attention_match_refuses(change, message):
    with pytest.raises(ValueError, match=message): attention_match_loss(**{**dict(zip(("student_q", "student_k", "target_q", "target_k"), pair())), "mask": padded(), **change})


# --- hidden states ------------------------------------------------------------
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_hidden_is_the_mean_over_real_tokens(dtype, tolerance):
    student, teacher, P, mask = normal(3, 6, 4).to(dtype).requires_grad_(), normal(3, 6, 5, seed=1).to(dtype), normal(4, 5, seed=2), heads()[4].bool()
    target = unit_rms(teacher).double() @ P.T
    h, t = student.detach().double(), teacher.double()
    expected = (h/h.square().mean(-1, keepdim=True).sqrt() - t/t.square().mean(-1, keepdim=True).sqrt() @ P.T)[mask].square().mean()
    loss = hidden_loss(student, target.to(unit_rms(student).dtype), mask)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    assert (student.grad[~mask] == 0).all() and (student.grad[mask] != 0).any()


def test_hidden_gradient_and_that_shrinking_gains_nothing():
    student, teacher, P, mask = normal(3, 6, 4).requires_grad_(), normal(3, 6, 5, seed=1), normal(4, 5, seed=2).requires_grad_(), heads()[4]
    assert gradcheck(lambda h, P: hidden_loss(h, unit_rms(teacher) @ P.T, mask), (student, P))
    grad, = torch.autograd.grad(hidden_loss(student, (unit_rms(teacher) @ P.T).detach(), mask), student)
    assert (grad*student).sum(-1).abs().max() < 1e-9  # along the stream itself there is no slope
    assert hidden_loss(1e-3*student, 0*student.detach(), mask).item() == pytest.approx(1, rel=1e-6)


def test_hidden_refuses_what_does_not_fit():
    student, mask = normal(3, 6, 4).requires_grad_(), heads()[4]
    with pytest.raises(ValueError, match=r"target \(3, 6, 5\)"): hidden_loss(student, normal(3, 6, 5), mask)
    with pytest.raises(ValueError, match="student hidden states .* carry no gradient"): hidden_loss(student.detach(), normal(3, 6, 4), mask)
    with pytest.raises(ValueError, match="token mask has shape"): hidden_loss(student, normal(3, 6, 4), mask[:, :5])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_are_those_of_torch_distributions(divergence):
    s, t = normal(5, 7).requires_grad_(), normal(5, 7, seed=1)
    p, q = (torch.distributions.Categorical(logits=x/3) for x in (s, t))
    m = torch.distributions.Categorical(probs=(p.probs + q.probs)/2)
    kl = torch.distributions.kl_divergence
    expected = {"forward": kl(q, p), "reverse": kl(p, q), "jsd": (kl(q, m) + kl(p, m))/2}[divergence].mean()*9
    torch.testing.assert_close(kl_loss(s, t, 3., divergence), expected)
    assert divergence != "jsd" or kl_loss(100*s, -100*s.detach(), 1., divergence) <= math.log(2)
    assert gradcheck(lambda x: kl_loss(x, t, 3., divergence), s)


def test_divergence_is_a_setting_read_from_the_table():
    from laid_nb.train import LaidConfig
    assert LaidConfig(use_cpu=True).divergence == "forward"
    assert LaidConfig(use_cpu=True, divergence="jsd").divergence == "jsd"
    with pytest.raises(ValueError, match="divergence is 'sideways': need one of forward, reverse, jsd"):
        LaidConfig(use_cpu=True, divergence="sideways")


def test_attention_to_images_is_the_kl_of_renormalised_eager_attention():
    heads = [2*normal(2, h, 20, 8, seed=i) for i, h in enumerate((4, 2, 4, 2))]
    rows = torch.zeros(2, 20, dtype=torch.bool)
    images = torch.zeros(2, 20, dtype=torch.bool)
    rows[0, 15:], rows[1, 18:], images[0, 3:9], images[1, 1:16] = True, True, True, True
    shares = []
    for q, k in (heads[:2], heads[2:]):
        logits = (q @ repeat_kv(k, 4).mT/3).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
        mass = logits.softmax(-1)*images[:, None, None]
        shares.append((mass/mass.sum(-1, keepdim=True)).transpose(1, 2)[rows])  # [rows, heads, tokens]
    expected = torch.xlogy(shares[1], shares[1]/shares[0]).nan_to_num().sum(-1).mean()
    own = [x.requires_grad_() for x in heads[:2]]
    for block in (2, 256):
        loss = losses.image_attention_loss(*own, *heads[2:], rows, images, 1/3, 1/3, block)
        torch.testing.assert_close(loss, expected)
        found = torch.autograd.grad(loss, own)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found)
    assert not found[0].transpose(1, 2)[~rows].any() and not found[1].transpose(1, 2)[~images].any()


def test_images_is_a_term_of_the_training(tmp_path):
    from laid_nb.train import LaidConfig
    assert LaidConfig(use_cpu=True, lambda_images=.2).weights == {"sft": .7, "kl": .3, "laid": .3, "images": .2}
    assert "images" not in LaidConfig(use_cpu=True, method="laid+").weights
    with pytest.raises(ValueError, match="'kd' has no term 'images'"):
        LaidConfig(use_cpu=True, method="kd", lambda_images=.2)
