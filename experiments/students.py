"""Students that fail differently, under one teacher: what each method does to each of them, and what Eq. 7 adds:
data/results/students.json

  python experiments/students.py            # goes on where it was stopped; finds the trainings of self_anchor.py
  python experiments/students.py --quick    # a smoke test
  python experiments/students.py --done     # write what has been made so far, train nothing
"""
import sys
import time

import training_free
import why
from ablation import RATES
from analysis import groups, results_of, summary
from asking import prompts
from common import (
    QUESTIONS,
    RESULTS,
    SIMULATION,
    SIZES,
    STUDENTS,
    Run,
    answers,
    answers_of,
    going_on,
    load,
    made_blocks,
    spent,
    tests,
    write,
)
from laid_nb.store import read_json
from reproduce import HAYSTACKS, STEPS, asked_with, questions_of, settings
from self_anchor import THIN

MANY = (0, 1, 2, 3, 4)  # seeds of rows that a sentence compares
PLAIN = {  # row -> (method and rate of reproduce.py, what is beside it); all with window simulation
    "SFT": ("SFT", {}),
    "KD": ("KD", dict(recompose=.5)),
    "KD, reverse": ("KD", dict(recompose=.5, divergence="reverse")),
    "LAid": ("LAid", dict(recompose=.5))}
GAINED = {  # row -> (settings beyond those that all share, what differs in the Run)
    "SFT + gain": (dict(method="sft"), {}),
    "KD + gain": (dict(method="kd", recompose=.5), {}),
    "LAid + gain": (dict(method="laid", recompose=.5), {}),
    "LAid+": (dict(method="laid+", recompose=.5), {}),
    "self-anchored, no label": (dict(method="kd", thin=THIN, recompose=1.0, alpha=1.0),
                                dict(labels=False, anchor="student")),
    "LAid + gain + spectra": (dict(method="laid", recompose=.5, lambda_fourier=.3), {})}
FEWER = dict.fromkeys((*PLAIN, "LAid+"), 3) | {"LAid + gain + spectra": 2}  # trainings of rows beside the others


def runs(student: str, seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    """Row -> a training for each seed, with window simulation: with the gain at the rates that were chosen for LAid+,
    and without it at those that were chosen for its method."""
    chosen = read_json(RESULTS/"reproduce.json")["search"]["chosen"]
    plain = {name: (settings(method, chosen[method], True) | more, {}) for name, (method, more) in PLAIN.items()}
    def shared(how): return how | (dict(gain=True) if how["method"] != "laid+" else {}) | RATES | SIMULATION
    gained = {name: (shared(how), differs) for name, (how, differs) in GAINED.items()}
    def every(name, how, differs):
        return [Run(name, seed, how, **dict(haystacks=haystacks, steps=steps, student=student) | differs)
                for seed in seeds[:FEWER.get(name)]]
    return {name: every(name, *way) for name, way in (plain | gained).items()}


def turn(run: Run) -> tuple:
    "Place in the order of training: seed by seed; first one that keeps what the others ask the teacher, beside SFT."
    first = run.name == "LAid + gain" and run.student == "student"
    return run.seed, not first, run.settings["method"] != "sft"


def measured(student: str, rows: dict[str, list[Run]], how: dict) -> dict:
    "Row -> answers of each training; the student itself and what needs no training first, as chosen for this student."
    models = {"teacher": [answers("teacher", **how)], "student": [answers(student, **how)]}
    chosen = {method: values for method, values in training_free.chosen_for(student).items() if method != "sort"}
    for label, ask in training_free.methods(chosen).items():
        models[label] = [asked_with(f"{label} {chosen}", student, ask, how)]
    models["numbered images"] = [answers(student, ask_with=("numbered images", training_free.ask_numbered), **how)]
    return models | answers_of((), rows, **how)


def ending(student: str, questions: int) -> dict:
    "What ends a student's window: its fall from few to many images, taken apart into positions and count."
    model, processor = load(student)
    haystacks = tests((why.MANY,), questions, "test", 5)
    return why.summary(why.measure(model, processor, prompts(model, processor, haystacks, {})))["parts"]


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, MANY)
    blocks = {student: runs(student, seeds, steps, haystacks) for student in STUDENTS}
    blocks = made_blocks(blocks, done, turn, STUDENTS, **how)
    models = {student: measured(student, rows, how) for student, rows in blocks.items()}
    places = groups(tests(**how))
    write("students_quick" if quick else "students", dict(
        training_seconds=spent(*blocks.values()), steps=steps, haystacks=haystacks, seeds=seeds, thin=THIN,
        ends={student: ending(student, 12 if quick else 240) for student in STUDENTS},
        settings={name: some[0].settings for name, some in blocks["student"].items()},
        trainings={student: {name: len(some) for name, some in rows.items()} for student, rows in blocks.items()},
        summary={student: summary(results_of(found, places)) for student, found in models.items()}, models=models,
        questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
