"""Distance response by FFT against the best direct sums: time ratio, peak memory, error.

`python benchmarks/spectra.py [--quick]`; OMP_NUM_THREADS sets the threads."""
import argparse
import math

import torch
from torch.nn.functional import pad

from laid_nb.spectra import distance_response
from measure import peak_bytes, seconds, table, write


def skewed(q, k, rows=256):
    """One head, [tokens, dims]: query rows in blocks against all keys before them (causal half only), diagonals summed
    in a skewed view of each block of logits."""
    tokens, out = len(q), q.new_zeros(len(q))
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        n = stop - start
        logits = q.new_empty(n, stop + n)
        logits[:, stop:] = 0
        torch.mm(q[start:stop], k[:stop].flip(0).T, out=logits[:, :stop])
        later = torch.ones(n, n, dtype=torch.bool).triu(1).flip(1)  # keys after their query
        logits[:, :n].masked_fill_(later, 0)
        out[:stop] += logits.as_strided((n, stop), (stop + n - 1, 1), n - 1).sum(0)
    return out/torch.arange(tokens, 0, -1)/math.sqrt(q.shape[1])


def blocked(q, k, block=128):
    """One head, [tokens, dims]: for each offset between blocks of tokens one matrix product over all pairs of blocks
    and all dimensions; diagonals are summed once an offset."""
    (tokens, dims), n = q.shape, -(-len(q)//block)
    out = q.new_zeros((n + 1)*block)

    def rows(x):
        x = pad(x, (0, 0, 0, n*block - tokens)).view(n, block, dims)
        return x.transpose(0, 1).reshape(block, n*dims)
    q, k = rows(q), rows(k)
    for offset in range(n):
        products = q[:, offset*dims:] @ k[:, :(n - offset)*dims].T
        skewed_view = pad(products.flip(1), (0, block)).flatten()[:-block].view(block, -1)
        out[offset*block:(offset + 2)*block - 1] += skewed_view.sum(0)
    return out[block - 1:block - 1 + tokens]/torch.arange(tokens, 0, -1)/math.sqrt(dims)


def by_head(one, q, k):
    "All heads of a batch of one."
    heads, kv_heads = q.shape[1], k.shape[1]
    return torch.stack([one(q[0, h].contiguous(), k[0, h*kv_heads//heads].contiguous()) for h in range(heads)])


def textbook(q, k):
    "The plain FFT: float64, zeros appended, every head by itself."
    transform = lambda x: torch.fft.rfft(x.double().mT, 2*x.shape[0])

    def one(q, k):
        sums = torch.fft.irfft((transform(q)*transform(k).conj()).sum(0), 2*len(q))[:len(q)]
        return sums/torch.arange(len(q), 0, -1)/math.sqrt(q.shape[1])
    return by_head(one, q, k)


def run(heads, kv_heads, dims, tokens):
    "A row: one shape of queries and keys."
    q, k = (torch.randn(1, tokens, h, dims).transpose(1, 2) for h in (heads, kv_heads))  # laid out as captured
    truth = distance_response(q.double(), k.double())
    methods = {
        "fft": lambda: distance_response(q, k),
        "blocked": lambda: by_head(blocked, q, k),
        "skewed": lambda: by_head(skewed, q, k),
        "textbook fft": lambda: textbook(q, k),
    }
    error = {name: ((call() - truth).abs().max()/truth.abs().max()).item() for name, call in methods.items()}
    assert max(error.values()) < 1e-5, error
    time = seconds(methods, repeat=3 if tokens > 4096 else 7)
    memory = {name: peak_bytes(methods[name])/2**20 for name in ("fft", "blocked", "skewed")}
    return dict(
        heads=heads, kv_heads=kv_heads, head_dim=dims, tokens=tokens, fft_s=time["fft"],
        blocked_over_fft=time["blocked"]/time["fft"], skewed_over_fft=time["skewed"]/time["fft"],
        textbook_over_fft=time["textbook fft"]/time["fft"], fft_error=error["fft"],
        fft_MiB=memory["fft"], blocked_MiB=memory["blocked"], skewed_MiB=memory["skewed"],
        input_MiB=(q.numel() + k.numel())*4/2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens only, nothing written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    results = []
    for heads, kv_heads, dims in ((8, 2, 64), (8, 2, 128), (8, 8, 64)):
        for tokens in (1024,) if quick else (1024, 4096, 16_384):
            results.append(run(heads, kv_heads, dims, tokens))
            print(table(results[-1:]), flush=True)
    print(table(results))
    if quick: return
    what = ("time of a direct sum over time of distance_response, float32, all distances, batch 1; "
            "error = largest difference to float64 over the largest response")
    write("bench_spectra", results, threads=torch.get_num_threads(), what=what)


if __name__ == "__main__":
    main()
