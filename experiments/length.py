"""How long to train: a few methods at one, two and four times the steps of the table, and SFT on long haystacks: data/results/length.json

  python experiments/length.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/length.py --quick    # a smoke test
  python experiments/length.py --done     # write what has been made so far, train nothing
"""
import json
import sys
import time

from common import QUESTIONS, RESULTS, SIZES, Run, answers, do_all, finished, spent, tests, write
from analysis import Results, groups
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

TIMES = (1, 2, 4)
WAYS = {"SFT" + SIMULATED: ("SFT", True), "LAid+" + SIMULATED + RECOMPOSED: ("LAid+", True, .5)}


def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks = (2, 24) if quick else (STEPS, HAYSTACKS)
    rates = dict.fromkeys(METHODS, 2e-3) if quick else json.loads((RESULTS/"reproduce.json").read_text())["search"]["chosen"]
    runs = {n*steps: {name: Run(name, 0, settings(m, rates[m], *rest), haystacks=haystacks, steps=n*steps) for name, (m, *rest) in WAYS.items()} for n in TIMES}
    runs[steps]["SFT on 1–150 images"] = Run("SFT on 1–150 images", 0, settings("SFT", rates["SFT"], False), haystacks=haystacks, images=(1, 30 if quick else 150), steps=steps)  # what short samples stand in for
    if done: runs = {n: there for n, rs in runs.items() if (there := {name: r[0] for name, r in finished({k: [r] for k, r in rs.items()}).items()})}
    do_all([r for rs in runs.values() for r in rs.values()], **how)
    pair = {name: [answers(name, **how)] for name in ("teacher", "student")}
    found = {n: Results(pair | {name: [answers(r, **how)] for name, r in rs.items()}, groups(tests(**how))).summary() for n, rs in runs.items()}
    write("length_quick" if quick else "length", dict(training_seconds=spent([r for rs in runs.values() for r in rs.values()]), seed=0, haystacks=haystacks, summary=found), start)


if __name__ == "__main__": main("--quick" in sys.argv, "--done" in sys.argv)
