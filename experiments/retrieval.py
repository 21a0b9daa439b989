"""Open question 3: retrieval first, then the student. `python experiments/retrieval.py [--quick] [--models name ...]`

A haystack is read in chunks of CHUNK images. After each chunk comes the question, and one attention head, at one of its
words, scores the images: no embedding model, no index. The K best images of all chunks are read again, together, and
the question is answered. Head, word and form of the score are chosen on split `val`, for every model by itself.
Compared with reading everything at once."""
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

CHUNK, KEEP = 20, (1, 5, 10)  # images of a chunk; images read again
CROSS = 5  # images read again where retrievers and readers are crossed
ROWS = 12  # words that may score: of "For the image with the X, is there a Y?", as many as all questions have
PICK = ("layer", "head", "row", "score")
SCORES = ("logits", "share", "contrast")


def image_logits(cache, layer, start, images):
    """Attention logits of a captured question on the images before it -> (log-sum-exp over each image's four tokens,
    over all visible keys, over those of no image), [questions, heads, rows, images or 1].
    Before the softmax a score does not depend on what else is in the chunk, but on the row; after it, on both."""
    q, k = cache["q", layer], cache["k", layer]
    logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)*cache.scaling[layer]
    rows, keys = logits.shape[2:]  # logits [questions, heads, rows, keys]
    logits = logits.masked_fill(torch.arange(keys) > torch.arange(keys - rows, keys)[:, None], -torch.inf)
    pictures = logits[..., start:start + 6*images].unflatten(-1, (images, 6))[..., 1:5].logsumexp(-1)
    text = torch.cat([logits[..., :start], logits[..., start + 6*images:]], -1).logsumexp(-1, keepdim=True)
    return pictures, logits.logsumexp(-1, keepdim=True), text


def score(parts, form):
    """Parts of `image_logits` -> scores of the images, [..., images]: `logits` as they are; `share` of the row's
    attention (its log); `contrast`, against what the row gives to the text, which is the same in all chunks."""
    pictures, everything, text = parts
    return {"logits": pictures, "share": pictures - everything, "contrast": pictures - text}[form]


@torch.no_grad()
def chunk_scores(model, processor, features, questions, chunk, pick):
    """Scores of all images [questions, images] by the head, word and form of `pick` (layer, head, row, form); with pick
    None by all of them: form -> [questions, layers, heads, rows, images]."""
    found = []
    words = [q[:ROWS if pick is None else pick[2] + 1] for q in questions]
    with capture(model, None if pick is None else pick[0]) as cache:
        for part in features.split(chunk):
            trunk = read(model, processor, part[None])
            continue_prefix(model, trunk, words, 0, set())
            start = trunk.length - 6*len(part)
            parts = [image_logits(cache, layer, start, len(part)) for layer in cache.layers]
            found.append(score(parts[0], pick[3])[:, pick[1], -1] if pick else
                         {form: torch.stack([score(p, form) for p in parts], 1) for form in SCORES})
    return torch.cat(found, -1) if pick else {form: torch.cat([f[form] for f in found], -1) for form in SCORES}


