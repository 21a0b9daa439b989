import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from laid_nb.capture import capture, rotate
from laid_nb.mixing import (
    FORMS,
    Gram,
    GramStats,
    HeadMixing,
    _nonnegative_ridge,
    _ridge_weights,
    best_pairs,
    explained,
    explained_table,
    from_bands,
    head_sizes,
    layer_pairs,
    mix,
    mixing_kind,
    mixings,
    plot_weights,
    repeat_kv,
    to_bands,
)
from laid_nb.rope import RopeSpec, rope_spec

SIZES = [(4, 6, 2, 2), (4, 6, 2, 3), (3, 8, 1, 8), (6, 4, 6, 2)]  # student heads, teacher heads, student KV, teacher KV; MQA, MHA and a smaller teacher too
CONSTRAINTS = ("convex", "norm", "free")
SPEC = RopeSpec(torch.tensor([1., .3, .05, .01]), torch.tensor([0, 1, 2, 2]), 8)  # three axes, halves
SPECS = [SPEC, RopeSpec(SPEC.inv_freq, SPEC.axis, 8, adjacent=True), RopeSpec(SPEC.inv_freq[:3], SPEC.axis[:3], 8), RopeSpec(SPEC.inv_freq[:2], SPEC.axis[:2], 8, adjacent=True)]  # and some that do not turn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(sizes, seed=0, b=2, tokens=12, dim=8):
    "student q, k, teacher q, k; the student partly made of the teacher."
    hs, ht, ks, kt = sizes
    tq, tk = normal(b, ht, tokens, dim, seed=seed + 1), normal(b, kt, tokens, dim, seed=seed + 2)
    sq = torch.einsum("ij,bjsd->bisd", normal(hs, ht, seed=98), tq) + normal(b, hs, tokens, dim, seed=seed + 3)
    sk = torch.einsum("ij,bjsd->bisd", normal(ks, kt, seed=99), tk) + normal(b, ks, tokens, dim, seed=seed + 4)
    return sq, sk, tq, tk


def stats(sizes, n=3, spec=None):
    gram = GramStats()
    for b in range(n): gram.update(*batch(sizes, seed=10 * b), spec=spec)
    return gram


def weights(form, h_s=4, h_t=6, bands=4, seed=0):
    "Normal numbers of one form."
    if form == "scalar": return normal(h_s, h_t, seed=seed)
    real = normal(h_s, h_t, bands, seed=seed)
    return real if form == "band" else torch.complex(real, normal(h_s, h_t, bands, seed=seed + 1))


def all_batches(sizes, n=3):
    return (torch.cat(x) for x in zip(*(batch(sizes, seed=10 * b) for b in range(n))))


class Count(TorchDispatchMode):
    "Operations that run, and the largest tensor they return."
    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def rows(x):
    "heads as columns: [batch·tokens·dim, heads]"
    return x.transpose(0, 1).flatten(1).T


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_is_the_double_loop(sizes, constraint):
    m = HeadMixing(*sizes, constraint).double()
    m.init_random(torch.Generator().manual_seed(1))
    _, _, tq, tk = batch(sizes)
    for out, w, t in zip(m(tq, tk), m.weights(), (tq, tk)):
        expected = torch.stack([sum(w[i, j] * t[:, j] for j in range(w.shape[1])) for i in range(w.shape[0])], 1)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("init", ["init_uniform", "init_random", "init_ridge"])
def test_constraint_holds_after_every_init(init, constraint):
    m = HeadMixing(4, 6, 2, 3, constraint)
    getattr(m, init)(*{"init_random": [torch.Generator().manual_seed(0)], "init_ridge": [stats((4, 6, 2, 3))]}.get(init, []))
    for w in m.weights():
        assert w.isfinite().all()
        if constraint == "convex": assert (w > 0).all() and torch.allclose(w.sum(-1), torch.ones(len(w)))
        if constraint == "norm": assert torch.allclose(w.norm(dim=-1), torch.ones(len(w)))


