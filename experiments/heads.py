"""What the heads do before and after training: attention on the needle by haystack size (the paper's Figure 4),
response by distance, leakage, near and far.

Drawn haystacks of each size, every question asked alone. Writes data/results/heads.json."""
import time

import torch

from asking import given_models, model_arguments, prompts, read
from common import log, tests, write
from laid_nb.align import needle_attention
from laid_nb.rope import leakage, rope_spec
from laid_nb.spectra import HeadStats, in_bins, key_activation, local_global, log_edges

SIZES = (1, 5, 20, 50, 100, 150)
LONG = [n for n in SIZES if n >= 20]  # where distance is looked at
NEAR, FAR = 16, 128  # tokens: local is nearer, global from there on
WINDOW = 128  # distances, in tokens, whose leakage is taken: as many as 20 images have
SLOW = 300  # positions: a slow band takes more for a turn


def on_needle(
    reading,
) -> torch.Tensor:  # [2, layers, heads, questions]: key activation, and the mean over the question's rows
    "Attention on the needle (its image with both delimiters) from the rows of each question, by head."
    cache, found = reading.cache, []
    for n, image in enumerate(reading.needles):
        sees = ((reading.turn < 0) | (reading.turn == n)).nonzero()[:, 0]
        needle, rows = (reading.image[sees] == image)[None], (reading.turn[sees] == n)[None]
        qk = [(cache["q", l][:, :, sees], cache["k", l][:, :, sees], cache.scaling[l]) for l in cache.layers]
        largest = torch.stack([key_activation(q, k, needle, rows, scaling=s)[0] for q, k, s in qk])
        mean = torch.stack([needle_attention(q, k, rows, needle, None, s) for q, k, s in qk])
        found.append(torch.stack([largest, mean]))
    return torch.stack(found, -1)


def by_distance(
    stats: list,  # a HeadStats a layer
    spec,  # RopeSpec of the model
    per_token: float,  # positions a token, on average
) -> dict:  # quantity -> [layers, heads]
    "What the responses, the keys and the attention of each head are like."
    response, attention = torch.stack([s.response for s in stats]), [s.attention for s in stats]
    near, far = local_global(torch.stack([a.mass for a in attention]), NEAR, FAR)
    leak = leakage(response[..., :WINDOW].double(), spec.inv_freq*per_token)
    slow = torch.stack([s.energy("k", True) for s in stats])[..., spec.wavelength > SLOW].sum(-1)
    sink, entropy = (torch.stack([getattr(a, what) for a in attention]) for what in ("sink", "entropy"))
    return {"local": near, "global": far} | dict(
        sink=sink, entropy=entropy, leakage=leak, spread=response.std(-1), slow_keys=slow)


def measure_size(
    model,
    processor,
    asked: list,  # prompts of one size
    stats: list,  # a HeadStats a layer, updated where distance is looked at
) -> torch.Tensor:  # [2, layers, heads] means over questions, of `on_needle`
    "What the heads give to the needle; what they are like by distance goes into `stats`."
    needle, size = [], len(asked[0].features)
    for p in asked:
        reading = read(model, processor, p, torch.arange(size), torch.arange(size)*p.step, size*p.step)
        needle.append(on_needle(reading))
        if size not in LONG: continue
        first = (reading.turn <= 0).nonzero()[:, 0]  # the prompt of the first question
        for l, s in enumerate(stats):
            q, k = reading.cache["q", l][:, :, first], reading.cache["k", l][:, :, first]
            s.update(q, k, scaling=reading.cache.scaling[l])
    return torch.cat(needle, -1).mean(-1)


def measure(
    model,
    processor,
    asked: list,  # from `prompts`
) -> dict:  # what json can write
    "All quantities by size: means over questions; [layers][heads] in each."
    spec, layers = rope_spec(model), model.config.text_config.num_hidden_layers
    short = lambda x: [[round(v, 4) for v in row] for row in x.tolist()]
    found = {"activation": {}, "needle_mean": {}}
    for size in SIZES:
        of_size, stats = [p for p in asked if len(p.features) == size], [HeadStats(spec) for _ in range(layers)]
        for name, x in zip(("activation", "needle_mean"), measure_size(model, processor, of_size, stats)):
            found[name][size] = short(x)
        if size in LONG:
            per_token = of_size[0].step*size/(of_size[0].image >= 0).sum().item()
            for name, x in by_distance(stats, spec, per_token).items():
                found.setdefault(name, {})[size] = short(x)
    response = torch.stack([s.response for s in stats])  # of the largest size
    edges = log_edges(response.shape[-1], 2)
    mean = [short(in_bins(x, edges)/edges.diff()) for x in response]
    return found | dict(response=dict(edges=edges.tolist(), mean=mean))


def main():
    args, start, models, made = model_arguments(__doc__, 240, seed=6).parse_args(), time.time(), {}, {}
    haystacks = tests(SIZES, 12 if args.quick else args.questions, args.split, args.seed)
    for name, model, processor in given_models(args):
        models[name] = measure(model, processor, prompts(model, processor, haystacks, made))
        best = [round(torch.tensor(models[name]["activation"][n]).max().item(), 2) for n in SIZES]
        log(f"{name}: key activation of the best head at {SIZES} images {best} ({time.time() - start:.0f} s)")
    if not args.quick:
        write("heads", dict(
            seed=args.seed, split=args.split, sizes=SIZES, questions=args.questions, near=NEAR, far=FAR, window=WINDOW,
            slow=SLOW, models=models), start)


if __name__ == "__main__":
    main()
