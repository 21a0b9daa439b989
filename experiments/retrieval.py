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

CHUNK = 20  # images of a chunk
KEEP, CROSS = (1, 5, 10), 5  # images read again; those where retrievers and readers are crossed
ROWS = 12  # words that may score: "For the image with the X, is there a Y?" up to where questions differ in length
SCORES = ("logits", "share", "contrast")
AT_ONCE, PERFECT = "all at once", "perfect"  # retrievers that hand on every image; the needle and others at random
PICK = ("layer", "head", "row", "score")  # what is chosen for a model


def image_logits(cache, layer, start, images):
    """Attention logits of a captured question on the images before it -> (log-sum-exp over each image's four tokens,
    over all visible keys, over those of no image), [questions, heads, rows, images or 1].

    Before the softmax a score does not depend on what else is in the chunk, but on the row; after it, on both."""
    q, k = cache["q", layer], cache["k", layer]
    logits = (q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT).flatten(1, 2)*cache.scaling[layer]
    rows, keys = logits.shape[2:]  # of [questions, heads, rows, keys]
    logits = logits.masked_fill(torch.arange(keys) > torch.arange(keys - rows, keys)[:, None], -torch.inf)
    pictures = logits[..., start:start + 6*images].unflatten(-1, (images, 6))[..., 1:5].logsumexp(-1)
    text = torch.cat([logits[..., :start], logits[..., start + 6*images:]], -1).logsumexp(-1, keepdim=True)
    return pictures, logits.logsumexp(-1, keepdim=True), text


def score(parts, form):
    """Parts of `image_logits` -> scores of the images, [..., images]: `logits` as they are; `share` of the row's
    attention (its log); `contrast`, against what the row gives to the text, which is the same in all chunks."""
    pictures, everything, text = parts
    return {"logits": pictures, "share": pictures - everything, "contrast": pictures - text}[form]


def read_chunks(model, processor, features, words, chunk, layers):
    "Each chunk with the questions' `words` behind it -> parts of `image_logits` of each layer."
    with capture(model, layers) as cache:
        for part in features.split(chunk):
            trunk = read(model, processor, part[None])
            continue_prefix(model, trunk, words, 0, set())
            start = trunk.length - 6*len(part)
            yield [image_logits(cache, layer, start, len(part)) for layer in cache.layers]


@torch.no_grad()
def chunk_scores(model, processor, features, questions, chunk, pick):
    """Scores of all images [questions, images] by the head, word and form of `pick` (layer, head, row, form); with pick
    None by all of them: form -> [questions, layers, heads, rows, images]."""
    if pick is None:
        chunks = list(read_chunks(model, processor, features, [q[:ROWS] for q in questions], chunk, None))
        every = lambda form: [torch.stack([score(parts, form) for parts in layers], 1) for layers in chunks]
        return {form: torch.cat(every(form), -1) for form in SCORES}
    layer, head, row, form = pick
    chunks = read_chunks(model, processor, features, [q[:row + 1] for q in questions], chunk, layer)
    return torch.cat([score(parts, form)[:, head, -1] for parts, in chunks], -1)


