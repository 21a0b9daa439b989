"""Other tasks than one needle. First several needles ("for all images with X, do all of them contain Y?"), which nobody
was taught: does a longer window for one needle help there, and does teaching both break the first? Then multiple
choice, counting and order: each start is taught all tasks by turns on 1-5 images alone, with labels, and asked about up
to 300. Does the window that was grown for the needle carry over?
data/results/tasks.json

  python experiments/tasks.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/tasks.py --quick    # a smoke test
  python experiments/tasks.py --done     # write what has been made so far, train nothing

What is taught on 1-5 images has neither window simulation nor gain: none of the means that lengthen a window here. A
start that was trained with a gain has it in its query weights, as any weight: all starts learn the same parameters at
the same rate. AdamW's steps do not know how large a weight is, so weights that the gain has made larger move less for
their size; whether a window was lost by that or by short samples is seen at the needle, before and after."""
import sys
import time
from dataclasses import replace

from analysis import groups, paired, results_of, summary
from common import (
    QUESTIONS,
    SIZES,
    STUDENTS,
    Run,
    answers_of,
    going_on,
    made_blocks,
    spent,
    tests,
    write,
)
from drawn_tasks import CHANCE, FEWEST, TURNS
from reproduce import HAYSTACKS, STEPS, settings
from students import runs

SEEDS = (0, 1)
TAUGHT = ("SFT + gain", "KD + gain", "LAid + gain", "self-anchored, no label")  # rows of students.py
BOTH = ("SFT + gain", "KD + gain")  # of these also a training on both tasks by turns
AS_THEY_ARE = ("teacher", "student")
STARTS = TAUGHT[1:]  # of a training on all tasks; beside them the teacher and the student as they are
NEW = {"multiple choice": "choice", "count": "count", "order": "order"}  # exam -> one of drawn_tasks.TASKS
KINDS = {"one needle": "single", "several needles": "multi"} | NEW
UNKNOWN = ("count", "order")  # what no model can do that was not taught it
RATE, MIXED_STEPS = 1e-3, 1040  # of a training on all tasks: the rate that was chosen for SFT
SPANS = {"one": (1,), "few": (5, 20), "many": (50, 100, 150, 300)}  # images


def mixed(who: str) -> str: return f"{who}, all tasks"  # name of a row


def mixed_runs(starts: dict[str, list], seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Row -> a training on all tasks for each seed, on 1-5 images: from a model as it is, or from the run of that seed."
    how = dict(settings=settings("SFT", RATE, False), haystacks=haystacks*len(TURNS), images=(1, 5), steps=steps,
               kind="mixed")
    def untaught(who): return [Run(mixed(who), seed, student=who, **how) for seed in seeds]
    def taught(who): return [Run(mixed(who), run.seed, start=run, **how) for run in starts[who]]
    return {mixed(who): untaught(who) for who in AS_THEY_ARE} | {mixed(who): taught(who) for who in STARTS}


def rows_of(seeds: tuple, steps: int, haystacks: int, mixed_steps: int) -> tuple[dict, dict]:
    "Row -> a training for each seed: of needles alone, and of all tasks."
    made = runs("student", seeds, steps, haystacks)
    both = {f"{name}, both tasks": [replace(run, kind="both", images=(1, 20)) for run in made[name]] for name in BOTH}
    return {name: made[name] for name in TAUGHT} | both, mixed_runs(made, seeds, mixed_steps, haystacks)


def exams_of(quick: bool) -> dict[str, dict]:
    "Exam -> what `tests` is told."
    def one(kind):
        sizes = (FEWEST[kind], 5) if quick else (FEWEST[kind], 5, 20, 50, 100, 150, 300)
        return dict(sizes=sizes, questions=24 if quick else 120, kind=kind)
    needles = {
        "one needle": dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS),
        "several needles": dict(sizes=(2, 5) if quick else (2, 5, 20, 50, 100, 150), questions=24 if quick else 240,
                                kind="multi")}
    return needles | {name: one(kind) for name, kind in NEW.items()}


def asked(name: str, how: dict, needles: dict, taught: dict) -> dict:
    "Row -> answers to an exam: of what may know the task, and of the student as it is."
    if name in UNKNOWN: return answers_of(("student",), taught, **how)
    if name not in NEW: return answers_of(("teacher", *STUDENTS), needles | taught, **how)
    return answers_of(AS_THEY_ARE, {who: needles[who] for who in TAUGHT if who in needles} | taught, **how)


def results(name: str, found: dict, places: dict):
    "Every statistic of an exam, against the student as it is."
    return results_of(found, places, "student", "teacher" if "teacher" in found else "student", CHANCE[KINDS[name]])


def more(found: dict, places: dict, row: str, base: str) -> dict:
    "How much more of a row is right than of another, with one image, few and many: value and interval."
    def over(sizes):
        if base not in AS_THEY_ARE: return paired(found, places, row, base, sizes)
        return results_of({name: found[name] for name in (row, base)}, places, base, row).difference(row, base, sizes)
    sizes = {span: [size for size in some if size in places] for span, some in SPANS.items()}
    return {span: over(some) for span, some in sizes.items() if some}


@going_on()
def main(quick: bool = False, done: bool = False):
    start, exams = time.time(), exams_of(quick)
    how = (SEEDS[:1], 3, 24, 3) if quick else (SEEDS, STEPS, HAYSTACKS, MIXED_STEPS)
    blocks = made_blocks(dict(zip(("needles", "taught"), rows_of(*how))), done, **exams["one needle"])
    needles, taught = blocks.get("needles", {}), blocks.get("taught", {})
    models = {name: asked(name, how, needles, taught) for name, how in exams.items()}
    places = {name: groups(tests(**how)) for name, how in exams.items()}
    write("tasks_quick" if quick else "tasks", dict(
        training_seconds=spent(needles, taught), exams=exams,
        chance={name: CHANCE[kind] for name, kind in KINDS.items()},
        steps=MIXED_STEPS, rate=RATE, trainings={name: len(some) for name, some in needles.items()},
        taught={name: len(some) for name, some in taught.items()},
        against_student={name: {row: more(found, places[name], row, mixed("student")) for row in taught}
                         for name, found in models.items() if mixed("student") in taught},
        against_start={row: more(models["one needle"], places["one needle"], row, row.removesuffix(mixed("")))
                       for row in taught},
        summary={name: summary(results(name, found, places[name])) for name, found in models.items()}, models=models,
        haystacks={name: {s: g.tolist() for s, g in found.items()} for name, found in places.items()}), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
