"""What a result costs: methods at several lengths of training on the embedded student, each with its own schedule, and
what their steps cost: data/results/budget.json. The two rows that differ by Eq. 7 alone are trained for four times the
steps of the table as well.

  python experiments/budget.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/budget.py --quick    # a smoke test
  python experiments/budget.py --done     # write what has been made so far, train nothing but the steps that are timed
"""
import sys
import time

from analysis import groups, results_of
from common import SEEDS, Run, answers_of, going_on, log, made_blocks, pair, spent, tests, write
from laid_nb.accuracy import Results, interval
from reproduce import HAYSTACKS, STEPS, questions_of
from step_cost import EPOCH, costs
from students import runs

EQ7 = ("LAid + gain", "KD + gain")
ROWS = (*EQ7, "SFT + gain", "self-anchored, no label", "KD", "SFT", "LAid", "LAid+")  # in the order of training
BUDGETS, LONGEST = (65, 520, 16, STEPS), 4*STEPS  # steps; the longest for EQ7
EXAM = dict(sizes=(1, 50, 100, 150), questions=240)  # of `tests`
MARGIN = .02  # below its plateau a row has come to its result


def rows_of(budgets: tuple, longest: int, haystacks: int) -> dict[int, dict[str, list[Run]]]:
    "Steps -> row -> its training."
    every = {steps: runs("student", SEEDS[:1], steps, haystacks) for steps in (*budgets, longest)}
    return {steps: {name: rows[name] for name in (EQ7 if steps == longest else ROWS)} for steps, rows in every.items()}


def whole(cost: dict, seen: dict, anchor: str | None, steps: int, haystacks: int) -> dict:
    """What a training costs: pictures, drawn and seen by the student's tower and the anchor's (None: there is none),
    what comes before the first step, and the steps."""
    more = seen[anchor] if anchor else dict(flops=0., seconds=0.)
    teacher = steps*cost["teacher_flops"] + haystacks*more["flops"]
    own = steps*cost["student_flops"] + haystacks*seen["alone"]["flops"] + cost["start_flops"]
    once = haystacks*(seen["alone"]["seconds"] + more["seconds"]) + cost["start_seconds"]
    return dict(teacher_flops=teacher, flops=teacher + own, seconds=once + steps*cost["seconds"])


def accuracy(results: Results, name: str, sizes: list[int]) -> dict:
    "Mean over some sizes, with its interval over haystacks."
    places = [results.at(size) for size in sizes]
    low, high = interval(results.draws[name][:, places].mean(1))
    return dict(accuracy=float(results.accuracy[name][places].mean()), interval=[low, high])


def named(name: str, steps: int) -> str: return f"{name}, {steps} steps"


def points_of(results: Results, points: dict, cost: dict, haystacks: int) -> dict[str, list[dict]]:
    "Row -> what came of each budget, and what it cost, the smallest first."
    long, found = [s for s in results.sizes.tolist() if s > 1], {}
    for steps, ways in sorted(points.items()):
        for name, (run, *_) in ways.items():
            anchor = None if run.settings["method"] == "sft" else run.anchor
            price = whole(cost["steps"][name], cost["pictures"], anchor, steps, haystacks)
            found.setdefault(name, []).append(dict(steps=steps) | accuracy(results, named(name, steps), long) | price)
    return found


def arrived(row: list[dict]) -> dict:
    "The smallest budget that comes within MARGIN of the best of a row; after it, none of the larger ones falls below."
    plateau = max(point["accuracy"] for point in row)
    short = [i for i, point in enumerate(row) if point["accuracy"] < plateau - MARGIN - 1e-9]
    first = next(i for i, point in enumerate(row) if i not in short)
    return dict(row[first], plateau=plateau, last=first == len(row) - 1)


def differences(results: Results, points: dict) -> dict[int, list[float]]:
    "Steps -> what Eq. 7 adds to KD + gain in long haystacks, with its interval over haystacks, where both are there."
    long = [s for s in results.sizes.tolist() if s > 1]
    both = sorted(steps for steps, ways in points.items() if set(EQ7) <= set(ways))
    return {steps: results.difference(*(named(name, steps) for name in EQ7), long) for steps in both}


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20), questions=24) if quick else EXAM
    budgets, longest, haystacks = ((2, 3), 4, 24) if quick else (BUDGETS, LONGEST, HAYSTACKS)
    points = rows_of(budgets, longest, haystacks)
    wanted = {name: run for name, (run,) in points[budgets[0]].items()}
    planned = sum(map(len, points.values()))
    points = made_blocks(points, done, **how)
    log("what a step costs")
    measured = dict(haystacks=16 if quick else EPOCH, rounds=1 if quick else 3)
    cost = costs(wanted, **measured)
    models = answers_of(("teacher", "student"), {}, **how)
    for steps, ways in points.items():
        models |= answers_of((), {named(name, steps): some for name, some in ways.items()}, **how)
    results = results_of(models, groups(tests(**how)))
    found = points_of(results, points, cost, haystacks)
    long = [s for s in how["sizes"] if s > 1]
    write("budget_quick" if quick else "budget", dict(
        training_seconds=spent(*points.values()), planned=planned, seed=SEEDS[0], haystacks=haystacks, sizes=long,
        margin=MARGIN, measured=measured | dict(threads=1, device=str(pair()["device"])), cost=cost, points=found,
        arrived={name: arrived(row) for name, row in found.items()}, eq7=differences(results, points),
        pair={name: accuracy(results, name, long) for name in ("teacher", "student")},
        models=models, questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
