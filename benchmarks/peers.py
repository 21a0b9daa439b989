"""The distillation losses of other libraries as one step, forward and backward, on the pair and batch that ours reads.

TRL and NeMo AutoModel are not needed by anything else: one that is not installed is left out, with a line that says so.
They read the tokens of images as words, which costs the same; TRL's terms are KL alone, AutoModel's KL and
cross-entropy, as ours. What TRL's trainers generate is not timed: the answers of the batch are taken."""
import os
import tempfile
from importlib import metadata

import torch

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

TEMPERATURE = 2.0
PACKAGES = {"TRL DistillationTrainer": "trl", "TRL GKDTrainer": "trl", "AutoModel KDLoss": "nemo-automodel"}


def _settings() -> dict:
    "Of both trainers of TRL."
    gpu = torch.cuda.is_available()
    return dict(output_dir=tempfile.mkdtemp(), use_cpu=not gpu, bf16=gpu, report_to="none", beta=0.0,
                temperature=TEMPERATURE, gradient_checkpointing=False, disable_tqdm=True)


def distillation_trainer(student, teacher, batch: dict, processor):
    "TRL's `DistillationTrainer`: hidden states of everything after the first answer began, logits in tiles."
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    trainer = DistillationTrainer(student, teacher, DistillationConfig(**_settings()),
                                  Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}]),
                                  processing_class=processor)
    start = int((batch["labels"][0] != -100).nonzero()[0])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answers = (batch["labels"] != -100).long()
    given = dict(prompt_ids=ids[:, :start], prompt_mask=mask[:, :start], completion_ids=ids[:, start:],
                 completion_mask=mask[:, start:], tool_mask=answers[:, start:], num_items_in_batch=answers.sum())
    return lambda: trainer.compute_loss(trainer.model, given)


def gkd_trainer(student, teacher, batch: dict, processor):
    "TRL's `GKDTrainer`: logits of every token of both models."
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    trainer = GKDTrainer(student, teacher, GKDConfig(**_settings(), lmbda=0.0, loss_type="nll"),
                         data_collator=list, train_dataset=Dataset.from_list([{"messages": []}]),
                         processing_class=processor.tokenizer)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return lambda: trainer.compute_loss(trainer.model, given)


def automodel_loss(student, teacher, batch: dict, processor):
    "As in AutoModel's `recipes/vlm/kd.py`: logits of every token of both models, its `KDLoss` and cross-entropy."
    from nemo_automodel.components.loss.kd_loss import KDLoss
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    kd, ce = KDLoss(temperature=TEMPERATURE), MaskedCrossEntropy()
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # its data sets shift them

    def loss():
        with torch.no_grad():
            target = teacher(**given, use_cache=False).logits.detach().clone()
        logits = student(**given, use_cache=False).logits
        return (ce(logits, labels, num_label_tokens=(labels != -100).sum()) + kd(logits, target, labels))/2
    return loss


_MADE = dict(zip(PACKAGES, (distillation_trainer, gkd_trainer, automodel_loss)))


def _installed(name: str) -> bool:
    "Whether the package of a peer is there."
    try:
        metadata.version(PACKAGES[name])
    except metadata.PackageNotFoundError:
        print(f"{name} is left out: {PACKAGES[name]} is not installed", flush=True)
        return False
    return True


def versions() -> dict:  # package -> version, of those installed
    "What stands beside ours in a table."
    return {p: metadata.version(p) for name, p in PACKAGES.items() if _installed(name)}


def calls(
    student,  # a transformers model
    teacher,  # likewise, with the same vocabulary
    batch: dict,  # `input_ids`, `attention_mask`, `labels`, one row, on the device
    processor,
) -> dict:  # name -> function without arguments
    "One step of each peer."
    def step(loss):
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=torch.cuda.is_available()):
            value = loss()
        value.backward()
        student.zero_grad()

    def one(name):
        made = _MADE[name](student, teacher, batch, processor)
        return lambda: step(made)
    return {name: one(name) for name in PACKAGES if _installed(name)}
