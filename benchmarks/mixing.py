"""The three forms of mixing beside each other and beside a loop over heads: time of a step (forward, and backward to
the weights), of the Gram sums, and peak memory.

Heads of Qwen2.5-VL 32B (40 queries, 8 keys, head_dim 128) for a student of 7B (28 and 4); what a layer's attention
costs at the same size is the yardstick."""
import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention

from laid_nb.mixing import FORMS, GramStats, HeadMixing, from_bands, to_bands
from laid_nb.rope import RopeSpec
from measure import peak_bytes, seconds, table, write

TEACHER, STUDENT, DIM = (40, 8), (28, 4), 128
SPEC = RopeSpec(1e6**-(torch.arange(0, DIM, 2)/DIM), torch.tensor([0]*16 + [1]*24 + [2]*24), DIM)


def loop(w, heads, spec):
    "One teacher head at a time, as complex numbers."
    z = torch.view_as_complex(to_bands(heads, spec).contiguous())
    out = torch.stack([sum(w[i, j]*z[:, j] for j in range(w.shape[1])) for i in range(w.shape[0])], 1)
    return from_bands(torch.view_as_real(out), spec)


def step(mixing, q, k):
    "Forward and backward to the weights."
    a, b = mixing(q, k)
    (a.square().mean() + b.square().mean()).backward()


def calls_of(tokens, device):
    "What is measured at one sequence length: name -> function without arguments."
    generator = torch.Generator().manual_seed(0)
    normal = lambda h: torch.randn(1, h, tokens, DIM, generator=generator).to(device)
    (tq, tk), (sq, sk) = map(normal, TEACHER), map(normal, STUDENT)
    heads = STUDENT[0], TEACHER[0], STUDENT[1], TEACHER[1]
    made = {form: HeadMixing(*heads, form=form, spec=SPEC).to(device) for form in FORMS}
    w = made["complex"].weights()[0].detach()
    gram = lambda spec: GramStats().update(sq, sk, tq, tk, spec=spec)
    calls = {f"step, {form}": (lambda m=m: step(m, tq, tk)) for form, m in made.items()}
    return calls | {
        "Gram sums, scalar": lambda: gram(None),
        "Gram sums, by band": lambda: gram(SPEC),
        "complex by a loop over heads, forward, queries": lambda: loop(w, tq, SPEC),
        "attention of the teacher layer, forward":
            lambda: scaled_dot_product_attention(tq, tk, tk, is_causal=True, enable_gqa=True),
    }


def run(tokens, repeat, device):
    "Rows of one sequence length."
    calls = calls_of(tokens, device)
    times = seconds(calls, repeat)
    return [dict(tokens=tokens, what=name, seconds=t, ratio=t/times["step, scalar"],
                 peak_MB=peak_bytes(calls[name])/1e6) for name, t in times.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 tokens, one round, nothing written")
    quick = parser.parse_args().quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, repeat = ((512,), 1) if quick else ((2048, 8192), 5)
    rows = [row for tokens in sizes for row in run(tokens, repeat, device)]
    print(table(rows))
    if quick: return
    write("bench_mixing", rows)


if __name__ == "__main__":
    main()
