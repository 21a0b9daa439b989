"""Open question 2: can a head's spectral leakage be predicted from head_dim, depth, width and rope_theta?
`python experiments/leakage.py [--quick] [--models name ...]`

A grid of small Qwen2 models is trained alike, from scratch, to recall: an item is the sum of a key's and a value's
embedding, a question is a key alone, the answer its value; tokens stand at random positions.
Every finished model is kept in WORK/leakage, so that a run that was stopped goes on."""
import argparse
import itertools
import json
import math
import time

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
from features import DISTILLED, embed, load_all, read
from laid_nb.capture import capture
from laid_nb.rope import leakage, rope_series, rope_spec
from laid_nb.spectra import distance_response

FACTORS = ("head_dim", "depth", "width", "theta")
CENTRE = dict(head_dim=32, depth=3, width=128, theta=1e4)
KEYS, VALUES = 96, 16  # symbols
SPAN, WINDOW = 512, 384  # positions of a sequence; distances (in positions) in which leakage is measured
SHORT, LONG = 32, 96  # items of a training sequence; items of a long one, at positions of the same range
STEPS, ROWS = 150, 112  # steps of each training; sequences looked at, twice
TASK = dict(keys=KEYS, values=VALUES, span=SPAN, window=WINDOW, short=SHORT, long=LONG)


def grid():
    """The centre, one factor at a time, and the eight corners of a half fraction (head_dim, depth and width free, theta
    their product)."""
    ends = dict(head_dim=(16, 64), depth=(2, 4), width=(64, 256), theta=(1e6,))
    def corner(a, b, c):
        return dict(head_dim=(16, 64)[a], depth=(2, 4)[b], width=(64, 256)[c], theta=(1e4, 1e6)[(a + b + c)%2])
    corners = [corner(*bits) for bits in itertools.product((0, 1), repeat=3)]
    return [CENTRE] + [CENTRE | {factor: value} for factor, values in ends.items() for value in values] + corners


def sequences(rng, rows, items):
    """Recall sequences of `items` items and as many questions, each after the item it asks about -> keys, values,
    whether a token is an item, positions; [rows, 2*items] each."""
    tokens = 2*items
    item = np.array([np.r_[True, rng.permutation(np.arange(tokens - 1) < items - 1)] for _ in range(rows)])
    seen = item.cumsum(1)
    which = np.where(item, seen - 1, (rng.random((rows, tokens))*seen).astype(int))  # a question: any item so far
    keys = np.array([rng.permutation(KEYS)[:items] for _ in range(rows)])
    values = rng.integers(VALUES, size=(rows, items))
    positions = np.array([np.sort(rng.permutation(SPAN)[:tokens]) for _ in range(rows)])
    keys, values = (np.take_along_axis(x, which, 1) for x in (keys, values))
    return [torch.from_numpy(x) for x in (keys, values, item, positions)]


def build(head_dim, depth, width, theta, seed):
    "A stock Qwen2 text model; one KV head for two query heads."
    torch.manual_seed(seed)
    heads = width//head_dim
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=KEYS + VALUES, hidden_size=width, intermediate_size=2*width, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=max(1, heads//2), head_dim=head_dim, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=theta), initializer_range=width**-.5))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= (2*depth)**.5
            layer.mlp.down_proj.weight /= (2*depth)**.5
    return model


def states(model, batch):
    """Last hidden states [rows, tokens, width]. With the mask: without one, transformers takes a jump in the positions
    for the start of another text."""
    keys, values, item, positions = batch
    table = model.model.embed_tokens
    embeds = table(keys) + table(values + KEYS)*item[..., None]
    mask = torch.ones_like(keys)
    output = model.model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False)
    return output.last_hidden_state


def answer(model, batch):
    "-> (cross-entropy of the values asked for, share that is right)."
    asked = ~batch[2]
    logits, values = model.lm_head(states(model, batch)[asked])[:, KEYS:], batch[1][asked]
    return F.cross_entropy(logits, values), (logits.argmax(-1) == values).float().mean()


