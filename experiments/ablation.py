"""What each part does: the paper's Table 3, then ours, one thing changed at a time: data/results/ablation.json

  python experiments/ablation.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/ablation.py --quick    # a smoke test
  python experiments/ablation.py --done     # write what has been made so far, train nothing
"""
import sys
import time

from analysis import groups, results_of, summary
from common import QUESTIONS, RESULTS, Run, answers_of, going_on, made_blocks, spent, tests, write
from laid_nb.store import read_json
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

SIZES = (1, 20, 50, 100, 150)
SEVERAL = (0, 1, 2)  # seeds of the rows in SHARED
LAID, PLUS, SFT = "LAid" + SIMULATED, "LAid+" + SIMULATED, "SFT" + SIMULATED
KD_RECOMPOSED = "KD" + SIMULATED + RECOMPOSED
SHARED = {  # trainings of reproduce.py: row -> its name there
    "full": LAID, "without L_LAid": "KD" + SIMULATED, "nothing": LAID, "all (LAid+)": PLUS, "SFT": SFT,
    "KD, recomposed": KD_RECOMPOSED, "LAid+, recomposed": PLUS + RECOMPOSED}
RATES = dict(learning_rate=5e-4, mixing_learning_rate=.1)  # LAid+'s, as reproduce.py chose them
LAST = ("Eq. 8", "window simulation (SFT)")  # tables whose last row the others are compared with; else the first
PARTS = {  # table -> row -> (the run that is changed, what changes)
    "Eq. 8": {
        "without L_KL": (LAID, dict(lambda_kl=0.0)),
        "without L_LAid": ("KD" + SIMULATED, {}),
        "full": (LAID, {})},
    "added to LAid": {
        "nothing": (LAID, {}),
        "spectra": (LAID, dict(lambda_fourier=.3)),
        "attention": (LAID, dict(lambda_attention=.3)),
        "attention, all distances alike": (LAID, dict(lambda_attention=.3, beta=0.0)),
        "gain": (LAID, dict(gain=True)),
        "LAid+'s rates": (LAID, RATES),
        "gain at LAid+'s rates": (LAID, RATES | dict(gain=True)),
        "all (LAid+)": (PLUS, {}),
        "hidden states": (LAID, dict(lambda_hidden=.3))},
    "gain without LAid": {
        "SFT": (SFT, {}),
        "SFT with gain": (SFT, RATES | dict(gain=True)),
        "KD, recomposed": (KD_RECOMPOSED, {}),
        "KD, recomposed, with gain": (KD_RECOMPOSED, RATES | dict(gain=True)),
        "LAid+, recomposed": (PLUS + RECOMPOSED, {})},
    "mixing": {
        "scalar, ridge start": (LAID, {}),
        "by band": (LAID, dict(form="band")),
        "complex": (LAID, dict(form="complex")),
        "uniform start": (LAID, dict(mixing_init="uniform"))},
    "layers": {
        "last": (LAID, {}),
        "all, by depth": (LAID, dict(layers="depth")),
        "needle": (LAID, dict(layers="needle"))},
    "window simulation (SFT)": {
        "none": ("SFT", {}),
        "gaps alone": (SFT, dict(max_multiplicity=1.0)),
        "multiplicity alone": (SFT, dict(max_gap=0)),
        "both, no ramp": (SFT, dict(ramp=0.0)),
        "both": (SFT, {})},
    "training images": {
        "1–20": (LAID, {}),
        "1–5": (LAID, dict(images=(1, 5))),
        "1–10": (LAID, dict(images=(1, 10))),
        "2–20": (LAID, dict(images=(2, 20))),
        "2–20, several needles": (LAID, dict(images=(2, 20), kind="multi"))}}


def changed(base: Run, what: dict) -> Run:
    "A run with other settings; `images` and `kind` say what it is trained on."
    data = {k: v for k, v in what.items() if k in ("images", "kind")}
    settings = base.settings | {k: v for k, v in what.items() if k not in data}
    return Run(base.name, base.seed, settings, base.haystacks, data.get("images", base.images), base.steps,
               kind=data.get("kind", base.kind))


def runs(rates: dict, steps: int, haystacks: int, seeds: tuple) -> dict[str, dict[str, list[Run]]]:
    "Table -> row -> a training for each seed."
    def way(name, seed):
        method = name.split(" + ")[0]
        how = settings(method, rates[method], SIMULATED in name, .5 if RECOMPOSED in name else 0.0)
        return Run(name, seed, how, haystacks=haystacks, steps=steps)
    def trainings(row, name, what):
        return [changed(way(name, seed), what) for seed in (SEVERAL if row in SHARED else seeds)]
    return {table: {row: trainings(row, *how) for row, how in rows.items()} for table, rows in PARTS.items()}


def compared(
    answers: dict,  # of one table: row -> answers of each training; and those of teacher and student
    haystacks: dict,  # from `groups`
    first: str,  # the row that the others are compared with
    sizes: list,  # at which
) -> dict:  # row -> its summary, and the paired difference
    results = results_of(answers, haystacks)
    rows = {row: said for row, said in summary(results).items() if row not in ("teacher", "student")}
    return {row: said | dict(against=first, difference=results.difference(row, first, sizes))
            for row, said in rows.items()}


def first_of(table: str, rows) -> str: return list(rows)[-1 if table in LAST else 0]


@going_on()
def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    chosen = dict.fromkeys(METHODS, 2e-3) if quick else read_json(RESULTS/"reproduce.json")["search"]["chosen"]
    tables = runs(chosen, *((2, 24) if quick else (STEPS, HAYSTACKS)), (0,))
    tables = made_blocks(tables, done, **how)
    pair = answers_of(("teacher", "student"), {}, **how)
    said = {table: answers_of((), rows, **how) for table, rows in tables.items() if len(rows) > 1}
    haystacks, long = groups(tests(**how)), [s for s in how["sizes"] if s >= 20]
    found = {table: compared(pair | rows, haystacks, first_of(table, rows), long) for table, rows in said.items()}
    write("ablation_quick" if quick else "ablation", dict(
        training_seconds=spent(*tables.values()), seeds=[0], several=list(SEVERAL), difference_at=long, steps=STEPS,
        summary=found, answers=said), start)


if __name__ == "__main__":
    main("--quick" in sys.argv, "--done" in sys.argv)