@pytest.mark.parametrize("form", ["band", "complex"])
@pytest.mark.parametrize("constraint", ["convex", "norm"])
@pytest.mark.parametrize("init", ["init_uniform", "init_random", "init_ridge"])
def test_constraint_holds_in_every_band_after_every_init(init, constraint, form):
    m = HeadMixing(4, 6, 2, 3, constraint, form=form, spec=SPEC)
    getattr(m, init)(*{"init_random": [torch.Generator().manual_seed(0)], "init_ridge": [stats((4, 6, 2, 3), spec=SPEC)]}.get(init, []))
    for w in m.weights():
        assert w.is_complex() == (form == "complex") and w.shape[2] == 4
        if form == "band" and constraint == "convex": assert (w > 0).all()
        length = w.abs().sum(1) if constraint == "convex" else w.abs().square().sum(1)
        torch.testing.assert_close(length, torch.ones_like(length))


def test_random_init_repeats_by_seed():
    a, b = HeadMixing(4, 6, 2, 3), HeadMixing(4, 6, 2, 3)
    for m in (a, b): m.init_random(torch.Generator().manual_seed(3))
    assert all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights()))


@pytest.mark.parametrize("sizes", SIZES)
def test_ridge_equals_least_squares_over_all_tokens(sizes):
    m, gram = HeadMixing(*sizes, "free").double(), stats(sizes)
    m.init_ridge(gram, ridge=1e-2)
    sq, sk, tq, tk = (torch.cat(x) for x in zip(*(batch(sizes, seed=10 * b) for b in range(3))))
    for w, s, t in zip(m.weights(), (sq, sk), (tq, tk)):
        S, T = rows(s), rows(t)
        lam = (1e-2 * T.square().sum(0).mean()).sqrt()
        extra = lam * torch.eye(T.shape[1], dtype=T.dtype)
        expected = torch.linalg.lstsq(torch.cat([T, extra]), torch.cat([S, torch.zeros(len(extra), S.shape[1], dtype=S.dtype)])).solution.T
        torch.testing.assert_close(w.detach(), expected)


def test_explained_equals_the_direct_share():
    sizes = (4, 6, 2, 3)
    gram = stats(sizes)
    sq, sk, tq, tk = (torch.cat(x) for x in zip(*(batch(sizes, seed=10 * b) for b in range(3))))
    for tied in (False, True):
        m = HeadMixing(*sizes, "norm", tied).double()
        m.init_ridge(gram)
        for e, s, out in zip(m.explained(gram), (sq, repeat_kv(sk, 4) if tied else sk), m(tq, tk)):
            torch.testing.assert_close(e, 1 - rows(s - out.detach()).square().sum(0) / rows(s).square().sum(0))


def test_nonnegative_ridge_is_the_best_of_all_active_sets():
    gram = stats((4, 6, 2, 3)).q
    w, lam = _nonnegative_ridge(gram, 1e-3), 1e-3 * gram.teacher.diagonal().mean()
    G = gram.teacher + lam * torch.eye(6, dtype=torch.float64)
    for i in range(4):
        best, value = torch.zeros(6, dtype=torch.float64), 0.0
        for n in range(1, 7):
            for keep in map(list, itertools.combinations(range(6), n)):  # brute force: solve on each subset, keep feasible ones
                x = torch.zeros(6, dtype=torch.float64)
                x[keep] = torch.linalg.solve(G[keep][:, keep], gram.cross[i, keep])
                v = x @ G @ x - 2 * gram.cross[i] @ x
                if (x >= 0).all() and v < value: best, value = x, v
        torch.testing.assert_close(w[i], best, atol=1e-8, rtol=1e-6)


def test_nonnegative_ridge_of_nearly_parallel_heads_is_exact():
    "Weights may trade places at almost no cost; the conditions of the minimum hold all the same."
    common, own = normal(1, 1, 50, 8), normal(1, 6, 50, 8, seed=1)
    gram = Gram.of(common + 0.3 * normal(1, 4, 50, 8, seed=2), common + 1e-3 * own)
    w = _nonnegative_ridge(gram, 1e-6)
    G = gram.teacher + 1e-6 * gram.teacher.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    slope = (w @ G - gram.cross) / gram.teacher.diagonal().mean()
    assert (w >= 0).all() and (w > 0).any(1).all()
    assert slope[w > 0].abs().max() < 1e-10 and slope[w == 0].min() > -1e-10


def test_convex_start_recovers_a_planted_mixture():
    w, (_, _, tq, tk) = torch.tensor([[.7, .3, 0.], [0, 0, 1.]]).double(), batch((2, 3, 1, 1), tokens=200)
    gram, m = GramStats(), HeadMixing(2, 3, 1, 1)
    gram.update(torch.einsum("ij,bjsd->bisd", w, tq), tk, tq, tk)
    m.init_ridge(gram)
    torch.testing.assert_close(m.weights()[0].detach().double(), 0.95 * w + 0.05 / 3, atol=2e-3, rtol=0)  # the floor of 5% is by design


