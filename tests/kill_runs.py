"""Stop the commands of `laid` at file events and at random moments, go on, and compare with a run that nobody stopped.

python tests/kill_runs.py [--quick] [--only train-laid,eval] [--points 12] [--moments 4] [--out data/results/kills.json]

Everything that is slow to import is imported once; every run is forked from here, in a session of its own, so that whatever it leaves behind is seen. A run is the real command, on a tiny pair; that of `experiments` is two trainings, their answers and a result file, on the embedded pair. It is stopped
- at a file event: the n-th time that it opens, writes, renames or removes something below its folder (an audit hook counts; a file that torch or safetensors writes counts three times: before, when half of it is on the disk, after),
- at a random moment,
by SIGKILL, SIGTERM, SIGINT (to all its processes, as a terminal or a launcher sends them), by a full disk (from that event on nothing can be opened for writing; `limit`: the kernel lets no file grow beyond some kB), or by the end of a worker.
Then the same command goes on, as its message says. What counts: the files of its result are those of the run that nobody stopped, byte for byte; no process is left; after SIGTERM and SIGINT it says how to go on."""
import argparse
import atexit
import errno
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import safetensors.torch
import torch
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT/"experiments"))
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
COUNTED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


# --- file events ----------------------------------------------------------------
class Events:
    "Counts what a process does to files below a folder, and stops it at one of these."
    def __init__(self, root, at=0, how=""): self.root, self.at, self.how, self.count, self.busy = str(root), at, how, 0, False

    def hook(self, event, args):
        if event not in COUNTED or self.busy or not isinstance(args[0], (str, os.PathLike)): return
        path = os.path.abspath(args[0])
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(self.root) and not reads: self.tick(event)

    def tick(self, event, torn=None):
        self.count += 1
        if self.how == "full" and 0 < self.at <= self.count and event in ("open", "os.mkdir", "save"): raise OSError(errno.ENOSPC, "No space left on device")
        if self.count != self.at or self.how not in SIGNALS: return
        if torn and self.how == "SIGKILL":
            self.busy = True
            os.truncate(torn, os.path.getsize(torn)//2)
        if self.how == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
        os.killpg(os.getpgrp(), SIGNALS[self.how])


EVENTS = None  # of this process


def counted(save):
    "A function that writes a file without Python's `open`, counted."
    @wraps(save)
    def counting(what, path, *args, **kwargs):
        if EVENTS is None or not isinstance(path, (str, os.PathLike)): return save(what, path, *args, **kwargs)
        EVENTS.tick("save")
        result = save(what, path, *args, **kwargs)
        EVENTS.tick("half", torn=path)
        EVENTS.tick("saved")
        return result
    return counting


torch.save, safetensors.torch.save_file = counted(torch.save), counted(safetensors.torch.save_file)  # before others take their names

logging.disable_progress_bar()
import common  # noqa: E402
from laid_nb import anchors, cli, demo, evaluate, haystack, store, train  # noqa: E402, F401
from laid_nb.anchors import anchor_config, build_processor  # noqa: E402
from laid_nb.checkpoint import checkpoints  # noqa: E402

torch.set_num_threads(1)


# --- what is run ------------------------------------------------------------------
@dataclass
class Case:
    "A command, how it goes on, and the files that it is about. FOLDER stands for the folder of a run, PAIR for that of the tiny pair."
    name: str
    argv: list
    result: tuple  # globs below the folder
    more: list = field(default_factory=list)  # flags with which it goes on
    processes: int = 1
    saves: str = ""  # folder whose checkpoints it goes on from; "": it goes on by itself
    done: str = ""  # what is there when there is nothing to go on with
    prepare: object = None  # called in the process
    main: object = cli.main  # called with the arguments -> exit code


TRAIN = ["train", "--teacher", "PAIR/teacher", "--student", "PAIR/student", "--pictures", "--sizes", "2-3", "--haystacks", "6", "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "1", "--report_to", "none",
         "--use_cpu", "true", "--disable_tqdm", "true", "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--mixing_learning_rate", "1e-2", "--output_dir", "FOLDER/run"]
METHODS = {"sft": ["--method", "sft"], "kd": ["--method", "kd"], "laid": ["--method", "laid"], "laid-plus": ["--method", "laid+", "--max_gap", "50", "--max_multiplicity", "4"],
           "lora": ["--method", "laid", "--lora_rank", "2"], "biases": ["--method", "kd", "--biases_only", "true"], "hidden": ["--method", "laid", "--layers", "0:1,1:2", "--lambda_hidden", "0.5"],
           "recompose": ["--method", "kd", "--recompose", "0.5"], "workers": ["--method", "laid", "--dataloader_num_workers", "1"], "cache": ["--method", "laid", "--teacher_cache", "FOLDER/said"]}


def training(name, flags, processes=1):
    return Case(f"train-{name}", TRAIN + flags, ("run/model/*",), ["--resume_from_checkpoint", "last"], processes, "run", "run/model")


def small_demo(): demo.QUICK = dict(questions=2, steps=1, pool=3, batch=2, longest=3, shown=4, sizes=(1, 2))


def small_anchors():
    "Eight objects, few drawings and steps; nothing else of the training is another."
    few = haystack.OBJECTS[:8]
    haystack.OBJECTS = anchors.OBJECTS = few
    anchors.CONTENTS = [c for c in anchors.CONTENTS if max(c) < len(few)]
    anchors._INDEX = {tuple(few[i] for i in c): k for k, c in enumerate(anchors.CONTENTS)}
    anchors._train_vision.__defaults__ = ((2, 2), 8, 2e-3)
    size = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    anchors.SIZES = {"teacher": size, "student": size}
    train_language = anchors._train_language
    anchors._train_language = lambda *args, **kwargs: train_language(*args, **kwargs, save_every=2)
    anchors._TRAINING = {name: dict(steps=4, longest=6, tokens=400) for name in anchors.SIZES}


def small_experiment(argv):
    "What the scripts of the experiments do, below a folder, with a time that stands still. Workers are forked, as nothing is to be imported anew."
    common.ROOT, common.WORK, common.RESULTS, common.now = *(Path(argv[0])/name for name in ("", "work", "results")), str
    common.time = SimpleNamespace(time=float, strftime=time.strftime)
    common.multiprocessing = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"), active_children=multiprocessing.active_children)
    few = dict(haystacks=3, images=(1, 3), steps=2)
    runs, how = [common.Run("SFT", 0, dict(method="sft"), **few), common.Run("LAid+", 0, dict(method="laid+"), **few)], dict(sizes=(1, 3), questions=6)
    try:
        with common.going_on():
            common.do_all(runs, **how)
            common.write("killed", dict(answers={run.name: common.answers(run, **how) for run in runs}), 0.)
    except SystemExit as e: return e.code
    return 0


CASES = [*(training(name, flags) for name, flags in METHODS.items()), training("laid-two", METHODS["laid"], 2), training("lora-two", METHODS["lora"], 2),
         Case("eval", ["eval", "PAIR/student", "--pictures", "--sizes", "1,2,3,4", "--questions", "6", "--out", "FOLDER/records.jsonl", "--vhs", "FOLDER/vhs"], ("records.jsonl", "vhs/**/*"), done="vhs"),
         Case("demo", ["demo", "--quick", "--teacher", "PAIR/teacher", "--student", "PAIR/student", "--out", "FOLDER/demo"], ("demo/models/*/*", "demo/records/*", "demo/vhs/**/*.json", "demo/table.md"), prepare=small_demo),
         Case("anchors", ["anchors", "--out", "FOLDER/pair", "--folder", "FOLDER/drafts"], ("pair/*/*",), prepare=small_anchors),
         Case("experiments", ["FOLDER"], ("results/*.json", "work/models/[a-z]*/*.safetensors", "work/answers/*/*.json"), main=small_experiment)]


def tiny(folder, name, layers, heads, processor):
    "Save a random Qwen2.5-VL of a few layers."
    config = anchor_config(name, processor.tokenizer).to_dict()
    config["text_config"] |= dict(hidden_size=32*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None,
                                  rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 4, 8]))
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=32*heads, fullatt_block_indexes=[0])
    torch.manual_seed(layers)
    store.save_model(anchors.Qwen2_5_VLForConditionalGeneration(anchors.Qwen2_5_VLConfig(**config)), processor, folder/name)


