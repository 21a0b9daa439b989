"""All questions of a haystack in one forward pass, none of which sees another, with positions, images and counts
changed at will."""
import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import load
from laid_nb.capture import Cache, capture
from laid_nb.inputs import precompute_prompts, question_ids, read_groups, read_positions
from laid_nb.simulate import asked_rows, multiplicity_factors
from laid_nb.store import tower_fingerprint

PAIR = ["teacher", "student"]
TRAINED = [m + how for how in ("", " + window simulation") for m in ("SFT", "KD", "LAid", "LAid+")]  # of reproduce.json


def model_arguments(
    about: str,  # what the script does
    questions: int,  # default
    seed: int,  # default
    of: str = "at each size",  # what the questions belong to
) -> argparse.ArgumentParser:
    "Arguments of a script that looks at several models."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--models", nargs="+", metavar="NAME[=FOLDER]", help=(
        "teacher, student, rows of reproduce.json, or names of your own for folders (default: the pair and all trained "
        "rows; with --quick the pair)"))
    parser.add_argument("--questions", type=int, default=questions, help=f"{of} (default {questions})")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--quick", action="store_true", help="12 questions, nothing is written")
    return parser


def given_models(
    args,  # from `model_arguments`
):  # yields (name, model, processor)
    "The models that were asked for, one at a time."
    for item in args.models or (PAIR if args.quick else PAIR + TRAINED):
        name, _, folder = item.partition("=")
        yield name, *load(folder or name)


class Prompt(NamedTuple):
    "A haystack and its questions as one row of tokens: the chat up to its last image, then question after question."
    ids: torch.Tensor  # [tokens]
    image: torch.Tensor  # [tokens] the image a token belongs to, -1 = text
    turn: torch.Tensor  # [tokens] the question a token belongs to, -1 = up to the last image
    inner: torch.Tensor  # [3, tokens] M-RoPE position in the token's image or question; before the images from 0
    opening: int  # tokens before the first image, and its position
    step: int  # M-RoPE positions that an image takes
    needles: torch.Tensor  # [questions] the image that a question asks about
    answers: torch.Tensor  # [questions] bool, True = yes
    anchors: torch.Tensor  # [questions] the token that names the needle's object (its last, if it has several)
    last: torch.Tensor  # [questions] the token that predicts the answer
    features: torch.Tensor  # [images, tokens an image, hidden]


def tails(processor, haystack) -> list[list[int]]:
    "The tokens of each question, behind the last image, as if it were asked alone."
    asked = range(len(haystack.questions))
    return [question_ids(processor, haystack, t)[1:] for t in asked]  # without the end of the image


def prompt(
    model,  # one of the pair, or trained from it
    processor,
    haystack,  # single-needle questions about pictures of one size
    seen: dict,  # the haystack's part of what `laid_nb.inputs.precompute_prompts` made
) -> Prompt:
    "A haystack with its questions, each as `laid_nb.evaluate.ask` would put it."
    ids, asked = seen["input_ids"][0], tails(processor, haystack)
    shown = int((ids == processor.image_token_id).nonzero()[-1]) + 2  # up to the end of the last image
    if asked[0] != ids[shown:].tolist():
        raise ValueError(f"haystack {haystack.id!r}: the tokenizer does not separate the question from the images")
    ids = torch.cat([ids[:shown], *map(torch.tensor, asked)])
    turn = torch.cat([torch.full((shown,), -1), *(torch.full((len(t),), n) for n, t in enumerate(asked))])
    image = torch.where(turn < 0, F.pad(read_groups(model, seen)[0, :shown], (0, len(ids) - shown)), -1)
    n, positions = len(haystack.images), read_positions(model, seen)[:, 0]
    opening = int((image >= 0).int().argmax())
    step = (positions[0, shown].item() - opening)//n
    inner = torch.cat([_inner(positions[:, :shown], image[:shown], opening),
                       *(torch.arange(len(t)).expand(3, -1) for t in asked)], 1)
    needles, answers = (torch.tensor(x) for x in zip(*((q.needles[0], q.answer) for q in haystack.questions)))
    last = torch.tensor([(turn == t).nonzero()[-1].item() for t in range(len(asked))])
    anchors = _anchors(processor, haystack, ids, turn)
    features = seen["features"].unflatten(0, (n, -1))
    return Prompt(ids, image, turn, inner, opening, step, needles, answers, anchors, last, features)


def _inner(positions, image, opening):
    "Positions up to the last image, counted from the start of each image; before the first as they are."
    first = torch.stack([positions[0, image == i].amin() for i in range(int(image.max()) + 1)])
    return torch.cat([positions[:, :opening], positions[:, opening:] - first[image[opening:]]], 1)


def _anchors(processor, haystack, ids, turn):
    "The last token of each question's anchor."
    names = [processor.tokenizer(f" {q.anchor}", add_special_tokens=False).input_ids[-1] for q in haystack.questions]
    return torch.tensor([((turn == n) & (ids == name)).nonzero()[0].item() for n, name in enumerate(names)])


