"""Students that fail differently, under one teacher: what each method does to each of them, and what Eq. 7 adds:
data/results/students.json

  python experiments/students.py            # goes on where it was stopped; finds the trainings of self_anchor.py
  python experiments/students.py --quick    # a smoke test
  python experiments/students.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from functools import partial

import training_free
import why
from ablation import RATES
from analysis import groups, results_of, summary
from asking import prompts
from common import (
    QUESTIONS,
    RESULTS,
    SEEDS,
    SIMULATION,
    SIZES,
    STUDENTS,
    Run,
    answers,
    do_all,
    finished,
    going_on,
    load,
    pictures,
    spent,
    tests,
    write,
)
from laid_nb.store import read_json
from reproduce import HAYSTACKS, STEPS, questions_of
from self_anchor import THIN

WAYS = {  # row -> (settings beyond those that all share, what differs in the Run)
    "SFT + gain": (dict(method="sft"), {}),
    "KD + gain": (dict(method="kd", recompose=.5), {}),
    "LAid + gain": (dict(method="laid", recompose=.5), {}),
    "LAid+": (dict(method="laid+", recompose=.5), {}),
    "self-anchored, no label": (dict(method="kd", thin=THIN, recompose=1.0, alpha=1.0),
                                dict(labels=False, anchor="student"))}


def runs(student: str, seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Row -> a training for each seed, all with the gain, window simulation and the rates that were chosen for LAid+."
    def every(name, more, differs):
        shared = more | (dict(gain=True) if more["method"] != "laid+" else {}) | RATES | SIMULATION
        how = dict(haystacks=haystacks, steps=steps, student=student) | differs
        return [Run(name, seed, shared, **how) for seed in seeds]
    return {name: every(name, *way) for name, way in WAYS.items()}


def measured(student: str, rows: dict[str, list[Run]], how: dict) -> dict:
    "Row -> answers of each training; the student itself and log n scaling first."
    chosen = read_json(RESULTS/"training_free.json")["chosen"]["log_n"]
    scale = training_free.methods({"log_n": chosen})["log n scaling"]
    seen = pictures("student", how["sizes"], how["questions"], "test", 1)
    models = {"teacher": [answers("teacher", **how)], "student": [answers(student, **how)],
              "log n scaling": [answers(student, ask_with=(f"log n {chosen}", partial(scale, features=seen)), **how)]}
    return models | {name: [answers(run, **how) for run in some] for name, some in rows.items()}


def ending(student: str, questions: int) -> dict:
    "What ends a student's window: its fall from few to many images, taken apart into positions and count."
    model, processor = load(student)
    haystacks = tests((why.MANY,), questions, "test", 5)
    return why.summary(why.measure(model, processor, prompts(model, processor, haystacks, {})))["parts"]


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, SEEDS)
    blocks = {student: runs(student, seeds, steps, haystacks) for student in STUDENTS}
    if done:
        blocks = {student: finished(rows) for student, rows in blocks.items()}
    trainings = sorted((r for rows in blocks.values() for some in rows.values() for r in some), key=lambda r: r.seed)
    if not done:
        do_all(trainings, **how)
    models = {student: measured(student, rows, how) for student, rows in blocks.items()}
    places = groups(tests(**how))
    write("students_quick" if quick else "students", dict(
        training_seconds=spent(trainings), steps=steps, haystacks=haystacks, seeds=seeds, thin=THIN,
        ends={student: ending(student, 12 if quick else 240) for student in STUDENTS},
        settings={name: some[0].settings for name, some in blocks["student"].items()},
        trainings={student: {name: len(some) for name, some in rows.items()} for student, rows in blocks.items()},
        summary={student: summary(results_of(found, places)) for student, found in models.items()}, models=models,
        questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
