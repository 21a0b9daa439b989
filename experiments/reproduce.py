"""Table 1 of the paper at the size of the embedded pair: every method, the same samples, steps and search, three seeds.

  python experiments/training_free.py        # first: settings of what needs no training
  python experiments/reproduce.py            # search on val, trainings, test; goes on where it was stopped
  python experiments/reproduce.py --quick    # a smoke test
"""
import argparse
import time
from functools import partial

import training_free
from analysis import groups, markdown, plot_lines, results_of, summary
from common import (
    QUESTIONS,
    RESULTS,
    SEEDS,
    SIMULATION,
    SIZES,
    Run,
    answers,
    do_all,
    going_on,
    log,
    made,
    pictures,
    shares,
    spent,
    tests,
    write,
)
from laid_nb.accuracy import Results, windows_markdown
from laid_nb.store import atomic_write, read_json

METHODS = {  # LAid and LAid+ first read what KD reads too
    "SFT (LoRA)": dict(method="sft", lora_rank=8),
    "SFT": dict(method="sft"),
    "KD": dict(method="kd"),
    "LAid": dict(method="laid"),
    "LAid+": dict(method="laid+")}
SIMULATED, RECOMPOSED = " + window simulation", " + recomposed pictures"
BEST = "LAid+" + SIMULATED + RECOMPOSED
RATES = (1e-3, 2e-3, 4e-3)  # learning rates tried for every method
FAST = ((3e-4, .03), (5e-4, .1), (1e-3, .05))  # pairs that LAid+ tries beside (rate, 5e-3): of weights, of what is new
LOWER = {"SFT": 5e-4}  # tried as well, as the smallest of the three was the best
STEPS, SEARCH_STEPS, HAYSTACKS = 260, 200, 417  # 5 epochs of 5,000 questions; length.py has 10 and 20
SHARPENED = ("SFT", "KD", "LAid+", "SFT" + SIMULATED, "LAid+" + SIMULATED, BEST)  # read with log n scaling as well
LORA = 4  # adapters take larger rates: each is multiplied by this
FIRST = {"LAid": 0, "SFT (LoRA)": 1, "SFT": 2, "KD": 4.5, "LAid+": 4.6}  # order of training


def settings(method: str, rate: float | tuple, simulated: bool, recompose: float = 0.0) -> dict:
    "Of a training; a rate may be a pair, of the student and of what is trained beside it."
    rate, *fast = rate if isinstance(rate, (tuple, list)) else (rate,)
    factor = LORA if "lora_rank" in METHODS[method] else 1
    found = METHODS[method] | dict(learning_rate=rate*factor)
    found |= SIMULATION if simulated else {"ramp": SIMULATION["ramp"]}
    if fast:
        found["mixing_learning_rate"] = fast[0]
    if recompose:
        found["recompose"] = recompose
    return found


def search(steps: int, questions: int, fast_steps: int) -> dict:
    """Each method's learning rate by its mean accuracy at 20 to 150 images on validation haystacks, window simulation
    on; LAid+'s pairs with recomposed pictures."""
    how = dict(sizes=(1, 5, 20, 50, 100, 150), questions=questions, split="val", seed=2)
    rates = {m: (*RATES, *([LOWER[m]] if m in LOWER else [])) for m in METHODS}
    runs = {(m, rate): Run(m, 0, settings(m, rate, True), steps=steps) for m in METHODS for rate in rates[m]}
    pairs = {pair: Run("LAid+", 0, settings("LAid+", pair, True, .5), steps=fast_steps) for pair in FAST}
    do_all(sorted([*runs.values(), *pairs.values()], key=lambda r: r.name != "LAid"), **how)
    measured = lambda run: shares(answers(run, **how))
    score = lambda run: sum(a for s, a in measured(run).items() if s >= 20)
    chosen = {m: max(rates[m], key=lambda rate: score(runs[m, rate])) for m in METHODS}
    return dict(
        steps=steps, fast_steps=fast_steps, seed=0, questions=questions,
        tried={m: {f"{rate:g}": measured(runs[m, rate]) for rate in rates[m]} for m in METHODS},
        pairs=[dict(rates=pair, accuracy=measured(run)) for pair, run in pairs.items()],
        chosen=chosen | {"LAid+": max(FAST, key=lambda pair: score(pairs[pair]))}, slow=chosen["LAid+"])


def runs(rates: dict, seeds: tuple, steps: int, haystacks: int) -> dict[str, list[Run]]:
    "Name -> a training for each seed."
    def make(name, method, *how):
        way = settings(method, rates[method], *how)
        return {name: [Run(name, seed, way, haystacks=haystacks, steps=steps) for seed in seeds]}
    found = {}
    for m in METHODS:
        found |= make(m, m, False)
    for m in METHODS:
        found |= make(m + SIMULATED, m, True)
    for m in ("KD", "LAid+"):
        found |= make(m + SIMULATED + RECOMPOSED, m, True, .5)
    return found


def in_order(run: Run) -> tuple:
    "Seed by seed; LAid early, and KD and LAid+, which hear the same teacher, when it is done."
    return run.seed, 4*run.name.count(" + ") + FIRST[run.name.split(" + ")[0]]


def questions_of(haystacks) -> dict:
    "For each size, the haystack of each question and the place of its needle (0 = first image)."
    found = {size: dict(haystack=g.tolist(), needle=[]) for size, g in groups(haystacks).items()}
    for h in haystacks:
        found[len(h.images)]["needle"] += [q.needles[0] for q in h.questions]
    return found


