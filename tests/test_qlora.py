"QLoRA: a student in few bits learns by adapters, resumes to the bit, and becomes a stock checkpoint in the precision it came in."
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PrinterCallback

from laid_nb.anchors import build_processor
from laid_nb.store import load_model, save_model
from laid_nb.train import LaidConfig, LaidTrainer
from shard_worker import tiny, uneven

bitsandbytes = pytest.importorskip("bitsandbytes", reason="weights of few bits are bitsandbytes' business: pip install bitsandbytes")


@pytest.fixture(scope="module", autouse=True)
def unpacked():
    "On CPUs with bfloat16 instructions bitsandbytes packs weights anew when they are read for nothing but reading, and rounds their scales: no GPU does that."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(tiny("student", torch.bfloat16), build_processor(), folder/"student")
    return str(folder/"student")


def train(base, folder, bits, resume=None, **more):
    student, processor = load_model(base, "auto", bits, "cpu")
    settings = dict(use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="steps", save_steps=2, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                    learning_rate=1e-2, mixing_learning_rate=1e-2, max_steps=4, method="laid+", lora_rank=2, student_bits=bits)
    made = LaidTrainer(student, LaidConfig(str(folder), **settings | more), uneven(), processor, tiny("teacher", torch.float32))
    made.remove_callback(PrinterCallback)
    made.train(resume_from_checkpoint=resume)
    made.save_student(folder/"model", base)
    return made


@pytest.fixture(scope="module", params=[4, 8])
def runs(request, base, tmp_path_factory):
    "(bits, folder, a run of four steps, one that went on after two)."
    folder = tmp_path_factory.mktemp(f"bits{request.param}")
    straight = train(base, folder/"straight", request.param)
    return request.param, folder, straight, train(base, folder/"again", request.param, str(folder/"straight/checkpoint-2"))


def losses(made): return [h["loss"] for h in made.state.log_history if "loss" in h]


def test_it_goes_on_to_the_bit(runs):
    _, folder, straight, again = runs
    assert len(losses(straight)) == 4 and losses(straight) == losses(again)
    kept = load_file(folder/"straight/model/model.safetensors")
    gone_on = load_file(folder/"again/model/model.safetensors")
    assert kept.keys() == gone_on.keys() and all(torch.equal(x, gone_on[k]) for k, x in kept.items())
    for a, b in zip((*straight.parts, *straight.spent), (*again.parts, *again.spent), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("where", ["model", "checkpoint-2", "checkpoint-4"])
def test_what_is_saved_is_a_stock_student(runs, base, where):
    _, folder, straight, _ = runs
    made, info = AutoModelForImageTextToText.from_pretrained(folder/"straight"/where, dtype="auto", output_loading_info=True)
    assert not any(info.values()) and made.dtype == torch.bfloat16 and not getattr(made.config, "quantization_config", None)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in tiny("student").named_parameters()}
    ids = torch.arange(40)[None]
    with torch.no_grad(): logits = made.eval()(ids).logits
    if where != "checkpoint-2":
        with torch.no_grad(): torch.testing.assert_close(straight.model.eval()(ids).logits, logits, rtol=0, atol=0)
    saved, original = made.state_dict(), tiny("student", torch.bfloat16).state_dict()
    moved = {n for n, x in saved.items() if not torch.equal(x, original[n])}
    assert any("q_proj" in n for n in moved) and not any("embed" in n or "norm" in n for n in moved)  # neither quantised nor adapted


def test_merging_is_what_peft_makes_of_the_adapters(base, tmp_path, bits=4):
    "The same run saved whole and as adapters; the reference puts peft's adapters into the base that transformers dequantises."
    for name, adapter in (("whole", False), ("adapter", True)):
        train(base, tmp_path/name, bits, gain=False, max_steps=2, save_strategy="no", save_adapter=adapter)
    reference, _ = load_model(base, "auto", bits, "cpu")
    reference.dequantize(torch.bfloat16)
    merged = PeftModel.from_pretrained(reference, tmp_path/"adapter"/"model").merge_and_unload().state_dict()
    whole = load_file(tmp_path/"whole"/"model"/"model.safetensors")
    assert len(whole) > 20
    for name, x in AutoModelForImageTextToText.from_pretrained(tmp_path/"whole"/"model", dtype="auto").state_dict().items():
        torch.testing.assert_close(x, merged[name], rtol=2**-7, atol=2**-9, msg=name)
