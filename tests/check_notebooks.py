"""Runs the notebooks and compares what their cells show with what is stored in them.

    python tests/check_notebooks.py [--write [--all]] [--jobs N] [NOTEBOOK or FOLDER …]     (without one: nbs/)

It fails when a cell raises, shows something and has no stored output, has a stored output and shows nothing, or shows
another text than the stored one. `--write` stores the outputs of the cells at fault and of those whose source differs
from git HEAD, and leaves all others as they are, so that a difference stays small; `--all` stores those of every cell.

Passed over: cells with a flag of `tst_flags` in settings.ini (`#| slow`), with `#| eval: false`, and the export.
Compared: what is printed, and the text, Markdown and HTML of what is displayed. Of a picture only that it is there.
Not compared: stderr, times, sizes in bytes, dates, addresses, ports, absolute paths, versions, digests, progress bars.
Integers must be equal; other numbers may differ by 2% or one unit of the last digit, and rounding errors are all equal.
Of a cell flagged `#| varies`, whose numbers depend on the machine, only the form: as many lines, and in each, numbers
left aside, at least half of the words. Which cells need the flag shows a run as on another processor:

    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem python tests/check_notebooks.py
"""
import argparse
import asyncio
import configparser
import copy
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600     # seconds of one cell
SHOWN_LINES = 12  # of a difference
TOLERANCE = 2e-2  # relative, of a number that is no integer
NOISE = 1e-4      # numbers below are rounding errors, which differ from one processor to another
DISPLAYED = ("text/markdown", "text/html", "text/latex", "text/plain")


# --- notebooks ----------------------------------------------------------------
def joined(text): return text if isinstance(text, str) else "".join(text)


def read(path): return json.loads(Path(path).read_text(encoding="utf-8"))


def flags(source):
    "The directives of a cell: name -> what stands behind it."
    return dict(re.findall(r"^#\|[ \t]*([\w-]+)(?::[ \t]*|[ \t]+|$)(.*)$", source, re.M))


def passed_flags():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    return set(settings["DEFAULT"]["tst_flags"].split())


def is_run(cell, passed):
    "Whether a cell is run: code, without one of the flags `passed`."
    if cell["cell_type"] != "code": return False
    source = joined(cell["source"])
    found = flags(source)
    return not (passed & set(found) or found.get("eval", "").strip().lower() == "false" or "nbdev_export(" in source)


@dataclass
class Run:
    "What came of running a notebook."
    path: Path
    outputs: dict  # cell id -> its outputs, for the cells that were run to their end
    error: tuple | None  # (cell id, what was raised)
    seconds: float


def environment(folder):  # where the kernels may write
    "Of the kernels: no network, no GPU, one thread, pictures in the notebook, lines of 80, no settings of the user."
    unwanted = ("MPLBACKEND", "FORCE_COLOR", "PY_COLORS")
    given = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))
    return given | dict(IN_TEST="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path,
                        IPYTHONDIR=str(folder), COLUMNS="80", PYTHONHASHSEED="0", TOKENIZERS_PARALLELISM="false")


async def run(path, folder, passed):
    "Run one notebook in a kernel of its own up to the first error. `folder`: for what the kernel writes."
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    start, begun = time.time(), []
    cells = [cell for cell in read(path)["cells"] if is_run(cell, passed)]
    cells = [cell | dict(source=joined(cell["source"]), outputs=[]) for cell in cells]
    live = nbformat.from_dict(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    # sockets need short paths, so they are put into `folder`
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=f"{folder}/kernel.json")
    client = NotebookClient(live, km=manager, timeout=TIMEOUT, store_widget_state=False, shutdown_kernel="immediate",
                            resources=dict(metadata=dict(path=str(path.parent))),
                            on_notebook_start=lambda notebook: interruptible(),
                            on_cell_start=lambda cell, cell_index: begun.append(cell["id"]))
    error = None
    try:
        await client.async_execute(env=environment(folder), cleanup_kc=True)
    except CellExecutionError as e:
        error = f"{e.ename}: {e.evalue}\n{short_traceback(e.traceback)}"
    except (CellTimeoutError, DeadKernelError) as e:
        error = f"{type(e).__name__}: {e}"
    done = begun if error is None else begun[:-1]
    outputs = {cell["id"]: stored_form(cell["outputs"]) for cell in live["cells"] if cell["id"] in done}
    return Run(path, outputs, error and (begun[-1] if begun else "(no cell)", error), time.time() - start)


