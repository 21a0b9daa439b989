"""How many labels does each method need? Labelled haystacks 0 to all, a share of the labels wrong:
data/results/labels.json

  python experiments/labels.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/labels.py --quick    # a smoke test
  python experiments/labels.py --done     # write what has been made so far, train nothing
"""
import sys
import time

from analysis import groups, results_of, summary
from common import QUESTIONS, RESULTS, Run, answers_of, going_on, made_blocks, spent, tests, write
from laid_nb.store import read_json
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

SIZES = (1, 20, 50, 100, 150)
COUNTS = (60, 200)  # labelled haystacks, besides none and all
FLIPPED = .15  # share of wrong labels
WAYS = {
    "SFT": ("SFT", False),
    "SFT" + SIMULATED: ("SFT", True),
    "KD" + SIMULATED + RECOMPOSED: ("KD", True, .5),
    "LAid+" + SIMULATED: ("LAid+", True),
    "LAid+" + SIMULATED + RECOMPOSED: ("LAid+", True, .5)}


def runs(rates: dict, steps: int, haystacks: int, counts: tuple) -> dict[str, dict[str, list[Run]]]:
    "Point -> name -> its one training. Without labels the teacher's answers have the whole weight."
    def every(**how):
        ways = {name: settings(method, rates[method], *rest) for name, (method, *rest) in WAYS.items()}
        return {name: [Run(name, 0, way, steps=steps, **how)] for name, way in ways.items()}
    points = {str(n): every(haystacks=n) for n in (*counts, haystacks)}
    points[f"{haystacks}, {FLIPPED:.0%} wrong"] = every(haystacks=haystacks, flipped=FLIPPED)
    def alone(run):
        return Run(run.name, 0, run.settings | dict(alpha=1.0), haystacks=haystacks, steps=steps, labels=False)
    taught = {name: [alone(run)] for name, [run] in points[str(haystacks)].items() if "SFT" not in name}
    return {"0": taught} | points


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, counts = (3, 24, (16,)) if quick else (STEPS, HAYSTACKS, COUNTS)
    chosen = dict.fromkeys(METHODS, 2e-3) if quick else read_json(RESULTS/"reproduce.json")["search"]["chosen"]
    points = runs(chosen, steps, haystacks, counts)
    points = made_blocks(points, done, **how)
    pair = answers_of(("teacher", "student"), {}, **how)
    said = {point: answers_of((), ways, **how) for point, ways in points.items()}
    found = {point: summary(results_of(pair | ways, groups(tests(**how)))) for point, ways in said.items()}
    write("labels_quick" if quick else "labels", dict(
        training_seconds=spent(*points.values()), steps=steps, seed=0, summary=found, answers=said), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
