"""Does it take a bigger teacher? The embedded student under four: the teacher, `small` and `near`, which are no bigger
and have longer windows than it has, and itself: data/results/teachers.json

  python experiments/teachers.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/teachers.py --quick    # a smoke test
  python experiments/teachers.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from dataclasses import replace

from analysis import groups, results_of, summary
from common import (
    QUESTIONS,
    SEEDS,
    SIZES,
    STUDENTS,
    Run,
    answers_of,
    do_all,
    finished,
    going_on,
    load,
    nothing_made,
    spent,
    tests,
    write,
)
from reproduce import HAYSTACKS, STEPS, questions_of
from students import runs

METHODS, ANCHORS = ("KD + gain", "LAid + gain"), ("teacher", "small", "near", "student")


def rows_of(seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "`method, taught by anchor` -> a training for each seed."
    made = runs("student", seeds, steps, haystacks)
    return {f"{method}, taught by {anchor}": [replace(run, anchor=anchor) for run in made[method]]
            for anchor in ANCHORS for method in METHODS}


def parameters(name: str) -> int:
    "Of the language model."
    return sum(p.numel() for key, p in load(name)[0].named_parameters() if "visual" not in key)


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, SEEDS)
    rows = rows_of(seeds, steps, haystacks)
    if done:
        rows = finished(rows)
        if not rows: raise nothing_made()
    trainings = sorted((run for some in rows.values() for run in some), key=lambda run: run.seed)
    if not done:
        do_all(trainings, **how)
    models = answers_of(("teacher", *STUDENTS), rows, **how)
    write("teachers_quick" if quick else "teachers", dict(
        training_seconds=spent(trainings), steps=steps, haystacks=haystacks, seeds=seeds,
        parameters={name: parameters(name) for name in ANCHORS},
        summary=summary(results_of(models, groups(tests(**how)))), models=models,
        questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