def test_convex_start_ignores_the_student_s_size():
    a, b = HeadMixing(4, 6, 2, 3), HeadMixing(4, 6, 2, 3)
    for m, size in ((a, 1.0), (b, 0.01)):
        gram = GramStats()
        sq, sk, tq, tk = batch((4, 6, 2, 3))
        gram.update(sq * size, sk * size, tq, tk)
        m.init_ridge(gram)
    torch.testing.assert_close(a.weights()[0], b.weights()[0])


def test_convex_start_without_any_positive_head_is_the_least_negative_one():
    gram = Gram(torch.tensor([[-3., -1., -2.]]).double(), torch.eye(3).double(), torch.ones(1).double(), 1)
    stats_ = GramStats()
    stats_.q = stats_.k = gram
    m = HeadMixing(1, 3, 1, 3)
    m.init_ridge(stats_)
    assert m.weights()[0].argmax() == 1


def test_gram_batches_add_up_and_padding_does_not_count():
    sq, sk, tq, tk = batch((4, 6, 2, 3), b=3)
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12, [1] * 9 + [0] * 3])
    for x in (sq, sk, tq, tk): x[0, :, :5] = float("nan")
    together, apart, cut = GramStats(), GramStats(), GramStats()
    together.update(sq, sk, tq, tk, mask)
    for b in range(3): apart.update(*(x[b:b + 1] for x in (sq, sk, tq, tk)), mask[b:b + 1])
    for b in range(3): cut.update(*(x[b:b + 1, :, mask[b].bool()] for x in (sq, sk, tq, tk)))
    for other in (apart, cut):
        for kind in ("q", "k"):
            for name in ("cross", "teacher", "student"):
                torch.testing.assert_close(getattr(getattr(together, kind), name), getattr(getattr(other, kind), name))
    assert together.q.count == mask.sum() * 8


def test_scales_are_the_teacher_s_mean_squares():
    sizes = (4, 6, 2, 3)
    m = HeadMixing(*sizes).double()
    assert m.scale_q.isnan()
    m.measure(stats(sizes))
    _, _, tq, tk = (torch.cat(x) for x in zip(*(batch(sizes, seed=10 * b) for b in range(3))))
    torch.testing.assert_close(m.scale_q, tq.square().mean())
    torch.testing.assert_close(m.scale_k, tk.square().mean())


def test_bfloat16_heads_keep_float32_weights():
    m = HeadMixing(4, 6, 2, 3)
    sq, sk, tq, tk = (x.bfloat16() for x in batch((4, 6, 2, 3)))
    gram = GramStats()
    gram.update(sq, sk, tq, tk)
    m.init_ridge(gram)
    assert m(tq, tk)[0].dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in m.parameters())


