"""What the embedded models make of drawings and backgrounds that they were not taught, with the vision towers that ship
and with those that learned from varied drawings: data/results/art.json

  python experiments/art.py            # goes on where it was stopped; takes the trainings of students.py, makes none
  python experiments/art.py --quick    # a smoke test, no result is written
  python experiments/art.py --done     # write what has been asked so far
"""
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch

from analysis import groups, results_of
from common import WORK, Run, exam_name, going_on, log, marks, pair, tests, write
from laid_nb.anchors import Namer, anchor_config, patchify, take_varied
from laid_nb.evaluate import evaluate
from laid_nb.haystack import ART, BACKGROUNDS, Haystack, drawn_test
from laid_nb.inputs import prompt_inputs
from laid_nb.pictures import picture_hash
from laid_nb.store import data_path, load_model, read_json, slug, tower_fingerprint, write_json
from reproduce import HAYSTACKS, STEPS, questions_of
from students import runs

ROWS, SEEDS = ("KD + gain", "LAid + gain", "LAid+"), (0, 1)  # of students.py, on the student
AS_TAUGHT, TOWERS = "as taught", ("shipped", "varied")
LOOKS = {AS_TAUGHT: {}} | {name: dict(background=name) for name in BACKGROUNDS[1:]} \
    | {name: dict(art=name) for name in ART[1:]} \
    | {f"{ART[-1]} on {BACKGROUNDS[-1]}": dict(art=ART[-1], background=BACKGROUNDS[-1])}
HELD_OUT = (BACKGROUNDS[-1], ART[-1], f"{ART[-1]} on {BACKGROUNDS[-1]}")  # no tower was taught these
QUICK = (AS_TAUGHT, HELD_OUT[-1])
EXAM = dict(sizes=(1, 20, 50, 100, 150), questions=240)
LONG = (50, 100, 150)  # images over which a mean is taken


def models_of(rows: dict[str, list[Run]]) -> dict[str, list]:
    "Row -> what is asked: the pair, the distilled student that ships, and the trainings."
    return {name: [name] for name in ("teacher", "student", "distilled")} | rows


def eyes(tower: str) -> Namer:
    "The towers of the pair, run side by side on batches of pictures."
    whole = {name: load_model(name) for name in ("teacher", "student")}
    namer = Namer({name: anchor_config(name, processor.tokenizer) for name, (_, processor) in whole.items()})
    for name, (model, _) in whole.items():
        namer.towers[name].load_state_dict(with_tower(model, tower).model.visual.state_dict())
    return namer.eval()


def with_tower(model, tower: str):
    "A model as it ships, or with the varied tower."
    return take_varied(model) if tower == "varied" else model


def prompts_as_taught(haystacks: list[Haystack]) -> dict[str, dict]:
    "Prompts without pixels: they are the same whatever the pictures look like, but for the haystack's id."
    processor = pair()["processor"]
    made = {h.id: prompt_inputs(processor, h, 56) for h in haystacks}
    return {name: {k: v for k, v in inputs.items() if k != "pixel_values"} for name, inputs in made.items()}


@torch.no_grad()
def seen(namer: Namer, haystack: Haystack) -> dict[str, torch.Tensor]:  # role -> [images*4, hidden]
    "What both towers make of a haystack's pictures."
    image = pair()["processor"].image_processor
    pictures = np.stack([np.asarray(haystack.image(i)) for i in range(len(haystack.images))])
    tokens = namer(patchify(pictures, image.image_mean, image.image_std))
    return {name: x.flatten(0, 1) for name, x in tokens.items()}


def features_of(namer, plain: list[Haystack], looking: list[Haystack], prompts: dict) -> dict[str, dict]:
    "For each role what `evaluate` takes as features."
    found = {role: {} for role in namer.towers}
    for before, haystack in zip(plain, looking):
        for role, x in seen(namer, haystack).items():
            found[role][haystack.id] = prompts[before.id] | {"features": x}
    return found


def answers_file(tower: str, look: str, name, exam: dict) -> Path:
    "Where right and wrong of one model are kept."
    label = name if isinstance(name, str) else name.id
    return WORK/"answers"/f"art-{exam_name(**exam)}"/f"{mark_of(tower)}-{slug(look)}-{label}.json"