def interruptible():
    "Ctrl-C ends the whole run; nbclient's handlers would end the kernel of one notebook."
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM): loop.remove_signal_handler(number)


def short_traceback(text):
    "The lines of a traceback that point to code."
    text = re.sub(r"\x1b\[[0-9;]*m", "", joined(text))
    return "\n".join(line for line in text.splitlines() if re.match(r"-+> ?\d|(File|Cell) ", line))


async def run_all(paths, jobs, passed, report):
    "Run the notebooks, `jobs` at a time; each result goes to `report`."
    gate = asyncio.Semaphore(jobs)

    async def one(path):
        async with gate:
            with tempfile.TemporaryDirectory() as folder: done = await run(path, folder, passed)
            report(done)
    await asyncio.gather(*map(one, paths))


# --- outputs as they are stored -------------------------------------------------
def stored_form(outputs):
    "Outputs as they are stored, and nbdev_clean leaves them: no counts, metadata, stderr, widgets, progress bars."
    made = []
    for output in json.loads(json.dumps(outputs)):
        kind = output["output_type"]
        if kind == "error" or kind == "stream" and output["name"] == "stderr": continue
        if kind == "stream":
            text = joined(output["text"])
            if made and made[-1]["output_type"] == "stream": text = joined(made.pop()["text"]) + text
            output["text"] = without_addresses(text).splitlines(keepends=True)
        else:
            if "text/plain" in output["data"] and not lines(joined(output["data"]["text/plain"])): continue
            output = dict(data=stored_data(output["data"]), metadata={}, output_type=kind)
            if kind == "execute_result": output["execution_count"] = None
        made.append(dict(sorted(output.items())))
    return made


def stored_data(data):
    kept = {}
    for kind, value in sorted(data.items()):
        if kind.startswith("application/vnd.jupyter.widget"): continue
        if kind.startswith("text/"): value = without_addresses(joined(value)).splitlines(keepends=True)
        elif kind == "image/svg+xml": value = joined(value).splitlines(keepends=True)
        elif kind.startswith("image/"): value = joined(value).rstrip()
        kept[kind] = value
    return kept


def without_addresses(text): return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


# --- what is compared -----------------------------------------------------------
def parts(outputs):
    "The parts of a cell's outputs in their order: (kind, text), a picture without its text."
    found = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stdout": found.append(("stdout", joined(output["text"])))
            continue
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data): found.append(("picture", ""))
        found += [(kind, joined(data[kind])) for kind in DISPLAYED if kind in data]
    merged = []
    for kind, text in found:
        if kind == "stdout" and merged and merged[-1][0] == "stdout": text = merged.pop()[1] + text
        merged.append((kind, text))
    return [(kind, text) for kind, text in merged if kind == "picture" or lines(text)]