# --- a run ------------------------------------------------------------------------
def work(case, argv, folder, rank, port, at, how):
    "One process of a run, forked; never returns."
    global EVENTS
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(folder.with_suffix(f".log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    if case.processes > 1: os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        if case.prepare: case.prepare()
        if how == "limit": resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        if rank == 0:
            EVENTS = Events(folder, at if how != "limit" else 0, how)
            sys.addaudithook(EVENTS.hook)
        folder.with_suffix(f".begun{rank}").touch()
        code = case.main(argv)
    except BaseException as e: print(f"TRACEBACK {type(e).__name__}: {e}", file=sys.stderr)
    finally:
        if rank == 0: count, EVENTS.busy, EVENTS.at = EVENTS.count, True, 0
        if rank == 0: folder.with_suffix(".events").write_text(str(count))
        atexit._run_exitfuncs()
        os._exit(code)


def launch(case, argv, folder, at, how):
    "A session with the processes of a run; ends them all as soon as one has failed, as torchrun does. Forked; never returns."
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: None)  # they go to the whole group
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(case.processes):
        pid = os.fork()
        if pid == 0: work(case, argv, folder, rank, port, at, how)
        pids.append(pid)
    codes, failed = {}, None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found: codes[pid] = os.waitstatus_to_exitcode(status)
            if found and codes[pid]: failed = failed or time.monotonic()
        for pid in set(pids) - codes.keys() if failed else ():
            if time.monotonic() > failed + 8: os.kill(pid, signal.SIGKILL)
        time.sleep(.02)
    code = codes[pids[0]]
    os._exit(code if code >= 0 else 128 - code)


def session(sid):
    "Processes of a session that are alive."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try: state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError): continue
        if int(its) == sid and state != "Z": found.append(int(path.parent.name))
    return found