def ranks(scores, needles):
    """How many images score higher than the needle (0 = found first): scores [questions, ..., images], needles
    [questions] -> [questions, ...]."""
    at = needles.view(-1, *[1]*(scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return (scores > scores.gather(-1, at)).sum(-1)


def choose(model, processor, haystacks):
    """The (layer, head, row, form) with the best mean reciprocal rank of the needle -> (pick, its mean reciprocal rank,
    the best of each form)."""
    reciprocal = {form: 0 for form in SCORES}  # [layers, heads, rows]
    for h in haystacks:
        needles = torch.tensor([q.needles[0] for q in h.questions])
        by_form = chunk_scores(model, processor, embed(model, processor, h), tails(processor, h), CHUNK, None)
        for form, scores in by_form.items():
            reciprocal[form] = reciprocal[form] + (1/(1 + ranks(scores, needles))).mean(0)/len(haystacks)
    place = lambda x: (int(i) for i in np.unravel_index(int(x.argmax()), x.shape))
    best = {form: (float(x.max()), *place(x)) for form, x in reciprocal.items()}
    form = max(SCORES, key=lambda f: best[f][0])
    return (*best[form][1:], form), best[form][0], best


@torch.no_grad()
def answers(model, processor, features, questions):
    """Margins log p(Yes) - log p(No) [questions] of questions that each have images of their own, features [questions,
    images, 4, hidden], or all the same, [1, images, 4, hidden]."""
    log_p, _ = continue_prefix(model, read(model, processor, features), questions, 0, set())
    yes, no = answer_ids(processor.tokenizer)
    return log_p[:, yes] - log_p[:, no]


def best(scores, k):
    "The k highest, in the order of the haystack: [questions, images] -> indices [questions, k]."
    return scores.topk(min(k, scores.shape[1]), -1).indices.sort(-1).values


def with_needle(needles, images, k, seed):
    "A perfect retriever: the needle and k - 1 others at random, in the order of the haystack, [questions, k]."
    rng = np.random.default_rng(seed)
    places = needles.tolist()
    others = [rng.choice(np.delete(np.arange(images), n), min(k, images) - 1, replace=False) for n in places]
    return torch.tensor(np.array([sorted([n, *o]) for n, o in zip(places, others)]))


def tokens(images, question, k=None):
    """Tokens read for one question on a haystack, everything at once or (k) by retrieval; and pairs of tokens that
    attention compares."""
    opening = 14  # of the system prompt
    pairs = lambda n: n*(n + 1)//2
    if k is None: return opening + 6*images + question, pairs(opening + 6*images + question)
    chunks = [min(CHUNK, images - i) for i in range(0, images, CHUNK)]
    word = 6  # tokens of the question up to the word that scores
    reads = [opening + 6*n + word for n in chunks] + [opening + 6*k + question]
    return sum(reads), sum(map(pairs, reads))


def difference(a, b, per=12, samples=2000):
    "Accuracy of a less that of b on the same questions, with a 95% interval by redrawing haystacks of `per` questions."
    d = (np.array(a) - np.array(b)).reshape(-1, per).mean(1)
    draws = d[np.random.default_rng(0).integers(len(d), size=(samples, len(d)))].mean(1)
    return dict(difference=float(d.mean()), low=float(np.quantile(draws, .025)), high=float(np.quantile(draws, .975)))


def compare(right, size):
    """Right answers by (retriever, reader, k) -> paired differences of each, as far as there is what to compare with:
    `once`, to the same reader with everything at once; `reader`, to the student reading the same images; `retriever`,
    to the same reader with the student's images; `both`, to the student with its own."""
    def others(retriever, reader, k):
        named = dict(once=("all at once", reader, size), reader=(retriever, "student", k),
                     retriever=("student", reader, k), both=("student", "student", k))
        return {name: key for name, key in named.items() if key in right and key != (retriever, reader, k)}
    return {key: {name: difference(marks, right[other]) for name, other in others(*key).items()}
            for key, marks in right.items()}


class Clock:
    "CPU seconds of each kind of work."
    def __init__(self, *kinds): self.seconds = dict.fromkeys(kinds, 0.)

    def __call__(self, kind, call, *args):
        start = time.process_time()
        result = call(*args)
        self.seconds[kind] += time.process_time() - start
        return result


def picks_of(models, validation, clock):
    "Head, word and form of the score of every model, chosen on validation haystacks."
    picks = {}
    for name, (model, processor) in models.items():
        for h in validation:
            clock("features", embed, model, processor, h)
        pick, mrr, by_form = clock("choose", choose, model, processor, validation)
        forms = {f: x[0] for f, x in by_form.items()}
        told = ", ".join(f"{f} {x:.3f}" for f, x in forms.items())
        common.log(f"{name}: layer {pick[0]}, head {pick[1]}, word {pick[2]}, {pick[3]}: "
                   f"mean reciprocal rank {mrr:.3f} on val; {told}")
        picks[name] = dict(zip(PICK, pick)) | dict(reciprocal_rank=mrr, by_score=forms)
    return picks


def ask_haystack(models, picks, haystack, clock):
    "-> (model -> ranks of the needles, (retriever, reader, k) -> right or wrong by question), 1 or 0."
    size, needles = len(haystack.images), torch.tensor([q.needles[0] for q in haystack.questions])
    features = {name: clock("features", embed, *mp, haystack) for name, mp in models.items()}
    asked = {name: tails(mp[1], haystack) for name, mp in models.items()}
    marks = lambda margins: [int((m > 0) == q.answer) for m, q in zip(margins.tolist(), haystack.questions)]
    found, right, lists = {}, {}, {}
    for name, mp in models.items():
        pick = tuple(picks[name][k] for k in PICK)
        scores = clock("retrieve", chunk_scores, *mp, features[name], asked[name], CHUNK, pick)
        found[name] = ranks(scores, needles).tolist()
        lists |= {(name, k): best(scores, k) for k in KEEP}
        once = clock("once", answers, *mp, features[name][None], asked[name])
        right["all at once", name, size] = marks(once)
    lists |= {("perfect", CROSS): with_needle(needles, size, CROSS, size)}
    for (retriever, k), name in itertools.product(lists, models):
        if retriever != name and k != CROSS: continue
        shown = features[name][lists[retriever, k]]
        right[retriever, name, k] = marks(clock("read", answers, *models[name], shown, asked[name]))
    return found, right


def share_of(right, total):
    "A share and its 95% interval."
    low, high = wilson(right, total)
    return right/total, float(low), float(high)


def row(size, key, marks, against):
    "A line of the result."
    retriever, reader, k = key
    accuracy, low, high = share_of(sum(marks), len(marks))
    read_tokens, pairs = tokens(size, 17, None if retriever == "all at once" else k)
    return dict(images=size, retriever=retriever, reader=reader, k=k, right=sum(marks), total=len(marks),
                accuracy=accuracy, low=low, high=high, tokens=read_tokens, pairs=pairs, against=against,
                marks="".join(map(str, marks)))


def recall_of(name, size, k, found):
    "How often the needle is among the k best."
    among = sum(rank < k for rank in found)
    recall, low, high = share_of(among, len(found))
    return dict(model=name, images=size, k=k, found=among, total=len(found), recall=recall, low=low, high=high)


def run(models, sizes, questions, validation):
    """-> picks, ranks by model and size, and answers by size, retriever, reader and k; retriever `all at once`: every
    image; `perfect`: the needle and others at random."""
    clock = Clock("choose", "features", "once", "retrieve", "read")
    picks, found, rows = picks_of(models, validation, clock), {}, []
    for size in sizes:
        right = {}
        for h in common.tests((size,), questions):
            needles, marks = ask_haystack(models, picks, h, clock)
            for name, places in needles.items():
                found.setdefault((name, size), []).extend(places)
            for key, new in marks.items():
                right.setdefault(key, []).extend(new)
        against = compare(right, size)
        rows += [row(size, key, marks, against[key]) for key, marks in right.items()]
        for name in models:
            tell(name, size, right, np.array(found[name, size]))
    recall = [recall_of(name, size, k, places) for (name, size), places in found.items() for k in KEEP]
    return dict(picks=picks, recall=recall, rows=rows, cpu_seconds={k: round(v, 1) for k, v in clock.seconds.items()})


def tell(name, size, right, places):
    "A line for the log."
    share = lambda *key: f"{np.mean(right[key]):.2f}"
    recalls = ", ".join(f"recall@{k} {np.mean(places < k):.2f} right {share(name, name, k)}" for k in KEEP)
    common.log(f"{size} images, {name}: at once {share('all at once', name, size)}; {recalls}; "
               f"perfect retriever {share('perfect', name, CROSS)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small haystacks, the pair only, nothing written")
    parser.add_argument("--models", nargs="*", default=DISTILLED, metavar="NAME[=FOLDER]",
                        help="trained students, beside the embedded pair")
    parser.add_argument("--questions", type=int, default=240, metavar="N", help="at each size (default 240)")
    args = parser.parse_args()
    start = time.time()
    models = load_all([] if args.quick else args.models)
    sizes, questions, val = (100, 300, 1000), args.questions, (300, 96)
    if args.quick:
        sizes, questions, val = (40,), 12, (40, 12)
    result = run(models, sizes, questions, common.tests((val[0],), val[1], "val", 3))
    common.log(f"CPU seconds: {result['cpu_seconds']}")
    if not args.quick:
        how = dict(chunk=CHUNK, keep=KEEP, cross=CROSS, questions=questions)
        common.write("retrieval", how | result, start)


if __name__ == "__main__":
    main()
