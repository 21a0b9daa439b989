"""A fair chance for Eq. 7, on two students that nobody made short-sighted: its settings, one at a time, on validation
haystacks, all with the gain, window simulation, recomposed pictures and the rates of LAid+; then the best of them and
KD + gain over several trainings, on the test haystacks; and both again for four times the steps, and on from where
KD + gain has come: data/results/eq7.json

  python experiments/eq7.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/eq7.py --quick    # a smoke test
  python experiments/eq7.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from dataclasses import replace

from analysis import groups, results_of, summary
from common import (
    QUESTIONS,
    SEEDS,
    SIZES,
    Run,
    answers,
    answers_of,
    going_on,
    made,
    made_blocks,
    nothing_made,
    shares,
    spent,
    tests,
    write,
)
from reproduce import HAYSTACKS, STEPS
from students import runs

WHO, WITHOUT, PLAIN = ("near", "small"), "KD + gain", "LAid + gain"
AT_NEEDLE = "queries of questions, keys of images asked about"
TRIED = {  # row -> what differs from `PLAIN`
    "last layer, weight 0.3": {},
    "needle layers": dict(layers="needle"),
    "all, by depth": dict(layers="depth"),  # layers="best" pairs them in the same way here
    "weight 0.1": dict(lambda_laid=.1),
    "weight 1": dict(lambda_laid=1.0),
    "weight 10": dict(lambda_laid=10.0),
    "by band": dict(form="band"),
    "complex": dict(form="complex"),
    "free": dict(constraint="free"),
    "uniform start": dict(mixing_init="uniform")}
CHOOSE = dict(sizes=(1, 20, 50, 100, 150), questions=240, split="val", seed=3)  # of `tests`


def tried(who: str, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Row -> its one training; the one without Eq. 7 first."
    known = runs(who, (0,), steps, haystacks)
    plain = known[PLAIN][0]
    rows = {name: [replace(plain, settings=plain.settings | what)] for name, what in TRIED.items()}
    return {WITHOUT: known[WITHOUT]} | rows | {AT_NEEDLE: [replace(plain, where="needle")]}


def score(run: Run, how: dict, least: int = 20) -> float:
    "Mean accuracy at that many images and more."
    found = [a for size, a in shares(answers(run, **how)).items() if size >= least or len(how["sizes"]) < 3]
    return sum(found)/len(found)


def proved(who: str, best: Run, seeds: tuple) -> dict[str, list[Run]]:
    "The best setting of Eq. 7 and what it is compared with, a training for each seed."
    without = runs(who, seeds, best.steps, best.haystacks)[WITHOUT]
    return {WITHOUT: without, "Eq. 7": [replace(best, seed=seed) for seed in seeds]}


def later(who: str, best: Run, seeds: tuple) -> dict[str, dict[str, list[Run]]]:
    "Eq. 7 and what it is compared with: longer, and aligned only when KL has settled."
    rows = proved(who, best, seeds)
    longer = {name: [replace(run, steps=4*run.steps) for run in some] for name, some in rows.items()}
    def on(run, first): return replace(run, start=first)
    after = {name: list(map(on, some, rows[WITHOUT])) for name, some in rows.items()}
    return {"four times the steps": longer, "after KL has settled": after}


def compared(who: str, rows: dict[str, list[Run]], how: dict) -> dict:
    "Summary of a student's rows on the test haystacks, and the paired difference that Eq. 7 makes."
    models = {"teacher": [answers("teacher", **how)], "student": [answers(who, **how)]}
    models |= answers_of((), rows, **how)
    results = results_of(models, groups(tests(**how)))
    long = [s for s in results.sizes if s >= 50] or results.sizes.tolist()
    return dict(summary=summary(results), difference=results.difference("Eq. 7", WITHOUT, long),
                trainings={name: len(some) for name, some in rows.items()})


def found(who: str, rows: dict[str, list[Run]], seeds: tuple, choose: dict, how: dict, done: bool) -> tuple:
    "-> (everything that is said of a student, all of its trainings)."
    rows = made(rows, done, needs=(WITHOUT,), **choose)
    if len(rows) < 2: raise nothing_made()
    scores = {name: score(some[0], choose) for name, some in rows.items()}
    best = max((name for name in rows if name != WITHOUT), key=scores.get)
    proof = made(proved(who, rows[best][0], seeds), done, needs=(WITHOUT, "Eq. 7"), **how)
    more = later(who, rows[best][0], seeds[:2])
    more = made_blocks({"proof": proof} | more, done, **how)
    more = {name: pair for name, pair in more.items() if name != "proof" and len(pair) == 2}
    said = dict(tried=scores, best=best) | compared(who, proof, how)
    said["later"] = {name: compared(who, pair, how) for name, pair in more.items()}
    return said, (rows, proof, *more.values())


@going_on()
def main(quick: bool = False, done: bool = False):
    start, choose = time.time(), CHOOSE | (dict(sizes=(1, 5), questions=24) if quick else {})
    how = dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, SEEDS)
    said, trainings = {}, []
    for who in WHO[:1] if quick else WHO:
        rows = dict(list(tried(who, steps, haystacks).items())[:3 if quick else None])
        said[who], blocks = found(who, rows, seeds, choose, how, done)
        trainings += blocks
    write("eq7_quick" if quick else "eq7", dict(
        training_seconds=spent(*trainings), steps=steps, chosen_on=choose, seeds=seeds, students=said), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
