"""Another task than one needle: several needles ("for all images with X, do all of them contain Y?"), which nobody was
taught. Does a longer window for one needle help there, and does teaching both break the first?
data/results/tasks.json

  python experiments/tasks.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/tasks.py --quick    # a smoke test
  python experiments/tasks.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from dataclasses import replace

from analysis import groups, results_of, summary
from common import (
    QUESTIONS,
    SIZES,
    STUDENTS,
    answers_of,
    do_all,
    finished,
    going_on,
    nothing_made,
    spent,
    tests,
    write,
)
from reproduce import HAYSTACKS, STEPS
from students import runs

SEEDS = (0, 1)
TAUGHT = ("SFT + gain", "KD + gain", "LAid + gain", "self-anchored, no label")  # rows of students.py
BOTH = ("SFT + gain", "KD + gain")  # of these also a training on both tasks by turns


def rows_of(seeds: tuple, steps: int, haystacks: int) -> dict[str, list]:
    "Row -> a training for each seed."
    made = runs("student", seeds, steps, haystacks)
    both = {f"{name}, both tasks": [replace(run, kind="both", images=(1, 20)) for run in made[name]] for name in BOTH}
    return {name: made[name] for name in TAUGHT} | both


@going_on()
def main(quick: bool = False, done: bool = False):
    start, one = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    several = dict(sizes=(2, 5) if quick else (2, 5, 20, 50, 100, 150), questions=24 if quick else 240, kind="multi")
    rows = rows_of(SEEDS[:1] if quick else SEEDS, *((3, 24) if quick else (STEPS, HAYSTACKS)))
    if done:
        rows = finished(rows)
        if not rows: raise nothing_made()
    else:
        do_all([run for some in rows.values() for run in some], **one)
    exams = {"one needle": one, "several needles": several}
    models = {name: answers_of(("teacher", *STUDENTS), rows, **how) for name, how in exams.items()}
    places = {name: groups(tests(**how)) for name, how in exams.items()}
    write("tasks_quick" if quick else "tasks", dict(
        training_seconds=spent([run for some in rows.values() for run in some]), exams=exams,
        trainings={name: len(some) for name, some in rows.items()},
        summary={name: summary(results_of(found, places[name])) for name, found in models.items()}, models=models,
        haystacks={name: {s: g.tolist() for s, g in found.items()} for name, found in places.items()}), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