def said(results: Results) -> str:
    "The claim of the paper, and what it rests on, in numbers."
    long = [s for s in (50, 100, 150) if s in results.sizes]
    def points(a, b, sizes):
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100*x for x in results.difference(a, b, sizes)))
    gap = ", ".join(str(results.closed(BEST, s)) for s in long)
    pairs = ((BEST, "KD" + SIMULATED + RECOMPOSED), ("LAid+" + SIMULATED, "SFT" + SIMULATED),
             ("LAid" + SIMULATED, "SFT" + SIMULATED), ("LAid+", "SFT"), ("LAid", "SFT"), ("LAid", "KD"),
             (BEST, "log n scaling"), ("log n scaling", "student"))
    told = "; ".join(f"{a} against {b} {points(a, b, long)}" for a, b in pairs)
    return (f"- **{BEST}**: window {results.ratio(BEST)} times the student's; of the gap to the teacher at "
            f"{', '.join(map(str, long))} images it closes {gap}; at 1 image {points(BEST, 'student', [1])} points "
            f"against the student.\n- Points at {long[0]}–{long[-1]} images: {told}.\n")


def over_thresholds(results: Results) -> str:
    "Windows by the threshold that ends them, as 0.75 was chosen."
    names = ["teacher", "student", "log n scaling", *(m + SIMULATED for m in ("SFT", "KD", "LAid", "LAid+")), BEST]
    text = windows_markdown(results, [name for name in names if name in results.models])
    return f"Windows in images, by the accuracy that ends them (0.75 is half-way from chance to perfect):\n\n{text}"


def headline(models) -> dict[str, list[str]]:
    "The panels of the headline figure."
    pair, levers = ["teacher", "student"], [name for name in models if SIMULATED in name]
    shown = [name for name in levers if RECOMPOSED not in name or name.startswith(("KD", "LAid+"))]
    return {"as in the paper: no window simulation": pair + [name for name in models if name not in pair + levers],
            "with window simulation; dashed: and recomposed pictures": pair + shown}


def report(results: Results, name: str):
    "The table in words and the headline figure: data/results/NAME.md and NAME.png."
    parts = [markdown(results, results.sizes)]
    if len(results.sizes) > 4:
        parts += [said(results), over_thresholds(results)]
    with atomic_write(RESULTS/f"{name}.md") as part:
        part.write_text("\n".join(parts), encoding="utf-8")
    with atomic_write(RESULTS/f"{name}.png") as part:
        plot_lines(results, headline(results.models)).savefig(part, dpi=130)


def asked_with(label: str, name, ask, how: dict) -> dict[int, str]:
    "Answers of a model that is asked in another way, each picture seen once."
    seen = lambda: pictures("student", how["sizes"], how["questions"], "test", 1)
    return answers(name, ask_with=(label, lambda *a: ask(*a, features=seen())), **how)


def measure(trainings: dict[str, list[Run]], chosen: dict, how: dict) -> tuple[dict, dict]:
    "Answers of every row of the table -> (name -> one for each training, name -> those of log n scaling on top)."
    models = {name: [answers(name, **how)] for name in ("teacher", "student")}
    tried = {m: v for m, v in chosen.items() if m != "sort"}  # did nothing on val, and reads every haystack three times
    for label, ask in training_free.methods(tried).items():
        log(label)
        models[label] = [asked_with(f"{label} {chosen}", "student", ask, how)]
    models |= {label: [answers(r, **how) for r in rs] for label, rs in trainings.items()}
    log("log n scaling on top of training")
    scale = training_free.methods({"log_n": chosen["log_n"]})["log n scaling"]
    sharpen = partial(asked_with, f"log n {chosen['log_n']}", ask=scale, how=how)
    return models, {label: sharpen(trainings[label][0]) for label in SHARPENED}


@going_on()
def main(quick: bool = False, done: bool = False):
    start, name = time.time(), "reproduce_quick" if quick else "reproduce"
    sizes, questions, seeds, steps, haystacks = SIZES, QUESTIONS, SEEDS, STEPS, HAYSTACKS
    if quick:
        sizes, questions, seeds, steps, haystacks = (1, 5, 20, 50), 24, (0, 1), 4, 24
        chosen = {m: list(values[0]) for m, values in training_free.TRIED.items()}
        searched = search(steps, questions, steps)
    else:
        chosen = read_json(RESULTS/"training_free.json")["chosen"]
        searched = search(SEARCH_STEPS, 240, STEPS)
    trainings, how = runs(searched["chosen"], seeds, steps, haystacks), dict(sizes=sizes, questions=questions)
    trainings = made(trainings, done, in_order, **how)
    models, sharp = measure(trainings, chosen, how)
    results = results_of(models, groups(tests(sizes, questions)))
    write(name, dict(
        training_seconds=spent(trainings), seeds=seeds, steps=steps, haystacks=haystacks, search=searched,
        training_free=chosen, questions=questions_of(tests(sizes, questions)), summary=summary(results),
        with_log_n=sharp, runs={label: [r.id for r in rs] for label, rs in trainings.items()}, models=models), start)
    report(results, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and questions: whether everything runs")
    parser.add_argument("--done", action="store_true", help="write what has been made so far, train nothing")
    main(**vars(parser.parse_args()))
