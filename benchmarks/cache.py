"""What a teacher cache costs and saves: bytes a token and time of a step with and without it; and, with --effect, what
keeping less does to the losses and the accuracy of the embedded student."""
import argparse
import functools
import tempfile
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from laid_nb.accuracy import by_size
from laid_nb.anchors import build_processor
from laid_nb.evaluate import evaluate
from laid_nb.haystack import drawn_test, drawn_training
from laid_nb.inputs import HaystackCollator, precompute, precompute_prompts
from laid_nb.store import load_model
from laid_nb.train import LaidTrainer, quiet_training
from measure import seconds, table, write
from step import DEPTH, made, model, sample, step

KEPT = {  # what is kept -> settings
    "all": {},
    "all, 8 bits": dict(teacher_cache_bits=8),
    "rows": dict(teacher_cache_heads="rows"),
    "rows, 8 bits": dict(teacher_cache_heads="rows", teacher_cache_bits=8),
    "a quarter": dict(teacher_cache_heads="subset", teacher_cache_share=.25),
    "a quarter, 8 bits": dict(teacher_cache_heads="subset", teacher_cache_share=.25, teacher_cache_bits=8),
}
TRAINING = dict(method="laid", per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=2e-3,
                mixing_learning_rate=5e-3, logging_steps=10)
SIZES = (5, 20)  # images of the questions asked afterwards


def entry_bytes(folder) -> int:
    "Bytes of all samples in a cache."
    return sum(f.stat().st_size for f in Path(folder, "said").glob("*.safetensors") if f.stem != "head")


def measure(
    tokens: int,
    repeat: int,  # timed steps of each
) -> list[dict]:  # a row for each way to keep
    "One LAid step on one haystack: with the teacher, and from the cache."
    processor, device = build_processor(), "cuda" if torch.cuda.is_available() else "cpu"
    pair = {name: model(name, processor).to(device) for name in DEPTH}
    pool, calls, sizes = [sample(tokens, processor, pair)], {}, {}
    for name, kept in {"the teacher is read": None, **KEPT}.items():
        cache = {} if kept is None else dict(teacher_cache=tempfile.mkdtemp(), **kept)
        trainer = made("laid", pair["student"], pair["teacher"], pool, processor, **cache)
        batch = trainer.data_collator(pool)
        calls[name] = functools.partial(step, trainer, batch)
        calls[name]()  # writes
        sizes[name] = entry_bytes(cache["teacher_cache"]) if cache else 0
    time, length = seconds(calls, repeat), batch["input_ids"].shape[1]
    return [{"tokens": length, "kept": name, "bytes / token": sizes[name]/length, "seconds": time[name],
             "time / read": time[name]/time["the teacher is read"]} for name in calls]


def terms(
    trainer: LaidTrainer,  # trained
    held_out: list[dict],  # from `precompute`
) -> dict[str, float]:
    "KL and Eq. 7, on all tokens, of haystacks that were not trained on."
    trainer.cached = None
    batch = trainer._prepare_inputs(HaystackCollator(trainer.processing_class)(held_out))
    trainer.model.eval()
    with torch.no_grad(), trainer.captured():
        answers, pairs, _ = trainer.evidence(trainer.model, batch)
        found = trainer.terms(answers, pairs)
    return {name: found[name].item() for name in ("kl", "laid")}


def effect(
    seed: int,
    haystacks: int,
    epochs: int,
    questions: int,  # at each size
    sizes: tuple = SIZES,
    ways: dict = KEPT,
) -> list[dict]:  # a row for each way to keep
    "The embedded student, distilled by LAid from a cache, and what became of it."
    teacher, (student, processor) = load_model("teacher")[0], load_model("student", torch.float32)
    collate = HaystackCollator(processor)
    pool = precompute(drawn_training(range(2, 13), haystacks, seed), collate, student, teacher, progress=False)
    held_out = precompute(drawn_training(range(8, 11), 6, 77), collate, student, teacher, progress=False)
    tests = drawn_test(sizes, questions, seed)
    prompts, rows = precompute_prompts(student, processor, tests, progress=False), []
    tokens = sum(s["input_ids"].numel() for s in pool)
    for name, kept in {"the teacher is read": None, **ways}.items():
        student, _ = load_model("student", torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            cache = {} if kept is None else dict(teacher_cache=folder, **kept)
            trained = quiet_training(student, processor, pool, teacher, seed=seed, num_train_epochs=epochs,
                                     use_cpu=not torch.cuda.is_available(), **TRAINING, **cache)
            size = entry_bytes(folder) if cache else 0
        records = evaluate(student.eval(), processor, tests, batch=12, progress=False, features=prompts)
        found = by_size(records)
        accuracy = {f"{n} images": a for n, a in zip(found.sizes, found.accuracy)}
        asked = trained.cached.asked if trained.cached else epochs*len(pool)
        losses = terms(trained, held_out)
        about = {"seed": seed, "kept": name, "bytes / token": size/tokens, "teacher reads": asked}
        rows.append(about | losses | accuracy)
        print(table(rows[-1:]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of the haystack that is read")
    parser.add_argument("--effect", type=int, nargs="*", metavar="SEED", help="train the embedded student instead")
    parser.add_argument("--quick", action="store_true", help="512 tokens, one short training; nothing is written")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = []
    if args.quick:
        rows = measure(512, 1)
        effect(0, 8, 2, 6, (2,), {"rows": KEPT["rows"]})
    elif args.effect is not None:
        for seed in args.effect or (0, 1):
            rows += effect(seed, 160, 3, 144)
            write("bench_cache_effect", rows, training=TRAINING, haystacks=160, epochs=3, pair="embedded")
    else:
        for tokens in args.tokens:
            rows += measure(tokens, 5)
        models = "Qwen2.5-VL classes, random weights (seed 0), widths of the embedded pair"
        write("bench_cache", rows, layers=DEPTH, models=models)
    print(table(rows) if rows else "")


if __name__ == "__main__":
    main()
