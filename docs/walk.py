"""Every shell command of docs/your_pair.md, run on stand-ins of the published models -> data/results/walk.json.

  python docs/walk.py WORK              # run what is not in the file, or has changed; WORK keeps models and results
  python docs/walk.py WORK --again      # run all of them
  python docs/walk.py                   # only write the page's note and table anew, from the file

The package is installed from a clone of this repository, into an environment of its own that borrows the packages of
the Python that runs this. Commands run in their order, in one folder, as they stand on the page; `CHANGES` says what
is put behind them to be feasible on a CPU, and `NOT_RUN` what cannot run here."""
import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from laid_nb.store import cores, hardware, read_json, versions, write_json

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT/"docs"/"your_pair.md", ROOT/"data"/"results"/"walk.json"
LIMIT = 3600  # seconds of a command
STEP = "--use_cpu true --max_steps 1 --gradient_accumulation_steps 1"
SHORT = STEP + " --max_pixels 50176"  # 64 tokens an image
CHANGES = {  # what a command begins with -> what is put behind it, for a CPU
    "laid train": SHORT + " --lora_rank 8",
    "laid train --student Qwen/Qwen2.5-VL-3B-Instruct --teacher OpenGVLab":  # whose processor has no limits in pixels
        STEP + " --lora_rank 8",
    "laid train --student Qwen/Qwen2.5-VL-3B-Instruct --teacher Qwen/Qwen2.5-VL-7B-Instruct":
        SHORT + " --save_strategy no",
    "laid train --config": SHORT,
    "laid check": SHORT + " --lora_rank 8",
    "torchrun --nproc-per-node 4": SHORT + " --lora_rank 8",
    "accelerate launch --config_file": SHORT + " --lora_rank 8",
    "laid eval Qwen/Qwen2.5-VL-3B-Instruct": "--max_pixels 50176",
}
WORDS = {  # words of a command -> those that are run
    "git clone https://github.com/laid-nb/laid_nb": 'git clone --quiet "$LAID_SOURCE" laid_nb',
    "torchrun --nproc-per-node 4": "torchrun --nproc-per-node 2",
    "accelerate launch --config_file": "accelerate launch --cpu --num_processes 2 --config_file",
}
LMMS = "asks for lmms-eval, some 100 packages; run apart, see [10b](../nbs/10b_lmms.ipynb)"
NOT_RUN = {"pip install lmms-eval": LMMS, "export LAID_DATA": LMMS, "lmms-eval": LMMS, "LAID_": LMMS, "for m in": LMMS,
           "laid lmms logs": LMMS}  # what a command begins with -> why not
PENDING = "not reached yet: `python docs/walk.py WORK` goes on here"
NOTE = "<!-- walk: python docs/walk.py -->\n", "<!-- walk end -->"
TABLE = "<!-- walk table: python docs/walk.py -->\n", "<!-- walk table end -->"


def of_start(command: str, table: dict[str, str]) -> str | None:
    "The value of the longest key that a command begins with."
    found = [key for key in table if command.startswith(key)]
    return table[max(found, key=len)] if found else None


def commands(page: str) -> list[str]:
    "Shell commands of a page, in their order, one line each."
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def as_run(command: str) -> str:
    "What is run in place of a command of the page."
    more = of_start(command, CHANGES)
    start = max((key for key in WORDS if command.startswith(key)), key=len, default="")
    return WORDS.get(start, "") + command.removeprefix(start) + (f" {more}" if more else "")


