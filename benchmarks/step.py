"""One training step of SFT, SFT + KL, LAid and LAid+ on one pair of models: time and peak memory as ratios to SFT + KL,
beside the floor that no method can beat."""
import argparse
import tempfile
import warnings

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.haystack import picture_haystack
from laid_nb.losses import supervised_rows
from laid_nb.inputs import HaystackCollator, image_inputs, precompute, read_positions
from laid_nb.simulate import WindowSimulation
from laid_nb.train import LaidConfig, LaidTrainer
from measure import peak_bytes, seconds, table, write

METHODS = {"SFT": "sft", "SFT + KL": "kd", "LAid": "laid", "LAid+": "laid+"}
DEPTH = {"teacher": 16, "student": 12}  # widths as in the embedded pair, whose few layers overstate what is done once
ON_GPU = torch.cuda.is_available()


def model(
    name: str,  # "teacher" or "student"
    processor,
) -> Qwen2_5_VLForConditionalGeneration:  # random weights
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
    haystacks = [picture_haystack(0, images, 12, "train")]
    return precompute(haystacks, collate, pair["student"], pair["teacher"], progress=False)[0]


def floor(
    pair: dict,  # name -> model
    batch: dict,  # on the device
):
    "Teacher forward, student forward and backward: stock models, cross-entropy alone."
    rows, answers = supervised_rows(batch["labels"])
    positions, keep = read_positions(pair["student"], batch), rows.any(0).nonzero()[:, 0]
    how = dict(position_ids=positions, logits_to_keep=keep, use_cache=False)
    def run():
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=ON_GPU):
            with torch.no_grad():
                pair["teacher"](**image_inputs(pair["teacher"], batch, "teacher"), **how)
            logits = pair["student"](**image_inputs(pair["student"], batch, "student"), **how).logits
            torch.nn.functional.cross_entropy(logits[0].float(), answers).backward()
        pair["student"].zero_grad()
    return run


def step(
    trainer: LaidTrainer,
    batch: dict,  # from the collator
):
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    def run():
        with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
            trainer.training_step(trainer.model, dict(batch))
        trainer.model.zero_grad()
        for part in trainer.parts:
            for p in part.parameters():
                p.grad = None
    return run


def prepared(
    method: str,  # a row of METHODS
    processor,
    pool: list[dict],  # of samples
    teacher,  # a model
) -> LaidTrainer:
    "A trainer before its first step. Far keys have their whole weight, as at the end of a training."
    config = LaidConfig(
        tempfile.mkdtemp(), method=METHODS[method], use_cpu=not ON_GPU, bf16=ON_GPU, report_to="none",
        disable_tqdm=True, save_strategy="no")
    student, simulation = model("student", processor), WindowSimulation(ramp=0.0)
    trainer = LaidTrainer(student, config, pool, processor, teacher=teacher, simulation=simulation)
    trainer.start()
    trainer.model.train()
    return trainer


def measure(
    tokens: int,
    repeat: int,  # timed steps of each method
) -> list[dict]:  # a row a method
    processor, device = build_processor(), "cuda" if ON_GPU else "cpu"
    pair = {name: model(name, processor).to(device) for name in DEPTH}
    pool, calls = [sample(tokens, processor, pair)], {}
    for name in METHODS:
        trainer = prepared(name, processor, pool, pair["teacher"])
        batch = trainer.data_collator(pool)
        calls[name] = step(trainer, batch)
    pair["student"].get_encoder(modality="image").requires_grad_(False)
    calls["floor"] = floor(pair, {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})
    return rows_of(calls, repeat, batch["input_ids"].shape[1])


def rows_of(
    calls: dict,  # method -> what is timed
    repeat: int,  # timed steps of each method
    tokens: int,  # that are read
) -> list[dict]:
    "Time and memory of each call, and their ratio to SFT + KL."
    time, memory = seconds(calls, repeat), {name: peak_bytes(call) for name, call in calls.items()}
    ratio = lambda what, name: what[name]/what["SFT + KL"]
    return [{"tokens": tokens, "method": name, "seconds": time[name], "time / SFT + KL": ratio(time, name),
             "MB": memory[name]/1e6, "memory / SFT + KL": ratio(memory, name)} for name in calls]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    tokens = [1024, 4096, 16384] + [53_000]*ON_GPU
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="of the haystack that is read")
    parser.add_argument("--quick", action="store_true", help="one step of each at 512 tokens; nothing is written")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = []
    for tokens in [512] if args.quick else args.tokens:
        rows += measure(tokens, 1 if args.quick else 5 if tokens < 10_000 else 2)
        print(table(rows), flush=True)
    if not args.quick:
        models = "Qwen2.5-VL classes, random weights (seed 0), widths of the embedded pair"
        write("bench_step" + "_gpu"*ON_GPU, rows, layers=DEPTH, models=models)


if __name__ == "__main__":
    main()
