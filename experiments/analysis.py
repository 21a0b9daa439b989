"""From right and wrong answers to accuracies, windows, ratios and shares of the gap, with intervals over haystacks and trainings."""
import numpy as np
from matplotlib.figure import Figure

from laid_nb.accuracy import HALF, Ratio, Window, interval, mean_relative_gain, redraws, wilson, window_draws

PAPER_TABLE = {  # accuracy in % at 1, 5, 10, 20, 50, 100 and 150 images (paper, Table 1)
    "32B": (83.79, 79.11, 74.71, 73.34, 68.17, 62.56, 60.65),
    "7B": (80.22, 68.45, 62.19, 57.21, 54.73, 51.08, 47.43), "7B YaRN": (80.03, 63.78, 62.09, 55.96, 56.26, 47.96, 42.36), "7B SelfExtend": (78.53, 62.58, 58.69, 53.01, 50.35, 45.12, 40.12),
    "7B SFT (LoRA)": (97.78, 92.92, 85.80, 84.73, 63.10, 52.28, 43.08), "7B LAid": (92.83, 83.26, 80.46, 74.09, 67.04, 63.37, 60.17),
    "3B": (85.91, 65.70, 62.09, 52.16, 50.22, 47.80, 41.67), "3B YaRN": (86.27, 72.86, 57.79, 55.74, 52.20, 45.07, 39.97), "3B SelfExtend": (77.89, 64.69, 54.11, 47.95, 41.13, 35.05, 31.25),
    "3B SFT (LoRA)": (98.20, 91.88, 87.48, 68.89, 52.34, 48.01, 42.18), "3B LAid": (96.83, 83.34, 74.29, 63.27, 58.20, 53.91, 50.23)}


def groups(haystacks) -> dict[int, np.ndarray]:
    "For each size, the haystack of each question."
    found = {}
    for number, h in enumerate(haystacks): found.setdefault(len(h.images), []).extend([number]*len(h.questions))
    return {size: np.array(g) for size, g in found.items()}


def bits(trainings: list[dict], size: int) -> np.ndarray:
    "Right or wrong, [trainings, questions]."
    return np.array([[c == "1" for c in found[size]] for found in trainings])


