"""A quick part of kill_runs.py: a training, and an evaluation, stopped and gone on with, give the bytes of a run that nobody stopped."""
import json
import subprocess
import sys
from pathlib import Path


def test_what_is_stopped_goes_on_to_the_same_bytes(tmp_path):
    line = [sys.executable, Path(__file__).with_name("kill_runs.py"), "--quick", "--out", tmp_path/"kills.json"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path/"kills.json").read_text())
    assert found["came"] == {"the same bytes": found["stopped"]} and found["stopped"] == found["planned"] >= 6 and not found["wrong"]
    assert found["cases"]["train-laid"]["events"] > 100