def prompts(
    model,
    processor,
    haystacks: list,
    made: dict,  # fingerprint of a vision tower -> prompts of these haystacks; added to
) -> list[Prompt]:
    "All haystacks, prepared once for all models that share a vision tower."
    tower = tower_fingerprint(model)
    if tower not in made:
        seen = precompute_prompts(model, processor, haystacks, progress=False)
        made[tower] = [prompt(model, processor, h, seen[h.id]) for h in haystacks]
    return made[tower]


class Reading(NamedTuple):
    "What a model made of a prompt."
    margin: torch.Tensor  # [questions] logit of the right answer over the wrong one
    cache: Cache  # queries and keys of all layers
    bias: torch.Tensor  # [tokens, tokens] on the logits: -inf between questions, the log of how often an image counts
    image: torch.Tensor  # [tokens] the image a token belongs to, counted among the images kept, -1 = text
    turn: torch.Tensor  # [tokens] as in the prompt
    positions: torch.Tensor  # [3, tokens]
    needles: torch.Tensor  # [questions], counted among the images kept
    anchors: torch.Tensor  # [questions]
    last: torch.Tensor  # [questions]


def few(
    prompt: Prompt,
    count: int,  # images to keep
) -> torch.Tensor:  # [count], ascending
    """The needles and, from the front of a fixed random order, as many distractors as there is room for: smaller
    haystacks are part of larger ones."""
    needles = sorted(set(prompt.needles.tolist()))
    if count < len(needles): raise ValueError(f"{count} images cannot hold {len(needles)} needles")
    order = torch.randperm(len(prompt.features), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor(sorted(needles + [i for i in order if i not in needles][:count - len(needles)]))


@torch.no_grad()
def read(
    model,
    processor,
    prompt: Prompt,
    kept: torch.Tensor,  # [images] which images are there, ascending
    starts: torch.Tensor,  # [images] M-RoPE position at which each begins, counted from the first possible one
    end: int,  # M-RoPE position at which every question begins, likewise
    times: float = 1.,  # how often a distractor counts
) -> Reading:
    """One forward pass. With all images, `starts` 0, step, 2 step ... and `end` behind them, margins are those of
    `laid_nb.evaluate.ask`."""
    keep = (prompt.image < 0) | torch.isin(prompt.image, kept)
    ids, turn, place = prompt.ids[keep], prompt.turn[keep], keep.cumsum(0) - 1
    image = torch.where(prompt.image[keep] < 0, -1, torch.searchsorted(kept, prompt.image[keep]))
    needles = torch.searchsorted(kept, prompt.needles)
    begin = torch.where(image >= 0, prompt.opening + starts[image], torch.where(turn >= 0, prompt.opening + end, 0))
    positions = prompt.inner[:, keep] + begin
    bias = _bias(turn, image, needles, times)
    embeds = model.get_input_embeddings()(ids)[None]
    features = prompt.features[kept].flatten(0, 1).to(embeds)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[None, :, None], features)
    last, words = place[prompt.last], processor.tokenizer
    yes, no = (words(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    with capture(model, bias=bias[None, None]) as cache:
        logits = model(inputs_embeds=embeds, attention_mask=torch.ones(1, len(ids)), position_ids=positions[:, None],
                       logits_to_keep=last, use_cache=False).logits[0]
    margin = logits[:, yes] - logits[:, no]
    margin = torch.where(prompt.answers, margin, -margin)
    return Reading(margin, cache, bias, image, turn, positions, needles, place[prompt.anchors], last)


def _bias(turn, image, needles, times):
    "No question sees another; a distractor counts several times for those that ask."
    bias = torch.zeros(len(turn), len(turn)).masked_fill((turn >= 0) & (turn != turn[:, None]), -torch.inf)
    if times > 1:
        asks = asked_rows(turn[None], [needles[:, None].tolist()], image[None])
        rows, keys = multiplicity_factors(image[None], asks, torch.tensor([times]))
        bias += (rows @ keys.mT)[0]
    return bias


def row_weights(
    reading: Reading,
    rows: torch.Tensor,  # [rows] tokens that look
) -> tuple:  # (attention [layers, heads, rows, tokens], bias with the causal mask [rows, tokens])
    "Attention of some tokens in every layer and head; float64, as sharp heads leave almost nothing to the rest."
    cache, future = reading.cache, torch.arange(len(reading.image)) > rows[:, None]
    bias = reading.bias[rows].double().masked_fill(future, -torch.inf)
    def layer(l):
        q, k = cache["q", l][0].double(), cache["k", l][0].double()
        logits = q[:, rows].unflatten(0, (len(k), -1)) @ k[:, None].mT * cache.scaling[l]
        return (logits + bias).softmax(-1).flatten(0, 1)
    return torch.stack([layer(l) for l in cache.layers]), bias


def entropy(
    weights: torch.Tensor,  # [..., rows, tokens]
    bias: torch.Tensor,  # [rows, tokens], both from `row_weights`
) -> torch.Tensor:  # [..., rows], 0 = one key, 1 = spread evenly over all keys in sight
    "Entropy over the log of the number of keys; a key that counts c times is c keys."
    counts = bias.exp()
    return (torch.special.entr(weights) + weights*bias.clamp(min=0)).sum(-1)/counts.sum(-1).log()
