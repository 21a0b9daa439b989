"""Open question 3: retrieval first, then the student. `python experiments/retrieval.py [--quick] [--models name ...]`

A haystack is read in chunks of CHUNK images. After each chunk comes the question, and one attention head, at one of its words, scores the images: no embedding model, no index. The K best images of all
chunks are read again, together, and the question is answered. Head, word and form of the score are chosen on split `val`, for every model by itself. Compared with reading everything at once."""
import argparse
import itertools
import time

import numpy as np
import torch

import common
from features import DISTILLED, embed, load_all, read, tails
from laid_nb.accuracy import wilson
from laid_nb.capture import capture
from laid_nb.evaluate import answer_ids, continue_prefix

CHUNK, KEEP, CROSS = 20, (1, 5, 10), 5  # images of a chunk; images read again; those where retrievers and readers are crossed
ROWS = 12  # words of the question that may score: "For the image with the X, is there a Y?" up to the first that questions do not share in number
SCORES = ("logits", "share", "contrast")


def image_logits(cache, layer, start, images):
    """Attention logits of a captured question on the images before it -> (log-sum-exp over each image's four tokens, over all visible keys, over those of no image), [questions, heads, rows, images or 1].
    Before the softmax a score does not depend on what else is in the chunk, but on the row; after it, on both."""
    q, k = cache["q", layer], cache["k", layer]
    logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)*cache.scaling[layer]  # [questions, heads, rows, keys]
    rows, keys = logits.shape[2:]
    logits = logits.masked_fill(torch.arange(keys) > torch.arange(keys - rows, keys)[:, None], -torch.inf)
    pictures = logits[..., start:start + 6*images].unflatten(-1, (images, 6))[..., 1:5].logsumexp(-1)
    text = torch.cat([logits[..., :start], logits[..., start + 6*images:]], -1).logsumexp(-1, keepdim=True)
    return pictures, logits.logsumexp(-1, keepdim=True), text


def score(parts, form):
    "Parts of `image_logits` -> scores of the images, [..., images]: `logits` as they are; `share` of the row's attention (its log); `contrast`, against what the row gives to the text, which is the same in all chunks."
    pictures, everything, text = parts
    return {"logits": pictures, "share": pictures - everything, "contrast": pictures - text}[form]


@torch.no_grad()
def chunk_scores(model, processor, features, questions, chunk, pick):
    "Scores of all images [questions, images] by the head, word and form of `pick` (layer, head, row, form); with pick None by all of them: form -> [questions, layers, heads, rows, images]."
    found = []
    words = [q[:ROWS if pick is None else pick[2] + 1] for q in questions]
    with capture(model, None if pick is None else pick[0]) as cache:
        for part in features.split(chunk):
            trunk = read(model, processor, part[None])
            continue_prefix(model, trunk, words, 0, set())
            start = trunk.length - 6*len(part)
            parts = [image_logits(cache, layer, start, len(part)) for layer in cache.layers]
            if pick is None: found.append({form: torch.stack([score(p, form) for p in parts], 1) for form in SCORES})
            else: found.append(score(parts[0], pick[3])[:, pick[1], -1])
    return torch.cat(found, -1) if pick else {form: torch.cat([f[form] for f in found], -1) for form in SCORES}


