"""How long to train: a few methods at one, two and four times the steps of the table, and SFT on long haystacks:
data/results/length.json

  python experiments/length.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/length.py --quick    # a smoke test
  python experiments/length.py --done     # write what has been made so far, train nothing
"""
import sys
import time

from analysis import groups, results_of, summary
from common import QUESTIONS, RESULTS, SIZES, Run, answers_of, going_on, made_blocks, spent, tests, write
from laid_nb.store import read_json
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

TIMES = (1, 2, 4)
WAYS = {"SFT" + SIMULATED: ("SFT", True), "LAid+" + SIMULATED + RECOMPOSED: ("LAid+", True, .5)}


def runs(rates: dict, steps: int, haystacks: int, longest: int) -> dict[int, dict[str, list[Run]]]:
    "Steps -> name -> its one training; beside them SFT on long haystacks, which short samples stand in for."
    def make(name, how, steps, **rest): return [Run(name, 0, how, haystacks=haystacks, steps=steps, **rest)]
    ways = {name: settings(method, rates[method], *rest) for name, (method, *rest) in WAYS.items()}
    found = {n*steps: {name: make(name, way, n*steps) for name, way in ways.items()} for n in TIMES}
    long = "SFT on 1–150 images"
    found[steps][long] = make(long, settings("SFT", rates["SFT"], False), steps, images=(1, longest))
    return found


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks = (2, 24) if quick else (STEPS, HAYSTACKS)
    chosen = dict.fromkeys(METHODS, 2e-3) if quick else read_json(RESULTS/"reproduce.json")["search"]["chosen"]
    points = runs(chosen, steps, haystacks, 30 if quick else 150)
    points = made_blocks(points, done, **how)
    pair = answers_of(("teacher", "student"), {}, **how)
    said = {point: answers_of((), ways, **how) for point, ways in points.items()}
    found = {point: summary(results_of(pair | ways, groups(tests(**how)))) for point, ways in said.items()}
    write("length_quick" if quick else "length", dict(
        training_seconds=spent(*points.values()), seed=0, haystacks=haystacks, summary=found, answers=said), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