def kill_worker(sid):
    "End a process that a process of the session has started to work for it."
    for _ in range(600):
        for pid in session(sid):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent != sid and pid != sid:
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(.02)


def run(case, argv, folder, at=0, how="", after=None):
    "Run a command -> (exit code, seconds, what it said, processes that it left)."
    start, pid = time.monotonic(), os.fork()
    if pid == 0: launch(case, argv, folder, at, how)
    if how == "worker": kill_worker(pid)
    if after is not None:  # since it began: before that it is Python that is stopped, and says nothing
        while len(list(folder.parent.glob(f"{folder.name}.begun*"))) < case.processes and time.monotonic() < start + 120: time.sleep(.01)
        time.sleep(after)
        try: os.killpg(pid, SIGNALS[how])
        except ProcessLookupError: pass
    _, status = os.waitpid(pid, 0)
    took = time.monotonic() - start
    for _ in range(100):  # a reader process sees after 5 s that its parent was killed
        left = session(pid)
        if not left: break
        time.sleep(.1)
    for other in left: os.kill(other, signal.SIGKILL)
    said = "\n".join(p.read_text(errors="replace") for p in sorted(folder.parent.glob(f"{folder.name}.log*")))
    return os.waitstatus_to_exitcode(status), took, said, len(left)


def argv_of(case, folder, pair, more=()): return [x.replace("FOLDER", str(folder)).replace("PAIR", str(pair)) for x in (*case.argv, *more)]


def result_of(case, folder):
    "Hash of every file of a result."
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # what a killed writer left: a later one removes it
    files = sorted(p for glob in case.result for p in folder.glob(glob) if p.is_file() and not hidden(p))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes().replace(str(folder).encode(), b"FOLDER")).hexdigest() for p in files}


# --- a stop, and what comes of it ---------------------------------------------------
def stopped(case, work, pair, wanted, at, how, after=None):
    "Stop a run and go on -> (what came of it, details)."
    folder = Path(tempfile.mkdtemp(dir=work, prefix=f"{case.name}-"))
    code, _, said, left = run(case, argv_of(case, folder, pair), folder, at, how, after)
    about = dict(case=case.name, how=how, at=at if after is None else f"{after:.1f} s", code=code, left=left)
    lines = [line for line in said.splitlines() if "laid: " in line or "TRACEBACK" in line]
    about["said"] = lines[-1][:300] if lines else ""
    if "TRACEBACK" in said or code == 1: return "traceback", about
    if left: return "processes left", about
    if how in ("SIGTERM", "SIGINT") and code > 128 and "; go on with" not in said: return "says not how to go on", about
    if how == "SIGTERM" and code not in (0, 143, 2) or how == "SIGINT" and code not in (0, 130, 2): return "another exit code", about
    for _ in range(2):
        if case.done and (folder/case.done).exists(): break
        more = case.more if case.saves and checkpoints(folder/case.saves) else ()
        code, _, said, left = run(case, argv_of(case, folder, pair, more), folder)
        if code == 0: break
    about["then"] = ([line[:300] for line in said.splitlines() if "laid: error" in line or "TRACEBACK" in line] or [""])[-1]
    if case.done and (folder/case.done).exists(): code = 0
    if code: return "did not go on", about
    found = result_of(case, folder)
    differ = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if differ: return "other bytes", about | {"differ": differ[:3]}
    for path in (*folder.rglob("*"), *folder.parent.glob(f"{folder.name}.*")):
        if path.is_file(): path.unlink()
    return "the same bytes", about


def spread(n, points):
    "Some of 1 … n, in the middle of as many equal parts."
    return sorted({round(.5 + (i + .5)*n/points) for i in range(min(points, n))})