@functools.cache
def mark_of(tower: str) -> str:
    "A tower's name; another varied tower is another."
    return tower if tower == "shipped" else f"{tower}-{picture_hash(data_path('anchors', 'varied.safetensors'))[:8]}"


def ask(name, tower: str, haystacks: list[Haystack], features: dict) -> dict[int, str]:
    "Size -> a 1 for each right answer, a 0 for each wrong one."
    model, processor = load_model(name if isinstance(name, str) else str(name.folder))
    with_tower(model, tower)
    known = features["teacher" if name == "teacher" else "student"] | {"tower": tower_fingerprint(model)}
    return marks(evaluate(model, processor, haystacks, batch=12, progress=False, features=known))


def ask_all(models: dict[str, list], looks, exam: dict):
    "Every model, in every look, with both towers: one look at a time, so that its pictures are drawn once."
    plain, prompts, start = tests(**exam), None, time.time()
    for look in looks:
        for tower in TOWERS:
            open_ = [m for some in models.values() for m in some if not answers_file(tower, look, m, exam).exists()]
            if not open_: continue
            prompts = prompts or prompts_as_taught(plain)
            looking = drawn_test(exam["sizes"], exam["questions"], exam["seed"], exam["split"], **LOOKS[look])
            features = features_of(eyes(tower), plain, looking, prompts)
            for name in open_:
                write_json(answers_file(tower, look, name, exam), ask(name, tower, looking, features))
            log(f"{look}, {tower} towers: {len(open_)} models, {(time.time() - start)/60:.0f} min")


def collected(models: dict[str, list], looks, exam: dict) -> dict:
    "Tower -> look -> row -> answers of each training that were given with both towers."
    def there(look, name): return all(answers_file(t, look, name, exam).exists() for t in TOWERS)
    def read(tower, look, name):
        return {int(size): text for size, text in read_json(answers_file(tower, look, name, exam)).items()}
    found = {}
    for tower in TOWERS:
        for look in looks:
            rows = {row: [read(tower, look, m) for m in some if there(look, m)] for row, some in models.items()}
            rows = {row: some for row, some in rows.items() if some}
            if {"teacher", "student"} <= rows.keys():
                found.setdefault(tower, {})[look] = rows
    return found


def summary_of(rows: dict[str, list[dict]], places: dict) -> dict:
    "Of a look: accuracy by size with its interval; points over the student at many images, and the share of the gap."
    results, sizes = results_of(rows, places), [s for s in LONG if s in places] or sorted(places)[-1:]
    def rounded(values): return [round(float(x), 4) for x in values]
    return {name: dict(
        trainings=a.trainings, accuracy=dict(zip(results.sizes.tolist(), rounded(a.accuracy))),
        interval={s: rounded(results.interval(name, s)) for s in results.sizes.tolist()},
        over_student=rounded(results.difference(name, "student", sizes))) for name, a in results.models.items()}


@going_on()
def main(quick: bool = False, done: bool = False):
    start, size = time.time(), dict(sizes=(1, 5), questions=12) if quick else EXAM
    exam = size | dict(split="test", seed=1, kind="single")
    trained = runs("student", SEEDS, STEPS, HAYSTACKS)
    rows = {} if quick else {name: [run for run in trained[name] if run.folder.exists()] for name in ROWS}
    models, looks = models_of(rows), QUICK if quick else tuple(LOOKS)
    if not done:
        ask_all(models, looks, exam)
    found, places = collected(models, looks, exam), groups(tests(**exam))
    if not found: raise SystemExit(f"nothing has been asked in {WORK} yet: leave out --done")
    told = {tower: {look: summary_of(some, places) for look, some in looks.items()} for tower, looks in found.items()}
    if quick: return log(told["varied"][HELD_OUT[-1]]["student"]["accuracy"])
    write("art", dict(
        exam=exam, looks=LOOKS, held_out=HELD_OUT, long=LONG, summary=told, models=found,
        trainings={row: len(found["varied"][AS_TAUGHT].get(row, [])) for row in ROWS},
        questions=questions_of(tests(**exam))), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
