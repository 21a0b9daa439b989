"""How many labels does each method need? Labelled haystacks 0 to all, and a share of the labels wrong: data/results/labels.json

  python experiments/labels.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/labels.py --quick    # a smoke test
  python experiments/labels.py --done     # write what has been made so far, train nothing
"""
import json
import sys
import time

from common import QUESTIONS, RESULTS, Run, answers, do_all, finished, spent, tests, write
from analysis import Results, groups
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

SIZES = (1, 20, 50, 100, 150)
COUNTS = (60, 200)  # labelled haystacks, besides none and all
FLIPPED = .15  # share of wrong labels
WAYS = {"SFT": ("SFT", False), "SFT" + SIMULATED: ("SFT", True), "KD" + SIMULATED + RECOMPOSED: ("KD", True, .5), "LAid+" + SIMULATED: ("LAid+", True), "LAid+" + SIMULATED + RECOMPOSED: ("LAid+", True, .5)}


def runs(rates: dict, steps: int, haystacks: int, counts: tuple) -> dict[str, dict[str, Run]]:
    "Point -> name -> training. Without labels the teacher's answers have the whole weight."
    make = lambda name, **how: Run(name, 0, settings(WAYS[name][0], rates[WAYS[name][0]], *WAYS[name][1:]), steps=steps, **how)
    points = {str(n): {name: make(name, haystacks=n) for name in WAYS} for n in (*counts, haystacks)}
    points[f"{haystacks}, {FLIPPED:.0%} wrong"] = {name: make(name, haystacks=haystacks, flipped=FLIPPED) for name in WAYS}
    alone = lambda run: Run(run.name, 0, run.settings | dict(alpha=1.0), haystacks=haystacks, steps=steps, labels=False)
    return {"0": {name: alone(run) for name, run in points[str(haystacks)].items() if "SFT" not in name}} | points


def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, counts = (3, 24, (16,)) if quick else (STEPS, HAYSTACKS, COUNTS)
    rates = dict.fromkeys(METHODS, 2e-3) if quick else json.loads((RESULTS/"reproduce.json").read_text())["search"]["chosen"]
    points = runs(rates, steps, haystacks, counts)
    if done: points = {point: there for point, ways in points.items() if (there := {name: rs[0] for name, rs in finished({n: [r] for n, r in ways.items()}).items()})}
    do_all([r for ways in points.values() for r in ways.values()], **how)
    models = {point: {name: answers(r, **how) for name, r in ways.items()} for point, ways in points.items()}
    pair = {name: [answers(name, **how)] for name in ("teacher", "student")}
    found = {point: Results(pair | {name: [a] for name, a in ways.items()}, groups(tests(**how))).summary() for point, ways in models.items()}
    write("labels_quick" if quick else "labels", dict(training_seconds=spent([r for ways in points.values() for r in ways.values()]), steps=steps, seed=0, summary=found), start)


if __name__ == "__main__": main("--quick" in sys.argv, "--done" in sys.argv)
