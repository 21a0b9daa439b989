"""The student that the package ships beside the pair: LAid+ with window simulation and recomposed pictures, seed 0, as
in the table of reproduce.py.

  python experiments/distilled.py    # data/anchors/distilled, and its mixing weights and losses on the way:
                                     # data/spectra/training.safetensors
"""
import json
import time

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import reproduce
from common import RESULTS, Run, log, pair, pool_of, settings_of
from laid_nb.parts import MixingPart
from laid_nb.store import atomic_write, data_path, hardware, load_model, read_json, save_model, versions
from laid_nb.train import LaidTrainer, quiet_training


class Watched(LaidTrainer):
    "A trainer that its callback knows."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for callback in kwargs["callbacks"]:
            callback.trainer = self


class Watch(TrainerCallback):
    "Keeps the mixing weights before the first step and at every log."
    def __init__(self): self.weights, self.steps = [], []

    def on_train_begin(self, args, state, control, **_): self.keep(state)

    def on_log(self, args, state, control, **_):
        if state.global_step not in self.steps:
            self.keep(state)

    def keep(self, state):
        mixing = self.trainer.part(MixingPart).mixing
        self.steps.append(state.global_step)
        kept = lambda m: {x: w.detach().cpu() for x, w in zip("qk", m.weights())}
        self.weights.append({key: kept(m) for key, m in mixing.items()})


def history(watch: Watch, logs: list[dict]) -> dict:
    "Steps; mixing weights [times, student heads, teacher heads]; losses [times but the first]."
    weights = {f"{key}/{x}": torch.stack([w[key][x] for w in watch.weights]) for key in watch.weights[0] for x in "qk"}
    logs = [h for h in logs if "loss" in h]
    terms = [term for term in logs[0] if term.startswith("loss")]
    losses = {term: torch.tensor([h[term] for h in logs], dtype=torch.float32) for term in terms}
    return {"steps": torch.tensor(watch.steps), **weights, **losses}


def main():
    start, chosen = time.time(), read_json(RESULTS/"reproduce.json")["search"]["chosen"]["LAid+"]
    run = Run(reproduce.BEST, 0, reproduce.settings("LAid+", chosen, True, .5), steps=reproduce.STEPS)
    student, processor = load_model("student", torch.float32)
    watch = Watch()
    trainer = quiet_training(student, processor, pool_of(run), pair()["teacher"], callbacks=[watch], trainer=Watched,
                             **settings_of(run) | dict(logging_steps=10))
    save_model(student, processor, data_path("anchors")/"distilled")
    made = dict(command="python experiments/distilled.py", run=run.name, settings=json.dumps(run.settings),
                steps=str(run.steps), seconds=str(round(time.time() - start)), versions=json.dumps(versions()),
                hardware=json.dumps(hardware()))
    with atomic_write(data_path("spectra")/"training.safetensors") as part:
        save_file(history(watch, trainer.state.log_history), part, made)
    log("written: data/anchors/distilled, data/spectra/training.safetensors")


if __name__ == "__main__":
    main()
