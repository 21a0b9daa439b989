"""Other tasks than a needle, about drawn haystacks: how many images show it, which of two comes first, and which of
four things an image shows.

No answer can be told from names alone: what is asked for or offered as an answer stands in the haystack exactly once
(to be counted: none to three times, equally often), and the answers of one haystack say nothing about each other."""
import numpy as np

from laid_nb.haystack import KINDS, OBJECTS, SPLITS, Haystack, Question, Scene, as_many, picture_haystack

FEWEST = {"single": 1, "multi": 2, "count": 3, "order": 2, "choice": 4}  # images of a haystack, for each task
CHANCE = {"single": .5, "multi": .5, "count": .25, "order": .5, "choice": .25}  # what guessing gets right
COUNTS = ("0", "1", "2", "3")
ROOM = 3  # objects of an image
MOST = 10  # questions of a haystack, so that enough names are left for the rest of it
TAUGHT = 4  # questions of a training haystack: a single needle must not drown the others


def emptiest(
    rng: np.random.Generator,
    images: list[list[str]],  # names in each
    number: int,
    without: int = -1,  # an image that does not count
) -> list[int]:
    "The images with fewest objects, those with as many by chance."
    order = [int(i) for i in rng.permutation(len(images)) if i != without]
    return sorted(order, key=lambda i: len(images[i]))[:number]


def put(images: list[list[str]], places, names):
    "One name into each place."
    for i, name in zip(places, names):
        images[i].append(name)


def count_questions(rng, images, names, number) -> list[Question]:
    "How many images show it? None to three, each as often; the counts of a haystack do not depend on each other."
    made = []
    for _ in range(min(number, len(images))):
        name, places = names.pop(), emptiest(rng, images, int(rng.integers(len(COUNTS))))
        put(images, places, [name]*len(places))
        asked = f"For all images with the {name}, how many are there?"
        made.append(Question(name, "", "count", str(len(places)), tuple(sorted(places)), asked, COUNTS))
    return made


def order_questions(rng, images, names, number) -> list[Question]:
    "Which of two comes first? Each is in one image, named first or second by chance."
    made = []
    for _ in range(min(number, len(images))):
        places, pair = sorted(emptiest(rng, images, 2)), [names.pop(), names.pop()]
        put(images, places, pair)
        one, other = pair if rng.random() < .5 else reversed(pair)
        asked, choices = f"Which comes first: the {one} or the {other}?", (f"a {one}", f"a {other}")
        made.append(Question(one, other, "order", f"a {pair[0]}", tuple(places), asked, choices))
    return made


def choice_questions(rng, images, names, number) -> list[Question]:
    "What does the image with X show, of four things? Each is in one image, the other three not in that of X."
    needles = [int(i) for i in rng.permutation(len(images))[:min(number, len(images)//2)]]
    pairs = [(names.pop(), names.pop()) for _ in needles]
    for needle, pair in zip(needles, pairs):
        images[needle] += pair
    return [one_of_four(rng, images, names, needle, *pair) for needle, pair in zip(needles, pairs)]


def one_of_four(rng, images, names, needle, anchor, right) -> Question:
    "A question about a needle that is there; the wrong answers are put into three other images."
    others = [names.pop() for _ in range(3)]
    put(images, emptiest(rng, images, 3, needle), others)
    a, b, c, d = said = [[right, *others][i] for i in rng.permutation(4)]
    asked = f"Choose the {a}, the {b}, the {c} or the {d}. For the image with the {anchor}, what is there?"
    return Question(anchor, right, "choice", f"a {right}", (needle,), asked, tuple(f"a {name}" for name in said))


MADE = {"count": count_questions, "order": order_questions, "choice": choice_questions}
TASKS = (*KINDS, *MADE)
TURNS = (*TASKS, "multi")  # of a mixed training; several needles come twice, as their haystacks have one question


def fill(rng, images, pool, least):
    "Other names for images that hold fewer than `least` to three objects."
    for held in images:
        more = int(rng.integers(least, ROOM + 1)) - len(held)
        held += [pool[i] for i in rng.choice(len(pool), max(more, 0), replace=False)]


def task_haystack(
    seed: int,  # of everything in the haystack
    n_images: int,
    n_questions: int,  # at most
    split: str,  # "train", "val" or "test"
    kind: str,  # one of TASKS
) -> Haystack:
    "A drawn haystack of one task. ValueError for fewer images than its questions need."
    if n_images < FEWEST[kind]: raise ValueError(f"{kind} needs at least {FEWEST[kind]} images, not {n_images}")
    if kind in KINDS: return picture_haystack(seed, n_images, n_questions, split, kind)
    rng = np.random.default_rng([seed, n_images, SPLITS.index(split), TASKS.index(kind)])
    names, images = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))], [[] for _ in range(n_images)]
    questions = MADE[kind](rng, images, names, min(n_questions, MOST))
    fill(rng, images, names[:24], ROOM if kind == "choice" else 1)  # else a full image would tell of an answer
    scenes = [Scene(tuple(held[i] for i in rng.permutation(len(held))), int(rng.integers(2**31)), split)
              for held in images]
    return Haystack(tuple(scenes), tuple(questions), f"{split}-{kind}-{n_images}-{seed}")


def task_test(
    sizes,  # numbers of images
    questions: int,  # at each size
    seed: int,
    split: str,
    kind: str,  # one of MADE
) -> list[Haystack]:
    "Test haystacks, as `drawn_test` makes them of needles."
    return as_many(sizes, questions, lambda i, n, left: task_haystack(seed*100_000 + i, n, left, split, kind))


def mixed_training(
    sizes,  # numbers of images
    number: int,  # of haystacks
    seed: int,
) -> list[Haystack]:
    "Training haystacks of all tasks by turns, and of each by turns of the sizes that it can have."
    def one(i):
        kind, turn = TURNS[i % len(TURNS)], i//len(TURNS)
        fit = [n for n in sizes if n >= FEWEST[kind]]
        return task_haystack(seed*100_000 + i, fit[turn % len(fit)], TAUGHT, "train", kind)
    return [one(i) for i in range(number)]