QUANTITY = r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
TIME = r"(?:ns|[µμu]s|ms|s|sec|secs|seconds?|min|mins|minutes?|h|hours?)"
MEMORY = r"(?:[kKMGT]i?B|B|bytes?|[kKMGT]?i?B/s)"
ASIDE = [
    (r"\x1b\[[0-9;]*m", ""),
    (r"(?m)^.*\r(?!\n)", ""),                                          # a line that was written over
    (r"(?m)^.*\d+%\|.*\|.*$|^.*\b(?:it/s|s/it)\b.*$", ""),             # a progress bar
    (r"<img\b[^>]*>|<svg\b.*?</svg>", "<picture>"),
    (r"<Figure size [^>]*>", "<Figure>"),
    (r"0x[0-9a-fA-F]+", "<address>"),
    (r"(?i)((?:\bport|127\.0\.0\.1|localhost)\W{1,2})\d{4,5}\b", r"\1<port>"),
    (r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,64}\b", "<digest>"),       # of weights: their last bits vary by processor
    (r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z?)?", "<date>"),
    (r"\b\d+:\d\d:\d\d(?:\.\d+)?", "<time>"),
    (r"(?<![\w./:…<-])~?/(?:[\w.+@~-]+/)+[\w.+@~-]*", "<path>"),
    (r"\btmp[a-z0-9_]{8}\b", "<path>"),
    (r"\bv?\d+\.\d+\.\d+(?:[.+-]?\w+)*", "<version>"),
    (rf"{QUANTITY} ?{TIME}\b", "<time>"),
    (rf"{QUANTITY} ?{MEMORY}(?![\w/])", "<memory>"),
    (rf"{QUANTITY}( [a-z]+)? ?(?:/|per )(?:s|sec|second)\b", r"<rate>\1"),
    (rf"(runtime|per_second|seconds|elapsed)(['\"]?[:=] ?)['\"]?{QUANTITY}['\"]?", r"\1\2<time>"),
    (r"(?<=\S) {2,}| +$", " "),                                        # columns move with the numbers in them
    (r"-{3,}", "---"),
]
ASIDE = [(re.compile(pattern, re.M | re.S if "svg" in pattern else re.M), new) for pattern, new in ASIDE]
NUMBER = re.compile(r"(?<![\w.])(?:(?<![)\]])[-+−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d+)?"
                    r"|(?<![\w.])[-+−]?\.\d+")


def lines(text):
    "The lines of a text without what is not compared, and without empty ones."
    for pattern, new in ASIDE: text = pattern.sub(new, text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def value(number): return float(number.replace(",", "").replace("−", "-"))


def last_unit(number):
    "One unit of the last digit that was printed."
    digits, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def same_number(stored, now):
    if stored == now: return True
    a, b = value(stored), value(now)
    if not any(mark in stored + now for mark in ".e"): return a == b
    off = abs(a - b)
    if max(abs(a), abs(b)) < NOISE: return True
    return off <= max(TOLERANCE*max(abs(a), abs(b)), 1.001*last_unit(stored), 1.001*last_unit(now))


def where(stored, now):
    "Where two lines begin to differ, by more than numbers may: a place in either; None where they do not."
    a, b, place = pieces(stored), pieces(now), [0, 0]
    for i in range(max(len(a), len(b))):
        if i >= min(len(a), len(b)) or not (same_number if i % 2 else str.__eq__)(a[i], b[i]): return tuple(place)
        place = [place[0] + len(a[i]), place[1] + len(b[i])]


def pieces(line):
    "Text, number, text … of a line."
    ends = [0, *(end for found in NUMBER.finditer(line) for end in found.span()), len(line)]
    return [line[a:b] for a, b in zip(ends, ends[1:])]


def same_form(stored, now):
    "Whether at least half of the words of two lines are equal, numbers left aside."
    a, b = NUMBER.sub("#", stored).split(), NUMBER.sub("#", now).split()
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() >= .5


def difference(stored, now, varies=False):
    "What differs of two texts, a line each, '-' before a stored one and '+' before one of now; [] where nothing does."
    stored, now = lines(stored), lines(now)
    if len(stored) != len(now): return [line for line in difflib.ndiff(stored, now) if line[0] in "-+"]
    found = []
    for a, b in zip(stored, now):
        place = where(a, b)
        if place is None or varies and same_form(a, b): continue
        found += [f"- {excerpt(a, place[0])}", f"+ {excerpt(b, place[1])}"]
    return found


def excerpt(line, place, before=60, length=150):
    "A long line around the place where it differs."
    if len(line) <= length: return line
    start = max(0, min(place - before, len(line) - length))
    return "…"*(start > 0) + line[start:start + length] + "…"*(start + length < len(line))


def fault(cell, outputs):
    "What is wrong with the stored outputs of a cell that has just shown `outputs`; None where nothing is."
    stored, now = parts(cell.get("outputs", [])), parts(outputs)
    varies = "varies" in flags(joined(cell["source"]))
    if now and not stored: return "shows something and has no stored output", [f"+ {line}" for line in shown(now)]
    if stored and not now: return "has a stored output and shows nothing", [f"- {line}" for line in shown(stored)]
    if [kind for kind, _ in stored] != [kind for kind, _ in now]:
        return "shows another kind of output", [f"- {', '.join(kind for kind, _ in stored)}",
                                                f"+ {', '.join(kind for kind, _ in now)}"]
    wrong = [line for (_, a), (_, b) in zip(stored, now) for line in difference(a, b, varies)]
    return ("shows another text than the stored one", wrong) if wrong else None


def shown(found):
    "Lines of the parts of an output."
    return [line for kind, text in found for line in (lines(text) or [f"<{kind}>"])]


def faults(nb, done):
    "All faults of a notebook: (cell id, what is wrong, lines that show it)."
    cells = {cell["id"]: cell for cell in nb["cells"]}
    found = [(name, *wrong) for name, outputs in done.outputs.items() if (wrong := fault(cells[name], outputs))]
    if done.error:
        name, text = done.error
        found.append((name, "raises", text.splitlines()))
    return found


# --- writing --------------------------------------------------------------------
def sources_in_git(path):
    "Cell id -> source at HEAD; {} where there is no such notebook or no git."
    command = ["git", "show", f"HEAD:./{path.name}"]
    found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, encoding="utf-8")
    cells = json.loads(found.stdout)["cells"] if found.returncode == 0 else []
    return {cell["id"]: joined(cell["source"]) for cell in cells}


