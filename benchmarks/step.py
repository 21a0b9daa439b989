"""One training step of SFT, SFT + KL, LAid and LAid+ on one pair of models: time and peak memory as ratios to SFT + KL,
beside the floor that no method can beat."""
import argparse
import functools
import tempfile
import warnings

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, image_inputs, precompute, read_positions
from laid_nb.losses import supervised_rows
from laid_nb.simulate import WindowSimulation
from laid_nb.train import LaidConfig, LaidTrainer
from measure import peak_bytes, seconds, table, write

METHODS = {"SFT": "sft", "SFT + KL": "kd", "LAid": "laid", "LAid+": "laid+"}
DEPTH = {"teacher": 16, "student": 12}  # the embedded pair's few layers would overstate what is done once


def model(
    name: str,  # "teacher" or "student"
    processor,
) -> Qwen2_5_VLForConditionalGeneration:  # random weights
    "A model of the pair's widths, as deep as DEPTH says."
    config = anchor_config(name, processor.tokenizer).to_dict()
    config["text_config"] |= dict(num_hidden_layers=DEPTH[name], layer_types=None)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def sample(
    tokens: int,  # of the text model, at least
    processor,
    pair: dict,  # name -> model
) -> dict:
    "An encoded haystack of 12 questions, its images as both frozen towers see them."
    collate, per_image = HaystackCollator(processor, size=168), 38  # 36 merged patches and two delimiters
    images = max(12, round((tokens - 300)/per_image))
    haystack = picture_haystack(0, images, 12, "train")
    return precompute([haystack], collate, pair["student"], pair["teacher"], progress=False)[0]


def floor(
    student,  # a transformers model
    teacher,  # likewise
    batch: dict,  # on the device
):  # -> function without arguments
    "Teacher forward, student forward and backward: stock models, cross-entropy alone."
    rows, answers = supervised_rows(batch["labels"])
    how = dict(position_ids=read_positions(student, batch), logits_to_keep=rows.any(0).nonzero()[:, 0], use_cache=False)
    half = torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=torch.cuda.is_available())

    def run():
        with half:
            with torch.no_grad():
                teacher(**image_inputs(teacher, batch, "teacher"), **how)
            logits = student(**image_inputs(student, batch, "student"), **how).logits
            torch.nn.functional.cross_entropy(logits[0].float(), answers).backward()
        student.zero_grad()
    return run


def step(
    trainer: LaidTrainer,
    batch: dict,  # from the collator
):
    "A training step, without that of the optimiser."
    with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
        trainer.training_step(trainer.model, dict(batch))
    trainer.model.zero_grad()
    for part in trainer.parts:
        for p in part.parameters():
            p.grad = None


def made(
    method: str,
    student,  # a transformers model; its weights stay as they are, for no optimiser steps
    teacher,  # likewise
    pool: list[dict],  # from `precompute`
    processor,
    kind: type = LaidTrainer,  # or a subclass
    **settings,  # more of LaidConfig
) -> LaidTrainer:  # ready for its first step
    "A trainer of one method."
    gpu = torch.cuda.is_available()
    config = LaidConfig(tempfile.mkdtemp(), method=method, use_cpu=not gpu, bf16=gpu, report_to="none",
                        disable_tqdm=True, save_strategy="no", **settings)
    full = WindowSimulation(ramp=0.0)  # every term at full weight from the start
    trainer = kind(student, config, pool, processor, teacher=teacher, simulation=full)
    trainer.model.train()
    trainer.start()
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    return trainer


def measure(
    tokens: int,
    repeat: int,  # timed steps of each method
) -> list[dict]:  # a row a method
    processor, device = build_processor(), "cuda" if torch.cuda.is_available() else "cpu"
    pair = {name: model(name, processor).to(device) for name in DEPTH}
    pool, calls = [sample(tokens, processor, pair)], {}
    for name, method in METHODS.items():
        trainer = made(method, model("student", processor), pair["teacher"], pool, processor)
        batch = trainer.data_collator(pool)
        calls[name] = functools.partial(step, trainer, batch)
    pair["student"].get_encoder(modality="image").requires_grad_(False)
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    calls["floor"] = floor(pair["student"], pair["teacher"], batch)
    time, memory = seconds(calls, repeat), {name: peak_bytes(call) for name, call in calls.items()}
    against = "SFT + KL"
    return [{
        "tokens": batch["input_ids"].shape[1],
        "method": name,
        "seconds": time[name],
        f"time / {against}": time[name]/time[against],
        "MB": memory[name]/1e6,
        f"memory / {against}": memory[name]/memory[against],
    } for name in calls]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = [1024, 4096, 16384] + [53_000]*torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes, help="of the haystack that is read")
    parser.add_argument("--quick", action="store_true", help="one step of each at 512 tokens; nothing is written")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = []
    for tokens in [512] if args.quick else args.tokens:
        repeat = 5 if tokens < 10_000 else 2
        rows += measure(tokens, 1 if args.quick else repeat)
        print(table(rows), flush=True)
    if args.quick: return
    name = "bench_step_gpu" if torch.cuda.is_available() else "bench_step"
    models = "Qwen2.5-VL classes, random weights (seed 0), widths of the embedded pair"
    write(name, rows, layers=DEPTH, models=models)


if __name__ == "__main__":
    main()
