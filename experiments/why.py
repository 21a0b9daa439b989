"""Why does a window end: is the needle too far, or one of too many?

The same questions about the same pictures, read with the number of images and their positions set apart: `count` images laid out over the
positions that `span` images take. A cell with count = span is a haystack as it is. Writes data/results/why.json."""
import argparse
import time

import numpy as np
import torch
from torch.nn.functional import one_hot

from asking import MODELS, PAIR, entropy, few, prompts, read, row_weights
from common import QUESTIONS, load, log, tests, write
from laid_nb.accuracy import interval, redraws, wilson
from laid_nb.evaluate import ask

SIZES = [20, 50, 100, 150]
FEW, MANY = SIZES[0], SIZES[-1]


def cells() -> dict:  # name -> (images there, images whose positions are taken, how these are laid out, times a distractor counts)
    "What is read of every haystack."
    even = {f"{count} over {span}": (count, span, "even", 1.) for count in SIZES for span in SIZES}
    other = {f"{FEW} shifted by {MANY - FEW}": (FEW, MANY, "shifted", 1.), f"{FEW} left of {MANY}": (FEW, MANY, "left", 1.)}
    counted = {f"{FEW} counted as {size} over {span}": (FEW, span, "even", (size - 1)/(FEW - 1)) for size in SIZES[1:] for span in (FEW, size)}
    return even | other | counted


