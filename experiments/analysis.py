"What the experiments say of their answers: the paper's table, summaries for result files, a table and a figure."
import numpy as np
from matplotlib.figure import Figure

from laid_nb.accuracy import UNMEASURED, Results, from_bits, mean_relative_gain, table_markdown, wilson

PAPER_TABLE = {  # accuracy in % at 1, 5, 10, 20, 50, 100 and 150 images (paper, Table 1)
    "32B": (83.79, 79.11, 74.71, 73.34, 68.17, 62.56, 60.65),
    "7B": (80.22, 68.45, 62.19, 57.21, 54.73, 51.08, 47.43),
    "7B YaRN": (80.03, 63.78, 62.09, 55.96, 56.26, 47.96, 42.36),
    "7B SelfExtend": (78.53, 62.58, 58.69, 53.01, 50.35, 45.12, 40.12),
    "7B SFT (LoRA)": (97.78, 92.92, 85.80, 84.73, 63.10, 52.28, 43.08),
    "7B LAid": (92.83, 83.26, 80.46, 74.09, 67.04, 63.37, 60.17),
    "3B": (85.91, 65.70, 62.09, 52.16, 50.22, 47.80, 41.67),
    "3B YaRN": (86.27, 72.86, 57.79, 55.74, 52.20, 45.07, 39.97),
    "3B SelfExtend": (77.89, 64.69, 54.11, 47.95, 41.13, 35.05, 31.25),
    "3B SFT (LoRA)": (98.20, 91.88, 87.48, 68.89, 52.34, 48.01, 42.18),
    "3B LAid": (96.83, 83.34, 74.29, 63.27, 58.20, 53.91, 50.23)}
COLOURS = {"teacher": "black", "student": "0.55", "SFT (LoRA)": "C9", "SFT": "C0", "KD": "C1", "LAid": "C2",
           "LAid+": "C3", "YaRN": "C4", "SelfExtend": "C5", "log n scaling": "C6",
           "attention sorting": "C8", "small position steps": "C7", "numbered images": "0.7",
           "self-anchored": "deeppink"}  # the same in every figure


def groups(haystacks) -> dict[int, np.ndarray]:
    "For each size, the haystack of each question."
    found = {}
    for number, h in enumerate(haystacks):
        found.setdefault(len(h.images), []).extend([number]*len(h.questions))
    return {size: np.array(g) for size, g in found.items()}


def results_of(
    models: dict,  # name -> one {size: '1101…'} for each training
    haystacks: dict,  # size -> [questions] the haystack of each question, from `groups`
    base: str = "student",
    anchor: str = "teacher",
    chance: float = .5,  # accuracy of guessing
) -> Results:
    "Every statistic of answers that are kept as texts of 1 and 0."
    found = {name: from_bits(trainings, haystacks, chance) for name, trainings in models.items()}
    return Results(found, base, anchor)


def paired(
    models: dict,  # name -> answers of each training, those of equal seeds in equal places
    haystacks: dict,  # size -> [questions] the haystack of each question, from `groups`
    name: str,
    base: str,
    sizes,  # mean over these
):  # -> (difference, lower end, upper end) of accuracy, as from `Results.difference`
    "How much more one row gets right than another, over the trainings that both have."
    both = min(len(models[name]), len(models[base]))
    kept = {row: models[row][:both] for row in (name, base)}
    return results_of(kept, haystacks, base, name).difference(name, base, sizes)


def relative(results: Results, name: str) -> dict[str, float]:
    "Mean relative gain over the base, short and long (paper, Table 1)."
    by_size = [dict(zip(results.sizes.tolist(), results.accuracy[n].tolist())) for n in (results.base, name)]
    return mean_relative_gain(*by_size)


def summary(results: Results) -> dict:
    "All of it as JSON can hold it."
    return {name: _of_model(results, name) for name in results.models}


def _of_model(results, name):
    answers, sizes = results.models[name], results.sizes.tolist()
    ratio, gain = results.ratio(name), relative(results, name)
    places = dict(zip(sizes, zip(answers.correct, answers.total)))
    short = lambda values, digits=4: [None if np.isnan(x) else round(float(x), digits) for x in values]
    return dict(
        trainings=answers.trainings, accuracy=dict(zip(sizes, short(answers.accuracy))),
        interval={s: short(results.interval(name, s)) for s in sizes},
        wilson={s: short(wilson(*places[s])) for s in sizes},
        window=str(results.window(name)), ratio=str(ratio), ratio_interval=short((ratio.low, ratio.high), 3),
        closed={s: short(results.closed(name, s), 3) for s in (50, 100, 150) if s in sizes},
        short=round(gain["short"], 4), long=round(gain["long"], 4))


