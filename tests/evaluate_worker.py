"""What each of two gloo processes does for test_evaluate_processes.py; run by torchrun: evaluate_worker.py FOLDER JOB ..."""
import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import distributed
from transformers import logging

from laid_nb import cli
from laid_nb import evaluate as module
from laid_nb.evaluate import evaluate
from laid_nb.haystack import drawn_test
from laid_nb.validation import Validation
from shard_worker import FSDP, allow_cpu, fresh, keep, trainer

logging.set_verbosity_error()
logging.disable_progress_bar()
SIZES, QUESTIONS = [1, 2, 3], 5  # haystacks of two or three questions, so that groups are of one haystack and of two


def laid(folder, name, *more):
    "laid eval in a folder, as accelerate launch starts it; what it prints goes to a file of each process."
    os.chdir(folder)
    rank = os.environ["RANK"]
    with open(f"{name}-{rank}.txt", "w") as said, redirect_stdout(said):
        return cli.main(["eval", "student", "--pictures", "--sizes", ",".join(map(str, SIZES)), "--questions", str(QUESTIONS), "--batch_size", "4", "--out", f"{name}.jsonl", *more])


def divided(folder):
    "Fresh, and from half a file; then by the first process alone."
    assert laid(folder, "both") == 0
    distributed.barrier()
    if os.environ["RANK"] == "0":
        whole = Path("both.jsonl").read_bytes()
        lines = whole.split(b"\n")
        Path("again.jsonl").write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:20])  # header, four records, a piece of the fifth
    distributed.barrier()
    assert laid(folder, "again", "--plot", "again.png") == 0
    distributed.barrier()
    if os.environ["RANK"] == "0":
        model, processor = cli.load_model("student")
        evaluate(model, processor, drawn_test(SIZES, QUESTIONS), "one.jsonl", "student", 4, progress=False)
    distributed.barrier()


def trained(folder):
    "Two steps on two processes, with an evaluation at each, and without; then a sharded student."
    logs = {}
    for name, settings in (("ddp", {}), ("alone", {}), ("fsdp", FSDP)):
        fresh()
        made = trainer(folder/name, 1, 2, method="sft", lambda_hidden=None, gain=True, eval_steps=1, **settings)
        assert made.args.world_size == 2 and made.is_fsdp_enabled == (name == "fsdp")
        if name != "alone": Validation(made, drawn_test(SIZES, QUESTIONS))
        made.train()
        keep(made, folder/name)
        logs[name] = [{k: x for k, x in h.items() if k.startswith("eval_")} for h in made.state.log_history if "eval_window" in h]
    Path(folder/f"log-{os.environ['RANK']}.json").write_text(json.dumps(logs))


def broken(folder, name, error):
    "The second process fails at its second group; what both say on stderr goes to files."
    real, calls = module.ask_many, []
    def ask(*args):
        calls.append(args)
        if os.environ["RANK"] == "1" and len(calls) == 2: error()
        return real(*args)
    module.ask_many = ask
    with open(folder/f"{name}-{os.environ['RANK']}.err", "w") as said, redirect_stderr(said):
        print("exit", laid(folder, name), file=said)
    module.ask_many = real


def fails(folder):
    def error(): raise ValueError("no such picture")
    broken(folder, "fails", error)
    distributed.barrier()


def ends(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other at once, which is to speak for itself
    broken(folder, "ends", lambda: os._exit(7))


if __name__ == "__main__":
    allow_cpu()
    torch.set_num_threads(1)
    for job in sys.argv[2:]: globals()[job](Path(sys.argv[1]))