class Results:
    "Answers of several models to the same questions. `models`: name -> one {size: '1101…'} for each training."
    def __init__(self, models: dict, groups: dict, base: str = "student", anchor: str = "teacher", samples: int = 2000):
        self.models, self.groups, self.base, self.anchor = models, groups, base, anchor
        self.sizes = np.array(sorted(groups))
        self.accuracy = {name: np.array([bits(t, s).mean() for s in self.sizes]) for name, t in models.items()}  # name -> [sizes]
        self.draws = {name: np.stack([redraws(bits(t, s), groups[s], samples, int(s)) for s in self.sizes], 1) for name, t in models.items()}  # name -> [samples, sizes]

    def at(self, size): return int(np.flatnonzero(self.sizes == size)[0])

    def interval(self, name, size) -> tuple[float, float]:
        "Of an accuracy: over haystacks and trainings, and never narrower than Wilson's of as many independent questions of one training."
        i, n = self.at(size), len(self.groups[size])
        low, high = interval(self.draws[name][:, i])
        if len(self.models[name]) > 1: return low, high
        l, h = wilson(round(self.accuracy[name][i]*n), n)
        return min(low, float(l)), max(high, float(h))

    def window(self, name, threshold=HALF) -> Window:
        found, accuracy = window_draws(self.sizes, self.draws[name], threshold), self.accuracy[name]
        estimate = window_draws(self.sizes, accuracy[None], threshold)[0]
        return Window(float(estimate), *interval(found), threshold, bool((accuracy >= threshold).all()), bool(accuracy[0] < threshold), (float(self.sizes[0]), float(self.sizes[-1])))

    def ratio(self, name, threshold=HALF) -> Ratio:
        "Of the window to the base's, on the same haystacks."
        own, base = self.window(name, threshold), self.window(self.base, threshold)
        found = window_draws(self.sizes, self.draws[name], threshold)/window_draws(self.sizes, self.draws[self.base], threshold)
        return Ratio(own.size/base.size, *interval(found), "≥" if own.censored else "")

    def closed(self, name, size) -> tuple[float, float, float]:
        "Share of the gap between base and anchor that is closed, and its interval."
        i = self.at(size)
        part = lambda x: (x[name][..., i] - x[self.base][..., i])/(x[self.anchor][..., i] - x[self.base][..., i])
        return float(part(self.accuracy)), *interval(part(self.draws))

    def difference(self, name, other, sizes) -> tuple[float, float, float]:
        "Mean difference in accuracy over some sizes, and its paired interval."
        i = [self.at(s) for s in sizes]
        part = lambda x: (x[name][..., i] - x[other][..., i]).mean(-1)
        return float(part(self.accuracy)), *interval(part(self.draws))

    def relative(self, name) -> dict[str, float]:
        "Mean relative gain over the base, short and long (paper, Table 1)."
        return mean_relative_gain(*(dict(zip(self.sizes.tolist(), self.accuracy[n].tolist())) for n in (self.base, name)))

    def summary(self) -> dict:
        "All of it as JSON can hold it."
        def one(name):
            w, r, g = self.window(name), self.ratio(name), self.relative(name)
            return dict(trainings=len(self.models[name]), accuracy={int(s): round(float(a), 4) for s, a in zip(self.sizes, self.accuracy[name])}, interval={int(s): [round(x, 4) for x in self.interval(name, s)] for s in self.sizes},
                        wilson={int(s): [round(float(x), 4) for x in wilson(bits(self.models[name], s).sum(), bits(self.models[name], s).size)] for s in self.sizes},
                        window=str(w), ratio=str(r), ratio_interval=[round(r.low, 3), round(r.high, 3)], closed={s: [round(x, 3) for x in self.closed(name, s)] for s in (50, 100, 150) if s in self.sizes}, short=round(g["short"], 4), long=round(g["long"], 4))
        return {name: one(name) for name in self.models}

    def markdown(self, sizes, names=None) -> str:
        "Accuracy with its interval, short and long gain, window at 0.75 and its ratio to the base's."
        head = ["", *(str(s) for s in sizes), "short", "long", "window", "ratio"]
        lines = ["| " + " | ".join(head) + " |", "|:--" + "|--:"*(len(head) - 1) + "|"]
        small = lambda a, b: f"{a}<br><sub>{b}</sub>"
        for name in names or self.models:
            cells = [small(f"{100*self.accuracy[name][self.at(s)]:.0f}", "{:.0f}–{:.0f}".format(*(100*x for x in self.interval(name, s)))) for s in sizes]
            gain = self.relative(name)
            gains = ["", ""] if name == self.base else [f"{100*gain[k]:+.0f}%" for k in ("short", "long")]
            w, r = (str(x).split(" ", 1) for x in (self.window(name), self.ratio(name)))
            lines.append("| " + " | ".join([name, *cells, *gains, small(*w), "1" if name == self.base else small(*r)]) + " |")
        return "\n".join(lines) + "\n"


COLOURS = {"teacher": "black", "student": "0.55", "SFT (LoRA)": "C9", "SFT": "C0", "KD": "C1", "LAid": "C2", "LAid+": "C3", "YaRN": "C4", "SelfExtend": "C5", "log n scaling": "C6", "attention sorting": "C8"}  # the same in every figure


def short(name: str) -> str:
    "A name without the levers that a panel names."
    return name.replace(" + window simulation", "").replace(" + recomposed pictures", ", recomposed")


def plot_lines(
    results: Results,
    panels: dict[str, list[str]],  # title -> names
    threshold: float = HALF,
) -> Figure:
    "Accuracy against images (the paper's Figure 1), with intervals over haystacks and trainings; recomposed pictures are dashed."
    figure = Figure(figsize=(5*len(panels), 4.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat, panels.items()):
        for name in names:
            colour = COLOURS[name.split(" + ")[0]]
            axes.fill_between(results.sizes, *np.quantile(results.draws[name], [.025, .975], 0), color=colour, alpha=.1, linewidth=0)
            axes.plot(results.sizes, results.accuracy[name], "o--" if "recomposed" in name else "o-", color=colour, markersize=4, label=short(name))
        axes.axhline(.5, color="0.4", linestyle="--", linewidth=1)
        axes.axhline(threshold, color="0.4", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="images in the haystack", ylim=(.4, 1), title=title)
        axes.title.set_size(10)
        axes.set_xticks(results.sizes, [str(s) for s in results.sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.axes[0].set(ylabel="accuracy")
    return figure