def markdown(results: Results, sizes, names=None) -> str:
    "Accuracy with its interval, short and long gain, window half-way and its ratio to the base's."
    rows = [[(title, "") for title in ("", *map(str, sizes), "short", "long", "window", "ratio")]]
    for name in names or results.models:
        ends = {s: results.interval(name, s) for s in sizes}
        accuracies = [_percent(results.accuracy[name][results.at(s)], *ends[s]) for s in sizes]
        gain, own = relative(results, name), name == results.base
        gains = [("" if own else f"{100*gain[k]:+.0f}%", "") for k in ("short", "long")]
        ratio = ("1", "") if own else _split(results.ratio(name))
        rows.append([(name, ""), *accuracies, *gains, _split(results.window(name)), ratio])
    return table_markdown(rows)


def _percent(value, low, high): return f"{100*value:.0f}", f"{100*low:.0f}–{100*high:.0f}"


def _split(shown):
    "A printed estimate and what stands behind it."
    text = str(shown)
    return ("", text) if text == UNMEASURED else tuple(text.split(" ", 1))


def tried_markdown(
    tried: dict[str, dict[str, float]],  # row -> size -> accuracy, as JSON keeps it; what the others are beside first
    title: str,  # of the rows
) -> str:
    "What was tried on validation haystacks, in %, and the mean of 50 images and more."
    base, sizes = next(iter(tried)), list(next(iter(tried.values())))
    lines = [f"| {title} | {' | '.join(sizes)} | mean of 50 and more |", "|:--" + "|--:"*(len(sizes) + 1) + "|"]
    for name, row in tried.items():
        mean = np.mean([row[s] for s in sizes if int(s) >= 50])
        cells = " | ".join(f"{100*row[s]:.0f}" for s in sizes)
        lines.append(f"| {'nothing more' if name == base else name} | {cells} | {100*mean:.1f} |")
    return "\n".join(lines)


def proved_markdown(
    found: dict,  # of one row of farther.json
    title: str,  # of the rows
) -> str:
    "The two best on the test haystacks: share of the gap they close by size, and points, with intervals."
    base, sizes = next(iter(found["closed"])), list(next(iter(found["closed"].values())))
    def printed(ends, form): return f"{form} [{form}, {form}]".format(*(100*x for x in ends))
    columns = [title, *(f"% of the gap at {size}" for size in sizes), "points at 50 and more", "points at 1 image",
               "trainings"]
    lines = ["| " + " | ".join(columns) + " |", "|:--" + "|--:"*(len(columns) - 1) + "|"]
    for name, closed in found["closed"].items():
        more = printed(found["difference"][name], "{:+.1f}") if name != base else ""
        cells = [*(printed(ends, "{:.0f}") for ends in closed.values()), more,
                 printed(found["at_one"][name], "{:+.1f}"), str(found["trainings"][name])]
        lines.append(f"| {'nothing more' if name == base else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(name: str) -> str:
    "A name without the levers that a panel names."
    return name.replace(" + window simulation", "").replace(" + recomposed pictures", ", recomposed")


def plot_lines(
    results: Results,
    panels: dict[str, list[str]],  # title -> names
    threshold: float | None = None,  # a dotted line; None: half-way from chance to perfect
) -> Figure:
    """Accuracy against images (the paper's Figure 1), with intervals over haystacks and trainings; recomposed pictures
    are dashed."""
    figure = Figure(figsize=(5*len(panels), 4.2), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False).flat
    for axes, (title, names) in zip(places, panels.items()):
        for name in names:
            _plot_line(axes, results, name)
        axes.axhline(2*results.half - 1, color="0.4", linestyle="--", linewidth=1)
        axes.axhline(results.half if threshold is None else threshold, color="0.4", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="images in the haystack", ylim=(.4, 1), title=title)
        axes.title.set_size(10)
        axes.set_xticks(results.sizes, [str(s) for s in results.sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.axes[0].set(ylabel="accuracy")
    return figure


def _plot_line(axes, results, name):
    colour = COLOURS[name.split(" + ")[0]]
    low, high = zip(*(results.interval(name, s) for s in results.sizes))
    axes.fill_between(results.sizes, low, high, color=colour, alpha=.1, linewidth=0)
    axes.plot(results.sizes, results.accuracy[name], "o--" if "recomposed" in name else "o-", color=colour,
              markersize=4, label=short(name))
