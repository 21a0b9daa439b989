"""Table 1 of the paper at the size of the embedded pair: every method, the same samples, steps and search, three seeds.

  python experiments/training_free.py        # first: settings of what needs no training
  python experiments/reproduce.py            # search on validation haystacks, trainings, test; goes on where it was stopped
  python experiments/reproduce.py --quick    # a smoke test
"""
import argparse
import json
import time

from common import QUESTIONS, RESULTS, SEEDS, SIMULATION, SIZES, Run, answers, do_all, finished, log, pictures, shares, spent, tests, write
from laid_nb.store import atomic_write
import training_free
from analysis import Results, groups, plot_lines

METHODS = {"SFT (LoRA)": dict(method="sft", lora_rank=8), "SFT": dict(method="sft"), "KD": dict(method="kd"), "LAid": dict(method="laid"), "LAid+": dict(method="laid+")}  # LAid and LAid+ first read what KD reads too
SIMULATED, RECOMPOSED = " + window simulation", " + recomposed pictures"
RATES = (1e-3, 2e-3, 4e-3)  # learning rates tried for every method
FAST = ((3e-4, .03), (5e-4, .1), (1e-3, .05))  # for LAid+, which has a second one, of mixing weights and gain: pairs tried beside (rate, 5e-3)
LOWER = {"SFT": 5e-4}  # tried as well, as the smallest of the three was the best
STEPS, SEARCH_STEPS, HAYSTACKS = 260, 200, 417  # 5 epochs of 5,000 questions; length.py has 10 and 20
SHARPENED = ("SFT", "KD", "LAid+", "SFT" + SIMULATED, "LAid+" + SIMULATED, "LAid+" + SIMULATED + RECOMPOSED)  # first trainings, read with log n scaling as well
LORA = 4  # adapters take larger rates: each is multiplied by this


def settings(method: str, rate: float | tuple, simulated: bool, recompose: float = 0.0) -> dict:
    "Of LaidConfig; a rate may be a pair, of the student and of what is trained beside it."
    rate, *fast = rate if isinstance(rate, (tuple, list)) else (rate,)
    extra = (dict(mixing_learning_rate=fast[0]) if fast else {}) | (dict(recompose=recompose) if recompose else {})
    return METHODS[method] | dict(learning_rate=rate*(LORA if "lora_rank" in METHODS[method] else 1)) | (SIMULATION if simulated else {"ramp": SIMULATION["ramp"]}) | extra


def search(steps: int, questions: int, fast_steps: int) -> dict:
    "Each method's learning rate by its mean accuracy at 20 to 150 images on validation haystacks, window simulation on; LAid+'s pairs with recomposed pictures."
    how = dict(sizes=(1, 5, 20, 50, 100, 150), questions=questions, split="val", seed=2)
    runs = {(m, rate): Run(m, 0, settings(m, rate, True), steps=steps) for m in METHODS for rate in (*RATES, *([LOWER[m]] if m in LOWER else []))}
    pairs = {pair: Run("LAid+", 0, settings("LAid+", pair, True, .5), steps=fast_steps) for pair in FAST}
    do_all(sorted([*runs.values(), *pairs.values()], key=lambda r: r.name != "LAid"), **how)
    score = lambda run: sum(a for s, a in shares(answers(run, **how)).items() if s >= 20)
    found = {m: {f"{rate:g}": shares(answers(run, **how)) for (name, rate), run in runs.items() if name == m} for m in METHODS}
    chosen = {m: max((rate for name, rate in runs if name == m), key=lambda rate: score(runs[m, rate])) for m in METHODS}
    return dict(steps=steps, fast_steps=fast_steps, seed=0, questions=questions, tried=found, pairs=[dict(rates=pair, accuracy=shares(answers(run, **how))) for pair, run in pairs.items()],
                chosen=chosen | {"LAid+": max(FAST, key=lambda pair: score(pairs[pair]))}, slow=chosen["LAid+"])


