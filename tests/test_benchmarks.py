"""The benchmark scripts run; their figures are not tested."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent/"benchmarks"


@pytest.mark.parametrize("name, column", [("spectra", "tokens"), ("mixing", "tokens"), ("attention", "tokens"), ("step", "tokens"), ("cache", "kept"),
                                          ("gpu", "SFT + KL, dense logits")])
def test_quick_run_prints_a_table_and_writes_nothing(name, column):
    results = FOLDER.parent/"data/results"
    before = {p: p.stat().st_mtime_ns for p in results.iterdir()}
    done = subprocess.run([sys.executable, FOLDER/f"{name}.py", "--quick"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert column in done.stdout and {p: p.stat().st_mtime_ns for p in results.iterdir()} == before


def test_tables_hold_what_was_measured():
    done = subprocess.run([sys.executable, "-c", "import tables; print('\\n'.join([tables.steps(), tables.parts(), tables.peers(), tables.card(), tables.aims()]), end='')"], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (FOLDER.parent/"data/results/bench.md").read_text(encoding="utf-8")
