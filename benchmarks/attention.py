"""Time and peak memory of attention_match_loss in blocks against plain autograd on the whole matrix, forward and backward."""
import argparse

import torch

from laid_nb.losses import attention_match_loss
from laid_nb.mixing import repeat_kv
from measure import peak_bytes, seconds, table, write

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens, one round")
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--kv-heads", type=int, default=2)
parser.add_argument("--head-dim", type=int, default=64)
parser.add_argument("--beta", type=float, default=1.0, help="weight of the farthest key, less 1; 0 = plain KL")
parser.add_argument("--block", type=int, default=256, help="rows of logits at a time")
parser.add_argument("--most", type=int, default=8192, help="longest sequence given to the materialised version")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def materialised(sq, sk, tq, tk):
    "Plain autograd on the whole matrix: the fastest of the forms tried (log_softmax, logsumexp, kl_div, einsum)."
    (H, N), scaling = sq.shape[1:3], sq.shape[3] ** -.5
    place = torch.arange(N, device=sq.device)
    hidden = place[:, None] < place
    s, t = ((q * scaling @ repeat_kv(k, H).mT).masked_fill_(hidden, -1e30).log_softmax(-1) for q, k in ((sq, sk), (tq, tk)))
    p_s, p_t = s.exp(), t.exp()
    if not args.beta: return (p_t * (t - s)).sum() / (H * N)
    omega = (place[:, None] - place).clamp_(min=0) * (args.beta / (N - 1)) + 1
    return ((p_t * (t - s) - p_t + p_s) * omega).sum() / (H * N)


def step(loss, inputs): return lambda: torch.autograd.grad(loss(*inputs), inputs)


blocks = lambda *x: attention_match_loss(*x, None, beta=args.beta, block=args.block)
def value_only(*x):
    with torch.no_grad(): return blocks(*x)
rows = []
for N in (512, 1024) if args.quick else (1024, 2048, 4096, 8192, 16384):
    torch.manual_seed(0)
    x = [torch.randn(1, h, N, args.head_dim, device=device).requires_grad_() for h in (args.heads, args.kv_heads) * 2]
    calls = {"blocks": step(blocks, x), "value": lambda: value_only(*x)}
    if N <= args.most:
        calls["whole"] = step(materialised, x)
        with torch.no_grad(): value, full = blocks(*x).item(), materialised(*x).item()
        assert abs(value / full - 1) < 1e-5, (value, full)
    time = seconds(calls, 1 if args.quick or N > 2048 else 3)
    memory = {name: peak_bytes(call) for name, call in calls.items() if name != "value"}
    rows.append({"tokens": N, "blocks s": time["blocks"], "whole s": time.get("whole"), "time ratio": time["blocks"] / time["whole"] if "whole" in time else None,
                 "blocks MB": memory["blocks"] / 2**20, "whole MB": memory["whole"] / 2**20 if "whole" in memory else None,
                 "memory ratio": memory["blocks"] / memory["whole"] if "whole" in memory else None,
                 "recomputing": (time["blocks"] + time["value"]) / time["blocks"]})  # blocks once for the value, once more for the gradients
    print(table(rows[-1:]), flush=True)
print(table(rows))
if not args.quick: write("bench_attention", rows, **{**vars(args), "device": device, "threads": torch.get_num_threads()})
