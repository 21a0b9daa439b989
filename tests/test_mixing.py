import itertools

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from laid_nb.mixing import Gram, GramStats, HeadMixing, head_sizes, mixings, nonnegative_ridge, repeat_kv, ridge_weights

SIZES = [(4, 6, 2, 2), (4, 6, 2, 3), (3, 8, 1, 8), (6, 4, 6, 2)]  # student heads, teacher heads, student KV, teacher KV; MQA, MHA and a smaller teacher too
CONSTRAINTS = ("convex", "norm", "free")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(sizes, seed=0, b=2, tokens=12, dim=8):
    "student q, k, teacher q, k; the student partly made of the teacher."
    hs, ht, ks, kt = sizes
    tq, tk = normal(b, ht, tokens, dim, seed=seed + 1), normal(b, kt, tokens, dim, seed=seed + 2)
    sq = torch.einsum("ij,bjsd->bisd", normal(hs, ht, seed=98), tq) + normal(b, hs, tokens, dim, seed=seed + 3)
    sk = torch.einsum("ij,bjsd->bisd", normal(ks, kt, seed=99), tk) + normal(b, ks, tokens, dim, seed=seed + 4)
    return sq, sk, tq, tk


def stats(sizes, n=3):
    gram = GramStats()
    for b in range(n): gram.update(*batch(sizes, seed=10 * b))
    return gram


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
    w, lam = nonnegative_ridge(gram, 1e-3, tolerance=1e-12), 1e-3 * gram.teacher.diagonal().mean()
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_gradient_of_the_weights(constraint, tied):
    m = HeadMixing(2, 3, 1, 1, constraint, tied).double()
    m.init_random(torch.Generator().manual_seed(0))
    _, _, tq, tk = batch((2, 3, 1, 1), tokens=3, dim=2)

    def f(*raw):
        q, k = torch.func.functional_call(m, dict(zip([n for n, _ in m.named_parameters()], raw)), (tq, tk))
        return q.square().sum() + k.sin().sum()

    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in m.parameters()))


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
    (lambda: ridge_weights(Gram.of(normal(1, 4, 3, 8), torch.zeros(1, 6, 3, 8).double())), "zero or not finite"),
    (lambda: ridge_weights(Gram.of(normal(1, 4, 3, 8) / 0, normal(1, 6, 3, 8))), "zero or not finite"),
    (lambda: repeat_kv(normal(1, 3, 3, 8), 4), "no multiple"),
    (lambda: mixings(config(16), config(32), [(1, 1)]), "student 16, teacher 32"),
    (lambda: mixings(config(), config(), [(1, 2)]), "teacher layer 2 does not exist"),
    (lambda: mixings(config(), config(), []), "no pair of layers"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()
