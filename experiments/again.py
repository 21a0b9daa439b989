"""Read the answers that result files keep and write their statistics again; nothing is trained or asked.

  python experiments/again.py    # reproduce.json, .md, .png, ablation.json, labels.json, length.json, demo.json, .md

Rows that have no answers of their own, as older runs wrote them, are rows of the table where their accuracies are the
table's. Of one training the numbers hold, as there is no other to draw; the rest is left as it is, and `made` names it.
Of the demo only the numbers of right answers are kept: there each question counts as a haystack of its own, and which
questions two models have in common is not known."""
import re

from ablation import PARTS, first_of
from analysis import results_of, summary
from common import RESULTS, command, log, now
from laid_nb.accuracy import UNMEASURED, Results, count, numbers, table_cells, table_markdown
from laid_nb.demo import verdict
from laid_nb.store import atomic_write, read_json, versions, write_json
from reproduce import report

WHAT = ("intervals, windows, ratios, gaps and differences, from the answers kept: haystacks and trainings redrawn, "
        "trainings jointly over sizes")
WHY_KEPT = ("no answers are kept of the row or of the one it is compared with: trainings are redrawn at each size by "
            "itself, which makes the interval of its difference, or of its window, a little too narrow")
COUNTED = ("Intervals from the numbers of right answers: each question counts as a haystack of its own, each model is "
           "taken for itself.")
END = re.compile(r"(\S+) \[(\S+), (\S+)\]")  # of a printed window or ratio


def write_again(
    name: str,  # of the result
    data: dict,  # its file, with new statistics
    kept: list[str] = (),  # rows that stay as they were
):
    "Write a result file; `made` says that its statistics are newer than its answers."
    made = data.get("made", data)  # the demo has no "made"
    made["again"] = dict(what=WHAT, command=command(), finished=now(), numpy=versions()["numpy"])
    if kept:
        made["again"]["kept"] = dict(why=WHY_KEPT, rows=kept)
    write_json(RESULTS/f"{name}.json", data)
    log("written again:", name)


def by_number(answers: dict) -> dict[int, str]:
    "Sizes as numbers, which JSON has as text."
    return {int(size): text for size, text in answers.items()}


class Table:
    "The answers of reproduce.json, and the haystack of each of its questions."
    def __init__(self):
        self.data = read_json(RESULTS/"reproduce.json")
        self.models = {name: list(map(by_number, ts)) for name, ts in self.data["models"].items()}
        self.haystacks = {int(size): q["haystack"] for size, q in self.data["questions"].items()}

    def results(
        self,
        models: dict,  # name -> answers of each training
        sizes,  # of these
    ) -> Results:
        "Every statistic of some answers to the questions of the table."
        return results_of(models, {size: self.haystacks[size] for size in sizes})

    def answers_of(
        self,
        name: str,  # of a row of the table
        row: dict,  # a summary
    ) -> list[dict] | None:
        "Answers of the table's first trainings, if the summary is theirs."
        found = self.models.get(name, [])[:row["trainings"]]
        if len(found) < row["trainings"]: return None
        share = lambda size: sum(t[size].count("1") for t in found)/sum(len(t[size]) for t in found)
        return found if all(abs(share(int(s)) - a) < 1e-4 for s, a in row["accuracy"].items()) else None


def marked(
    row: dict,  # summary of one training whose answers are not kept
) -> dict:
    "The same numbers, ends that were cut off marked."
    window, ratio = END.fullmatch(row["window"]), END.fullmatch(row["ratio"])
    if not window or not ratio: return row
    size, low, high = window.groups()
    marks = [{"≥": "≥", "<": "≤"}.get(end[0], "") for end in (low, high)]
    ends = ", ".join(mark + end.lstrip("≥≤") for mark, end in zip(marks, ratio.groups()[1:]))
    outside = size == low == high and marks[0]
    return row | dict(window=f"{size} {UNMEASURED}" if outside else row["window"], ratio=f"{ratio[1]} [{ends}]")


def again(
    table: Table,
    rows: dict[str, dict],  # name -> summary
    answers: dict,  # name -> answers of each training, or None where they are not kept
) -> tuple[dict, Results]:  # summaries, and the results of what has answers
    "Summaries from answers; without answers the numbers stay, bounds are marked."
    sizes = [int(s) for s in next(iter(rows.values()))["accuracy"]]
    known = {name: found for name, found in answers.items() if found}
    results = table.results({name: table.models[name] for name in ("teacher", "student")} | known, sizes)
    new = summary(results)
    return {name: new[name] if name in known else marked(row) for name, row in rows.items()}, results


def tables_of_points(name: str, table: Table):
    "labels.json and length.json: point -> name -> summary."
    data = read_json(RESULTS/f"{name}.json")
    for point, rows in data["summary"].items():
        own = data.get("answers", {}).get(point, {})
        answers = {n: list(map(by_number, own[n])) if n in own else table.answers_of(n, row) for n, row in rows.items()}
        data["summary"][point] = again(table, rows, answers)[0]
    write_again(name, data)


def answers_of_part(title: str, rows: dict, own: dict, table: Table) -> dict:
    "Answers of the rows of a table of the ablation, their own or, where nothing is changed, those of the table."
    same = {row: name for row, (name, what) in PARTS[title].items() if not what}
    return {r: list(map(by_number, own[r])) if r in own else table.answers_of(same.get(r), row)
            for r, row in rows.items()}


def ablation(table: Table):
    "ablation.json: table -> row -> summary and paired difference."
    data, kept = read_json(RESULTS/"ablation.json"), []
    for title, rows in data["summary"].items():
        answers = answers_of_part(title, rows, data.get("answers", {}).get(title, {}), table)
        new, results = again(table, rows, answers)
        first = first_of(title, rows)
        for row, old in rows.items():
            known, difference = bool(answers[row] and answers[first]), old["difference"]
            if known:
                difference = results.difference(row, first, data["difference_at"])
            new[row] |= dict(against=first, difference=difference)
            if not known and max(old["trainings"], rows[first]["trainings"]) > 1:
                kept.append(f"{title}: {row}")
        data["summary"][title] = new
    write_again("ablation", data, kept)


def demo():
    "demo.json, demo.md: of the counts."
    data = read_json(RESULTS/"demo.json")
    counts = {name: count(m["sizes"], m["correct"], m["total"]) for name, m in data["models"].items()}
    results = Results(counts, "student", "teacher")
    data["models"], data["counted"] = numbers(results), COUNTED
    write_again("demo", data)
    note = f"Accuracy in %, 95% intervals below. Test haystacks were never trained on. {COUNTED}"
    with atomic_write(RESULTS/"demo.md") as part:
        part.write_text(f"{table_markdown(table_cells(results))}\n{note}\n\n{verdict(results)}\n", encoding="utf-8")


def main():
    table = Table()
    results = table.results(table.models, table.haystacks)
    write_again("reproduce", table.data | dict(summary=summary(results)))
    report(results, "reproduce")
    for name in ("labels", "length"):
        tables_of_points(name, table)
    ablation(table)
    demo()


if __name__ == "__main__":
    main()
