"""What ends the window of a real student: haystacks of text whose number of items and positions are set apart, sharper
logits, where each head looks, and what the inspector shows of them. Reads the models that `laid real` made; writes
data/results/real.json and data/spectra/heads-real-*. What was read is kept in the folder's `why`, and not read again.

  laid real --out laid-real --seeds 0
  python experiments/real.py laid-real
"""
import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import one_hot

from asking import few, row_weights
from common import log, write
from laid_nb.accuracy import Answers, interval, redraws
from laid_nb.capture import Cache, capture
from laid_nb.inputs import prompt_inputs, question_ids
from laid_nb.inspector import read_heads
from laid_nb.real import ROWS, light, listed_test, load_text, made_folder
from laid_nb.store import data_path, read_json, write_json

SIZES = (20, 50, 100)
SHARPER = (1.25, 1.5)
INSPECTED = ("student", "self-anchored")


class Prompt(NamedTuple):
    "A haystack and its questions as one row of tokens: items, then question after question."
    ids: torch.Tensor  # [tokens]
    image: torch.Tensor  # [tokens] the item a token belongs to, -1 = question
    turn: torch.Tensor  # [tokens] the question a token belongs to, -1 = items
    needles: torch.Tensor  # [questions] the item that a question asks about
    last: torch.Tensor  # [questions] the token that predicts the answer
    choices: torch.Tensor  # [questions, choices] first tokens, the right one first
    features: torch.Tensor  # [items] their order, for `few`


def prompt(tokenizer, haystack) -> Prompt:
    "Each question as `laid_nb.evaluate.ask` would put it."
    inputs, asked = prompt_inputs(tokenizer, haystack, 0), range(len(haystack.questions))
    shown = int(inputs["prefix"])
    tails = [torch.tensor(question_ids(tokenizer, haystack, t)) for t in asked]
    turn = torch.cat([torch.full((shown,), -1), *(torch.full((len(t),), n) for n, t in enumerate(tails))])
    image = torch.cat([inputs["image"][0, :shown], torch.full((len(turn) - shown,), -1)])
    first = lambda name: tokenizer(f" {name}", add_special_tokens=False).input_ids[0]
    choices = [[first(q.answer), *(first(c) for c in q.choices if c != q.answer)] for q in haystack.questions]
    needles = torch.tensor([q.needles[0] for q in haystack.questions])
    last = torch.tensor([int((turn == t).nonzero()[-1]) for t in asked])
    return Prompt(torch.cat([inputs["input_ids"][0, :shown], *tails]), image, turn, needles, last,
                  torch.tensor(choices), torch.arange(len(haystack.images)))


class Reading(NamedTuple):
    "What a model made of a prompt."
    scores: torch.Tensor  # [questions, choices] logits, the right choice first
    cache: Cache  # queries and keys of all layers
    bias: torch.Tensor  # [tokens, tokens]: -inf between questions
    image: torch.Tensor  # [tokens] the item a token belongs to, counted among those kept
    needles: torch.Tensor  # [questions], counted among the items kept
    last: torch.Tensor  # [questions]


def positions(image, turn, stretch: float) -> torch.Tensor:  # [tokens]
    "Each item whole, but begun at `stretch` times its place; every question begins behind the last item."
    place, spread = torch.arange(len(image)), lambda start: int(round(start*stretch))
    found = torch.empty_like(place)
    for i in range(int(image.max()) + 1):
        own = image == i
        found[own] = place[own] - place[own][0] + spread(int(place[own][0]))
    end = spread(int((turn < 0).sum()))
    for t in range(int(turn.max()) + 1):
        own = turn == t
        found[own] = end + torch.arange(int(own.sum()))
    return found


@torch.no_grad()
def read(model, prompt: Prompt, count: int, span: int) -> Reading:
    "One pass: `count` of the items, begun as far apart as if they filled the positions of `span`."
    kept = few(prompt, count)
    keep = (prompt.image < 0) | torch.isin(prompt.image, kept)
    ids, turn, place = prompt.ids[keep], prompt.turn[keep], keep.cumsum(0) - 1
    image = torch.where(prompt.image[keep] < 0, -1, torch.searchsorted(kept, prompt.image[keep]))
    bias = torch.zeros(len(ids), len(ids)).masked_fill((turn >= 0) & (turn != turn[:, None]), -torch.inf)
    last = place[prompt.last]
    with capture(model, bias=bias[None, None]) as cache:
        logits = model(input_ids=ids[None], position_ids=positions(image, turn, span/count)[None],
                       attention_mask=torch.ones(1, len(ids)), logits_to_keep=last, use_cache=False).logits[0]
    return Reading(logits.gather(1, prompt.choices), cache, bias, image, torch.searchsorted(kept, prompt.needles), last)


