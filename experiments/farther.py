"""What reaches farther: ways to train the embedded student, one at a time and together, beside KD + gain and beside its
own thinned answers, on validation haystacks; then the two best of each and what they are compared with over several
trainings, on the test haystacks: data/results/farther.json

  python experiments/farther.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/farther.py --quick    # a smoke test
  python experiments/farther.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from dataclasses import replace

from analysis import groups, paired, results_of, summary
from common import (
    QUESTIONS,
    SIZES,
    Run,
    answers,
    answers_of,
    going_on,
    made,
    nothing_made,
    shares,
    spent,
    tests,
    write,
)
from eq7 import score
from reproduce import HAYSTACKS, STEPS
from self_anchor import THIN
from students import MANY, runs

KD, OWN = "KD + gain", "self-anchored, no label"
WIDER = dict(max_gap=1200, max_multiplicity=64.0)
WORDS = dict(method="laid", lambda_laid=0.0, lambda_images=1.0, layers="needle", mixing_learning_rate=.1)
LONGER, LONG = dict(images=(1, 60)), dict(images=(1, 150))
TRIED = {  # row of students.py -> what is tried beside it -> (settings, other differences)
    KD: {
        "a thinned teacher": (dict(thin=THIN), {}),
        "gaps to 1,200, counts to 64": (WIDER, {}),
        "attention of a question's words to images": (WORDS, {}),
        "gaps to 2,400, counts to 256": (dict(max_gap=2400, max_multiplicity=256.0), {}),
        "haystacks of 1–60 images": ({}, LONGER),
        "wider (1,200 and 64), attention": (WIDER | WORDS, {}),
        "haystacks of 1–60 images, wider": (WIDER, LONGER),
        "haystacks of 1–150 images, wider, twice the steps": (WIDER, LONG | dict(steps=2))},
    OWN: {
        "thinned more, log c = −5": (dict(thin=-5.0), {}),
        "gaps to 1,200, counts to 64": (WIDER, {}),
        "haystacks of 1–60 images": ({}, LONGER),
        "haystacks of 1–60 images, wider": (WIDER, LONGER),
        "its running average": ({}, dict(anchor="average"))}}  # steps: times those of the table
CHOOSE = dict(sizes=(1, 20, 50, 100, 150, 300), questions=240, split="val", seed=4)  # of `tests`


def tried(base: str, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Row -> its one training; the one that they are compared with first."
    plain = runs("student", (0,), steps, haystacks)[base][0]
    def way(name, settings, other):
        length = steps*other.get("steps", 1)
        return replace(plain, name=name, settings=plain.settings | settings, **other | dict(steps=length))
    return {base: [plain]} | {name: [way(name, *how)] for name, how in TRIED[base].items()}


def compared(base: str, rows: dict[str, list[Run]], how: dict) -> dict:
    """The answers of the best and of what they are compared with, what share of the gap they close, and their paired
    differences from it over the trainings that both have."""
    models, haystacks = answers_of(("teacher", "student"), rows, **how), groups(tests(**how))
    results = results_of(models, haystacks)
    long = [size for size in results.sizes.tolist() if size >= 50] or results.sizes.tolist()
    return dict(
        summary=summary(results), models=models,
        closed={name: {size: list(results.closed(name, size)) for size in long} for name in rows},
        difference={name: paired(models, haystacks, name, base, long) for name in rows if name != base},
        at_one={name: results.difference(name, "student", results.sizes.tolist()[:1]) for name in rows})


def found(base: str, steps: int, haystacks: int, seeds: tuple, choose: dict, how: dict, done: bool) -> tuple:
    "-> (everything that is said of one row and of what was tried beside it, all of the trainings)."
    rows = made(tried(base, steps, haystacks), done, needs=(base,), **choose)
    if len(rows) < 2: raise nothing_made()
    scores = {name: score(some[0], choose, 50) for name, some in rows.items() if name != base}
    best = {name: [replace(rows[name][0], seed=seed) for seed in seeds]
            for name in sorted(scores, key=scores.get, reverse=True)[:2]}
    proof = made({base: runs("student", seeds, steps, haystacks)[base]} | best, done, needs=(base,), **how)
    said = dict(
        tried={name: shares(answers(some[0], **choose)) for name, some in rows.items()},
        settings={name: some[0].settings for name, some in proof.items()},
        trainings={name: len(some) for name, some in proof.items()}, **compared(base, proof, how))
    return said, (rows, proof)


@going_on()
def main(quick: bool = False, done: bool = False):
    start, choose = time.time(), CHOOSE | (dict(sizes=(1, 5), questions=24) if quick else {})
    how = dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, MANY)
    bases = {base: found(base, steps, haystacks, seeds, choose, how, done) for base in TRIED}
    write("farther_quick" if quick else "farther", dict(
        training_seconds=spent(*(rows for _, blocks in bases.values() for rows in blocks)), steps=steps,
        haystacks=haystacks, chosen_on=choose, seeds=seeds,
        beside={base: said for base, (said, _) in bases.items()}), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
