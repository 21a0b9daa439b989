"""`python tests/versions.py [--folder F] [lowest newest]`: the tests of the core with the lowest and with the newest versions allowed.

Each end gets an environment of its own, made by uv (`pip install uv`), 5 GB: the lowest versions that settings.ini allows
on the oldest Python, the newest there are on the newest Python. A table goes to data/results/versions.json."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/"data/results/versions.json"
ENDS = {"lowest": ("3.10", "lowest-direct"), "newest": ("3.13", "highest")}  # Python, and what uv takes of what is allowed
TOOLS = ("pytest>=8", "hypothesis>=6.100", "nbformat>=5.10", "gguf>=0.17")  # beside the package itself
TESTS = "rope capture attention spectra mixing losses gain simulate store pictures haystack inputs vhs benchmarks benchmarks_readers accuracy recompose pair cli evaluate train baselines".split()


def settings():
    found = ConfigParser(delimiters=["="])
    found.read(ROOT/"settings.ini", encoding="utf-8")
    return found["DEFAULT"]


def direct():
    "Names of the packages that the package needs."
    return [re.match(r"[\w.-]+", need)[0] for need in settings()["requirements"].split()]


def install(end, folder, uv):
    "An environment with one end of what is allowed."
    python, resolution = ENDS[end]
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", python, folder], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", folder/"bin/python", "--resolution", resolution, "-e", ROOT, *TOOLS], check=True)


def run(end, folder, tests):
    "Versions and what the tests say -> a row of the table."
    python = folder/"bin/python"
    ask = f"import json, platform; from importlib.metadata import version as v; print(json.dumps(dict(python=platform.python_version(), packages={{n: v(n) for n in {direct()!r}}})))"
    row = json.loads(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
    files = [f"tests/test_{name}.py" for name in tests]
    done = subprocess.run([python, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files], cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout[-3000:])
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-300:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", last)}
    return row | dict(tests=list(tests), passed=counts.get("passed", 0), skipped=counts.get("skipped", 0), failed=counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
                      failures=re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ends", nargs="*", default=list(ENDS), help="lowest, newest (default both)")
    parser.add_argument("--folder", type=Path, default=Path("laid-versions"), help="of the environments; those that are there are used as they are")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="names of test files, such as rope")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    uv = shutil.which("uv")
    table = json.loads(given.out.read_text()) if given.out.exists() else {}
    for end in given.ends:
        folder = given.folder.absolute()/end
        if not (folder/"bin/python").exists():
            if not uv: parser.error("uv makes the environments: pip install uv")
            install(end, folder, uv)
        table[end] = run(end, folder, given.tests) | dict(resolution=ENDS[end][1])
        given.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(f"{end}: Python {table[end]['python']}, {table[end]['passed']} passed, {table[end]['failed']} failed")
    return int(any(row["failed"] for row in table.values()))


if __name__ == "__main__": sys.exit(main())