def ranks(scores, needles):
    "How many images score higher than the needle (0 = found first): scores [questions, ..., images], needles [questions] -> [questions, ...]."
    at = needles.view(-1, *[1]*(scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return (scores > scores.gather(-1, at)).sum(-1)


def choose(model, processor, haystacks):
    "The (layer, head, row, form) with the best mean reciprocal rank of the needle -> (pick, its mean reciprocal rank, the best of each form)."
    reciprocal = {form: 0 for form in SCORES}
    for h in haystacks:
        needles = torch.tensor([q.needles[0] for q in h.questions])
        for form, scores in chunk_scores(model, processor, embed(model, processor, h), tails(processor, h), CHUNK, None).items():
            reciprocal[form] = reciprocal[form] + (1/(1 + ranks(scores, needles))).mean(0)/len(haystacks)  # [layers, heads, rows]
    best = {form: (float(x.max()), *(int(i) for i in np.unravel_index(int(x.argmax()), x.shape))) for form, x in reciprocal.items()}
    form = max(SCORES, key=lambda f: best[f][0])
    return (*best[form][1:], form), best[form][0], best


@torch.no_grad()
def answers(model, processor, features, questions):
    "Margins log p(Yes) - log p(No) [questions] of questions that each have images of their own, features [questions, images, 4, hidden], or all the same, [1, images, 4, hidden]."
    log_p, _ = continue_prefix(model, read(model, processor, features), questions, 0, set())
    yes, no = answer_ids(processor.tokenizer)
    return log_p[:, yes] - log_p[:, no]


def best(scores, k):
    "The k highest, in the order of the haystack: [questions, images] -> indices [questions, k]."
    return scores.topk(min(k, scores.shape[1]), -1).indices.sort(-1).values


def with_needle(needles, images, k, seed):
    "A perfect retriever: the needle and k - 1 others at random, in the order of the haystack, [questions, k]."
    rng = np.random.default_rng(seed)
    others = [rng.choice(np.delete(np.arange(images), n), min(k, images) - 1, replace=False) for n in needles.tolist()]
    return torch.tensor(np.array([sorted([n, *o]) for n, o in zip(needles.tolist(), others)]))


def tokens(images, question, k=None):
    "Tokens read for one question on a haystack, everything at once or (k) by retrieval; and pairs of tokens that attention compares."
    opening = 14  # of the system prompt
    pairs = lambda n: n*(n + 1)//2
    if k is None: return opening + 6*images + question, pairs(opening + 6*images + question)
    chunks = [min(CHUNK, images - i) for i in range(0, images, CHUNK)]
    reads = [opening + 6*n + 6 for n in chunks] + [opening + 6*k + question]  # the question up to the word that scores: 6 tokens
    return sum(reads), sum(map(pairs, reads))


def difference(a, b, per=12, samples=2000):
    "Accuracy of a less that of b on the same questions, with a 95% interval by redrawing haystacks of `per` questions."
    d = (np.array(a) - np.array(b)).reshape(-1, per).mean(1)
    draws = d[np.random.default_rng(0).integers(len(d), size=(samples, len(d)))].mean(1)
    return dict(difference=float(d.mean()), low=float(np.quantile(draws, .025)), high=float(np.quantile(draws, .975)))


def compare(right, size):
    """Right answers by (retriever, reader, k) -> paired differences of each, as far as there is what to compare with: `once`, to the same reader with everything at once; `reader`, to the student reading the same images;
    `retriever`, to the same reader with the student's images; `both`, to the student with its own."""
    others = lambda retriever, reader, k: dict(once=("all at once", reader, size), reader=(retriever, "student", k), retriever=("student", reader, k), both=("student", "student", k))
    return {key: {name: difference(marks, right[other]) for name, other in others(*key).items() if other in right and other != key} for key, marks in right.items()}


def run(models, sizes, questions, validation):
    "-> picks, ranks by model and size, and answers by size, retriever, reader and k; retriever `all at once`: every image; `perfect`: the needle and others at random."
    picks, found, rows, seconds = {}, {}, [], dict(choose=0., features=0., once=0., retrieve=0., read=0.)
    def clock(what, call, *args):
        start = time.process_time()
        result = call(*args)
        seconds[what] += time.process_time() - start
        return result
    for name, (model, processor) in models.items():
        for h in validation: clock("features", embed, model, processor, h)
        picks[name], mrr, by_form = clock("choose", choose, model, processor, validation)
        common.log(f"{name}: layer {picks[name][0]}, head {picks[name][1]}, word {picks[name][2]}, {picks[name][3]}: mean reciprocal rank {mrr:.3f} on val; " + ", ".join(f"{f} {x[0]:.3f}" for f, x in by_form.items()))
        picks[name] = dict(zip(("layer", "head", "row", "score"), picks[name])) | dict(reciprocal_rank=mrr, by_score={f: x[0] for f, x in by_form.items()})
    for size in sizes:
        right = {}
        def mark(retriever, reader, k, margins, haystack): right.setdefault((retriever, reader, k), []).extend(int((m > 0) == q.answer) for m, q in zip(margins.tolist(), haystack.questions))
        for h in common.tests((size,), questions):
            needles, lists = torch.tensor([q.needles[0] for q in h.questions]), {}
            features = {name: clock("features", embed, *mp, h) for name, mp in models.items()}
            asked = {name: tails(mp[1], h) for name, mp in models.items()}
            for name, mp in models.items():
                scores = clock("retrieve", chunk_scores, *mp, features[name], asked[name], CHUNK, tuple(picks[name][k] for k in ("layer", "head", "row", "score")))
                found.setdefault((name, size), []).extend(ranks(scores, needles).tolist())
                lists |= {(name, k): best(scores, k) for k in KEEP}
                mark("all at once", name, size, clock("once", answers, *mp, features[name][None], asked[name]), h)
            lists |= {("perfect", CROSS): with_needle(needles, size, CROSS, size)}
            for (retriever, k), name in itertools.product(lists, models):
                if retriever != name and k != CROSS: continue
                mark(retriever, name, k, clock("read", answers, *models[name], features[name][lists[retriever, k]], asked[name]), h)
        against = compare(right, size)
        for (retriever, reader, k), marks in right.items():
            low, high = wilson(sum(marks), len(marks))
            read_tokens, pairs = tokens(size, 17, None if retriever == "all at once" else k)
            rows.append(dict(images=size, retriever=retriever, reader=reader, k=k, right=sum(marks), total=len(marks), accuracy=sum(marks)/len(marks), low=float(low), high=float(high), tokens=read_tokens, pairs=pairs,
                             against=against[retriever, reader, k], marks="".join(map(str, marks))))
        for name in models: common.log(f"{size} images, {name}: at once {np.mean(right['all at once', name, size]):.2f}; " + ", ".join(f"recall@{k} {np.mean(np.array(found[name, size]) < k):.2f} right {np.mean(right[name, name, k]):.2f}" for k in KEEP) + f"; perfect retriever {np.mean(right['perfect', name, CROSS]):.2f}")
    recall = [dict(model=name, images=size, k=k, found=sum(r < k for r in rs), total=len(rs), recall=sum(r < k for r in rs)/len(rs), low=float(wilson(sum(r < k for r in rs), len(rs))[0]), high=float(wilson(sum(r < k for r in rs), len(rs))[1]))
              for (name, size), rs in found.items() for k in KEEP]
    return dict(picks=picks, recall=recall, rows=rows, cpu_seconds={k: round(v, 1) for k, v in seconds.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small haystacks, the pair only, nothing written")
    parser.add_argument("--models", nargs="*", default=DISTILLED, metavar="NAME[=FOLDER]", help="trained students, beside the embedded pair")
    parser.add_argument("--questions", type=int, default=240, metavar="N", help="at each size (default 240)")
    args = parser.parse_args()
    start = time.time()
    models = load_all([] if args.quick else args.models)
    sizes, questions, val = ((40,), 12, (40, 12)) if args.quick else ((100, 300, 1000), args.questions, (300, 96))
    result = run(models, sizes, questions, common.tests((val[0],), val[1], "val", 3))
    common.log(f"CPU seconds: {result['cpu_seconds']}")
    if not args.quick: common.write("retrieval", dict(chunk=CHUNK, keep=KEEP, cross=CROSS, questions=questions, **result), start)


if __name__ == "__main__": main()