def test_tied_shares_one_weight_over_repeated_keys():
    m = HeadMixing(4, 6, 2, 3, "free", tied=True).double()
    m.init_random(torch.Generator().manual_seed(0))
    _, _, tq, tk = batch((4, 6, 2, 3))
    (w,), (q, k) = m.parameters(), m(tq, tk)
    torch.testing.assert_close(k[:, 1], sum(w[1, j] * tk[:, j // 2] for j in range(6)))
    torch.testing.assert_close(q[:, 1], sum(w[1, j] * tq[:, j] for j in range(6)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_gradient_of_the_weights(constraint, tied, form):
    m = HeadMixing(2, 3, 1, 1, constraint, tied, form, RopeSpec(torch.ones(1), torch.zeros(1, dtype=torch.long), 2)).double()
    m.init_random(torch.Generator().manual_seed(0))
    _, _, tq, tk = batch((2, 3, 1, 1), tokens=3, dim=2)

    def f(*raw):
        q, k = torch.func.functional_call(m, dict(zip([n for n, _ in m.named_parameters()], raw)), (tq, tk))
        return q.square().sum() + k.sin().sum()

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in m.parameters()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_mix_is_the_triple_loop_over_complex_pairs(form, spec):
    w, x = weights(form), normal(2, 6, 5, 8, seed=2)
    full = (w if form != "scalar" else w[..., None].expand(4, 6, 4)).to(torch.complex128)
    n = spec.rotary_dim
    where = [(2*b, 2*b + 1) if spec.adjacent else (b, b + n//2) for b in range(n//2)] + [(d, d + 1) for d in range(n, 8, 2)]  # the two dimensions of each band
    expected = torch.zeros(2, 4, 5, 8, dtype=torch.float64)
    for i, j, (b, (u, v)) in itertools.product(range(4), range(6), enumerate(where)):
        z = full[i, j, b]*torch.complex(x[:, j, :, u], x[:, j, :, v])
        expected[:, i, :, u] += z.real
        expected[:, i, :, v] += z.imag
    torch.testing.assert_close(mix(w, x, spec), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_bands_are_pairs_and_lead_back(spec):
    x = normal(2, 3, 5, 8)
    pairs = to_bands(x, spec)
    assert pairs.shape == (2, 3, 5, 4, 2) and torch.equal(from_bands(pairs, spec), x)
    assert torch.equal(pairs[..., :spec.rotary_dim//2, :], spec.pairs(x))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_commute_with_rope(form, spec):
    x, positions = normal(2, 6, 5, 8), torch.randint(0, 5000, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    w = weights(form)
    torch.testing.assert_close(spec.rotate(mix(w, x, spec), positions), mix(w, spec.rotate(x, positions), spec))


@pytest.mark.parametrize("name, matrix", [
    ("general", normal(8, 8)),
    ("shear in every band", torch.kron(torch.tensor([[1., .5], [0., 1.]]), torch.eye(4)).double()),  # bands (b, b + 4)
    ("conjugation", torch.diag(torch.tensor([1.] * 4 + [-1.] * 4)).double()),
    ("two bands exchanged", torch.eye(8).double()[[1, 0, 2, 3, 5, 4, 6, 7]]),
])
def test_other_matrices_do_not_commute_with_rope(name, matrix):
    x, positions = normal(1, 1, 20, 8), 7*torch.arange(20).expand(3, 1, 20)
    off = SPEC.rotate(x @ matrix.T, positions) - SPEC.rotate(x, positions) @ matrix.T
    assert off.norm() > .1*x.norm(), name


STOCK = {
    "llama": LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
    "glm": GlmConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16),  # neighbours are pairs, half of them turn
}

@pytest.mark.parametrize("name", STOCK)
def test_mixtures_of_stock_rotated_queries_are_rotated_mixtures(name):
    config = STOCK[name]
    for key, value in dict(vocab_size=50, num_hidden_layers=1, intermediate_size=16, pad_token_id=0).items(): setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.arange(1, 41)[None]
    with torch.no_grad(), capture(model, 0) as after: model(ids)
    with torch.no_grad(), capture(model, 0, rotated=False) as before:
        model(ids)
        q, k = before["q", 0], before["k", 0]
    spec, (cos, sin) = rope_spec(model), before.rope[0]
    assert spec.rotary_dim == (8 if name == "glm" else 16) and not torch.allclose(q, after["q", 0])
    for form in FORMS:
        w_q, w_k = weights(form, 3, 4, 8), weights(form, 3, 2, 8)
        stock = rotate(model.model.layers[0].self_attn, mix(w_q, q, spec), mix(w_k, k, spec), cos, sin)  # by the family's own function
        torch.testing.assert_close(mix(w_q, after["q", 0], spec), stock[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mix(w_k, after["k", 0], spec), stock[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_mix_runs_no_loop_over_heads_or_bands(form):
    calls = []
    for h, dim in ((2, 8), (16, 64)):
        spec = RopeSpec(torch.linspace(1, .1, dim//2), torch.zeros(dim//2, dtype=torch.long), dim)
        w, x = weights(form, h, h, dim//2), normal(1, h, 4, dim)
        with Count() as count: mix(w, x, spec)
        calls.append(count.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("spec", [None, SPEC])
def test_gram_sums_hold_nothing_larger_than_the_batch(spec):
    for tokens in (100, 800):
        sq, sk, tq, tk = batch((4, 6, 2, 3), b=1, tokens=tokens)
        with Count() as count: GramStats().update(sq, sk, tq, tk, spec=spec)
        assert count.largest == tq.numel() < 1000*tokens


def test_complex_sums_hold_those_of_the_other_forms():
    sq, _, tq, _ = batch((4, 6, 2, 3))
    gram, plain = Gram.of(sq, tq, spec=SPEC), Gram.of(sq, tq)
    for name in ("cross", "teacher", "student"): torch.testing.assert_close(getattr(gram.form("scalar"), name), getattr(plain, name))
    assert gram.scale == pytest.approx(plain.scale) and gram.count == plain.count
    S, T = ((x.transpose(0, 1).flatten(1, 2)[..., [1, 5]]).flatten(1) for x in (sq, tq))  # band 1 of all tokens
    torch.testing.assert_close(gram.form("band").cross[1], S @ T.T)
    torch.testing.assert_close(gram.form("band").teacher[1], T @ T.T)


def test_gram_sums_are_the_same_before_and_after_rope():
    sq, _, tq, _ = batch((4, 6, 2, 3))
    positions = torch.randint(0, 5000, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    plain, turned = Gram.of(sq, tq, spec=SPEC), Gram.of(SPEC.rotate(sq, positions), SPEC.rotate(tq, positions), spec=SPEC)
    for name in ("cross", "teacher", "student"): torch.testing.assert_close(getattr(plain, name), getattr(turned, name))


@pytest.mark.parametrize("tied", [False, True])
def test_complex_ridge_equals_complex_least_squares_in_each_band(tied):
    sizes = (4, 6, 2, 3)
    gram, m = stats(sizes, spec=SPEC), HeadMixing(*sizes, "free", tied, "complex", SPEC).double()
    m.init_ridge(gram, ridge=1e-2)
    sq, sk, tq, tk = all_batches(sizes)
    columns = lambda x, b: torch.complex(x[..., b], x[..., b + 4]).transpose(0, 1).flatten(1).T  # [tokens, heads]
    for b in range(4):
        if tied:
            q, k = gram.q.scale**.5, gram.k.scale**.5
            problems = [[torch.cat([columns(x, b)/q, columns(repeat_kv(y, h), b)/k]) for x, y, h in ((sq, sk, 4), (tq, tk, 6))]]
        else: problems = [[columns(x, b) for x in (s, t)] for s, t in ((sq, tq), (sk, tk))]
        for w, (S, T) in zip(m.weights(), problems):
            extra = (1e-2*T.abs().square().sum(0).mean()).sqrt()*torch.eye(T.shape[1], dtype=T.dtype)
            expected = torch.linalg.lstsq(torch.cat([T, extra]), torch.cat([S, S.new_zeros(len(extra), S.shape[1])])).solution.T
            torch.testing.assert_close(w[..., b].detach(), expected)


def test_band_ridge_is_the_real_least_squares_in_each_band():
    sq, _, tq, _ = all_batches((4, 6, 2, 3))
    w = _ridge_weights(stats((4, 6, 2, 3), spec=SPEC).q.form("band"), 1e-8)
    for b in range(4):
        S, T = (rows(x[..., [b, b + 4]]) for x in (sq, tq))
        torch.testing.assert_close(w[..., b], torch.linalg.lstsq(T, S).solution.T, atol=1e-6, rtol=1e-6)


def test_explained_grows_from_scalar_to_band_to_complex():
    sizes = (4, 6, 2, 3)
    gram = stats(sizes, spec=SPEC)
    share = {}
    for form in FORMS:
        m = HeadMixing(*sizes, "free", form=form, spec=SPEC).double()
        m.init_ridge(gram, ridge=1e-8)
        share[form] = torch.cat(m.explained(gram))
    for smaller, larger in (("scalar", "band"), ("band", "complex")): assert (share[smaller] < share[larger]).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["band", "complex"])
def test_explained_by_band_equals_the_direct_share(form, tied):
    sizes = (4, 6, 2, 3)
    gram, m = stats(sizes, spec=SPEC), HeadMixing(*sizes, "norm", tied, form, SPEC).double()
    m.init_ridge(gram)
    sq, sk, tq, tk = all_batches(sizes)
    for e, s, out in zip(m.explained(gram), (sq, repeat_kv(sk, 4) if tied else sk), m(tq, tk)):
        torch.testing.assert_close(e, 1 - rows(s - out.detach()).square().sum(0) / rows(s).square().sum(0))


def test_convex_start_by_band_is_the_scalar_start_of_each_band():
    sizes = (4, 6, 2, 3)
    m = HeadMixing(*sizes, form="band", spec=SPEC)
    m.init_ridge(stats(sizes, spec=SPEC))
    for b in range(4):
        alone = GramStats()
        for n in range(3): alone.update(*(x[..., [b, b + 4]] for x in batch(sizes, seed=10*n)))
        one = HeadMixing(*sizes)
        one.init_ridge(alone)
        for w, expected in zip(m.weights(), one.weights()): torch.testing.assert_close(w[..., b], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_complex_start_finds_a_delay(constraint):
    _, _, tq, tk = batch((4, 6, 2, 3), tokens=100)
    back = lambda x: SPEC.rotate(x, torch.full((3, 2, 100), -2))
    gram, m = GramStats(), HeadMixing(4, 6, 2, 3, constraint, form="complex", spec=SPEC)
    gram.update(back(tq[:, [5, 0, 1, 2]]), back(tk[:, :2]), tq, tk, spec=SPEC)
    m.init_ridge(gram)
    w = m.weights()[0].detach()[0, 5]
    torch.testing.assert_close(w.angle(), -2*SPEC.inv_freq, atol=.01, rtol=0)
    assert (w.abs() > .95).all()


def test_rotated_and_unrotated_distance_agree():
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    sq, _, tq, tk = batch((4, 6, 2, 3), tokens=9, dim=16)
    cos, sin = Qwen2RotaryEmbedding(config)(tq, 1000 * torch.arange(9)[None].repeat(2, 1))
    m = HeadMixing(4, 6, 2, 3, "free").double()
    m.init_random(torch.Generator().manual_seed(0))
    plain = (sq - m(tq, tk)[0]).square().sum()
    turn = lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0]
    torch.testing.assert_close((turn(sq) - m(turn(tq), turn(tk))[0]).square().sum(), plain, rtol=1e-6, atol=0)


def test_state_dict_round_trip_and_no_load_across_constraints():
    a, b = HeadMixing(4, 6, 2, 3), HeadMixing(4, 6, 2, 3)
    a.init_ridge(stats((4, 6, 2, 3)))
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights())) and a.scale_k == b.scale_k
    for other in (HeadMixing(4, 6, 2, 3, "norm"), HeadMixing(4, 6, 2, 3, tied=True)):
        with pytest.raises(RuntimeError, match="state_dict"): other.load_state_dict(a.state_dict())


KINDS = [dict(constraint=c, tied=t, form=f) for c in CONSTRAINTS for t in (False, True) for f in FORMS]

@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_read_from_a_saved_file(kind, tmp_path):
    saved = mixings(config(), config(), [(0, 1), (1, 1)], **kind)
    for m in saved.values(): m.init_random(torch.Generator().manual_seed(0))
    save_file(saved.state_dict(), tmp_path/"m.safetensors")
    state = load_file(tmp_path/"m.safetensors")
    assert mixing_kind(state) == mixing_kind(saved["0-1"].state_dict()) == kind
    again = mixings(config(), config(), [(0, 1), (1, 1)], **mixing_kind(state))
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for key in saved for a, b in zip(saved[key].weights(), again[key].weights()))


def test_no_kind_loads_into_another():
    state = [HeadMixing(4, 6, 2, 3, spec=SPEC, **kind).state_dict() for kind in KINDS]
    assert len({tuple(x) for x in state}) == len(KINDS)


@pytest.mark.parametrize("form", FORMS)
def test_form_of_bfloat16_heads(form):
    m = HeadMixing(4, 6, 2, 3, "norm", form=form, spec=SPEC)
    m.init_random(torch.Generator().manual_seed(0))
    _, _, tq, tk = batch((4, 6, 2, 3))
    half, whole = m(tq.bfloat16(), tk.bfloat16()), m(tq, tk)
    for a, b in zip(half, whole):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, atol=.1, rtol=.02)


def test_mixings_take_the_rope_of_the_teacher():
    teacher = Qwen2_5_VLConfig(text_config=dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, bos_token_id=0, eos_token_id=1,
                                                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])))
    m = mixings(config(), teacher, [(1, 1)], form="complex")["1-1"]
    assert torch.equal(m.spec.axis, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])) and m.weights()[0].shape == (4, 4, 8)
    other = mixings(config(32), teacher, [(1, 1)], form="complex", same_head_dim=False)["1-1"]
    assert other(normal(1, 4, 3, 16), normal(1, 2, 3, 16))[0].shape == (1, 4, 3, 16)


def layers(n): return Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=n)


@pytest.mark.parametrize("name, s, t, expected", [
    ("last", 28, 64, [(27, 63)]), ("depth", 3, 4, [(0, 0), (1, 2), (2, 3)]), ("depth", 3, 3, [(0, 0), (1, 1), (2, 2)]), ("depth", 1, 4, [(0, 3)]), ("depth", 4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
    ("1:2, 0:1,1:2", 3, 4, [(0, 1), (1, 2)]),
])
def test_layer_pairs(name, s, t, expected):
    assert layer_pairs(name, layers(s), layers(t)) == expected


@pytest.mark.parametrize("wrong", ["first", "", "1", "1:2:3", "1:-2", "a:b", "1:2,", "best"])
def test_layer_pairs_that_are_none(wrong):
    with pytest.raises(ValueError, match='need "last", "depth"'): layer_pairs(wrong, layers(3), layers(4))


def table_sums(seed, n_s=2, n_t=3):
    "Student layer s is made of teacher layer s + 1, its keys with more noise; sums of every pair."
    teacher = [(normal(1, 6, 40, 8, seed=seed + t), normal(1, 3, 40, 8, seed=seed + 10 + t)) for t in range(n_t)]
    student = [(mix(weights("complex"), q, SPEC) + normal(1, 4, 40, 8, seed=seed + 20 + s), mix(weights("complex", 2, 3), k, SPEC) + 3*normal(1, 2, 40, 8, seed=seed + 30 + s))
               for s, (q, k) in enumerate(teacher[1:])]
    grams = {(s, t): GramStats() for s in range(n_s) for t in range(n_t)}
    for (s, t), gram in grams.items(): gram.update(*student[s], *teacher[t], spec=SPEC)
    return grams, student, teacher


@pytest.mark.parametrize("form", FORMS)
def test_table_is_the_share_of_tokens_not_fitted_to(form):
    (fit, _, _), (seen, student, teacher) = table_sums(100), table_sums(200)
    table = explained_table(seen, form, 1e-2, fit)
    for s, t in seen:
        shares = []
        for x, S, T in zip("qk", student[s], teacher[t]):
            w = _ridge_weights(getattr(fit[s, t], x).form(form), 1e-2)
            shares.append(1 - (S - mix(w, T, SPEC)).square().sum() / S.square().sum())
        torch.testing.assert_close(table[s, t], sum(shares) / 2)
    torch.testing.assert_close(table, (explained_table(seen, form, 1e-2, fit, "q") + explained_table(seen, form, 1e-2, fit, "k")) / 2)


def test_best_pairs_follow_what_the_student_was_made_of():
    assert best_pairs(explained_table(table_sums(100)[0], "complex")) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("form", FORMS)
def test_figure_of_weights(form):
    w = weights(form)
    figure = plot_weights(w, 2.0, SPEC, "title")
    images = [im for ax in figure.axes for im in ax.images]
    shown = {"scalar": 1, "band": 4, "complex": 8}[form]  # panels
    assert len(images) == shown and figure.get_suptitle() == "title"
    first = torch.as_tensor(images[0].get_array().data)
    torch.testing.assert_close(first, w if form == "scalar" else w[0].abs() if form == "complex" else w[0])
    assert images[0].get_clim() == ((0, 2) if form == "complex" else (-2, 2))
    if form == "complex": assert images[1].get_clim() == (-math.pi, math.pi) and torch.equal(torch.as_tensor(images[1].get_array().data), w[0].angle())
    if form != "scalar": assert [t.get_text() for t in figure.axes[-2 if form == "band" else shown - 1].get_xticklabels()] == ["T 6", "H 21", "W 126", "W 628"]


@pytest.mark.parametrize("config, expected", [
    (Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2), (4, 2, 16)),
    (Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32), (4, 2, 32)),
    (LlamaConfig(hidden_size=64, num_attention_heads=4), (4, 4, 16)),
])
def test_head_sizes(config, expected):
    assert head_sizes(config) == expected


def config(dim=16):
    return Qwen2Config(hidden_size=4 * dim, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)


@pytest.mark.parametrize("call, message", [
    (lambda: HeadMixing(4, 6, 2, 3, "softmax"), "'softmax' is unknown"),
    (lambda: HeadMixing(4, 7, 2, 3), "teacher has 7 heads and 3 KV heads"),
    (lambda: HeadMixing(0, 6, 0, 3), "student has 0 heads"),
    (lambda: HeadMixing(4, 6, 2, 3)(normal(1, 5, 3, 8), normal(1, 3, 3, 8)), "teacher has 5 heads"),
    (lambda: HeadMixing(4, 6, 2, 3)(normal(1, 6, 3, 8), normal(1, 3, 3, 16)), "head dimensions differ"),
    (lambda: HeadMixing(4, 6, 2, 3).init_ridge(GramStats()), "GramStats is empty"),
    (lambda: HeadMixing(4, 6, 2, 2).init_ridge(stats((4, 6, 2, 3))), r"Gram sums are for heads \(4, 6, 2, 3\)"),
    (lambda: HeadMixing(4, 6, 2, 3).init_ridge(stats((4, 6, 2, 3)), ridge=0), "ridge is 0"),
    (lambda: GramStats().update(normal(1, 4, 3, 8), normal(1, 2, 3, 8), normal(1, 6, 3, 16), normal(1, 3, 3, 16)), "head dimensions differ: student queries"),
    (lambda: Gram.of(normal(1, 4, 3, 8), normal(1, 6, 3, 8), torch.zeros(1, 3)), "no real token"),
    (lambda: Gram.of(normal(4, 3, 8), normal(6, 3, 8)), "need \\[batch, heads, tokens, head_dim\\]"),
    (lambda: _ridge_weights(Gram.of(normal(1, 4, 3, 8), torch.zeros(1, 6, 3, 8).double())), "zero or not finite"),
    (lambda: _ridge_weights(Gram.of(normal(1, 4, 3, 8) / 0, normal(1, 6, 3, 8))), "zero or not finite"),
    (lambda: repeat_kv(normal(1, 3, 3, 8), 4), "no multiple"),
    (lambda: mixings(config(16), config(32), [(1, 1)]), "student 16, teacher 32"),
    (lambda: mixings(config(), config(), [(1, 2)]), "teacher layer 2 does not exist"),
    (lambda: mixings(config(), config(), []), "no pair of layers"),
    (lambda: HeadMixing(4, 6, 2, 3, form="bands", spec=SPEC), "form 'bands' is unknown"),
    (lambda: HeadMixing(4, 6, 2, 3, form="complex"), "needs the teacher's RopeSpec"),
    (lambda: HeadMixing(4, 6, 2, 3, form="band", spec=SPEC)(normal(1, 6, 3, 16), normal(1, 3, 3, 16)), r"heads \(1, 6, 3, 16\) do not fit: need .*head_dim 8"),
    (lambda: HeadMixing(4, 6, 2, 3, form="band", spec=SPEC).init_ridge(stats((4, 6, 2, 3))), "needs Gram sums by band"),
    (lambda: mix(weights("band"), normal(1, 6, 3, 8)), r"weights \(4, 6, 4\) are by band: pass the teacher's RopeSpec"),
    (lambda: mix(weights("band", h_t=5), normal(1, 6, 3, 8), SPEC), r"weights \(4, 5, 4\) and heads \(1, 6, 3, 8\) do not fit: need \[h_s, h_t, 4 bands\]"),
    (lambda: to_bands(normal(1, 1, 1, 9), RopeSpec(SPEC.inv_freq, SPEC.axis, 9)), "leaves 1 dimensions"),
    (lambda: explained(weights("complex"), stats((4, 6, 2, 3), spec=SPEC).q.form("band")), "of different forms"),
    (lambda: Gram.of(normal(1, 4, 3, 8), normal(1, 6, 3, 8)) + Gram.of(normal(1, 4, 3, 8), normal(1, 6, 3, 8), spec=SPEC), "cannot be added"),
    (lambda: _ridge_weights(Gram.of(normal(1, 4, 3, 8), normal(1, 6, 3, 8)*torch.tensor([1., 0, 1, 1]*2), spec=SPEC)), "zero or not finite"),
    (lambda: mixing_kind(["0-1.scale_q"]), "no names of one kind"),
    (lambda: mixing_kind(["0-1.q_convex", "1-1.q_band_convex"]), "no names of one kind"),
    (lambda: mixings(config(), config(), [(1, 1)], form="bands"), "form 'bands' is unknown"),
    (lambda: explained_table({(0, 1): stats((4, 6, 2, 3))}), r"missing: \[\(0, 0\)\]"),
    (lambda: explained_table({}), "missing"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()
