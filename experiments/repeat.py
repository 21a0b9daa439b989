"""Does the code make what is committed? Trainings drawn at random from data/results/students.json are made anew, in a
folder that knows no other, and compared answer by answer: data/results/repeat.json

  LAID_WORK=again python experiments/repeat.py    # six trainings, some ten minutes on two cores; goes on where it was

Other hardware or other versions round otherwise: a few answers may then differ. Another folder makes them once more."""
import random
import time

from common import RESULTS, SIZES, STUDENTS, WORK, Run, answers, command, do_all, going_on, log, tests, write
from laid_nb.store import read_json
from reproduce import HAYSTACKS, STEPS
from students import MANY, runs

NUMBER, SEED = 6, 0  # trainings, and of their draw


def committed(models: dict) -> list[tuple[Run, dict[int, str]]]:
    "Every training whose answers students.json holds, with them."
    found = []
    for who in STUDENTS:
        for name, some in runs(who, MANY, STEPS, HAYSTACKS).items():
            kept = models[who].get(name, [])
            found += [(run, {int(s): text for s, text in told.items()}) for run, told in zip(some, kept)]
    return found


def claim_folder():
    "Refuse a folder with other trainings."
    mark = WORK/"to-compare"
    if WORK.exists() and any(WORK.iterdir()) and not mark.exists():
        raise SystemExit(f"{WORK} holds other things: name an empty folder, LAID_WORK=again {command()}")
    WORK.mkdir(parents=True, exist_ok=True)
    mark.touch()


def different(before: dict[int, str], now: dict[int, str]) -> dict[int, int]:
    "Size -> questions that are right in one and wrong in the other."
    return {size: sum(a != b for a, b in zip(before[size], now[size], strict=True)) for size in before}


@going_on()
def main():
    start, data = time.time(), read_json(RESULTS/"students.json")
    claim_folder()
    drawn = random.Random(SEED).sample(committed(data["models"]), NUMBER)
    do_all([run for run, _ in drawn])
    told = []
    for run, before in drawn:
        found = different(before, answers(run))
        told.append(dict(student=run.student, row=run.name, seed=run.seed, different=found))
        log(f"{run.name} on {run.student}, seed {run.seed}: {sum(found.values())} answers differ")
    asked = sum(len(h.questions) for h in tests())
    write("repeat", dict(seed=SEED, sizes=SIZES, questions=asked, trainings=told, compared_with=data["made"]), start)


if __name__ == "__main__":
    main()