# --- running --------------------------------------------------------------------
def environment(work: Path) -> dict:
    "Variables of the commands: an environment of their own comes first in PATH."
    venv = work/"venv"
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        own = venv/Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (own/"borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for name in ("torchrun", "accelerate"):
            script = Path(sys.prefix, "bin", name).read_text().splitlines()[1:]
            (venv/"bin"/name).write_text("\n".join([f"#!{venv/'bin'/'python'}", *script]) + "\n")
            (venv/"bin"/name).chmod(0o755)
    left = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return left | dict(PATH=f"{venv/'bin'}:{os.environ['PATH']}", LAID_SOURCE=str(ROOT), HF_HUB_OFFLINE="1",
                       OMP_NUM_THREADS="1")


def last_line(text: str) -> str:
    "The last line that says something, without what a progress bar left and without folders of this machine."
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    said = [line for line in lines if line and not re.search(r"\d+%\||^\W+$|it/s\]", line)]
    return said[-1][:240] if said else ""


def clear(command: str, work: Path) -> None:
    "Remove what a command wrote when it ran before."
    for name in re.findall(r"(?:--output_dir|--out) (\S+)", command) + ["laid_nb"]*command.startswith("git clone"):
        shutil.rmtree(work/name, ignore_errors=True)
        if (work/name).is_file():
            (work/name).unlink()


def run(command: str, work: Path, variables: dict) -> dict:
    "A command and what came of it."
    clear(command, work)
    line, start = as_run(command), time.time()
    print(f"$ {line}", flush=True)
    log = work/"logs"/f"{re.sub(r'[^a-z0-9]+', '-', command.lower())[:80]}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        try:
            done = subprocess.run(["bash", "-c", line], cwd=work, env=variables, stdout=out, stderr=subprocess.STDOUT,
                                  timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            done = "stopped"
    said = last_line(log.read_text(errors="replace")).replace(f"{work}/", "").replace(str(ROOT), "$LAID_SOURCE")
    print(f"  {done}, {time.time() - start:.0f} s: {said}", flush=True)
    return dict(command=command, run=line, seconds=round(time.time() - start), exit=done, last=said)


def walk(work: Path, again: bool, only: str) -> None:
    "Run what is not known; the file is written after each command."
    from stand_ins import STAND_INS, make_all
    work.mkdir(parents=True, exist_ok=True)
    make_all(work)
    variables, wanted = environment(work), commands(PAGE.read_text(encoding="utf-8"))
    known = {name: row for name, row in known_rows().items() if not again or only and only not in name}
    for command in wanted:
        if only in command and is_due(command, known.get(command, {})):
            known[command] = run(command, work, variables)
        made = dict(command="python docs/walk.py WORK", finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    versions=versions(), hardware=hardware(), cores=cores(), stand_ins=STAND_INS)
        write_json(RESULTS, dict(made=made, commands=[known.get(c) or left_out(c) for c in wanted]))


def known_rows() -> dict[str, dict]:
    "What the file has, by command."
    return {row["command"]: row for row in read_json(RESULTS)["commands"]} if RESULTS.exists() else {}


def is_due(command: str, row: dict) -> bool:
    "Whether a command is to be run, again if it failed or if something else is put behind it now."
    if of_start(command, NOT_RUN): return False
    return (row.get("run"), row.get("exit")) != (as_run(command), 0)


def left_out(command: str) -> dict:
    "A command that is not run, and why."
    return dict(command=command, not_run=of_start(command, NOT_RUN) or PENDING)


# --- the page -------------------------------------------------------------------
def note(data: dict) -> str:
    "What has been run and what not, from the file."
    rows, made = data["commands"], data["made"]
    ran = [row for row in rows if "exit" in row]
    good, rest = sum(row["exit"] == 0 for row in ran), len(rows) - len(ran)
    text = (
        f"On {made['finished'][:10]} {good} of the {len(rows)} commands of this page ran to their end "
        f"on {made['cores']} CPU cores ({made['hardware']['cpu']}); {rest} have not been tried in it; what "
        "was changed for it stands in [the table](#what-has-been-run). The models are stand-ins: "
        f"{'; '.join(made['stand_ins'])}. Beside that: the embedded pair, and small random models of the families in "
        "[this table](families.md), on CPUs. **Not run: a GPU, the published weights, a training of full length.**")
    return f'!!! note "What has been run"\n    {text}\n'


def cell(text: str) -> str: return text.replace("|", "\\|")


def table(data: dict) -> str:
    "Each command with what was changed, how long it took and what it ended with."
    lines = ["| Command | For this run | Seconds | Exit code | Last line |", "|:--|:--|--:|--:|:--|"]
    for row in data["commands"]:
        changed = of_start(row["command"], CHANGES) or ""
        changed = " ".join(f"`{x}`" for x in (of_start(row["command"], WORDS), changed) if x)
        end = (f"{row['seconds']} | {row['exit']} | `{cell(row['last'])}`" if "exit" in row and row["last"] else
               f"{row['seconds']} | {row['exit']} | " if "exit" in row else f" | not run | {row['not_run']}")
        lines.append(f"| `{cell(row['command'])}` | {cell(changed)} | {end} |")
    return "\n".join(lines) + "\n"


def written(page: str, data: dict) -> str:
    "The page with note and table of the file."
    for (start, end), made in ((NOTE, note(data)), (TABLE, table(data))):
        before, rest = page.split(start)
        page = before + start + made + end + rest.split(end, 1)[1]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, help="folder of models, environment and results")
    parser.add_argument("--again", action="store_true", help="run all commands")
    parser.add_argument("--only", default="", help="run commands with this text in them, and no others")
    given = parser.parse_args()
    if given.work:
        walk(given.work.resolve(), given.again, given.only)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), read_json(RESULTS)), encoding="utf-8")


if __name__ == "__main__": main()
