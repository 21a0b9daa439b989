"""Settings of the training-free baselines, chosen for the embedded student on the split `val`:
data/results/training_free.json; and a smaller grid for the others: data/results/training_free_students.json, with
--students that one alone

    python experiments/training_free.py [--students] [--quick]

Answers are kept in WORK: a search that was stopped goes on. --quick asks little, tries little and writes no result."""
import copy
import sys
import time
from functools import partial
from statistics import fmean

from common import RESULTS, answers, going_on, log, pictures, shares, write
from laid_nb.baselines import evaluate_with
from laid_nb.capture import capture
from laid_nb.evaluate import evaluate
from laid_nb.inputs import precompute_prompts
from laid_nb.store import read_json

NAMES = {"yarn": "YaRN", "small_steps": "small position steps", "self_extend": "SelfExtend", "log_n": "log n scaling",
         "sort": "attention sorting"}
FACTORS = (1.25, 1.5, 2., 3., 4., 6., 8., 12., 16., 32., 64., 128., 256.)  # of YaRN
TRIED = {  # mildest first, as the earlier one wins a tie
    "yarn": [(f, *original) for f in FACTORS for original in ((), (1_300,))],  # trained on 1,300; the config: 32,768
    "log_n": [(slope, start) for slope in (.1, .2, .4, .6, .8, 1.2) for start in (200, 100, 50, 25)],
    "sort": [(1,), (2,)],
    "self_extend": [(group, window) for group in (2, 8) for window in (256, 32)],
    "small_steps": [(1/2,), (1/4,), (1/8,), (1/16,)]}
COARSE = {  # for students that the settings of `TRIED` were not chosen for
    "yarn": [(f, *original) for f in (1.5, 2., 4., 8., 16., 256.) for original in ((), (1_300,))],
    "log_n": [(slope, start) for slope in (.05, .1, .2, .4) for start in (200, 50)],
    "self_extend": TRIED["self_extend"],
    "small_steps": TRIED["small_steps"]}
SHARPER = (1.5, 2., 3., 4.)  # control: all logits times one number, whatever the length
SHORT = (1, 5, 10)  # images, where nothing should be lost; not chosen by


def asked(method, values, model, processor, haystacks, path=None, features=None):
    "`evaluate_with`, each picture seen once."
    if features is None:
        features = precompute_prompts(model, processor, haystacks, progress=False)
    return evaluate_with(
        method, values, model, processor, haystacks, path, batch=12, progress=False, features=features)


def sharpened(factor, model, processor, haystacks, path=None, features=None):
    "All logits times one number."
    gain = {layer: lambda query: factor*query for layer in range(model.config.get_text_config().num_hidden_layers)}
    with capture(model, [], gain=gain):
        return evaluate(model, processor, haystacks, path, batch=12, progress=False, features=features)


def methods(
    chosen: dict,  # method -> values, as "chosen" in the result
) -> dict:  # name for tables -> function of (model, processor, haystacks, path=None, features=None), -> records
    "Ways of asking."
    return {NAMES[method]: partial(asked, method, tuple(values)) for method, values in chosen.items()}


def measure(
    name: str,  # of the way of asking
    way: tuple,  # (function, *its first arguments); empty: as it is
    exam: tuple,  # (sizes, questions, split, seed)
    who: str = "student",  # one of STUDENTS
) -> dict:
    "Accuracy of a student by size, and its mean."
    how = (name, partial(*way, features=pictures("student", *exam))) if way else None
    accuracy = shares(answers(who, *exam, ask_with=how))
    told = " ".join(f"{s}:{100*a:.1f}" for s, a in accuracy.items())
    log(who, name, told, f"mean {100*fmean(accuracy.values()):.1f}")
    return dict(accuracy=accuracy, mean=fmean(accuracy.values()))


