"""A quick part of fuzz.py and mutate.py; that of kill_runs.py is in test_kills.py."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = '''def larger(a, b):
    return a if a > b else b


def scaled(x):
    scale = 2
    return scale*x
'''
CHECKS = "from laid_nb.small import larger, scaled\n\n\ndef test_larger(): assert larger(1, 2) == larger(2, 1) == 2\n\n\ndef test_scaled(): assert scaled(2) == 4\n"


def test_hostile_input_of_a_few_kinds_is_answered_as_it_should(tmp_path):
    line = [sys.executable, TESTS/"fuzz.py", "--cases", "30", "--seed", "3", "--only", "files", "kept", "command lines", "configs", "--out", tmp_path/"fuzz.json"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path/"fuzz.json").read_text())["targets"]
    assert sum(row["cases"] for row in rows.values()) in range(28, 33) and not any(row["failed"] for row in rows.values()) and sum(row["refused"] for row in rows.values()) > 10


@pytest.fixture
def mutated(tmp_path):
    "Kinds of changes to a small module -> whether its tests notice each, found in a process of its own."
    for folder in ("laid_nb", "tests"): (tmp_path/folder).mkdir()
    (tmp_path/"laid_nb/__init__.py").touch()
    (tmp_path/"laid_nb/small.py").write_text(SOURCE)
    (tmp_path/"tests/test_small.py").write_text(CHECKS)
    script = ("import json, sys; from pathlib import Path; import mutate\nfolder, mutate.TESTS = Path(sys.argv[1]), {'small': 'small'}\nfile = folder/'laid_nb/small.py'\nsource = file.read_text()\nfound = mutate.sound('small', folder)\n"
              "print(json.dumps([[line, kind, mutate.noticed(file, source, kind, place, found)] for line, kind, place in mutate.mutants(source)]))")
    done = subprocess.run([sys.executable, "-B", "-c", script, tmp_path], capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path/"laid_nb/small.py").read_text() == SOURCE
    return {(line, kind): noticed for line, kind, noticed in json.loads(done.stdout)}


def test_a_mutant_is_noticed_where_it_computes_something_else(mutated):
    same = {(2, "compare")}  # of two equal numbers either is the larger
    assert mutated.keys() == {(2, "compare"), (2, "negate"), (2, "return None"), (6, "plus one"), (6, "minus one"), (7, "operator"), (7, "return None")}
    assert {change for change, noticed in mutated.items() if not noticed} == same
