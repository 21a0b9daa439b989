"""Can a student be its own anchor? The frozen student reads a thinned haystack and teaches the student that reads the
crowd, with labels and without: data/results/self_anchor.json

  python experiments/self_anchor.py            # goes on where it was stopped
  python experiments/self_anchor.py --quick    # a smoke test
  python experiments/self_anchor.py --done     # write what has been made so far, train nothing
"""
import sys
import time

from ablation import RATES
from analysis import groups, results_of, summary
from common import QUESTIONS, SEEDS, SIMULATION, SIZES, Run, answers_of, going_on, made, spent, tests, write
from reproduce import HAYSTACKS, STEPS, questions_of

THIN = -3.0  # log of how often an image counts that nobody asks about; chosen on validation haystacks, seed 0
WAYS = {  # row -> (who teaches, settings beyond those that all share, labels)
    "student itself, thinned, no label": ("student", dict(thin=THIN, recompose=1.0, alpha=1.0), False),
    "student itself, thinned": ("student", dict(thin=THIN, recompose=.5), True),
    "student itself": ("student", dict(recompose=.5), True),
    "teacher": ("teacher", dict(recompose=.5), True),
    "teacher, thinned": ("teacher", dict(thin=THIN, recompose=.5), True)}


def runs(seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Row -> a training for each seed: KL and gain, at the rates that were chosen for LAid+, with window simulation."
    shared = dict(method="kd", gain=True) | RATES | SIMULATION
    def every(name, anchor, more, labels):
        how = dict(haystacks=haystacks, steps=steps, labels=labels, anchor=anchor)
        return [Run(name, seed, shared | more, **how) for seed in seeds]
    return {name: every(name, *way) for name, way in WAYS.items()}


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, SEEDS)
    rows = {f"taught by {name}": some for name, some in runs(seeds, steps, haystacks).items()}
    rows = made(rows, done, **how)
    models = answers_of(("teacher", "student"), rows, **how)
    results = results_of(models, groups(tests(**how)))
    write("self_anchor_quick" if quick else "self_anchor", dict(
        training_seconds=spent(rows), steps=steps, haystacks=haystacks, seeds=seeds, thin=THIN,
        settings={name.removeprefix("taught by "): some[0].settings for name, some in rows.items()},
        summary=summary(results), models=models, questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
