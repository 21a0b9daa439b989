"""What a training of a method costs when nothing is kept from another one: operations of teacher and student, seconds
of a core and peak memory of a step, and what is done once, before the first step."""
import hashlib
import math
import os
import sys
import time
from dataclasses import replace
from statistics import fmean, median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from common import ROOT, WORK, Run, anchor_of, pair, pool_of, settings_of
from laid_nb.haystack import drawn_training
from laid_nb.inputs import HaystackCollator, precompute
from laid_nb.store import load_model, read_json, write_json
from laid_nb.train import LaidTrainer, quiet_training

sys.path.insert(0, str(ROOT/"benchmarks"))
from measure import peak_now

EPOCH = 80  # haystacks of 1 to 20 images, four of each number: ten batches, an epoch, that are as a whole epoch is


# --- operations -------------------------------------------------------------------
def fft_flops(
    shape,  # of the input
    dim,  # transformed dimensions
    *args, out_shape=None, **kwargs,
) -> int:
    "Of a Fourier transform: 5 N log2 N, half of that where one side is real."
    length = math.prod(max(shape[d], out_shape[d]) for d in dim)
    points = math.prod(map(max, shape, out_shape))
    real = tuple(shape) != tuple(out_shape)
    return round(5*points*math.log2(max(2, length))/(1 + real))


FOURIER = {op: fft_flops for op in (torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2r, torch.ops.aten._fft_c2c)}


def counting() -> FlopCounterMode:
    """Counts matrix products, attention (the whole square; for its gradient the kernel makes a product anew),
    convolutions and Fourier transforms, forward and backward. What works number by number is not counted."""
    return FlopCounterMode(display=False, custom_mapping=FOURIER)


class Counting(LaidTrainer):
    "A trainer that counts the operations of what is done before the first step, and of each step."
    before, of_teacher = 0, 0  # the first step; in the present step
    steps = ()  # (of the teacher, of the student) of each

    def start(self):
        with counting() as counter:
            super().start()
        self.before = counter.get_total_flops()

    def ask_teacher(self, *args):
        before = self.counter.get_total_flops()
        said = super().ask_teacher(*args)
        self.of_teacher = self.counter.get_total_flops() - before
        return said

    def training_step(self, *args):
        with counting() as self.counter:
            loss = super().training_step(*args)
        own = self.counter.get_total_flops() - self.of_teacher
        self.steps = (*self.steps, (self.of_teacher, own))
        return loss


# --- seconds and bytes ------------------------------------------------------------
def clock() -> float:
    "Seconds of a core, whatever else runs on it; with a GPU, seconds until it is done."
    if not torch.cuda.is_available(): return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    "When the first step begins, and when each has ended, the optimiser's part too."
    def __init__(self): self.times = []

    def on_train_begin(self, *args, **kwargs): self.times.append(clock())

    def on_step_end(self, *args, **kwargs): self.times.append(clock())

    @property
    def steps(self) -> list[float]: return [b - a for a, b in zip(self.times, self.times[1:])]


class Timing(LaidTrainer):
    "A trainer that measures how long it takes to be ready for its first step, in seconds."
    before = 0.0

    def start(self):
        began = clock()
        super().start()
        self.before = clock() - began


class Weighing(LaidTrainer):
    "A trainer that measures how much memory each step takes over what was there before, in bytes."
    grown = ()

    def training_step(self, *args):
        found = []
        grown = peak_now(lambda: found.append(super(Weighing, self).training_step(*args)))
        self.grown = (*self.grown, grown)
        return found[0]


# --- of a training ----------------------------------------------------------------
def epoch(
    run: Run,
    haystacks: int,  # of its training set: batches of 8, every one of them once
    trainer: type = LaidTrainer,
    callbacks: tuple = (),
) -> LaidTrainer:
    "A training of one epoch over a small set, which is not kept."
    run = replace(run, haystacks=haystacks, steps=haystacks//8)
    student, _ = load_model(run.student, torch.float32)
    return quiet_training(student, pair()["processor"], pool_of(run), anchor_of(run), trainer=trainer,
                          callbacks=callbacks, **settings_of(run))


def operations(run: Run, haystacks: int) -> dict:
    "Of a step, the mean of an epoch, for teacher and student; and before the first step."
    made = epoch(run, haystacks, Counting)
    teacher, student = map(fmean, zip(*made.steps))
    return dict(teacher_flops=teacher, student_flops=student, start_flops=made.before)


def seconds(runs: dict[str, Run], haystacks: int, rounds: int) -> dict[str, dict]:
    """Row -> seconds: of a step, the mean over an epoch of each batch's median over the rounds, and before
    the first step. In each round all rows have their turn."""
    steps, before = ({name: [] for name in runs} for _ in range(2))
    for _ in range(rounds):
        for name, run in runs.items():
            watch = Clock()
            before[name].append(epoch(run, haystacks, Timing, (watch,)).before)
            steps[name].append(watch.steps)
    return {name: dict(seconds=fmean(map(median, zip(*steps[name]))), start_seconds=median(before[name]))
            for name in runs}


def memory(run: Run, haystacks: int) -> dict:
    "What the hungriest step of an epoch takes; the first is left out, as it makes what stays."
    return dict(peak_bytes=max(epoch(run, haystacks, Weighing).grown[1:]))


def pictures(haystacks: int) -> dict[str, dict]:
    """`alone`: what it costs to draw the pictures of a haystack and to see them with the student's tower, once for all
    steps; by anchor: how much more it is with the anchor's as well, which may be the student's once again."""
    drawn, collate = drawn_training(range(1, 21), haystacks), HaystackCollator(pair()["processor"])
    def seen(*towers):
        with counting() as counter:
            precompute(drawn, collate, *towers, progress=False)
        began = clock()
        precompute(drawn, collate, *towers, progress=False)
        return dict(flops=counter.get_total_flops()/haystacks, seconds=(clock() - began)/haystacks)
    alone = seen(pair()["student"])
    both = {anchor: seen(pair()["student"], pair()[anchor]) for anchor in ("teacher", "student")}
    more = {anchor: {unit: max(0., found[unit] - alone[unit]) for unit in alone} for anchor, found in both.items()}
    return dict(alone=alone) | more


def costs(runs: dict[str, Run], haystacks: int, rounds: int) -> dict[str, dict]:
    """`steps`: row -> what a step costs; `pictures`: what a haystack's pictures cost; `load`: processes that wanted a
    core meanwhile. On one thread; kept in WORK, so that it is measured once, all rows side by side."""
    measured = hashlib.sha256(" ".join(run.id for run in runs.values()).encode()).hexdigest()[:8]
    path = WORK/"costs"/f"{haystacks}-{rounds}-{measured}.json"
    if not path.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        timed, seen = seconds(runs, haystacks, rounds), pictures(20)
        found = {name: operations(run, haystacks) | timed[name] | memory(run, haystacks) for name, run in runs.items()}
        torch.set_num_threads(threads)
        write_json(path, dict(steps=found, pictures=seen, load=os.getloadavg()[2]))
    return read_json(path)