def write(nb, done, everything=False):
    "Store the outputs of cells at fault and of changed cells; the ids of those that are stored now."
    before = sources_in_git(done.path)
    written = []
    for cell in nb["cells"]:
        if cell["id"] not in done.outputs: continue
        outputs = done.outputs[cell["id"]]
        changed = before.get(cell["id"], joined(cell["source"])) != joined(cell["source"])
        if not (everything or changed or fault(cell, outputs)) or cell["outputs"] == outputs: continue
        cell["outputs"] = copy.deepcopy(outputs)
        written.append(cell["id"])
    if written:
        text = json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True)
        done.path.write_text(text + "\n", encoding="utf-8")
    return written


# --- command --------------------------------------------------------------------
def notebooks(paths):
    found = []
    for path in map(Path, paths):
        if not path.exists(): sys.exit(f"check_notebooks.py: there is no {path}")
        found += sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
    return [path.resolve() for path in found if not any(part.startswith((".", "_")) for part in path.parts[1:])]


def named(path): return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main(arguments=None):
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("paths", nargs="*", help="notebooks and folders (default: nbs)")
    args.add_argument("--write", action="store_true", help="store the outputs of cells at fault and of changed cells")
    args.add_argument("--all", action="store_true", help="with --write: of every cell that is run")
    args.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at once (default: one a core)")
    args = args.parse_args(arguments)
    found = []

    def report(done):
        nb = read(done.path)
        written = write(nb, done, args.all) if args.write else []
        wrong = faults(nb, done)
        words = [f"{named(done.path)}: {done.seconds:.0f} s", *([f"stored {', '.join(written)}"] if written else [])]
        print(*words, *([f"{len(wrong)} at fault"] if wrong else []), sep=", ", flush=True)
        found.extend((named(done.path), *rest) for rest in wrong)
    try:
        asyncio.run(run_all(notebooks(args.paths or [ROOT/"nbs"]), args.jobs, passed_flags(), report))
    except KeyboardInterrupt:
        return 130
    for path, cell, what, text in sorted(found, key=lambda f: str(f[0])):
        print(f"\n{path}, cell {cell}: {what}")
        for line in text[:SHOWN_LINES]: print(f"    {excerpt(line, 0)}")
        if len(text) > SHOWN_LINES: print(f"    … {len(text) - SHOWN_LINES} more")
    if not found: return 0
    print(f"\n{len(found)} cells at fault. Outputs are part of the source: look, then make outputs ARGS=NOTEBOOK")
    return 1


if __name__ == "__main__": sys.exit(main())