def search(
    tried: dict = TRIED,  # method -> tuples of values
    sizes: tuple = (20, 50, 100, 150), questions: int = 240, split: str = "val", seed: int = 0,  # of the haystacks
) -> dict:
    """Accuracies of the plain student, of a control and of every value of every method; of each method the value with
    the best mean over sizes."""
    rest = questions, split, seed
    def both(name, *way):
        return measure(name, way, (sizes, *rest)) | dict(short=measure(name, way, (SHORT, *rest))["accuracy"])
    def one(method, values):
        return dict(values=list(values)) | measure(f"{method} {values}", (asked, method, values), (sizes, *rest))
    found = {method: [one(method, values) for values in grid] for method, grid in tried.items()}
    chosen = {method: max(rows, key=lambda r: r["mean"])["values"] for method, rows in found.items()}
    best = {m: both(f"{m} {tuple(values)}", asked, m, tuple(values)) for m, values in chosen.items()}
    sharper = [dict(factor=f) | both(f"logits times {f}", sharpened, f) for f in SHARPER]
    return dict(split=split, seed=seed, sizes=list(sizes), questions=questions, plain=both("plain"), tried=found,
                chosen=chosen, best=best, sharper=sharper)


def search_for(
    who: str,  # one of STUDENTS
    tried: dict,  # method -> tuples of values
    exam: tuple = ((20, 50, 100, 150), 240, "val", 0),  # (sizes, questions, split, seed) of the haystacks
) -> dict:
    "The same for another student, without what is lost where nothing should be."
    def one(method, values):
        return dict(values=list(values)) | measure(f"{method} {values}", (asked, method, values), exam, who)
    found = {method: [one(method, values) for values in grid] for method, grid in tried.items()}
    chosen = {method: max(rows, key=lambda r: r["mean"])["values"] for method, rows in found.items()}
    return dict(plain=measure("plain", (), exam, who), tried=found, chosen=chosen)


def chosen_for(who: str) -> dict:
    "Method -> the values that were chosen for a student."
    found = read_json(RESULTS/"training_free_students.json")["students"][who]["chosen"]
    return found if who != "student" else read_json(RESULTS/"training_free.json")["chosen"] | found


def numbered(processor):
    "The processor with a chat template that numbers the images, `Image 1: …`, as `add_vision_id` does elsewhere."
    made, picture = copy.deepcopy(processor), "<|vision_start|><|image_pad|>"
    if picture not in processor.chat_template: raise ValueError(f"the chat template has no {picture} to be numbered")
    count = "{% set images.count = images.count + 1 %}Image {{ images.count }}: "
    made.chat_template = ("{% set images = namespace(count=0) %}"
                          + processor.chat_template.replace(picture, count + picture, 1))
    return made


def ask_numbered(model, processor, haystacks, path=None):
    "`evaluate` with numbered images, each picture seen once."
    processor = numbered(processor)
    seen = precompute_prompts(model, processor, haystacks, progress=False)
    return evaluate(model, processor, haystacks, path, batch=12, progress=False, features=seen)


def search_embedded(quick: bool):
    "The embedded student, every setting: data/results/training_free.json."
    start = time.time()
    found = search({k: v[:2] for k, v in TRIED.items()}, questions=12) if quick else search()
    log("chosen", found["chosen"])
    if not quick:
        write("training_free", found, start)


def search_students(quick: bool):
    "The other students, and what `training_free.json` is too old for: data/results/training_free_students.json."
    start, exam = time.time(), ((1, 5), 12, "val", 0) if quick else ((20, 50, 100, 150), 240, "val", 0)
    grids = {"student": {"small_steps": TRIED["small_steps"]}, "near": COARSE, "small": COARSE}
    if quick:
        grids = {who: {k: v[:1] for k, v in grid.items()} for who, grid in grids.items()}
    found = {who: search_for(who, grid, exam) for who, grid in grids.items()}
    log("chosen", {who: some["chosen"] for who, some in found.items()})
    if not quick:
        write("training_free_students", dict(exam=exam, students=found), start)


@going_on()
def main(quick: bool = False, students: bool = False, done: bool = False):
    if done: return  # both files are there, or this has not been run
    if not students:
        search_embedded(quick)
    search_students(quick)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--students" in sys.argv, "--done" in sys.argv)
