"""Usage: check_sdist.py FILE.tar.gz [TEST …]. Unpacks the source archive and runs tests from there, the package and the tests being those of the archive.

Nothing that git has may be missing. The scripts of `make reproduce` are loaded from the archive; without arguments the quick
tests that read data, notebooks, examples and settings run."""
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TESTS = "package style vhs rope examples"
LOADED = """
import importlib, pathlib, sys, laid_nb
sys.path[:0] = ["experiments", "benchmarks"]
here = pathlib.Path.cwd().resolve()
for name in ["laid_nb", *sys.argv[1:]]:
    file = pathlib.Path(importlib.import_module(name).__file__).resolve()
    assert file.is_relative_to(here), f"{name} is not that of the archive: {file}"
from laid_nb.store import data_path
assert data_path().resolve() == here/"data", f"data are not those of the archive: {data_path()}"
"""


def missing(names):
    "Files that git has here and the archive has not; none where there is no git."
    if not (HERE/".git").exists(): return []
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(set(listed) - names)


def check(archive, tests):
    "AssertionError or CalledProcessError where the archive lacks something."
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar: tar.extractall(folder, filter="data")
        root, = Path(folder).iterdir()
        names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert not missing(names), f"the archive lacks {', '.join(missing(names))}"
        env = os.environ | dict(PYTHONPATH=str(root), HF_HUB_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
        scripts = re.search(r"^reproduce:.*\n.*for script in ([\w ]+);", (root/"Makefile").read_text(encoding="utf-8"), re.M)[1].split()
        subprocess.run([sys.executable, "-c", LOADED, *scripts], cwd=root, env=env, check=True)
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in tests)], cwd=root, env=env, check=True)
    print(f"{archive.name}: {len(names)} files, {len(scripts)} scripts of make reproduce, {len(tests)} files of tests run from it")


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit("check_sdist.py takes a source archive, and names of tests such as rope")
    check(Path(sys.argv[1]), sys.argv[2:] or TESTS.split())
