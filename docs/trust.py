"""`python docs/trust.py`: what was tried against the package -> docs/trust.md. Every number comes from a file in data/results, or is counted in tests/."""
import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT/"data/results", ROOT/"docs/trust.md"
PARTS = {"kills": "python tests/kill_runs.py", "fuzz": "python tests/fuzz.py", "mutants": "python tests/mutate.py", "versions": "python tests/versions.py"}  # file -> what makes it


def found(name: str):  # what was found, or None where nobody has tried
    path = RESULTS/f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def guards() -> list[str]:  # faults that tests plant, in words
    "Names of the tests of guards."
    path = ROOT/"tests/test_guards.py"
    if not path.exists(): return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name.removeprefix("test_").replace("_", " ") for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def table(head: list, rows: list) -> str:
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |\n"
    return line(head) + "|:--" + "|--:"*(len(head) - 1) + "|\n" + "".join(map(line, rows))


def of_kills(kills) -> str:
    same = kills["came"].get("the same bytes", 0)
    rows = [(name, row["events"], sum(sum(c.values()) for c in row["stops"].values()), sum(c.get("the same bytes", 0) for c in row["stops"].values())) for name, row in kills["cases"].items()]
    others = ", ".join(f"{n} {came}" for came, n in kills["came"].items() if came != "the same bytes")
    left = f" {kills['planned'] - kills['stopped']:,} more were planned: the time was up." if kills["planned"] > kills["stopped"] else ""
    return (f"**{kills['stopped']:,} moments at which a run was stopped, {same:,} resumed to the same bytes; {kills['moments']:,} of them random moments.**{left}" + (f" The others: {others}." if others else "") + " A run is stopped at a file event or at a random moment, by a signal, a full disk or the end of a worker, goes on, and is compared with one that nobody stopped.\n\n"
            + table(["run", "file events", "stopped", "same bytes"], rows))


def of_fuzz(fuzz) -> str:
    rows = fuzz["targets"]
    cases, failed = (sum(row[key] for row in rows.values()) for key in ("cases", "failed"))
    more = fuzz.get("planned", cases) - cases
    left = f" {more:,} more are planned: the same command goes on with them." if more > len(rows) else ""
    text = (f"**{cases:,} hostile inputs, {failed:,} not answered as they should be.**{left} An input is files and the arguments of a command, drawn by hypothesis or made of sound ones by changing bytes. The command must end in order or with one line that names the file, the entry or the setting, "
            f"without a traceback, within {fuzz['seconds_allowed']} s of processor time or asleep and {fuzz['bytes_allowed']/1e9:.0f} GB.\n\n"
            + table(["input", "cases", "ended in order", "refused", "not as they should", "slowest, s of wall clock", "most memory, MB"],
                    [(name, f"{r['cases']:,}", f"{r['ended']:,}", f"{r['refused']:,}", r["failed"], r["slowest_s"], r["most_memory_mb"]) for name, r in rows.items()]))
    kinds = [f"- {name}: {entry['times']} × `{kind.replace('`', '')}`" for name, r in rows.items() for kind, entry in r["failures"].items()]
    return text + ("\nWhat was not answered as it should be:\n\n" + "\n".join(kinds) + "\n" if kinds else "")


def of_guards(names) -> str:
    return f"**{len(names)} faults and limits planted, each seen by a guard** (`tests/test_guards.py`): {', '.join(names)}.\n"


def of_mutants(mutants) -> str:
    run, killed, every = (sum(row[key] for row in mutants.values()) for key in ("run", "killed", "mutants"))
    same = sum("why" in s for row in mutants.values() for s in row["survivors"])
    text = (f"**{killed:,} of {run:,} mutants killed, {same:,} more compute the same: a seeded sample of {every:,} in {len(mutants)} modules.** A mutant is a module of the core with one operator, constant, condition or call changed; of its own tests those run that run the changed line.\n\n"
            + table(["module", "mutants", "run", "killed", "the same"], [(name, row["mutants"], row["run"], row["killed"], sum("why" in s for s in row["survivors"])) for name, row in mutants.items()]))
    left = [f"- `{name}.py:{s['line']}`, {s['kind']}: `{s['text'].replace('`', '')}`" + (f" — {s['why']}" if "why" in s else "") for name, row in mutants.items() for s in row["survivors"]]
    return text + ("\nSurvivors:\n\n" + "\n".join(left) + "\n" if left else "")


def of_versions(versions) -> str:
    names = list(next(iter(versions.values()))["packages"])
    rows = [(name, *(row["packages"][name] for row in versions.values())) for name in names]
    counts = [("files of tests", *(len(row["tests"]) for row in versions.values())), ("tests passed", *(row["passed"] for row in versions.values())), ("tests failed", *(row["failed"] for row in versions.values()))]
    return ("**The core's tests with the lowest and with the newest versions that `settings.ini` allows.**\n\n"
            + table(["", *versions], [("Python", *(row["python"] for row in versions.values())), *rows, *counts]))


def page() -> str:
    "The page as the files have it."
    parts = [("Stopped and gone on", "kills", of_kills), ("Hostile input", "fuzz", of_fuzz), ("Guards", "guards", of_guards), ("Tests of the tests", "mutants", of_mutants), ("Versions", "versions", of_versions)]
    text = ("# What was tried\n\nHow the package was tried to be broken, and what came of it. Every number on this page is read from `data/results` or counted in `tests/` by `python docs/trust.py`; a test fails where the page says something else.\n")
    for title, name, say in parts:
        data = guards() if name == "guards" else found(name)
        made = f"\nMade by `{PARTS[name]}`.\n" if name in PARTS else ""
        text += f"\n## {title}\n\n" + (say(data) if data else "Not tried here yet.\n") + made
    return text + "\nThe threat model behind the hostile inputs is in [SECURITY.md](../SECURITY.md).\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(page())