def layout(
    kept: torch.Tensor,  # [images] which of the haystack's images are there
    images: int,  # of the haystack
    span: int,  # images whose positions are taken
    how: str,  # "even": spread evenly, whole images; "shifted": all at the front, side by side; "left": where they stand in the haystack
    step: int,  # positions an image takes
) -> tuple:  # (starts [images], end)
    "M-RoPE positions at which images and question begin, from the first image's place on."
    begin = {"even": torch.arange(len(kept))*span*step//len(kept), "shifted": torch.arange(len(kept))*step, "left": kept*span*step//images}
    return begin[how], span*step


def look(
    reading,
) -> dict:  # [questions] or [layers, heads, questions]
    "What the row of the anchor's word gives to the needle, and how spread out it and the row of the answer are."
    weights, bias = row_weights(reading, reading.anchors)
    per_image = weights @ one_hot(reading.image + 1).double()[:, 1:]  # [layers, heads, questions, images]
    mass = per_image.gather(-1, reading.needles.expand(*per_image.shape[:2], -1)[..., None])[..., 0]
    other = (per_image.sum(-1) - mass)/(per_image.shape[-1] - 1)  # a mean distractor, however often it counts
    distance = reading.positions[0, reading.anchors] - torch.stack([reading.positions[0, reading.image == i].amin() for i in reading.needles])
    times = bias.clamp(min=0).amax().exp()
    return dict(right=(reading.margin > 0).float() + .5*(reading.margin == 0), margin=reading.margin, distance=distance.float(), mass=mass, edge=mass.log() - (other/times).log(),
                looking=entropy(weights, bias), answering=entropy(*row_weights(reading, reading.last)))


def measure(
    model,
    processor,
    asked: list,  # of the haystacks
) -> dict:  # cell -> quantity -> [..., questions of all haystacks]
    "Every cell of every haystack."
    found = {name: [] for name in cells()}
    for p in asked:
        for name, (count, span, how, times) in cells().items():
            kept = few(p, count)
            found[name].append(look(read(model, processor, p, kept, *layout(kept, len(p.features), span, how, p.step), times)))
    return {name: {k: torch.cat([f[k] for f in each], -1) for k in each[0]} for name, each in found.items()}


def compare(
    right: dict,  # cell -> [questions], 12 to a haystack
    formulas: dict,  # name -> {cell: factor}
) -> dict:  # name -> {"value", "interval"}
    "Sums of accuracies with 95% bootstrap intervals; haystacks are redrawn, the same ones in every cell."
    drawn = {cell: redraws(x[None], np.arange(len(x))//12) for cell, x in right.items()}
    total = lambda of, terms: sum(factor*of[cell] for cell, factor in terms.items())
    means = {cell: x.mean().item() for cell, x in right.items()}
    return {name: dict(value=round(total(means, terms), 4), interval=[round(x, 4) for x in interval(total(drawn, terms))]) for name, terms in formulas.items()}


def formulas() -> dict:
    "What the fall from few to many images is made of, and how far counting distractors several times foretells it."
    a, b, c, d = f"{FEW} over {FEW}", f"{FEW} over {MANY}", f"{MANY} over {FEW}", f"{MANY} over {MANY}"
    parts = dict(fall={a: 1, d: -1}, position={a: .5, b: -.5, c: .5, d: -.5}, count={a: .5, c: -.5, b: .5, d: -.5},
                 position_of_few={a: 1, b: -1}, position_of_many={c: 1, d: -1}, count_near={a: 1, c: -1}, count_far={b: 1, d: -1},
                 shifted={a: 1, f"{FEW} shifted by {MANY - FEW}": -1}, left={d: -1, f"{FEW} left of {MANY}": 1})
    for size in SIZES[1:]:
        parts |= {f"foretold {size} near": {f"{FEW} counted as {size} over {FEW}": 1, f"{size} over {FEW}": -1}, f"foretold {size}": {f"{FEW} counted as {size} over {size}": 1, f"{size} over {size}": -1}}
    return parts


def by_depth(
    cell: dict,  # quantity -> [..., questions]
    head: tuple,  # the retrieving one
    bins: int = 5,
) -> dict:  # quantity -> [bins]
    "Accuracy and attention on the needle by its distance, in bins of equally many questions, nearest first."
    order = cell["distance"].argsort(stable=True).tensor_split(bins)
    return {name: [round(x[i].mean().item(), 4) for i in order] for name, x in (("distance", cell["distance"]), ("accuracy", cell["right"]), ("mass", cell["mass"][head]))}


def summary(
    found: dict,  # from `measure`
) -> dict:  # what json can write
    "Means over questions."
    mass = found[f"{FEW} over {FEW}"]["mass"].mean(-1)
    head = divmod(mass.argmax().item(), mass.shape[1])  # layer and head that retrieve
    short = lambda x: [round(v, 4) for v in x.flatten().tolist()]
    table = {}
    for name, cell in found.items():
        correct, total = cell["right"].sum().item(), cell["right"].numel()
        table[name] = dict(correct=correct, total=total, wilson=[round(float(x), 4) for x in wilson(correct, total)], margin=round(cell["margin"].mean().item(), 3),
                           mass=round(cell["mass"][head].mean().item(), 4), mass_all=round(cell["mass"].mean().item(), 4), edge=round(cell["edge"][head].mean().item(), 3),
                           looking=round(cell["looking"][head].mean().item(), 4), answering=short(cell["answering"].mean(-1)), looking_all=short(cell["looking"].mean(-1)))
    deep = {name: by_depth(found[name], head) for name in (f"{a} over {b}" for a in (FEW, MANY) for b in (FEW, MANY))}
    return dict(head=head, layers_heads=list(mass.shape), cells=table, parts=compare({name: cell["right"].numpy() for name, cell in found.items()}, formulas()), depth=deep)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME[=FOLDER]", help="teacher, student, rows of reproduce.json, or names of your own for folders (default: the pair and all trained rows; with --quick the pair)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help=f"in each cell, 12 to a haystack (default {QUESTIONS})")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="12 questions, nothing is written")
    args, start, models, made = parser.parse_args(), time.time(), {}, {}
    haystacks = tests((MANY,), 12 if args.quick else args.questions, args.split, args.seed)
    for item in args.models or (PAIR if args.quick else MODELS):
        name, _, folder = item.partition("=")
        model, processor = load(folder or name)
        found = measure(model, processor, prompts(model, processor, haystacks, made))
        scores, _ = ask(model, processor, haystacks[0])
        margin = (scores[:, 0] - scores[:, 1])*torch.tensor([1. if q.answer else -1. for q in haystacks[0].questions])
        apart = (margin - found[f"{MANY} over {MANY}"]["margin"][:len(margin)]).abs().max().item()
        models[name] = summary(found) | dict(apart_from_ask=apart)
        part = models[name]["parts"]
        log(f"{name}: from {FEW} to {MANY} images {-part['fall']['value']:+.3f}, by position {-part['position']['value']:+.3f}, by count {-part['count']['value']:+.3f} ({time.time() - start:.0f} s)")
    if not args.quick: write("why", dict(seed=args.seed, split=args.split, sizes=SIZES, haystacks=len(haystacks), questions=12*len(haystacks), models=models), start)


if __name__ == "__main__": main()
