import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from laid_nb.capture import capture
from laid_nb.losses import check_same_tokens, kl_loss, laid_loss, needle_attention, supervised_rows, total_loss
from laid_nb.mixing import repeat_kv


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
