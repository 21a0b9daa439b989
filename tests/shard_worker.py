"""What each of two gloo processes does for test_shard.py; run by torchrun: shard_worker.py FOLDER JOB ..."""
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback, logging

from laid_nb.anchors import anchor_config, build_processor
from laid_nb.haystack import Haystack, picture_haystack
from laid_nb.inputs import HaystackCollator, precompute
from laid_nb.pictures import BadPicture
from laid_nb.shard import full_state
from laid_nb.train import LaidConfig, LaidTrainer
from laid_nb.validation import Validation

logging.set_verbosity_error()
logging.disable_progress_bar()
FSDP = dict(fsdp=True, fsdp_config=dict(version=2, state_dict_type="SHARDED_STATE_DICT"))


def allow_cpu():
    "accelerate takes FSDP for GPUs only: it leaves a CPU run at MULTI_CPU. For the tests it is told otherwise; the rest of FSDP2 runs on CPU as it is."
    init = AcceleratorState.__init__
    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no": fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState.__init__ = patched


def fresh():
    "Forget the engine of the run before."
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state()
    if PartialState._shared_state: PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def tiny(name, dtype=torch.float64, tied=False):
    "A random model of two or three layers; the same weights for the same name. float64: what differs is not rounding."
    layers, heads = {"student": (2, 2), "teacher": (3, 3)}[name]
    config = anchor_config(name, build_processor().tokenizer).to_dict()
    config["text_config"] |= dict(hidden_size=32*heads, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1, layer_types=None,
                                  rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 4, 8]))
    config["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=1, out_hidden_size=32*heads, fullatt_block_indexes=[0])
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    torch.manual_seed(len(name))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(dtype)


def uneven(): return [picture_haystack(i, n_images=2 + i % 3, n_questions=n) for i, n in enumerate((1, 4, 2, 3))]


def pool(): return precompute(uneven(), HaystackCollator(build_processor()), tiny("student"), tiny("teacher"), progress=False)


def trainer(folder, batch, steps, data=None, student=None, teacher=None, **settings):
    "A training whose steps read all four haystacks, `batch` at a time on each process."
    world = int(os.environ.get("WORLD_SIZE", 1))
    plain = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=4//batch//world,
                 optim="sgd", learning_rate=.1, mixing_learning_rate=.1, lr_scheduler_type="constant", warmup_steps=0, max_steps=steps, method="laid+", lambda_hidden=.3)
    made = LaidTrainer(student or tiny("student"), LaidConfig(str(folder), **(plain | settings)), uneven() if data is None else data, build_processor(), teacher or tiny("teacher"))
    if made.model.dtype == torch.float64:
        for part in made.parts:
            for name in ("mixing", "gains", "projections"):
                if isinstance(module := getattr(part, name, None), torch.nn.Module): module.double()
    return made


def keep(made, path):
    "Weights (folded, merged), what learnt beside them, and the log, by the first process."
    state = {f"student.{k}": v for k, v in full_state(made.model).items()}
    if not made.is_world_process_zero(): return
    for part in (*made.parts, *made.spent): state |= {f"{type(part).__name__}.{i}": p for i, p in enumerate(part.parameters())}
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps([h for h in made.state.log_history if "loss" in h]))


RUNS = {"plain": dict(), "lora": dict(lora_rank=2, learning_rate=1.)}  # settings; also made by one process, which reads four haystacks at once
ENGINES = {  # name -> settings, and the runs made with it
    "ddp": ({}, RUNS),
    "ddp-shard": (dict(teacher_placement="shard"), {"plain": {}}),
    "fsdp": (FSDP | dict(teacher_placement="shard"), RUNS),
    "fsdp-checkpointed": (FSDP | dict(teacher_placement="shard", activation_checkpointing=True), {"plain": {}}),
}


def agree(folder):
    "DDP, DDP beside a sharded teacher, and FSDP2 beside one."
    features = pool()
    for engine, (settings, runs) in ENGINES.items():
        for name, more in runs.items():
            fresh()
            made = trainer(folder/engine/name, 1, 2, None if "checkpointed" in engine else features, **settings, **more)
            assert made.args.world_size == 2 and made.is_fsdp_enabled == ("fsdp" in engine)
            made.train()
            keep(made, folder/f"{engine}-{name}")
            if engine == "ddp": assert made.model_wrapped.gradient_as_bucket_view


