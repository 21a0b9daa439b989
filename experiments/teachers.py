"""Does it take a bigger teacher, or one of the student's own architecture? The embedded student under six anchors:
three sizes of one recipe (the teacher, `medium` and `small`), `foreign` of the same recipe with another head dimension
and another theta, `near` of another recipe, and itself: data/results/teachers.json

  python experiments/teachers.py            # goes on where it was stopped; finds the trainings of students.py
  python experiments/teachers.py --quick    # a smoke test, with the anchors that ship
  python experiments/teachers.py --done     # write what has been made so far, train nothing
"""
import sys
import time
from dataclasses import replace

from analysis import groups, results_of, summary
from common import (
    MADE,
    QUESTIONS,
    SEEDS,
    SIZES,
    WORK,
    Run,
    anchor_folder,
    answers_of,
    going_on,
    load,
    made,
    spent,
    tests,
    write,
)
from reproduce import HAYSTACKS, STEPS, questions_of
from students import runs

ANCHORS = ("medium", "foreign", "small", "near", "teacher", "student")  # in the order of training
BY_DISTANCE = dict(method="laid+", lambda_laid=0.0, mixing_init="uniform")  # Eq. 7 compares dimension by dimension
METHODS = {"foreign": ("by distance + gain", "KD + gain"), "medium": ("LAid + gain", "KD + gain", "by distance + gain")}
USUAL_METHODS = ("LAid + gain", "KD + gain")  # the first keeps what the second asks the teacher


def taught(run: Run, method: str, anchor: str) -> Run:
    "The training of `students.py`, with another anchor."
    if method != "by distance + gain": return replace(run, anchor=anchor)
    return replace(run, name=method, settings=run.settings | BY_DISTANCE, anchor=anchor)


def rows_of(anchors: tuple, seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "`method, taught by anchor` -> a training for each seed."
    found = runs("student", seeds, steps, haystacks)
    found |= {"by distance + gain": found["LAid + gain"]}
    return {f"{method}, taught by {anchor}": [taught(run, method, anchor) for run in found[method]]
            for anchor in anchors for method in METHODS.get(anchor, USUAL_METHODS)}


def parameters(name: str) -> int:
    "Of the language model."
    return sum(p.numel() for key, p in load(name)[0].named_parameters() if "visual" not in key)


def heads(name: str) -> dict:
    "Dimensions of a head, and the base of its RoPE."
    text = load(name)[0].config.text_config
    return dict(head_dim=text.hidden_size//text.num_attention_heads, theta=text.rope_parameters["rope_theta"])


def there(anchors: tuple, train: bool) -> tuple:
    "Those that can be had: with `train` all of them, and what does not ship is made before workers read it."
    if train:
        for name in set(anchors) & set(MADE):
            anchor_folder(name)
    return tuple(name for name in anchors if name not in MADE or (WORK/"made"/name).exists())


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 5, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    steps, haystacks, seeds = (3, 24, (0,)) if quick else (STEPS, HAYSTACKS, SEEDS)
    anchors = there(tuple(name for name in ANCHORS if not (quick and name in MADE)), not done)
    rows = made(rows_of(anchors, seeds, steps, haystacks), done, lambda run: run.seed, **how)
    models = answers_of(anchors, rows, **how)
    write("teachers_quick" if quick else "teachers", dict(
        training_seconds=spent(rows), steps=steps, haystacks=haystacks, seeds=seeds, by_distance=BY_DISTANCE,
        parameters={name: parameters(name) for name in anchors}, heads={name: heads(name) for name in anchors},
        summary=summary(results_of(models, groups(tests(**how)))), models=models,
        questions=questions_of(tests(**how))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
