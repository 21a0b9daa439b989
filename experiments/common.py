"""What the experiments share: the protocol, trainings that resume, pictures seen once, and a labelled result file.

A training is named by its settings, kept in WORK and never made twice: an experiment that was stopped goes on where it
was, and one that needs the trainings of another finds them."""
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import time
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import drawn_tasks
from laid_nb.anchors import make_anchors
from laid_nb.evaluate import evaluate
from laid_nb.haystack import Haystack, drawn_test, drawn_training
from laid_nb.inputs import HaystackCollator, precompute, precompute_prompts
from laid_nb.parts import StreamPart
from laid_nb.recompose import unlabelled
from laid_nb.script import one_line
from laid_nb.simulate import asked_rows
from laid_nb.stop import stop_requests, worker_pool
from laid_nb.store import (
    atomic_write,
    cores,
    data_path,
    hardware,
    load_model,
    model_fingerprint,
    prepare_process,
    read_json,
    save_model,
    slug,
    versions,
    write_json,
)
from laid_nb.train import LaidTrainer, quiet_training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/"data"/"results"
WORK = Path(os.environ.get("LAID_WORK", ROOT/"laid-experiments"))  # models, records and caches, unseen by git
SIZES = (1, 5, 10, 20, 50, 100, 150, 300)  # images of a test haystack
QUESTIONS = 408  # at each size: 34 haystacks of 12
SEEDS = (0, 1, 2)  # of trainings
STUDENTS = ("student", "near", "small")  # with one vision tower
MADE = ("medium", "foreign")  # anchors with that tower that do not ship: `anchor_folder` makes them
USUAL = (("anchor", "teacher"), ("student", "student"), ("start", None),
         ("where", "all"))  # of a Run: what its id leaves out
SIMULATION = dict(max_gap=600, max_multiplicity=16.0, ramp=.3)  # window simulation


def log(*what): print(time.strftime("%H:%M:%S"), *what, flush=True)