def ranks(scores, needles):
    """How many images score higher than the needle (0 = found first): scores [questions, ..., images], needles
    [questions] -> [questions, ...]."""
    at = needles.view(-1, *[1]*(scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return (scores > scores.gather(-1, at)).sum(-1)


def needles_of(haystack):
    "[questions]"
    return torch.tensor([q.needles[0] for q in haystack.questions])


def choose(model, processor, haystacks):
    """The (layer, head, row, form) with the best mean reciprocal rank of the needle -> (pick, its mean reciprocal rank,
    the best of each form)."""
    reciprocal = {form: 0 for form in SCORES}
    for h in haystacks:
        needles, questions = needles_of(h), tails(processor, h)
        every = chunk_scores(model, processor, embed(model, processor, h), questions, CHUNK, None)
        for form, scores in every.items():
            of_haystack = (1/(1 + ranks(scores, needles))).mean(0)  # [layers, heads, rows]
            reciprocal[form] = reciprocal[form] + of_haystack/len(haystacks)
    best = {}
    for form, x in reciprocal.items():
        best[form] = (float(x.max()), *(int(i) for i in np.unravel_index(int(x.argmax()), x.shape)))
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
    others = [rng.choice(np.delete(np.arange(images), n), min(k, images) - 1, replace=False) for n in needles.tolist()]
    return torch.tensor(np.array([sorted([n, *o]) for n, o in zip(needles.tolist(), others)]))


def tokens(images, question, k=None):
    """Tokens read for one question on a haystack, everything at once or (k) by retrieval; and pairs of tokens that
    attention compares."""
    opening, asked = 14, 6  # tokens of the system prompt; of the question up to the word that scores
    pairs = lambda n: n*(n + 1)//2
    whole = opening + 6*images + question
    if k is None: return whole, pairs(whole)
    chunks = [min(CHUNK, images - i) for i in range(0, images, CHUNK)]
    reads = [opening + 6*n + asked for n in chunks] + [opening + 6*k + question]
    return sum(reads), sum(map(pairs, reads))


def difference(a, b, per=12, samples=2000):
    "Accuracy of a less that of b on the same questions, with a 95% interval by redrawing haystacks of `per` questions."
    d = (np.array(a) - np.array(b)).reshape(-1, per).mean(1)
    draws = d[np.random.default_rng(0).integers(len(d), size=(samples, len(d)))].mean(1)
    low, high = np.quantile(draws, .025), np.quantile(draws, .975)
    return dict(difference=float(d.mean()), low=float(low), high=float(high))


def compare(right, size):
    """Right answers by (retriever, reader, k) -> paired differences of each, as far as there is what to compare with:
    `once`, to the same reader with everything at once; `reader`, to the student reading the same images; `retriever`,
    to the same reader with the student's images; `both`, to the student with its own."""
    def others(retriever, reader, k):
        return dict(once=(AT_ONCE, reader, size), reader=(retriever, "student", k),
                    retriever=("student", reader, k), both=("student", "student", k))
    found = {}
    for key, marks in right.items():
        known = {name: other for name, other in others(*key).items() if other in right and other != key}
        found[key] = {name: difference(marks, right[other]) for name, other in known.items()}
    return found


class Clock:
    "CPU seconds by what was done."
    def __init__(self): self.seconds = dict(choose=0., features=0., once=0., retrieve=0., read=0.)

    def __call__(self, what, call, *args):
        start = time.process_time()
        result = call(*args)
        self.seconds[what] += time.process_time() - start
        return result


def pick_heads(models, validation, clock):
    "The head that scores for each model, and how well it does."
    picks = {}
    for name, (model, processor) in models.items():
        for h in validation:
            clock("features", embed, model, processor, h)
        pick, mrr, best_of = clock("choose", choose, model, processor, validation)
        by_form = {form: x[0] for form, x in best_of.items()}
        picks[name] = dict(zip(PICK, pick)) | dict(reciprocal_rank=mrr, by_score=by_form)
        told = ", ".join(f"{form} {x:.3f}" for form, x in by_form.items())
        common.log(f"{name}: layer {pick[0]}, head {pick[1]}, word {pick[2]}, {pick[3]}: "
                   f"mean reciprocal rank {mrr:.3f} on val; {told}")
    return picks


def ask_haystack(models, picks, haystack, clock):
    """Every retriever and every reader on one haystack -> (marks by (retriever, reader, k), 1 for a right answer; ranks
    of the needles by model)."""
    needles, size, lists, marks, found = needles_of(haystack), len(haystack.images), {}, {}, {}
    features = {name: clock("features", embed, *model, haystack) for name, model in models.items()}
    asked = {name: tails(processor, haystack) for name, (_, processor) in models.items()}

    def marked(margins):
        return [int((m > 0) == q.answer) for m, q in zip(margins.tolist(), haystack.questions)]
    for name, model in models.items():
        pick = tuple(picks[name][k] for k in PICK)
        scores = clock("retrieve", chunk_scores, *model, features[name], asked[name], CHUNK, pick)
        found[name] = ranks(scores, needles).tolist()
        lists |= {(name, k): best(scores, k) for k in KEEP}
        marks[AT_ONCE, name, size] = marked(clock("once", answers, *model, features[name][None], asked[name]))
    lists[PERFECT, CROSS] = with_needle(needles, size, CROSS, size)
    for (retriever, k), name in itertools.product(lists, models):
        if retriever != name and k != CROSS: continue
        images = features[name][lists[retriever, k]]
        marks[retriever, name, k] = marked(clock("read", answers, *models[name], images, asked[name]))
    return marks, found


def accuracy_rows(right, size):
    "A row for each retriever, reader and k."
    against, rows = compare(right, size), []
    for (retriever, reader, k), marks in right.items():
        low, high = wilson(sum(marks), len(marks))
        read_tokens, pairs = tokens(size, 17, None if retriever == AT_ONCE else k)
        rows.append(dict(
            images=size, retriever=retriever, reader=reader, k=k, right=sum(marks), total=len(marks),
            accuracy=sum(marks)/len(marks), low=float(low), high=float(high), tokens=read_tokens, pairs=pairs,
            against=against[retriever, reader, k], marks="".join(map(str, marks))))
    return rows


def recall_row(name, size, k, needle_ranks):
    "How often the needle is among the k best images."
    found, total = sum(r < k for r in needle_ranks), len(needle_ranks)
    low, high = wilson(found, total)
    return dict(model=name, images=size, k=k, found=found, total=total, recall=found/total, low=float(low),
                high=float(high))


def tell(name, size, right, needle_ranks):
    "A line on a model at one size."
    share = lambda *key: f"{np.mean(right[key]):.2f}"
    by_k = [f"recall@{k} {np.mean(np.array(needle_ranks) < k):.2f} right {share(name, name, k)}" for k in KEEP]
    common.log(f"{size} images, {name}: at once {share(AT_ONCE, name, size)}; {', '.join(by_k)}; "
               f"perfect retriever {share(PERFECT, name, CROSS)}")


def run(models, sizes, questions, validation):
    """-> picks, ranks by model and size, and answers by size, retriever, reader and k; retriever `all at once`: every
    image; `perfect`: the needle and others at random."""
    clock, found, rows = Clock(), {}, []
    picks = pick_heads(models, validation, clock)
    for size in sizes:
        right = {}
        for haystack in common.tests((size,), questions):
            marks, needle_ranks = ask_haystack(models, picks, haystack, clock)
            for key, x in marks.items():
                right.setdefault(key, []).extend(x)
            for name, x in needle_ranks.items():
                found.setdefault((name, size), []).extend(x)
        rows += accuracy_rows(right, size)
        for name in models:
            tell(name, size, right, found[name, size])
    recall = [recall_row(name, size, k, x) for (name, size), x in found.items() for k in KEEP]
    return dict(picks=picks, recall=recall, rows=rows, cpu_seconds={k: round(v, 1) for k, v in clock.seconds.items()})


def arguments():
    "From the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small haystacks, the pair only, nothing written")
    parser.add_argument("--models", nargs="*", default=DISTILLED, metavar="NAME[=FOLDER]",
                        help="trained students, beside the embedded pair")
    parser.add_argument("--questions", type=int, default=240, metavar="N", help="at each size (default 240)")
    return parser.parse_args()


def main():
    args, start = arguments(), time.time()
    models = load_all([] if args.quick else args.models)
    sizes, questions, (size, number) = (100, 300, 1000), args.questions, (300, 96)
    if args.quick:
        sizes, questions, (size, number) = (40,), 12, (40, 12)
    result = run(models, sizes, questions, common.tests((size,), number, "val", 3))
    common.log(f"CPU seconds: {result['cpu_seconds']}")
    if args.quick: return
    common.write("retrieval", dict(chunk=CHUNK, keep=KEEP, cross=CROSS, questions=questions, **result), start)


if __name__ == "__main__":
    main()