def stops(case, events, seconds, points, moments, rng):
    "(at, how, seconds after the start or None) of every stop of a case."
    for at in spread(events, points): yield at, "SIGKILL", None
    if not moments and points < 3:  # quick
        yield events//2, "SIGTERM", None
        return
    for how in ("SIGTERM", "SIGINT", "full"):
        for at in spread(events, max(1, points//3)): yield at, how, None
    for how in SIGNALS:
        for _ in range(moments): yield 0, how, rng.uniform(0, seconds)
    if moments: yield 20_000, "limit", None  # it binds shared memory too
    if case.name in ("train-workers", "anchors") and moments: yield 0, "worker", None


def both(found, more):
    "What came of two calls."
    cases = {name: dict(row, stops=dict(row["stops"])) for name, row in found["cases"].items()}
    for name, row in more["cases"].items():
        there = cases.setdefault(name, row | {"stops": {}})["stops"]
        for way, counts in row["stops"].items(): there[way] = dict(Counter(there.get(way, {})) + Counter(counts))
    return {key: found[key] + more[key] for key in ("commands", "planned", "minutes", "wrong")} | dict(cases=cases)


def summed(found):
    "What came of all cases, with its sums."
    ways = [(way, Counter(counts)) for row in found["cases"].values() for way, counts in row["stops"].items()]
    came = sum((counts for _, counts in ways), Counter())
    return found | dict(stopped=came.total(), came=dict(came.most_common()), moments=sum(counts.total() for way, counts in ways if way.endswith("random moment")))


def parsed(argv):
    "What was typed."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="three stops each of one training and of eval")
    p.add_argument("--only", default="", help="names of cases, with commas")
    p.add_argument("--points", type=int, default=12, help="file events at which a case gets SIGKILL; a third of it for each other way")
    p.add_argument("--moments", type=int, default=4, help="random moments for each signal and case")
    p.add_argument("--minutes", type=float, default=600., help="begin no stop after these")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="JSON file of what came of it")
    p.add_argument("--add", action="store_true", help="to what that file holds already; take another seed")
    return p.parse_args(argv)


def main(argv=None):
    args = parsed(argv)
    rng, began, names = random.Random(args.seed), time.monotonic(), set(args.only.split(",")) - {""}
    if args.quick: args.points, args.moments, names = 2, 0, names or {"train-laid", "eval"}
    table, wrong, tried = {}, [], {}
    scratch = Path(tempfile.mkdtemp(prefix="laid-kills-"))  # no TemporaryDirectory: a forked process would remove it when it ends
    try:
        processor = build_processor()
        for role, layers in (("teacher", 3), ("student", 2)): tiny(scratch/"pair", role, layers, layers, processor)
        plans = []
        for case in CASES:
            if names and case.name not in names: continue
            folder = scratch/f"{case.name}-whole"
            folder.mkdir()
            code, seconds, said, left = run(case, argv_of(case, folder, scratch/"pair"), folder)
            if code or left: raise SystemExit(f"{case.name} itself fails ({code}, {left} processes left):\n{said[-3000:]}")
            events = int(folder.with_suffix(".events").read_text())
            print(f"{case.name}: {events} file events, {seconds:.1f} s", flush=True)
            tried[case.name] = dict(events=events)
            plans += [(i, case, result_of(case, folder), stop) for i, stop in enumerate(stops(case, events, seconds, args.points, args.moments, rng))]
        order = random.Random(args.seed)
        plans = sorted(plans, key=lambda plan: order.random()) if args.minutes < 600 else plans
        for n, (_, case, wanted, (at, how, after)) in enumerate(plans, 1):
            if time.monotonic() - began > 60*args.minutes: break
            came, about = stopped(case, scratch, scratch/"pair", wanted, at, how, after)
            way = f"{how} at a {'file event' if after is None else 'random moment'}" if how in SIGNALS else {"full": "full disk", "limit": "file size limit", "worker": "end of a worker"}[how]
            table.setdefault(case.name, {}).setdefault(way, Counter())[came] += 1
            if came != "the same bytes":
                wrong.append({"came": came} | about)
                print(came, about, flush=True)
            elif n % 25 == 0: print(f"{n} of {len(plans)}", flush=True)
    finally: shutil.rmtree(scratch, ignore_errors=True)
    found = dict(commands=["python tests/kill_runs.py" + "".join(f" {x}" for x in (argv if argv is not None else sys.argv[1:]) if x)], planned=len(plans), minutes=round((time.monotonic() - began)/60, 1),
                 cases={name: tried[name] | {"stops": {way: dict(counts) for way, counts in sorted(ways.items())}} for name, ways in table.items()}, wrong=wrong)
    if args.add: found = both(store.read_json(args.out), found)
    found = summed(found)
    print(f"{found['stopped']} stops of {found['planned']} planned: " + ", ".join(f"{n} {came}" for came, n in found["came"].items()))
    if args.out: store.write_json(args.out, found)
    return int(bool(wrong))


if __name__ == "__main__": sys.exit(main())