def runs(rates: dict, seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Name -> a training for each seed."
    make = lambda name, m, *how: [Run(name, seed, settings(m, rates[m], *how), haystacks=haystacks, steps=steps) for seed in seeds]
    found = {m: make(m, m, False) for m in METHODS} | {m + SIMULATED: make(m + SIMULATED, m, True) for m in METHODS}
    return found | {m + SIMULATED + RECOMPOSED: make(m + SIMULATED + RECOMPOSED, m, True, .5) for m in ("KD", "LAid+")}


FIRST = {"LAid": 0, "SFT (LoRA)": 1, "SFT": 2, "KD": 4.5, "LAid+": 4.6}


def in_order(trainings: dict[str, list[Run]]) -> list[Run]:
    "Seed by seed; LAid early, and KD and LAid+, which hear the same teacher, when it is done."
    rank = lambda name: 4*name.count(" + ") + FIRST[name.split(" + ")[0]]
    return sorted((run for runs in trainings.values() for run in runs), key=lambda run: (run.seed, rank(run.name)))


def questions_of(haystacks) -> dict:
    "For each size, the haystack of each question and the place of its needle (0 = first image)."
    found = {size: dict(haystack=g.tolist(), needle=[]) for size, g in groups(haystacks).items()}
    for h in haystacks: found[len(h.images)]["needle"] += [q.needles[0] for q in h.questions]
    return found


def said(results: Results) -> str:
    "The claim of the paper, and what it rests on, in numbers."
    ours, long = "LAid+" + SIMULATED + RECOMPOSED, [s for s in (50, 100, 150) if s in results.sizes]
    points = lambda a, b, sizes: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100*x for x in results.difference(a, b, sizes)))
    gap = lambda name: ", ".join("{:.0f}% [{:.0f}, {:.0f}]".format(*(100*x for x in results.closed(name, s))) for s in long)
    lines = [f"- **{ours}**: window {results.ratio(ours)} times the student's; of the gap to the teacher at {', '.join(map(str, long))} images it closes {gap(ours)}; at 1 image {points(ours, 'student', [1])} points against the student."]
    lines += [f"- Points at {long[0]}–{long[-1]} images: " + "; ".join(f"{a} against {b} {points(a, b, long)}" for a, b in
              ((ours, "KD" + SIMULATED + RECOMPOSED), ("LAid+" + SIMULATED, "SFT" + SIMULATED), ("LAid" + SIMULATED, "SFT" + SIMULATED), ("LAid+", "SFT"), ("LAid", "SFT"), ("LAid", "KD"), (ours, "log n scaling"), ("log n scaling", "student"))) + "."]
    return "\n".join(lines) + "\n"


def headline(models) -> dict[str, list[str]]:
    "The panels of the headline figure."
    pair, levers = ["teacher", "student"], [name for name in models if SIMULATED in name]
    return {"as in the paper: no window simulation": pair + [name for name in models if name not in pair + levers],
            "with window simulation; dashed: and recomposed pictures": pair + [name for name in levers if RECOMPOSED not in name or name.startswith(("KD", "LAid+"))]}


def main(quick: bool = False, done: bool = False):
    start, name = time.time(), "reproduce_quick" if quick else "reproduce"
    sizes, questions, seeds, steps, haystacks = ((1, 5, 20, 50), 24, (0, 1), 4, 24) if quick else (SIZES, QUESTIONS, SEEDS, STEPS, HAYSTACKS)
    chosen = {m: list(values[0]) for m, values in training_free.TRIED.items()} if quick else json.loads((RESULTS/"training_free.json").read_text())["chosen"]
    searched = search(steps, questions, steps) if quick else search(SEARCH_STEPS, 240, STEPS)
    trainings = runs(searched["chosen"], seeds, steps, haystacks)
    if done: trainings = finished(trainings)
    do_all(in_order(trainings), sizes, questions)
    how = dict(sizes=sizes, questions=questions)
    models = {"teacher": [answers("teacher", **how)], "student": [answers("student", **how)]}
    for label, ask in training_free.methods({m: v for m, v in chosen.items() if m != "sort"}).items():  # sorting did nothing on validation haystacks, and reads each question's haystack three times
        log(label)
        models[label] = [answers("student", ask_with=(f"{label} {chosen}", lambda *a: ask(*a, features=pictures("student", sizes, questions, "test", 1))), **how)]
    models |= {label: [answers(r, **how) for r in rs] for label, rs in trainings.items()}
    log("log n scaling on top of training")
    scale = training_free.methods({"log_n": chosen["log_n"]})["log n scaling"]
    sharp = {label: answers(trainings[label][0], ask_with=(f"log n {chosen['log_n']}", lambda *a: scale(*a, features=pictures("student", sizes, questions, "test", 1))), **how) for label in SHARPENED}
    results = Results(models, groups(tests(sizes, questions)))
    write(name, dict(training_seconds=spent(in_order(trainings)), seeds=seeds, steps=steps, haystacks=haystacks, search=searched, training_free=chosen, questions=questions_of(tests(sizes, questions)), summary=results.summary(),
                     with_log_n=sharp, runs={label: [r.id for r in rs] for label, rs in trainings.items()}, models=models), start)
    with atomic_write(RESULTS/f"{name}.md") as part: part.write_text(results.markdown(sizes) + "\n" + (said(results) if len(sizes) > 4 else ""), encoding="utf-8")
    with atomic_write(RESULTS/f"{name}.png") as part: plot_lines(results, headline(models)).savefig(part, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and questions: whether everything runs")
    parser.add_argument("--done", action="store_true", help="write what has been made so far, train nothing")
    main(**vars(parser.parse_args()))
