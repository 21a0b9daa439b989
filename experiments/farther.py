"""What reaches farther than KD + gain: ways to train the embedded student, one at a time and together, on validation
haystacks; then the best of them and KD + gain over several trainings, on the test haystacks: data/results/farther.json

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
    do_all,
    finished,
    going_on,
    nothing_made,
    shares,
    spent,
    tests,
    write,
)
from eq7 import WITHOUT, score
from reproduce import HAYSTACKS, STEPS
from self_anchor import THIN
from students import MANY, runs

BEST = "the best"
WIDER = dict(max_gap=1200, max_multiplicity=64.0)
WORDS = dict(method="laid", lambda_laid=0.0, lambda_images=1.0, layers="needle", mixing_learning_rate=.1)
TRIED = {  # row -> (settings, other differences from KD + gain)
    "a thinned teacher": (dict(thin=THIN), {}),
    "gaps to 1,200, counts to 64": (WIDER, {}),
    "attention of a question's words to images": (WORDS, {}),
    "gaps to 2,400, counts to 256": (dict(max_gap=2400, max_multiplicity=256.0), {}),
    "haystacks of 1–60 images": ({}, dict(images=(1, 60))),
    "wider (1,200 and 64), attention": (WIDER | WORDS, {}),
    "haystacks of 1–60 images, wider": (WIDER, dict(images=(1, 60)))}
CHOOSE = dict(sizes=(1, 20, 50, 100, 150, 300), questions=240, split="val", seed=4)  # of `tests`


def tried(steps: int, haystacks: int) -> dict[str, Run]:
    "Row -> its training; KD + gain first."
    plain = runs("student", (0,), steps, haystacks)[WITHOUT][0]
    def way(name, settings, other): return replace(plain, name=name, settings=plain.settings | settings, **other)
    return {WITHOUT: plain} | {name: way(name, *how) for name, how in TRIED.items()}


def compared(rows: dict[str, list[Run]], how: dict) -> dict:
    """The answers of the best and of KD + gain, what share of the gap they close, and their paired difference over the
    trainings that both have."""
    models, haystacks = answers_of(("teacher", "student"), rows, **how), groups(tests(**how))
    results = results_of(models, haystacks)
    long = [size for size in results.sizes.tolist() if size >= 50] or results.sizes.tolist()
    closed = {name: {size: list(results.closed(name, size)) for size in long} for name in rows}
    return dict(summary=summary(results), closed=closed, difference=paired(models, haystacks, BEST, WITHOUT, long),
                at_one=results.difference(BEST, "student", results.sizes.tolist()[:1]), models=models)


@going_on()
def main(quick: bool = False, done: bool = False):
    start, choose = time.time(), CHOOSE | (dict(sizes=(1, 5), questions=24) if quick else {})
    how = dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, MANY)
    rows = tried(steps, haystacks)
    if done:
        rows = {name: run for name, run in rows.items() if run.folder.exists()}
        if len(rows) < 2 or WITHOUT not in rows: raise nothing_made()
    else:
        do_all(list(rows.values()), **choose)
    found = {name: shares(answers(run, **choose)) for name, run in rows.items()}
    best = max((name for name in rows if name != WITHOUT), key=lambda name: score(rows[name], choose, 50))
    proof = {WITHOUT: runs("student", seeds, steps, haystacks)[WITHOUT],
             BEST: [replace(rows[best], seed=seed) for seed in seeds]}
    if done:
        proof = finished(proof)
    else:
        do_all([run for some in proof.values() for run in some], **how)
    write("farther_quick" if quick else "farther", dict(
        training_seconds=spent([*rows.values(), *(run for some in proof.values() for run in some)]), steps=steps,
        haystacks=haystacks, chosen_on=choose, seeds=seeds, tried=found, best=best, settings=rows[best].settings,
        trainings={name: len(some) for name, some in proof.items()}, **compared(proof, how)), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
