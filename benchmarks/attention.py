"""Time and peak memory of attention_match_loss in blocks against plain autograd on the whole matrix, forward and
backward."""
import argparse
from functools import partial

import torch

from laid_nb.losses import attention_match_loss
from laid_nb.mixing import repeat_kv
from measure import peak_bytes, seconds, table, write


def arguments():
    "From the command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens, one round")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the farthest key, less 1; 0 = plain KL")
    parser.add_argument("--block", type=int, default=256, help="rows of logits at a time")
    parser.add_argument("--most", type=int, default=8192, help="longest sequence given to the materialised version")
    return parser.parse_args()


def materialised(sq, sk, tq, tk, beta):
    "Plain autograd on the whole matrix: the fastest of the forms tried (log_softmax, logsumexp, kl_div, einsum)."
    (heads, tokens), scaling = sq.shape[1:3], sq.shape[3]**-.5
    place = torch.arange(tokens, device=sq.device)
    hidden = place[:, None] < place

    def log_attention(q, k):
        return (q*scaling @ repeat_kv(k, heads).mT).masked_fill_(hidden, -1e30).log_softmax(-1)
    s, t = log_attention(sq, sk), log_attention(tq, tk)
    p_s, p_t = s.exp(), t.exp()
    if not beta: return (p_t*(t - s)).sum()/(heads*tokens)
    omega = (place[:, None] - place).clamp_(min=0)*(beta/(tokens - 1)) + 1
    return ((p_t*(t - s) - p_t + p_s)*omega).sum()/(heads*tokens)


def gradients(loss, inputs):
    "Forward and backward."
    return torch.autograd.grad(loss(*inputs), inputs)


@torch.no_grad()
def value(loss, inputs):
    "Forward alone."
    return loss(*inputs).item()


def run(
    tokens: int,
    args: argparse.Namespace,  # from `arguments`
    device: str,
) -> dict:
    "A row: one sequence length."
    torch.manual_seed(0)
    shapes = [(1, heads, tokens, args.head_dim) for heads in (args.heads, args.kv_heads)*2]
    inputs = [torch.randn(*shape, device=device).requires_grad_() for shape in shapes]
    blocks = lambda *x: attention_match_loss(*x, None, beta=args.beta, block=args.block)
    whole = partial(materialised, beta=args.beta)
    calls = {"blocks": lambda: gradients(blocks, inputs), "value": lambda: value(blocks, inputs)}
    if tokens <= args.most:
        calls["whole"] = lambda: gradients(whole, inputs)
        in_blocks, at_once = value(blocks, inputs), value(whole, inputs)
        assert abs(in_blocks/at_once - 1) < 1e-5, (in_blocks, at_once)
    time = seconds(calls, 1 if args.quick or tokens > 2048 else 3)
    memory = {name: peak_bytes(call) for name, call in calls.items() if name != "value"}
    compared = "whole" in calls
    return {
        "tokens": tokens,
        "blocks s": time["blocks"],
        "whole s": time["whole"] if compared else None,
        "time ratio": time["blocks"]/time["whole"] if compared else None,
        "blocks MB": memory["blocks"]/2**20,
        "whole MB": memory["whole"]/2**20 if compared else None,
        "memory ratio": memory["blocks"]/memory["whole"] if compared else None,
        "recomputing": (time["blocks"] + time["value"])/time["blocks"],  # blocks for the value, again for the gradients
    }


def main():
    args, device, rows = arguments(), "cuda" if torch.cuda.is_available() else "cpu", []
    for tokens in (512, 1024) if args.quick else (1024, 2048, 4096, 8192, 16384):
        rows.append(run(tokens, args, device))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if args.quick: return
    write("bench_attention", rows, **vars(args), device=device, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
