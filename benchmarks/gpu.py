"""A training step at the true shapes of Qwen2.5-VL, on one card: seconds, share of the FLOP floor, tokens a second,
peak memory, by method and length, and the targets beside what was measured.

`python benchmarks/gpu.py` takes under 9 minutes on an H100 and writes data/results/bench_gpu.json after each row;
stopped, it goes on where it was. A row that runs out of memory is recorded as such. Weights are random and bf16,
gradients are checkpointed, the features of the pictures are given (their tower is frozen), the optimiser does not step.
The 32B teacher is cut in layers, and its missing layers are added: their FLOPs at the rate of those that ran, their
weights.

Without a card the same steps run at cut widths, for their ratios alone, side by side with the losses of TRL and
AutoModel where those are installed (see peers.py): data/results/bench_peers.json."""
import argparse
import functools
import gc
import json
import time
import warnings
from dataclasses import dataclass, replace

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

import peers
from laid_nb.anchors import anchor_config, build_processor
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import HaystackCollator, image_inputs, read_positions
from laid_nb.losses import supervised_rows
from laid_nb.store import hardware
from laid_nb.train import LaidTrainer
from measure import RESULTS, peak_bytes, table, write
from step import floor, made, step


# --- shapes -----------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    "Widths of a text model."
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False  # whether the output head is the embedding

    @property
    def layer_weights(self) -> int:
        "Numbers in the matrices of a layer."
        return 2*self.hidden*(self.hidden + self.hidden//self.heads*self.kv_heads) + 3*self.hidden*self.intermediate

    def flops(self, tokens: int, rows: int) -> float:  # rows: tokens whose logits are needed
        "Of a forward pass: two for each weight and token, and causal attention."
        layer = 2*self.layer_weights*tokens + 2*tokens**2*self.hidden
        return self.layers*layer + 2*self.hidden*self.vocabulary*rows


SHAPES = {  # of Qwen/Qwen2.5-VL-*-Instruct
    "3B": Shape(2048, 36, 16, 2, 11008, 151936, tied=True),
    "7B": Shape(3584, 28, 28, 4, 18944, 152064),
    "32B": Shape(5120, 64, 40, 8, 27648, 152064),
}
CUT = {  # for two CPU cores: true head dimension and vocabulary, the rest cut
    "student": Shape(512, 4, 4, 1, 1408, 151936, tied=True),
    "teacher": Shape(1024, 6, 8, 2, 2816, 151936, tied=True),
}
PAIRS = {"3B from 7B": ("3B", "7B"), "7B from 32B": ("7B", "32B")}
LAYERS_KEPT = {"32B": 8}
LENGTHS = (18_000, 53_000, 4_000)  # the targets' first
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOPs a second, by what a card's name holds


def model(
    shape: Shape,
    processor,
    device: str,
    layers: int | None = None,  # of them; None: all
) -> Qwen2_5_VLForConditionalGeneration:  # random weights, its vision tower one block deep: features are given
    "A model of the family, bf16 on a card."
    config = anchor_config("student", processor.tokenizer).to_dict()
    config["text_config"] |= dict(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        layer_types=None, tie_word_embeddings=shape.tied, max_position_embeddings=128_000, initializer_range=.02,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    config["vision_config"] |= dict(depth=1, fullatt_block_indexes=[0], out_hidden_size=shape.hidden)
    config["tie_word_embeddings"] = shape.tied
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        with torch.device(device):
            return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    finally:
        torch.set_default_dtype(before)


@functools.lru_cache(1)
def drawn(
    tokens: int,  # of the text model, about
    processor,
    side: int,  # of a picture
) -> dict:
    "An encoded haystack of 12 questions."
    per_image = (side//28)**2 + 2
    haystack = picture_haystack(0, max(3, round((tokens - 300)/per_image)), 12, "train")
    encoded = HaystackCollator(processor, size=side).encode(haystack)
    return {k: v for k, v in encoded.items() if k != "pixel_values"} | {"haystack": haystack}


def sample(
    tokens: int,  # of the text model, about
    processor,
    widths: dict,  # "student" and "teacher" -> hidden size
    side: int = 532,  # of a picture: 361 tokens, about what a picture of VHs has
    device: str = "cpu",  # where features are drawn by lot
) -> dict:
    "An encoded haystack with random features in place of its pictures: on a card bf16, as its towers make them."
    encoded = drawn(tokens, processor, side)
    pieces = int((encoded["input_ids"] == processor.image_token_id).sum())
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    features = {role: torch.randn(pieces, width, device=device, dtype=dtype)*.02 for role, width in widths.items()}
    return encoded | {f"{role}_features": x.cpu() for role, x in features.items()}


# --- methods ----------------------------------------------------------------------
class Unnamed(LaidTrainer):
    "Its models get no fingerprints: hashing their weights takes longer than a step."
    def _describe_pair(self, *args): return {}


class CachedTeacher(Unnamed):
    "What the teacher contributes is kept off the card after it was read once, as a cache on disk keeps it."
    kept = None

    def read_teacher(self, inputs, how, bias, rows):
        "From memory, from the second time on."
        if self.kept is None:
            said = super().read_teacher(inputs, how, bias, rows)
            self.kept = {name: x.to("cpu", copy=True) for name, x in said.items()}
        return {name: x.to(self.args.device) for name, x in self.kept.items()}


def dense(
    student,  # a transformers model
    teacher,  # likewise
    batch: dict,  # on the device
):  # -> function without arguments
    "SFT + KL on the logits of every token, as TRL's GKDTrainer and AutoModel's recipe make them."
    positions, labels = read_positions(student, batch), batch["labels"][:, 1:]
    half = torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=torch.cuda.is_available())

    def run():
        with half:
            how = dict(position_ids=positions, use_cache=False)
            with torch.no_grad():
                target = teacher(**image_inputs(teacher, batch, "teacher"), **how).logits[:, :-1]
            logits = student(**image_inputs(student, batch, "student"), **how).logits[:, :-1]
            shared = min(logits.shape[-1], target.shape[-1])
            own, other = ((x[..., :shared]/peers.TEMPERATURE).log_softmax(-1) for x in (logits, target))
            kl = torch.nn.functional.kl_div(own, other, reduction="none", log_target=True)[labels != -100].sum()
            ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        (ce + kl/(labels != -100).sum()).backward()
        student.zero_grad()
    return run


METHODS = {"SFT": "sft", "SFT + KL": "kd", "LAid": "laid", "LAid+": "laid+", "LAid, cached teacher": "laid"}
DENSE = "SFT + KL, dense logits"
BF16 = dict(student_dtype="bfloat16", optim="adamw_torch_8bit", optim_args="bf16_stochastic_round=True")  # never steps


def call_of(
    name: str,  # of METHODS, or DENSE
    student,  # a transformers model
    teacher,  # likewise
    pool: list[dict],  # a sample
    processor,
):  # -> function without arguments
    "A step of a method, forward and backward."
    if name == DENSE: return dense(student, teacher, on_device(pool[0], student.device))
    kind = CachedTeacher if "cached" in name else Unnamed
    half = BF16 if student.dtype == torch.bfloat16 else {}
    trainer = made(METHODS[name], student, teacher, pool, processor, kind, **half)
    return functools.partial(step, trainer, on_device(trainer.data_collator(pool), student.device))


def on_device(batch: dict, device) -> dict:
    "Its tensors there."
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def needed(
    name: str,  # of a method
    student: Shape,
    teacher: Shape,
    tokens: int,
    rows: int,  # supervised
) -> float:
    "FLOPs that a step cannot do without: the student forward and backward, the teacher forward where it is read."
    read = name != "SFT" and "cached" not in name
    return 3*student.flops(tokens, rows) + read*teacher.flops(tokens, rows)


# --- on a card ---------------------------------------------------------------------
def card_row(
    name: str,  # of a method
    pair: str,  # of PAIRS
    student,  # a transformers model
    teacher,  # likewise, perhaps cut
    pool: list[dict],
    processor,
    forward: float,  # seconds of the teacher's forward pass
) -> dict:
    "One method at one length: measured, and added for the layers that are missing."
    own, other = (SHAPES[n] for n in PAIRS[pair])
    tokens = pool[0]["input_ids"].shape[1]
    rows = int(supervised_rows(pool[0]["labels"])[0].sum())
    row = dict(pair=pair, tokens=tokens, method=name)
    try:
        call = call_of(name, student, teacher, pool, processor)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return row | {"out of memory": True}
    except Exception as e:  # one row is not all of them
        return row | {"error": f"{type(e).__name__}: {e}"[:400]}
    if "cached" in name:  # the teacher need not be there
        peak -= sum(p.nbytes for p in teacher.parameters())
    kept = teacher.config.text_config.num_hidden_layers
    read, missing = name != "SFT" and "cached" not in name, other.layers - kept
    ran = kept*(other.flops(tokens, rows) - 2*other.hidden*other.vocabulary*rows)/other.layers
    more = read*forward*missing*ran/kept/(ran + 2*other.hidden*other.vocabulary*rows)
    peak_flops = next((x for card, x in PEAK.items() if card in torch.cuda.get_device_name()), None)
    floor_seconds = needed(name, own, other, tokens, rows)/peak_flops if peak_flops else None
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return row | {
        "seconds": took + more, "of which extrapolated": more,
        "share of the floor": floor_seconds/(took + more) if floor_seconds else None,
        "tokens a second": tokens/(took + more),
        "peak GB": (peak + read*2*missing*other.layer_weights)/1e9,
        "GB with AdamW": (peak + read*2*missing*other.layer_weights + 12*trained)/1e9,  # two moments, float32 weights
    }


def teacher_seconds(
    teacher,  # a transformers model
    batch: dict,
) -> float:
    "Of its forward pass, after one that is not counted."
    positions = read_positions(teacher, batch)
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            teacher(**image_inputs(teacher, batch, "teacher"), position_ids=positions, logits_to_keep=1,
                    use_cache=False)
            torch.cuda.synchronize()
    return time.perf_counter() - start


def on_card(
    args: argparse.Namespace,
    processor,
) -> list[dict]:
    "Every row, resumed and written one by one."
    path, begun = RESULTS/"bench_gpu.json", time.perf_counter()
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = found.get("hardware", {}).get("gpu") == hardware()["gpu"] and not args.fresh
    rows = [row for row in found.get("rows", []) if "error" not in row] if same else []
    for pair, (own, other) in PAIRS.items():
        student = model(SHAPES[own], processor, "cuda")
        student.gradient_checkpointing_enable({"use_reentrant": False})
        teacher = model(SHAPES[other], processor, "cuda", LAYERS_KEPT.get(other))
        for tokens in args.tokens or LENGTHS:
            widths = dict(student=SHAPES[own].hidden, teacher=SHAPES[other].hidden)
            pool = [sample(tokens, processor, widths, device="cuda")]
            forward = teacher_seconds(teacher, on_device(pool[0], "cuda"))
            for name in [*METHODS, DENSE]:
                key = dict(pair=pair, tokens=pool[0]["input_ids"].shape[1], method=name)
                if any(key.items() <= row.items() for row in rows): continue
                if time.perf_counter() - begun > 60*args.minutes: return rows
                rows.append(card_row(name, pair, student, teacher, pool, processor, forward))
                free(student)
                print(table(rows[-1:]), flush=True)
                write("bench_gpu", rows, weights="random, bf16", layers_kept=LAYERS_KEPT)
        del student, teacher
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def free(student) -> None:
    "What a step, or one that ran out of memory, left on the card."
    student.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()


# --- without a card -------------------------------------------------------------------
def measured(
    call,  # function without arguments
) -> tuple[float, int]:  # seconds that this process was on a core, whoever else uses them; bytes
    "Time and peak memory of a call, after a first one that is not counted."
    took = []

    def timed():
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    peak = peak_bytes(timed)
    return took[-1], peak


def on_cpu(
    args: argparse.Namespace,
    processor,
) -> list[dict]:
    "Ours and the peers' at cut widths, side by side."
    shapes = CUT if not args.quick else {k: replace(v, vocabulary=4096, layers=2) for k, v in CUT.items()}
    student, teacher = (model(shape, processor, "cpu") for shape in shapes.values())
    rows, widths = [], {name: shape.hidden for name, shape in shapes.items()}
    for tokens in [256] if args.quick else args.tokens or (512, 1024, 2048):
        pool = [sample(tokens, processor, widths, side=168)]
        calls = {name: call_of(name, student, teacher, pool, processor) for name in [*METHODS, DENSE]}
        calls |= {"floor": floor(student, teacher, pool[0])} | peers.calls(student, teacher, pool[0], processor)
        found = {name: measured(call) for name, call in calls.items()}
        for name, row in found.items():
            ratios = {f"{what} / {base}": row[i]/found[base][i]
                      for i, what in enumerate(("time", "memory")) for base in ("SFT + KL", DENSE)}
            rows.append({"tokens": pool[0]["input_ids"].shape[1], "method": name} | ratios)
        print(table(rows[-len(calls):]), flush=True)
        if args.quick: continue
        write("bench_peers", rows, shapes={k: vars(v) for k, v in shapes.items()}, peers=peers.versions(),
              what="one step, forward and backward, float32: ratios of time on the cores, of one call after one that "
                   "is not counted (good to about a third), and of memory over weights")
    return rows


# --- targets ---------------------------------------------------------------------------
TARGETS = {  # what -> (wanted, methods to divide, length, column)
    "LAid / SFT + KL at 18k": ("<= 1.03", ("LAid", "SFT + KL"), 18_000, "seconds"),
    "LAid+ / SFT + KL at 18k": ("<= 1.10", ("LAid+", "SFT + KL"), 18_000, "seconds"),
    "LAid at 18k, share of the bf16 peak": (">= 0.40", ("LAid",), 18_000, "share of the floor"),
    "SFT + KL / dense logits at 18k, memory": ("<= 0.50", ("SFT + KL", DENSE), 18_000, "peak GB"),
    "cached teacher at 53k, GB with AdamW": ("<= 80", ("LAid, cached teacher",), 53_000, "GB with AdamW"),
}


def targets(
    rows: list[dict],  # from `on_card`
) -> list[dict]:
    "What was aimed at beside what was measured, for each pair; None where it was not."
    def found(pair, method, length, column):
        return next((r.get(column) for r in rows if (r["pair"], r["method"]) == (pair, method)
                     and abs(r["tokens"] - length) < .1*length), None)

    def line(pair, target):
        wanted, methods, length, column = TARGETS[target]
        values = [found(pair, method, length, column) for method in methods]
        measured = None if None in values else values[0]/(values[1] if len(values) > 1 else 1)
        return dict(pair=pair, target=target, wanted=wanted, measured=measured)
    return [line(pair, target) for pair in dict.fromkeys(r["pair"] for r in rows) for target in TARGETS]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="other lengths")
    parser.add_argument("--minutes", type=float, default=8.5, help="no row is begun after them; the next run goes on")
    parser.add_argument("--fresh", action="store_true", help="measure what is in the file again")
    parser.add_argument("--quick", action="store_true", help="without a card: one short length, nothing written")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if torch.cuda.is_available():
        rows = on_card(args, build_processor())
        if rows:
            print(table(targets(rows)))
    else:
        on_cpu(args, build_processor())


if __name__ == "__main__":
    main()
