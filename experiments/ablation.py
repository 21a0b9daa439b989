"""What each part does: the paper's Table 3, then ours, one thing changed at a time: data/results/ablation.json

  python experiments/ablation.py            # goes on where it was stopped; finds the trainings of reproduce.py
  python experiments/ablation.py --quick    # a smoke test
  python experiments/ablation.py --done     # write what has been made so far, train nothing
"""
import json
import sys
import time

from common import QUESTIONS, RESULTS, Run, answers, do_all, finished, spent, tests, write
from analysis import Results, groups
from reproduce import HAYSTACKS, METHODS, RECOMPOSED, SIMULATED, STEPS, settings

SIZES = (1, 20, 50, 100, 150)
SEVERAL = (0, 1, 2)  # seeds of the rows in SHARED
SHARED = ("full", "without L_LAid", "nothing", "all (LAid+)", "SFT", "KD, recomposed", "LAid+, recomposed")  # trainings of reproduce.py
LAID, PLUS, SFT = "LAid" + SIMULATED, "LAid+" + SIMULATED, "SFT" + SIMULATED
RATES = dict(learning_rate=5e-4, mixing_learning_rate=.1)  # LAid+'s, as reproduce.py chose them
PARTS = {  # table -> row -> (the run that is changed, what changes)
    "Eq. 8": {"without L_KL": (LAID, dict(lambda_kl=0.0)), "without L_LAid": ("KD" + SIMULATED, {}), "full": (LAID, {})},
    "added to LAid": {"nothing": (LAID, {}), "spectra": (LAID, dict(lambda_fourier=.3)), "attention": (LAID, dict(lambda_attention=.3)), "attention, all distances alike": (LAID, dict(lambda_attention=.3, beta=0.0)),
                      "gain": (LAID, dict(gain=True)), "LAid+'s rates": (LAID, RATES), "gain at LAid+'s rates": (LAID, RATES | dict(gain=True)), "all (LAid+)": (PLUS, {}), "hidden states": (LAID, dict(lambda_hidden=.3))},
    "gain without LAid": {"SFT": (SFT, {}), "SFT with gain": (SFT, RATES | dict(gain=True)), "KD, recomposed": ("KD" + SIMULATED + RECOMPOSED, {}), "KD, recomposed, with gain": ("KD" + SIMULATED + RECOMPOSED, RATES | dict(gain=True)),
                          "LAid+, recomposed": (PLUS + RECOMPOSED, {})},
    "mixing": {"scalar, ridge start": (LAID, {}), "by band": (LAID, dict(form="band")), "complex": (LAID, dict(form="complex")), "uniform start": (LAID, dict(mixing_init="uniform"))},
    "layers": {"last": (LAID, {}), "all, by depth": (LAID, dict(layers="depth")), "needle": (LAID, dict(layers="needle"))},
    "window simulation (SFT)": {"none": ("SFT", {}), "gaps alone": (SFT, dict(max_multiplicity=1.0)), "multiplicity alone": (SFT, dict(max_gap=0)), "both, no ramp": (SFT, dict(ramp=0.0)), "both": (SFT, {})},
    "training images": {"1–20": (LAID, {}), "1–5": (LAID, dict(images=(1, 5))), "1–10": (LAID, dict(images=(1, 10))), "2–20": (LAID, dict(images=(2, 20))), "2–20, several needles": (LAID, dict(images=(2, 20), kind="multi"))}}


def changed(base: Run, what: dict) -> Run:
    "A run with other settings; `images` and `kind` say what it is trained on."
    data = {k: v for k, v in what.items() if k in ("images", "kind")}
    return Run(base.name, base.seed, base.settings | {k: v for k, v in what.items() if k not in data}, base.haystacks, data.get("images", base.images), base.steps, kind=data.get("kind", base.kind))


def runs(rates: dict, steps: int, haystacks: int, seeds: tuple) -> dict[str, dict[str, list[Run]]]:
    "Table -> row -> a training for each seed."
    def way(name, seed):
        method = name.split(" + ")[0]
        return Run(name, seed, settings(method, rates[method], SIMULATED in name, .5 if RECOMPOSED in name else 0.0), haystacks=haystacks, steps=steps)
    return {table: {row: [changed(way(name, seed), what) for seed in (SEVERAL if row in SHARED else seeds)] for row, (name, what) in rows.items()} for table, rows in PARTS.items()}


def main(quick: bool = False, done: bool = False):
    start, how = time.time(), dict(sizes=(1, 20) if quick else SIZES, questions=24 if quick else QUESTIONS)
    rates = dict.fromkeys(METHODS, 2e-3) if quick else json.loads((RESULTS/"reproduce.json").read_text())["search"]["chosen"]
    tables = runs(rates, *((2, 24) if quick else (STEPS, HAYSTACKS)), (0,))
    if done: tables = {table: rows for table, every in tables.items() if len(rows := finished(every)) > 1}
    do_all([r for rows in tables.values() for rs in rows.values() for r in rs], **how)
    pair = {name: [answers(name, **how)] for name in ("teacher", "student")}
    results = {table: Results(pair | {row: [answers(r, **how) for r in rs] for row, rs in rows.items()}, groups(tests(**how))) for table, rows in tables.items()}
    first = {table: list(rows)[-1] if table in ("Eq. 8", "window simulation (SFT)") else list(rows)[0] for table, rows in tables.items()}  # what the other rows are compared with
    long = [s for s in how["sizes"] if s >= 20]
    found = {table: {row: r.summary()[row] | dict(against=first[table], difference=r.difference(row, first[table], long)) for row in tables[table]} for table, r in results.items()}
    write("ablation_quick" if quick else "ablation", dict(training_seconds=spent([r for rows in tables.values() for rs in rows.values() for r in rs]), seeds=[0], several=list(SEVERAL), difference_at=long, steps=STEPS, summary=found), start)


if __name__ == "__main__": main("--quick" in sys.argv, "--done" in sys.argv)