def resume(folder):
    "FSDP2 with AdamW and tied embeddings: four steps in one go, and two and two; whole weights, and adapters."
    for name, settings in (("whole", {}), ("lora", dict(lora_rank=2, layers="best"))):
        made = {}
        for run in ("straight", "again"):
            fresh()
            student, teacher = tiny("student", torch.bfloat16, tied=True), tiny("teacher", torch.float32)
            made[run] = trainer(folder/f"{name}-{run}", 1, 4, optim="adamw_torch", learning_rate=1e-2, save_strategy="steps", save_steps=2, student=student, teacher=teacher,
                                teacher_placement="shard", **FSDP, **settings)
            made[run].train(resume_from_checkpoint=str(folder/f"{name}-straight/checkpoint-2") if run == "again" else None)
            keep(made[run], folder/f"{name}-{run}")
            made[run].save_model(str(folder/f"{name}-{run}/model"))


def cached(folder):
    "Three epochs of one step, with what the teacher says kept for later epochs, for another run, and for one that goes on."
    from laid_nb.folder import TensorFolder
    save, written = TensorFolder.save, []
    TensorFolder.save = lambda self, key, tensors: written.append(f"{self.path.name}/{key}") or save(self, key, tensors)
    features = pool()
    for engine, settings in (("ddp", {}), ("fsdp", FSDP | dict(teacher_placement="shard"))):
        keep_at = dict(teacher_cache=str(folder/f"cache-{engine}"))
        runs = {"plain": {}, "first": keep_at | dict(save_strategy="steps", save_steps=1), "other": keep_at, "on": keep_at}
        for name, more in runs.items():
            fresh()
            made = trainer(folder/"cached"/engine/name, 1, 3, features, **settings, **more)
            made.train(resume_from_checkpoint=str(folder/"cached"/engine/"first/checkpoint-2") if name == "on" else None)
            keep(made, folder/f"cached-{engine}-{name}")
            found = dict(written=written[:], asked=made.cached and made.cached.asked, found=made.cached and made.cached.found)
            Path(folder, f"cached-{engine}-{name}-{made.args.process_index}").write_text(json.dumps(found))
            written.clear()
    TensorFolder.save = save


def half(folder):
    "bf16 autocast under FSDP2."
    fresh()
    made = trainer(folder/"half", 1, 2, bf16=True, student=tiny("student", torch.float32), teacher=tiny("teacher", torch.bfloat16), teacher_placement="shard", **FSDP)
    made.train()
    keep(made, folder/"half")


class Spoil(TrainerCallback):
    "After the first step, empties pictures."
    def __init__(self, images): self.images = images
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for image in self.images: image.write_bytes(b"")


def filed(folder):
    "The four haystacks with pictures in files."
    found = []
    for h in uneven():
        files = [folder/f"{h.id.replace('/', '-')}-{i}.png" for i in range(len(h.images))]
        for i, file in enumerate(files): h.image(i).save(file)
        found.append(Haystack(tuple(files), h.questions, h.id))
    return found


def spoiled(folder):
    "The second process's own copy of the pictures goes bad after a step: all of them, or those of some haystacks; read by itself, and by a data reader."
    for policy, readers, validated in (("fail", 0, False), ("fail", 1, False), ("skip", 0, False), ("skip", 1, False), ("fail", 0, True), ("skip", 0, True)):
        fresh()
        name = f"spoiled-{policy}-{readers}-{'test' if validated else 'train'}"
        own = folder/f"{name}-{os.environ['RANK']}"
        own.mkdir()
        files = filed(own)
        made = trainer(folder/name, 2, 4, None if validated else files, method="sft", lambda_hidden=None, on_bad_image=policy, dataloader_num_workers=readers, eval_steps=2)
        if validated: Validation(made, files, batch=2)
        gone = files if policy == "fail" else files[:3] if validated else files[:1]
        if made.args.process_index == 1: made.add_callback(Spoil([x for h in gone for x in h.images]))
        said = None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try: made.train()
            except BadPicture as e: said = str(e)
        told = [str(w.message) for w in warned if "haystack" in str(w.message)]
        asked = [h["step"] for h in made.state.log_history if "eval_accuracy_2" in h]
        own.with_suffix(".json").write_text(json.dumps(dict(said=said, told=told, step=made.state.global_step, asked=asked)))
        save_file({k: x.clone() for k, x in made.model.state_dict().items()}, own.with_suffix(".safetensors"))


def fail(folder):
    "The second process meets a number that is none, and then hangs; the first one waits for it."
    made = trainer(folder/"fail", 1, 3, ddp_timeout=5, method="sft", lambda_hidden=None)
    if made.args.process_index == 1:
        step = made.training_step
        def broken(*args, **kwargs):
            if made.state.global_step == 1: made.model.lm_head.weight.data.fill_(float("nan"))
            return step(*args, **kwargs)
        made.training_step = broken
    try: made.train()
    except Exception as e:
        Path(folder, f"said-{made.args.process_index}").write_text(f"{type(e).__name__}: {e}")
        if made.args.process_index == 1: time.sleep(60)
        os._exit(1)


if __name__ == "__main__":
    allow_cpu()
    for job in sys.argv[2:]: globals()[job](Path(sys.argv[1]))
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
