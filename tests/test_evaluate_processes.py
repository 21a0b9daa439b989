"laid eval on two processes: one file, byte by byte that of one process; a run that was stopped goes on; nobody waits for ever. What the processes do is in evaluate_worker.py."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from laid_nb.evaluate import read_records
from laid_nb.store import save_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, processor):
    "Folder of what two processes left."
    folder = tmp_path_factory.mktemp("processes")
    save_model(tiny("student"), processor, folder/"student")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", HERE/"evaluate_worker.py", folder, "divided", "trained", "fails", "ends"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode and (folder/"ends-0.err").exists(), done.stderr  # the last job ends a process
    return folder


def test_the_file_is_that_of_one_process(runs):
    one, both = ((runs/name).read_bytes() for name in ("one.jsonl", "both.jsonl"))
    assert both == one and len(read_records(runs/"one.jsonl")[1]) == 15


def test_a_stopped_run_goes_on(runs):
    (header, records), (other, again) = read_records(runs/"both.jsonl"), read_records(runs/"again.jsonl")
    close = dict(margin=0, mass=0)  # a group that was cut is asked again in another batch
    assert header == other and [r | close for r in again] == [r | close for r in records] and again[:4] == records[:4]
    assert max(abs(a["margin"] - b["margin"]) for a, b in zip(again, records)) < 1e-4 and (runs/"again.png").exists()


def test_the_first_process_speaks(runs):
    said, silent = ((runs/f"both-{rank}.txt").read_text() for rank in (0, 1))
    assert said.count("window at 0.75") == 1 and said.count("written: both.jsonl") == 1 and silent == ""


def test_an_error_of_one_ends_all_and_is_said_by_all(runs):
    first, second = ((runs/f"fails-{rank}.err").read_text() for rank in (0, 1))
    assert "laid: error: process 1 of 2 has failed, and all end: ValueError: no such picture" in first and "exit 2" in first
    assert "laid: error: no such picture" in second and "exit 2" in second
    assert 0 < len(read_records(runs/"fails.jsonl")[1]) < 15  # what was done before is there


def test_a_process_that_ends_leaves_nobody_waiting(runs):
    assert "laid: error: process 0 of 2 got no answer from another" in (runs/"ends-0.err").read_text()


def test_a_training_on_two_processes_is_evaluated_by_both_and_learns_the_same(runs):
    first, second = (json.loads((runs/f"log-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first["ddp"]) == len(first["fsdp"]) == 3 and first["alone"] == []
    assert first["ddp"][0]["eval_accuracy_1"] == first["fsdp"][0]["eval_accuracy_1"] and "eval_window" in first["fsdp"][2]
    watched, alone, sharded = (load_file(runs/f"{name}.safetensors") for name in ("ddp", "alone", "fsdp"))
    for name, w in alone.items():
        assert torch.equal(w, watched[name]), name
        torch.testing.assert_close(sharded[name], w, atol=1e-10, rtol=0)


def test_evaluation_of_a_divided_training_is_that_of_one_process(runs):
    from laid_nb.anchors import build_processor
    from laid_nb.evaluate import evaluate
    from laid_nb.haystack import drawn_test
    from laid_nb.validation import log_numbers
    from shard_worker import tiny
    student, last = tiny("student"), json.loads((runs/"log-0.json").read_text())
    before = log_numbers(evaluate(student, build_processor(), drawn_test([1, 2, 3], 5), progress=False))
    student.load_state_dict({k.removeprefix("student."): w for k, w in load_file(runs/"ddp.safetensors").items() if k.startswith("student.")})  # folded
    after = log_numbers(evaluate(student, build_processor(), drawn_test([1, 2, 3], 5), progress=False))
    assert last["ddp"][0] == last["fsdp"][0] == before and last["ddp"][2] == last["fsdp"][2] == after
