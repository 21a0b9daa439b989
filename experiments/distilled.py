"""The student that the package ships beside the pair: LAid+ with window simulation and recomposed pictures, seed 0, as in the table of reproduce.py.

  python experiments/distilled.py        # data/anchors/distilled, and data/spectra/training.safetensors: mixing weights and losses on the way
"""
import json
import time

import torch
from safetensors.torch import save_file
from transformers import PrinterCallback, TrainerCallback

import reproduce
from common import RESULTS, Run, log, pair, pool
from laid_nb.store import atomic_write, hardware, load_model, save_model, versions
from laid_nb.store import data_path
from laid_nb.train import LaidConfig, LaidTrainer


class Watch(TrainerCallback):
    "Keeps the mixing weights before the first step and at every log."
    def __init__(self): self.weights, self.steps = [], []

    def on_train_begin(self, args, state, control, **_): self.keep(state)

    def on_log(self, args, state, control, **_):
        if state.global_step not in self.steps: self.keep(state)

    def keep(self, state):
        self.steps.append(state.global_step)
        self.weights.append({key: {x: w.detach().cpu() for x, w in zip("qk", m.weights())} for key, m in self.trainer.mixing.items()})


def main():
    start, name = time.time(), "LAid+" + reproduce.SIMULATED + reproduce.RECOMPOSED
    chosen = json.loads((RESULTS/"reproduce.json").read_text())["search"]["chosen"]["LAid+"]
    run = Run(name, 0, reproduce.settings("LAid+", chosen, True, .5), steps=reproduce.STEPS)
    student, processor = load_model("student", torch.float32)
    config = LaidConfig("unused", **dict(max_steps=run.steps, per_device_train_batch_size=8, gradient_accumulation_steps=1, seed=run.seed, use_cpu=pair()["device"] == "cpu", save_strategy="no", report_to="none", logging_steps=10, disable_tqdm=True) | run.settings)
    watch = Watch()
    watch.trainer = trainer = LaidTrainer(student, config, pool(run.seed, run.haystacks, run.images, run.kind, run.flipped, run.labels), processor, teacher=pair()["teacher"], callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    save_model(student, processor, data_path("anchors")/"distilled")
    weights = {f"{key}/{x}": torch.stack([w[key][x] for w in watch.weights]) for key in watch.weights[0] for x in "qk"}  # [times, student heads, teacher heads]
    logs = [h for h in trainer.state.log_history if "loss" in h]
    losses = {term: torch.tensor([h[term] for h in logs], dtype=torch.float32) for term in logs[0] if term.startswith("loss")}  # [times but the first]
    made = dict(command="python experiments/distilled.py", run=name, settings=json.dumps(run.settings), steps=str(run.steps), seconds=str(round(time.time() - start)), versions=json.dumps(versions()), hardware=json.dumps(hardware()))
    with atomic_write(data_path("spectra")/"training.safetensors") as part: save_file({"steps": torch.tensor(watch.steps), **weights, **losses}, part, made)
    log("written: data/anchors/distilled, data/spectra/training.safetensors")


if __name__ == "__main__": main()