def command() -> str:
    "What was typed."
    return shlex.join(["python", "experiments/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str: return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write(
    name: str,  # of the result: data/results/NAME.json
    data: dict,  # what json can write
    start: float,  # time.time() when the work began
):
    "A result, with the command, versions, hardware and time that made it."
    made = dict(command=command(), finished=now(), seconds=round(time.time() - start), versions=versions(),
                hardware=hardware())
    path = RESULTS/f"{name}.json"
    write_json(path, {"made": made} | data)
    log("written:", path.relative_to(ROOT))


@contextmanager
def going_on():
    "Around the main function of a script: Ctrl-C, SIGTERM, a lost worker and a full disk end it with what goes on."
    with stop_requests():
        try:
            yield
        except KeyboardInterrupt as e:
            print(f"stopped; go on with {command()}", file=sys.stderr)
            raise SystemExit(128 + getattr(e, "number", signal.SIGINT)) from None
        except (OSError, SafetensorError, BrokenProcessPool) as e:
            print(f"error: {one_line(e)}; go on with {command()}", file=sys.stderr)
            raise SystemExit(2) from None


@dataclass(frozen=True)
class Run:
    "A training of the embedded student. Everything that its result depends on stands here."
    name: str  # as in tables
    seed: int = 0  # of the training: haystacks, order, window simulation, first mixing weights
    settings: dict = field(default_factory=dict)  # of LaidConfig and WindowSimulation
    haystacks: int = 417  # of 12 questions each: about 5,000 questions, as in the paper
    images: tuple = (1, 20)  # smallest and largest training haystack
    steps: int = 520  # of 8 haystacks: 10 epochs, as in the paper
    flipped: float = 0.0  # share of the answers that is wrong
    labels: bool = True  # False: nobody has answered the questions; the teacher's answers are all there is
    kind: str = "single"  # "single" or "multi" needle, "both", by turns, or "mixed": all of drawn_tasks.TASKS
    anchor: str = "teacher"  # who teaches; "student": the student as it is, frozen; "average": see `RunningAverage`; or
    # one of STUDENTS or MADE
    student: str = "student"  # who learns: one of STUDENTS, or "teacher"
    start: "Run | None" = None  # the training that this one goes on from; None: the student as it is
    where: str = "all"  # the tokens that Eq. 7 compares; "needle": see `AtNeedle`

    @property
    def id(self) -> str:
        what = {k: v for k, v in asdict(self).items() if k != "name" and (k, v) not in USUAL}
        if self.start:
            what["start"] = self.start.id
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        return f"{slug(self.settings['method'])}-{digest[:8]}"

    @property
    def folder(self) -> Path: return WORK/"models"/self.id


def flip_labels(
    haystacks: list[Haystack],  # with yes/no questions
    share: float,  # of the answers to be turned round
    seed: int,
) -> list[Haystack]:
    "Labels as an annotator errs: a random share of them is the wrong way round."
    rng = random.Random(seed)
    wrong = lambda q: replace(q, answer=not q.answer) if rng.random() < share else q
    return [replace(h, questions=tuple(map(wrong, h.questions))) for h in haystacks]


@functools.lru_cache(1)
def pair() -> dict:
    "The embedded teacher and student, on the device, with the processor."
    device = prepare_process()
    (teacher, _), (student, processor) = load_model("teacher"), load_model("student")
    return dict(teacher=teacher.to(device), student=student.to(device), processor=processor, device=device)


def anchor_folder(
    name: str,  # one of MADE
) -> Path:
    "Where an anchor is that does not ship; where it is not there yet it is made, as `laid anchors` makes it."
    folder, work, towers = WORK/"made"/name, WORK/"anchors-work", data_path("anchors")
    if not folder.exists():
        log(f"{folder} is not there: making it, in about half an hour on one core, as does\n"
            f"laid anchors --models {name} --towers {towers} --folder {work} --out {folder.parent}")
        make_anchors(work, folder.parent, [name], towers, pair()["device"])
    return folder


@functools.lru_cache(len(STUDENTS))
def frozen(name: str):
    "A student or another anchor with its tower, as it is, on the device."
    return pair()["student"] if name == "student" else load(name)[0].to(pair()["device"])


def drawn(kind: str, sizes: range, number: int, seed: int) -> list[Haystack]:
    "Training haystacks of one task, or of several by turns; one image has no room for several needles."
    if kind == "mixed": return drawn_tasks.mixed_training(sizes, number, seed)
    if kind != "both": return drawn_training(sizes, number, seed, kind)
    single = drawn_training(sizes, -(-number//2), seed)
    several = drawn_training([n for n in sizes if n > 1], number//2, seed, "multi")
    return [h for pair in zip(single, several) for h in pair] + single[len(several):]


@functools.lru_cache(2)
def pool(seed, number, images, kind, flipped, labels, learner, tower) -> list[dict]:
    "Training haystacks as tensors."
    haystacks = flip_labels(drawn(kind, range(images[0], images[1] + 1), number, seed), flipped, seed)
    if not labels:
        haystacks = unlabelled(haystacks)
    collate = HaystackCollator(pair()["processor"])
    return precompute(haystacks, collate, pair()[learner], pair()[tower], progress=False)


def tower_of(name: str) -> str:
    "Whose vision tower a model has: all students have one."
    return "teacher" if name == "teacher" else "student"


def pool_of(run: Run) -> list[dict]:
    "The training haystacks of a run, as its two vision towers see them."
    learner, tower = tower_of(run.student), tower_of(run.anchor)
    return pool(run.seed, run.haystacks, run.images, run.kind, run.flipped, run.labels, learner, tower)


def anchor_of(run: Run):
    "The model that teaches."
    if run.anchor == "teacher": return pair()["teacher"]
    if run.anchor == "average": return load_model(run.student)[0].to(pair()["device"])  # its own, as it will change
    return frozen(run.student if run.anchor == "student" else run.anchor)


class ReadOnce(LaidTrainer):
    """A trainer that keeps what the teacher says of a batch on disk: methods that read the same batches in the same way
    share it."""
    def read_teacher(self, inputs, how, bias, rows):
        what = [inputs["input_ids"], inputs["teacher_features"], how["position_ids"], rows, *(bias or ())]
        other = self.teacher is not pair()["teacher"]
        who = model_fingerprint(self.teacher, pair()["processor"]) if other else ""
        known = self.kept(who.encode() + b"".join(x.contiguous().cpu().numpy().tobytes() for x in what))
        if known.exists(): return {k: v.to(self.args.device) for k, v in load_file(known).items()}
        said = super().read_teacher(inputs, how, bias, rows)
        with atomic_write(known) as part:
            save_file({k: v.contiguous() for k, v in said.items()}, part)
        return said

    def kept(
        self,
        what: bytes,  # all that the teacher's answer depends on
    ) -> Path:
        "The file of a batch: named by the layers that are compared; logits alone stand in any file of the batch."
        key = hashlib.blake2b(what, digest_size=16).hexdigest()
        layers = sorted({t for part in self.parts for _, t in part.pairs})
        path = WORK/"teacher"/f"{key}-{'-'.join(map(str, layers))}{'-hidden'*bool(self.part(StreamPart))}.safetensors"
        return path if path.exists() or layers else next(path.parent.glob(f"{key}-*"), path)


class AtNeedle(ReadOnce):
    """A trainer whose Eq. 7 compares the queries of questions and the keys of images alone that any question of the
    haystack asks about: with twelve questions, most images of a short haystack."""
    def evidence(self, model, inputs):
        found, pairs, outputs = super().evidence(model, inputs)
        groups = found.groups()
        asked = asked_rows(found.turn, inputs["needles"], groups).any(1)  # [batch, images]
        keys = (groups >= 0) & asked.gather(1, groups.clamp(min=0))
        counts = (found.turn >= 0).float(), keys.float()
        return found, {pair: replace(seen, counts=counts) for pair, seen in pairs.items()}, outputs


class RunningAverage(LaidTrainer):
    "A trainer whose teacher is a running average of its student as it would be saved, with the gain in its weights."
    KEPT = .98  # of the teacher at each step

    def training_step(self, *inputs, **how):
        loss, now = super().training_step(*inputs, **how), self.model.state_dict()
        for part in self.parts:
            now = part.stock(now)
        with torch.no_grad():
            for name, weight in self.teacher.state_dict().items():
                weight.lerp_(now[name], 1 - self.KEPT)
        return loss


def settings_of(run: Run) -> dict:
    "All that `quiet_training` is told: the steps, batches and rates of the table, and what the run changes."
    usual = dict(max_steps=run.steps, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-3,
                 mixing_learning_rate=5e-3, seed=run.seed, use_cpu=pair()["device"] == "cpu", logging_steps=20)
    return usual | run.settings


def train(
    run: Run,
) -> Path:  # folder of the student
    "Train, unless that has been done."
    if run.folder.exists(): return run.folder
    student, _ = load_model(str(train(run.start)) if run.start else run.student, torch.float32)
    start, processor = time.time(), pair()["processor"]
    trainer = RunningAverage if run.anchor == "average" else AtNeedle if run.where == "needle" else ReadOnce
    trained = quiet_training(student, processor, pool_of(run), anchor_of(run), trainer=trainer, **settings_of(run))
    if run.folder.exists(): return run.folder  # another experiment was faster
    with atomic_write(run.folder) as part:
        save_model(student, processor, part)
        seconds = round(time.time() - start)
        write_json(part/"run.json", dict(run=asdict(run), seconds=seconds, log=trained.state.log_history))
    return run.folder


def nothing_made() -> SystemExit:
    "What ends a script with `--done` where there is nothing to write."
    return SystemExit(f"nothing to write has been made in {WORK} yet: leave out --done")


def made(
    rows: dict,  # key -> trainings
    done: bool,  # `--done`: train nothing, keep what is there; rows without any are left out
    order=None,  # key of a Run, by which they are trained; None: as they stand
    needs: tuple = (),  # keys without which there is nothing to write
    **how,  # of `do_all`
) -> dict[str, list[Run]]:
    "Rows with the trainings that are there, which without `--done` are all."
    if not done:
        do_all(sorted((run for some in rows.values() for run in some), key=order or (lambda run: 0)), **how)
        return rows
    there = {name: [run for run in some if run.folder.exists()] for name, some in rows.items()}
    there = {name: some for name, some in there.items() if some}
    if not there or not set(needs) <= set(there):
        raise nothing_made()
    return there


def made_blocks(
    blocks: dict,  # block -> row -> trainings
    done: bool, order=None, needs: tuple = (), **how,  # of `made`; needs: blocks of which a row has to be there
) -> dict[str, dict[str, list[Run]]]:
    "The same in blocks, all of them in one go; blocks without a row are left out."
    rows = {(block, name): some for block, rows in blocks.items() for name, some in rows.items()}
    there = made(rows, done, order, **how)
    found = {block: {name: there[block, name] for name in rows if (block, name) in there}
             for block, rows in blocks.items()}
    found = {block: rows for block, rows in found.items() if rows}
    if not set(needs) <= set(found): raise nothing_made()
    return found


def spent(
    *blocks: dict,  # row -> trainings
) -> int:
    "Seconds that the trainings took, each on its own thread, whenever they were made; each counts once."
    different = {run.id: run for rows in blocks for some in rows.values() for run in some}
    return sum(read_json(run.folder/"run.json")["seconds"] for run in different.values())


def load(
    name,  # "teacher", one of STUDENTS or MADE, a Run, a folder, or a row of reproduce.json: its first training
):  # -> (model, processor)
    if isinstance(name, Run):
        name = name.folder
    elif name in MADE:
        name = anchor_folder(name)
    elif name not in ("teacher", *STUDENTS) and not Path(name).is_dir():
        rows = read_json(RESULTS/"reproduce.json")["runs"]
        if name not in rows: raise ValueError(f"no such model: {name}; give a folder, or one of {', '.join(rows)}")
        name = WORK/"models"/rows[name][0]
    return load_model(str(name))


@functools.lru_cache(4)
def tests(
    sizes: tuple = SIZES,  # images
    questions: int = QUESTIONS,  # at each size
    split: str = "test",  # "val" to choose by, "test" to report
    seed: int = 1,
    kind: str = "single",  # one of drawn_tasks.TASKS
) -> list[Haystack]:
    if kind in drawn_tasks.MADE: return drawn_tasks.task_test(sizes, questions, seed, split, kind)
    return drawn_test(sizes, questions, seed, split, kind)


def exam_name(sizes, questions, split, seed, kind) -> str:
    "Of `tests`, in paths."
    kind = "" if kind == "single" else f"{kind}-"
    return f"{kind}{split}-{seed}-{questions}-{'-'.join(map(str, sizes))}"


@functools.lru_cache(4)
def pictures(
    role: str,  # "teacher" or "student": whose vision tower
    sizes: tuple, questions: int, split: str, seed: int, kind: str = "single",  # of `tests`
) -> dict:  # for evaluate(features=)
    "What a vision tower makes of the test pictures, kept on disk."
    path = WORK/"seen"/f"{role}-{exam_name(sizes, questions, split, seed, kind)}.safetensors"
    if not path.exists():
        haystacks = tests(sizes, questions, split, seed, kind)
        made = precompute_prompts(pair()[role], pair()["processor"], haystacks, progress=False)
        flat = {f"{h} {k}": v.contiguous() for h, inputs in made.items() if h != "tower" for k, v in inputs.items()}
        with atomic_write(path) as part:
            save_file(flat, part, {"tower": made["tower"]})
    with safe_open(path, "pt") as f:
        found = {"tower": f.metadata()["tower"]}
        for name in f.keys():
            haystack, field = name.split(" ")
            found.setdefault(haystack, {})[field] = f.get_tensor(name)
    return found


def marks(records: list[dict]) -> dict[int, str]:
    "Size -> a 1 for each right answer, a 0 for each wrong one, in the order of the records."
    found = {}
    for r in records:
        found[r["size"]] = found.get(r["size"], "") + str(int(r["correct"]))
    return found


def answers(
    name,  # "teacher", one of STUDENTS or MADE, or a Run
    sizes: tuple = SIZES, questions: int = QUESTIONS, split: str = "test", seed: int = 1,  # of `tests`
    kind: str = "single",  # likewise
    ask_with=None,  # (label, function of (model, processor, haystacks, path) -> records): another way of asking
) -> dict[int, str]:  # size -> a 1 for each right answer, a 0 for each wrong one
    "Right and wrong, question by question, in the order of `tests`."
    label = (name if isinstance(name, str) else name.id) + (f"-{slug(ask_with[0])}" if ask_with else "")
    exam = sizes, questions, split, seed, kind
    path = WORK/"answers"/exam_name(*exam)/f"{label}.json"
    if not path.exists():
        model, processor = load(name)
        model, haystacks = model.to(pair()["device"]), tests(*exam)
        role = tower_of(name.student if isinstance(name, Run) else name)
        if ask_with:
            records = ask_with[1](model, processor, haystacks, None)
        else:
            features = pictures(role, *exam)
            records = evaluate(model, processor, haystacks, batch=12, progress=False, features=features)
        write_json(path, marks(records))
    return {int(size): text for size, text in read_json(path).items()}


def answers_of(
    names,  # models as they are
    rows: dict[str, list[Run]],  # name -> trainings
    **how,  # of `answers`
) -> dict[str, list[dict[int, str]]]:
    "Name -> answers of each training, the models as they are first."
    models = {name: [answers(name, **how)] for name in names}
    return models | {name: [answers(run, **how) for run in some] for name, some in rows.items()}


def shares(found: dict[int, str]) -> dict[int, float]:
    "Accuracy by size."
    return {size: text.count("1")/len(text) for size, text in found.items()}


def _work(run, how):
    train(run)
    return shares(answers(run, **how))


def do_all(
    runs: list[Run],
    sizes: tuple = SIZES, questions: int = QUESTIONS, split: str = "test", seed: int = 1,  # of `tests`
):
    "Train and measure; on a CPU as many at a time as there are cores, one thread each, on a GPU one at a time."
    how, start = dict(sizes=sizes, questions=questions, split=split, seed=seed), time.time()
    runs = list({r.id: r for r in runs}.values())
    pictures("student", **how)  # before the workers start, as all of them read the file
    workers = 1 if torch.cuda.is_available() else min(cores(), len(runs))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores()//workers))
    with worker_pool(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        jobs = {executor.submit(_work, run, how): run for run in runs}
        try:
            for i, job in enumerate(as_completed(jobs), 1):
                run, minutes = jobs[job], (time.time() - start)/60
                told = " ".join(f"{s}:{100*a:.0f}" for s, a in job.result().items())
                log(f"{i}/{len(runs)}, {minutes:.0f} min: {run.name}, seed {run.seed}:", told)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
