"""Why does a window end: is the needle too far, or one of too many?

The same questions about the same pictures, read with the number of images and their positions set apart: `count` images
laid out over the positions that `span` images take. A cell with count = span is a haystack as it is. Writes
data/results/why.json."""
import time

import numpy as np
import torch
from torch.nn.functional import one_hot

from asking import entropy, few, given_models, model_arguments, prompts, read, row_weights
from common import QUESTIONS, log, tests, write
from laid_nb.accuracy import Answers, interval, redraws, wilson
from laid_nb.evaluate import ask

SIZES = [20, 50, 100, 150]
FEW, MANY = SIZES[0], SIZES[-1]


def cells() -> dict:
    "What is read: name -> (images there, images whose positions are taken, how laid out, times a distractor counts)."
    even = {f"{count} over {span}": (count, span, "even", 1.) for count in SIZES for span in SIZES}
    other = {f"{FEW} shifted by {MANY - FEW}": (FEW, MANY, "shifted", 1.),
             f"{FEW} left of {MANY}": (FEW, MANY, "left", 1.)}
    counted = {f"{FEW} counted as {size} over {span}": (FEW, span, "even", (size - 1)/(FEW - 1))
               for size in SIZES[1:] for span in (FEW, size)}
    return even | other | counted


def layout(
    kept: torch.Tensor,  # [images] which of the haystack's images are there
    images: int,  # of the haystack
    span: int,  # images whose positions are taken
    how: str,  # "even": spread evenly; "shifted": at the front, side by side; "left": where they are in the haystack
    step: int,  # positions an image takes
) -> tuple:  # (starts [images], end)
    "M-RoPE positions at which images and question begin, from the first image's place on."
    begin = {"even": torch.arange(len(kept))*span*step//len(kept), "shifted": torch.arange(len(kept))*step,
             "left": kept*span*step//images}
    return begin[how], span*step


def look(
    reading,
) -> dict:  # [questions] or [layers, heads, questions]
    "What the row of the anchor's word gives to the needle, and how spread out it and the row of the answer are."
    weights, bias = row_weights(reading, reading.anchors)
    per_image = weights @ one_hot(reading.image + 1).double()[:, 1:]  # [layers, heads, questions, images]
    mass = per_image.gather(-1, reading.needles.expand(*per_image.shape[:2], -1)[..., None])[..., 0]
    other = (per_image.sum(-1) - mass)/(per_image.shape[-1] - 1)  # a mean distractor, however often it counts
    place = reading.positions[0]
    distance = place[reading.anchors] - torch.stack([place[reading.image == i].amin() for i in reading.needles])
    times = bias.clamp(min=0).amax().exp()
    return dict(
        right=(reading.margin > 0).float() + .5*(reading.margin == 0), margin=reading.margin,
        distance=distance.float(), mass=mass, edge=mass.log() - (other/times).log(), looking=entropy(weights, bias),
        answering=entropy(*row_weights(reading, reading.last)))


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
            place = layout(kept, len(p.features), span, how, p.step)
            found[name].append(look(read(model, processor, p, kept, *place, times)))
    return {name: {k: torch.cat([f[k] for f in each], -1) for k in each[0]} for name, each in found.items()}


def compare(
    right: dict,  # cell -> [questions], 12 to a haystack
    formulas: dict,  # name -> {cell: factor}
) -> dict:  # name -> {"value", "interval"}
    "Sums of accuracies with 95% bootstrap intervals; haystacks are redrawn, the same ones in every cell."
    drawn, means = {cell: redrawn(x) for cell, x in right.items()}, {cell: x.mean().item() for cell, x in right.items()}
    total = lambda of, terms: sum(factor*of[cell] for cell, factor in terms.items())
    def said(terms):
        return dict(value=round(total(means, terms), 4), interval=[round(x, 4) for x in interval(total(drawn, terms))])
    return {name: said(terms) for name, terms in formulas.items()}


def redrawn(
    right: np.ndarray,  # [questions] 1, 0, or a half for a tie; 12 to a haystack
) -> np.ndarray:  # [samples] accuracy on each redraw
    "The same haystacks are drawn in every cell, as if all of them were haystacks of one size."
    sums = np.add.reduceat(right, np.arange(0, len(right), 12))
    asked = np.diff(np.r_[np.arange(0, len(right), 12), len(right)])
    return redraws(Answers(np.array([0]), [sums[None]], [asked]))[:, 0]


def formulas() -> dict:
    "What the fall from few to many images is made of, and how far counting distractors several times foretells it."
    a, b, c, d = f"{FEW} over {FEW}", f"{FEW} over {MANY}", f"{MANY} over {FEW}", f"{MANY} over {MANY}"
    parts = dict(
        fall={a: 1, d: -1}, position={a: .5, b: -.5, c: .5, d: -.5}, count={a: .5, c: -.5, b: .5, d: -.5},
        position_of_few={a: 1, b: -1}, position_of_many={c: 1, d: -1},
        count_near={a: 1, c: -1}, count_far={b: 1, d: -1},
        shifted={a: 1, f"{FEW} shifted by {MANY - FEW}": -1}, left={d: -1, f"{FEW} left of {MANY}": 1})
    def foretold(size, span): return {f"{FEW} counted as {size} over {span}": 1, f"{size} over {span}": -1}
    for size in SIZES[1:]:
        parts |= {f"foretold {size} near": foretold(size, FEW), f"foretold {size}": foretold(size, size)}
    return parts


def by_depth(
    cell: dict,  # quantity -> [..., questions]
    head: tuple,  # the retrieving one
    bins: int = 5,
) -> dict:  # quantity -> [bins]
    "Accuracy and attention on the needle by its distance, in bins of equally many questions, nearest first."
    order = cell["distance"].argsort(stable=True).tensor_split(bins)
    shown = dict(distance=cell["distance"], accuracy=cell["right"], mass=cell["mass"][head])
    return {name: [round(x[i].mean().item(), 4) for i in order] for name, x in shown.items()}


def of_cell(
    cell: dict,  # quantity -> [..., questions]
    head: tuple,  # the retrieving one
) -> dict:  # what json can write
    "Means over questions."
    correct, total = cell["right"].sum().item(), cell["right"].numel()
    mean = lambda x, digits=4: round(x.mean().item(), digits)
    short = lambda x: [round(v, 4) for v in x.mean(-1).flatten().tolist()]
    return dict(
        correct=correct, total=total, wilson=[round(float(x), 4) for x in wilson_of(correct, total)],
        margin=mean(cell["margin"], 3), mass=mean(cell["mass"][head]), mass_all=mean(cell["mass"]),
        edge=mean(cell["edge"][head], 3), looking=mean(cell["looking"][head]), answering=short(cell["answering"]),
        looking_all=short(cell["looking"]))


def wilson_of(
    correct: float,  # right answers; a tie is a half
    total: int,
) -> tuple[float, float]:
    "Wilson's interval, halves rounded to whole numbers."
    return wilson(round(correct), total)


def summary(
    found: dict,  # from `measure`
) -> dict:  # what json can write
    "Means over questions."
    mass = found[f"{FEW} over {FEW}"]["mass"].mean(-1)
    head = divmod(mass.argmax().item(), mass.shape[1])  # layer and head that retrieve
    ends = [f"{a} over {b}" for a in (FEW, MANY) for b in (FEW, MANY)]
    right = {name: cell["right"].numpy() for name, cell in found.items()}
    return dict(
        head=head, layers_heads=list(mass.shape), cells={name: of_cell(cell, head) for name, cell in found.items()},
        parts=compare(right, formulas()), depth={name: by_depth(found[name], head) for name in ends})


def apart_from_ask(model, processor, haystack, margin) -> float:
    "Largest difference between these margins and those of `ask`, for a haystack as it is."
    scores, _ = ask(model, processor, haystack)
    right = torch.tensor([1. if q.answer else -1. for q in haystack.questions])
    return ((scores[:, 0] - scores[:, 1])*right - margin[:len(right)]).abs().max().item()


def main():
    parser = model_arguments(__doc__, QUESTIONS, seed=5, of="in each cell, 12 to a haystack")
    args, start, models, made = parser.parse_args(), time.time(), {}, {}
    haystacks = tests((MANY,), 12 if args.quick else args.questions, args.split, args.seed)
    for name, model, processor in given_models(args):
        found = measure(model, processor, prompts(model, processor, haystacks, made))
        apart = apart_from_ask(model, processor, haystacks[0], found[f"{MANY} over {MANY}"]["margin"])
        models[name] = summary(found) | dict(apart_from_ask=apart)
        fall, position, count = (-models[name]["parts"][k]["value"] for k in ("fall", "position", "count"))
        log(f"{name}: from {FEW} to {MANY} images {fall:+.3f}, by position {position:+.3f}, by count {count:+.3f} "
            f"({time.time() - start:.0f} s)")
    if not args.quick:
        write("why", dict(
            seed=args.seed, split=args.split, sizes=SIZES, haystacks=len(haystacks), questions=12*len(haystacks),
            models=models), start)


if __name__ == "__main__":
    main()