def train(model, steps, seed, rows=16, rate=6e-3):
    "AdamW, the same sequences for all models of a seed."
    rng = np.random.default_rng([seed, 1])
    optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(.9, .98), weight_decay=.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate*min((step + 1)/20, max(.02, 1 - step/steps))
        loss, _ = answer(model, sequences(rng, rows, SHORT))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimiser.step()


def by_position(x, positions):
    """[rows, heads, tokens, dims] at [rows, tokens] positions -> [rows, heads, SPAN, dims], zeros where there is no
    token."""
    place = positions[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.new_zeros(len(x), x.shape[1], SPAN, x.shape[3]).scatter(2, place, x)


def responses(model, batch):
    "Response of every head by distance in positions, [layers, heads, WINDOW]."
    positions = batch[3]
    real = torch.zeros(len(positions), SPAN, dtype=torch.bool).scatter(1, positions, True)
    with torch.no_grad(), capture(model) as cache:
        states(model, batch)
    placed = [[by_position(cache[x, l], positions) for x in "qk"] for l in cache.layers]
    return torch.stack([distance_response(q, k, real, WINDOW - 1) for q, k in placed]).double()


def power(response):
    "Power of a response but for its constant, [...]."
    return response.var(-1, correction=0)


def leaks(halves, inv_freq):
    """Leakage by head, `[layers, heads]` lists, from two independent measurements of the response, [2, layers, heads,
    distances]; None where it cannot be told.
    `whole`: of their mean, as `rope.leakage` has it. `apart`: distance 0 left out, where every token meets itself: a
    spike, whose spectrum is flat. `clean`: also less what the noise of the words adds. Half of the difference of the
    two measurements has the noise of their mean and nothing else; its power, off the lines and in all, is taken away.
    """
    mean, noise = halves.mean(0)[..., 1:], (halves[0] - halves[1])[..., 1:]/2
    apart = leakage(mean, inv_freq)
    off, total = apart*power(mean) - leakage(noise, inv_freq)*power(noise), power(mean) - power(noise)
    clean = torch.where(total > .1*power(mean), (off/total).clamp(0, 1), torch.nan)
    found = dict(whole=leakage(halves.mean(0), inv_freq), apart=apart, clean=clean)
    short = lambda layer: [None if math.isnan(x) else round(x, 4) for x in layer]
    return {name: [short(layer) for layer in values.tolist()] for name, values in found.items()}


def levels(inv_freq, window, draws=256):
    """Leakage where nothing but chance is at work: `series`, constant queries and keys (RoPE lines of random amplitude
    and phase, cut by the window), and `flat`, noise (queries and keys drawn anew for every token)."""
    g = torch.Generator().manual_seed(0)
    weights = torch.complex(*torch.randn(2, draws, len(inv_freq), dtype=torch.float64, generator=g))
    series = rope_series(inv_freq, torch.arange(window), weights)
    flat = torch.randn(draws, window, dtype=torch.float64, generator=g)
    return dict(series=leakage(series, inv_freq).mean().item(), flat=leakage(flat, inv_freq).mean().item())


def look(model, seed, rows):
    "Accuracy, and leakage of every head, on short and on long sequences that no training saw."
    out, inv_freq = {}, rope_spec(model).inv_freq
    for name, items, n in (("short", SHORT, rows), ("long", LONG, rows//4)):
        halves = [sequences(np.random.default_rng([seed, 2, items, half]), n, items) for half in (0, 1)]
        with torch.no_grad():
            accuracy = np.mean([answer(model, b)[1].item() for b in halves])
        measured = torch.stack([responses(model, b) for b in halves])
        out[name] = dict(accuracy=float(accuracy), **leaks(measured, inv_freq))
    return out


def grid_point(config, seed, steps, rows, folder):
    "One model: looked at untrained, trained, looked at again. Read from the folder where it is done."
    path = folder/("-".join(f"{config[f]:g}" for f in FACTORS) + f"-{seed}-{steps}-{rows}.json")
    if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["task"] != TASK:
        start, model = time.process_time(), build(**config, seed=seed)
        untrained = look(model, seed, rows)
        train(model, steps, seed)
        point = config | dict(
            task=TASK, seed=seed, parameters=sum(p.numel() for p in model.parameters()), untrained=untrained,
            trained=look(model, seed, rows), levels=levels(rope_spec(model).inv_freq, WINDOW))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(point | dict(seconds=round(time.process_time() - start, 1))), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def mean(heads):
    "Over the heads of all layers that have a value."
    return float(np.nanmean(np.array([np.nan if x is None else x for layer in heads for x in layer], dtype=float)))


def fit(points, target):
    """Least squares of `target(point)` on log2 of head_dim, depth, width and log10 of theta, centred, with 95%
    intervals (t) and the error of prediction when one architecture, all its seeds, is left out."""
    points = [p for p in points if math.isfinite(target(p))]
    y = np.array([target(p) for p in points])
    row = lambda p: [1, *(math.log2(p[f]/CENTRE[f]) for f in FACTORS[:3]), math.log10(p["theta"]/CENTRE["theta"])]
    X = np.array([row(p) for p in points])
    solve = lambda rows: np.linalg.lstsq(X[rows], y[rows], rcond=None)[0]
    every = np.ones(len(y), dtype=bool)
    beta, free = solve(every), len(y) - X.shape[1]
    residual = y - X @ beta
    spread = np.sqrt(np.diag(np.linalg.inv(X.T @ X))*(residual @ residual)/free)*stats.t.ppf(.975, free)
    groups, by_model, by_mean = [tuple(p[f] for f in FACTORS) for p in points], np.empty(len(y)), np.empty(len(y))
    for group in set(groups):
        out = np.array([g == group for g in groups])
        by_model[out], by_mean[out] = X[out] @ solve(~out), y[~out].mean()
    error = lambda prediction: float(np.sqrt(np.mean((y - prediction)**2)))
    seeds = [np.ptp([v for v, g in zip(y, groups) if g == group]) for group in set(groups)]
    ends = {name: dict(estimate=float(b), low=float(b - s), high=float(b + s))
            for name, b, s in zip(("constant", *FACTORS), beta, spread)}
    return dict(n=len(points), coefficients=ends, r2=float(1 - residual @ residual/np.sum((y - y.mean())**2)),
                error_left_out=error(by_model), error_of_mean=error(by_mean),
                mean_difference_of_seeds=float(np.mean(seeds)))


def of(trained, length, form):
    "Leakage of a point, mean over its heads."
    return lambda p: mean(p[trained][length][form])


def excess(p):
    "Leakage of the whole response between that of RoPE lines (0) and that of noise (1)."
    lines, noise = (p["levels"][k] for k in ("series", "flat"))
    return (mean(p["trained"]["short"]["whole"]) - lines)/(noise - lines)


def conclude(points):
    """Regressions on the architecture; and whether a model that leaks more is right less often on long sequences (rank
    correlation)."""
    targets = {
        "whole response": of("trained", "short", "whole"),
        "without distance 0": of("trained", "short", "apart"),
        "and without noise": of("trained", "short", "clean"),
        "the same, long sequences": of("trained", "long", "clean"),
        "whole response, between chance levels": excess,
        "level of RoPE lines": lambda p: p["levels"]["series"],
        "level of noise": lambda p: p["levels"]["flat"],
        "untrained": of("untrained", "short", "apart"),
        "right on long sequences": lambda p: p["trained"]["long"]["accuracy"]}
    with_accuracy = {}
    for name in ("whole response", "without distance 0", "and without noise"):
        pairs = [(targets[name](p), p["trained"]["long"]["accuracy"]) for p in points]
        pairs = [(leak, right) for leak, right in pairs if math.isfinite(leak)]
        rank = stats.spearmanr(*zip(*pairs))
        with_accuracy[name] = dict(rho=float(rank.statistic), p=float(rank.pvalue), n=len(pairs))
    return dict(fits={name: fit(points, target) for name, target in targets.items()}, with_long_accuracy=with_accuracy)


@torch.no_grad()
def two_responses(model, processor, size, stacks, window):
    "Two independent measurements of the response of every head, [2, layers, heads, window]."
    halves = [[], []]
    for i, haystack in enumerate(common.tests((size,), 12*stacks, "val", 5)):
        with capture(model) as cache:
            read(model, processor, embed(model, processor, haystack)[None])
        heads = [distance_response(cache["q", l], cache["k", l], max_distance=window - 1) for l in cache.layers]
        halves[i%2].append(torch.stack(heads).double())
    return torch.stack([torch.stack(h).mean(0) for h in halves])


def shipped(models, sizes, stacks):
    """The embedded pair, and students distilled, on haystacks of pictures: leakage of every head by number of images;
    distances in tokens, an image being 6 tokens and 4 positions. `pictures`: at distances of whole images only, so that
    what repeats with every image, delimiters and the places in it, is left out."""
    rows = []
    for (name, (model, processor)), size in itertools.product(models.items(), sizes):
        inv_freq, window = rope_spec(model).inv_freq*4/6, int(6*size*.75)
        by_image = ((6*inv_freq + math.pi)%(2*math.pi) - math.pi).abs()  # as seen at every sixth distance
        halves = two_responses(model, processor, size, stacks, window)
        row = dict(model=name, images=size, window=window, **leaks(halves, inv_freq), **levels(inv_freq, window),
                   pictures=leaks(halves[..., ::6], by_image)["clean"],
                   pictures_levels=levels(by_image, len(range(0, window, 6))))
        told = ", ".join(f"{form} {mean(row[form]):.2f}" for form in ("whole", "apart", "clean", "pictures"))
        common.log(f"{name}, {size} images: leakage {told}; lines alone {row['series']:.2f}, "
                   f"noise alone {row['flat']:.2f}; between whole images {row['pictures_levels']}")
        rows.append(row)
    return rows


def tell(p):
    "A line for the log: a point of the grid."
    trained, levels = p["trained"], p["levels"]
    common.log(
        " ".join(f"{f} {p[f]:g}" for f in FACTORS),
        f"seed {p['seed']}: right {trained['short']['accuracy']:.2f}, long {trained['long']['accuracy']:.2f};",
        f"leakage {mean(p['untrained']['short']['apart']):.2f} untrained,",
        f"{mean(trained['short']['clean']):.2f} trained (with distance 0 {mean(trained['short']['whole']):.2f};",
        f"lines alone {levels['series']:.2f},",
        f"noise {levels['flat']:.2f}); {p['seconds']} s")


def tell_result(result):
    "Lines for the log: the regressions and rank correlations."
    for name, f in result["fits"].items():
        terms = ", ".join(f"{k} {v['estimate']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"
                          for k, v in f["coefficients"].items())
        common.log(f"{name}: R2 {f['r2']:.2f}, error left out {f['error_left_out']:.3f}, "
                   f"of the mean {f['error_of_mean']:.3f}; {terms}")
    for name, c in result["with_long_accuracy"].items():
        common.log(f"{name} with long accuracy: rho {c['rho']:+.2f}, p {c['p']:.3f}, n {c['n']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three small models of a few steps, nothing written")
    parser.add_argument("--models", nargs="*", default=DISTILLED, metavar="NAME[=FOLDER]",
                        help="trained students to look at, beside the embedded pair")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of each architecture (default 2)")
    args = parser.parse_args()
    start, folder, points = time.time(), common.WORK/"leakage", []
    configs, seeds, size = grid(), range(args.seeds), (STEPS, ROWS)
    named, sizes, stacks = args.models, (20, 50, 100, 150, 300), 8
    if args.quick:
        configs, seeds, size = [c for c in configs if c["width"] == 64][:3], range(1), (3, 16)
        named, sizes, stacks = [], (20,), 2
    for seed, config in itertools.product(seeds, configs):
        points.append(grid_point(config, seed, *size, folder))
        tell(points[-1])
    pair = shipped(load_all(named), sizes, stacks)
    if args.quick: return
    result = conclude(points)
    tell_result(result)
    kept = [{k: v for k, v in p.items() if k != "task"} for p in points]
    common.write("leakage", dict(
        task=TASK | dict(steps=STEPS, sequences=ROWS), points=kept, pair=pair, **result,
        seconds_of_grid=sum(p["seconds"] for p in points)), start)


if __name__ == "__main__":
    main()