def look(reading: Reading) -> torch.Tensor:  # [layers, heads, questions]
    "Attention of the row that answers on the needle's tokens."
    weights, _ = row_weights(reading, reading.last)
    per_item = weights @ one_hot(reading.image + 1).double()[:, 1:]
    return per_item.gather(-1, reading.needles.expand(*per_item.shape[:2], -1)[..., None])[..., 0]


def sharpen(model, factor: float):
    "Multiply the logits of all attention, in place."
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= factor


def measure(model, prompts: list[Prompt], cells: list[tuple], looks: bool) -> tuple:  # (right, needle attention)
    "Every cell of every haystack: cell -> [questions] bool, and cell -> [layers, heads] where count = span."
    right, seen = {}, {}
    for count, span in cells:
        readings = [(r.scores.argmax(1) == 0, look(r) if looks and count == span else None)
                    for r in (read(model, p, count, span) for p in prompts)]
        right[f"{count} over {span}"] = torch.cat([r for r, _ in readings])
        if looks and count == span:
            seen[str(count)] = torch.cat([m for _, m in readings], -1).mean(-1).float()
    return right, seen


def redrawn(right: np.ndarray) -> np.ndarray:  # [samples] accuracy on each redraw
    "The same haystacks of 12 questions are drawn in every cell."
    sums = right.reshape(-1, 12).sum(1)
    return redraws(Answers(np.array([0]), [sums[None]], [np.full(len(sums), 12)]))[:, 0]


def share_of(cells: dict) -> dict:  # name -> {"value", "interval"}
    """What the fall from few to many items is made of: first farther, then more; and what squeezing many does. `cells`:
    name -> "1101…"."""
    a, b, c, d = (f"{x} over {y}" for x in (SIZES[0], SIZES[-1]) for y in (SIZES[0], SIZES[-1]))
    terms = dict(fall={a: 1, d: -1}, position={a: 1, b: -1}, count={b: 1, d: -1}, squeezed={c: 1, d: -1})
    right = {cell: np.array([int(x) for x in found]) for cell, found in cells.items()}
    drawn, means = ({cell: f(x) for cell, x in right.items()} for f in (redrawn, np.mean))
    total = lambda of, weights: sum(w*of[cell] for cell, w in weights.items())
    ends = {name: interval(total(drawn, w)) for name, w in terms.items()}
    return {name: dict(value=round(float(total(means, w)), 4), interval=[round(x, 4) for x in ends[name]])
            for name, w in terms.items()}


def bits(right: dict) -> dict: return {cell: "".join("01"[int(x)] for x in found) for cell, found in right.items()}


def of_model(folder: Path, asked: int, sharper: tuple) -> dict:
    "Cells, needle attention by layer and head, and cells with sharper logits."
    model, tokenizer = load_text(folder)
    prompts = [prompt(tokenizer, h) for h in listed_test([SIZES[-1]], asked, seed=5)]
    model = light(model)
    ends = SIZES if sharper else (SIZES[0], SIZES[-1])
    right, seen = measure(model, prompts, [(a, b) for a in ends for b in ends], True)
    found = dict(cells=bits(right), looks={k: v.tolist() for k, v in seen.items()}, sharper={})
    before = 1.
    for factor in sharper:
        sharpen(model, factor/before)
        before = factor
        found["sharper"][str(factor)] = bits(measure(model, prompts, [(n, n) for n in SIZES], False)[0])
    return found


def keep_heads(folder: Path):
    "What the inspector shows of two models' heads on haystacks of many items, in data/spectra, unless it is there."
    many = SIZES[-1]
    for name in INSPECTED:
        path = data_path("spectra")/f"heads-real-{name}-{many}.safetensors"
        if not path.exists():
            read_heads(*load_text(made_folder(folder, name, 0)), listed_test((many,), 24, seed=5), name).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that `laid real` has filled")
    parser.add_argument("--questions", type=int, default=48, help="in each cell, 12 to a haystack (default 48)")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="who is read (default: all that are there)")
    args, start, models = parser.parse_args(), time.time(), {}
    for name in args.rows:
        made = made_folder(args.folder, name, 0)
        if not made.exists(): continue
        kept = args.folder/"why"/f"{made.name}-{args.questions}.json"
        if not kept.exists():
            write_json(kept, of_model(made, args.questions, SHARPER if name == "student" else ()))
        models[name] = read_json(kept)
        models[name]["parts"] = share_of(models[name]["cells"])
        log(f"{name}: {models[name]['parts']} ({time.time() - start:.0f} s)")
    keep_heads(args.folder)
    results = read_json(args.folder/"results.json")
    write("real", dict(laid_real=results, seed=5, sizes=SIZES, questions=args.questions, why=models), start)


if __name__ == "__main__":
    main()
