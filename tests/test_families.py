"""What works with which family: every row of FAMILIES, read, trained, saved and asked, against stock readings.

`python tests/test_families.py` makes all checks and writes data/results/families.json and the table in docs/families.md;
with names of families it only says what it finds."""
import copy
import gc
import json
import math
import re
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, logging

import families
from laid_nb.attention import layers_left_out
from laid_nb.evaluate import _end_ids, ask
from laid_nb.haystack import Haystack, passage_haystack, picture_haystack
from laid_nb.inputs import (
    FAMILIES,
    OTHER,
    OURS,
    HaystackCollator,
    encode,
    family_of,
    image_inputs,
    messages,
    precompute,
    precompute_prompts,
    read_positions,
)
from laid_nb.inspector import read_heads
from laid_nb.pair import PairCollator, read_pair
from laid_nb.recompose import Recomposed
from laid_nb.store import tokenizer_of
from laid_nb.train import quiet_training

SIZES = ((56, 56), (112, 56), (56, 84))  # of pictures, width and height
ROUNDED = ("paligemma",)  # counts positions from 1 by itself: the same distances, but for the rounding of float32 in RoPE
ROOT = Path(__file__).parent.parent
TABLE, PAGE = ROOT/"data"/"results"/"families.json", ROOT/"docs"/"families.md"


def filed(folder, seed, n_images, n_questions):
    "A drawn haystack whose pictures are files of unequal size."
    drawn, files = picture_haystack(seed, n_images, n_questions), []
    for i in range(n_images):
        files.append(folder/f"{seed}-{i}.png")
        if not files[-1].exists(): drawn.image(i, 112).resize(SIZES[(seed + i) % 3]).save(files[-1])
    return Haystack(tuple(files), drawn.questions, drawn.id)


@dataclass
class Built:
    "A family, made once for all checks."
    name: str
    folder: Path  # for pictures

    @cached_property
    def made(self): return families.build(self.name)

    @property
    def reads(self): return self.made[0]

    @property
    def words(self): return tokenizer_of(self.reads)

    def model(self, name="student"): return self.made[1](name)

    @property
    def text(self): return self.words is self.reads

    @property
    def exact(self): return self.model() if "moe" in self.name else self.model().double()  # no experts in float64

    @property
    def error(self): return 1e-5 if "moe" in self.name or self.name in ROUNDED else 1e-10  # of a log-probability

    @cached_property
    def haystacks(self):
        "Of 2, 3 and 4 images of unequal size, or of passages."
        if self.text: return [passage_haystack(i, 2 + i, 3) for i in range(3)]
        return [filed(self.folder, i, 2 + i, 3) for i in range(3)]

    def whole(self, haystack, turns, answers):
        "The stock reading of a conversation."
        return self.reads.apply_chat_template(messages(haystack, turns, answers), tokenize=True, return_dict=True, return_tensors="pt",
                                              add_generation_prompt=not answers)

    @property
    def yes_no(self):
        "The tokens that Yes and No begin with behind a prompt: where two whole conversations part, or as they are alone."
        if "metaspace" not in self.name: return [self.words(" "*(self.name == "llava") + w, add_special_tokens=False).input_ids[0] for w in ("Yes", "No")]
        h = self.haystacks[0]
        both = [self.whole(replace(h, questions=(replace(h.questions[0], answer=a),)), [0], True)["input_ids"][0].tolist() for a in (True, False)]
        return list(next(pair for pair in zip(*both) if pair[0] != pair[1]))

    @torch.no_grad()
    def logits(self, model, given):
        return model(**{k: x for k, x in given.items() if k not in OURS}).logits


def runs(built, **settings):
    "One step of training: finite terms, and weights that moved."
    student, teacher, data = built.model(), built.model("teacher"), built.haystacks
    before = {k: x.clone() for k, x in student.named_parameters()}
    done = quiet_training(student, built.reads, data, teacher=teacher, use_cpu=True, max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=1,
                          learning_rate=1e-2, warmup_steps=0, logging_steps=1, **settings)
    terms = {k: x for h in done.state.log_history for k, x in h.items() if k.startswith("loss_")}
    assert terms and all(math.isfinite(x) for x in terms.values()), terms
    after = dict(done.model.named_parameters())
    assert any(not torch.equal(x, after[k]) for k, x in before.items() if k in after), "no weight moved"
    return terms


# --- checks: they pass, or raise the ValueError that refuses what cannot be ---
def check_encode(built):
    "A conversation is what the stock processor makes of it; replies and images are found in it."
    h = built.haystacks[1]
    sample, row = encode(built.reads, h, [0, 1]), family_of(built.reads)
    naive = built.whole(h, [0], answers=False) if row.reply else built.whole(h, [0, 1], answers=True)
    start = naive["input_ids"].shape[1]
    for name in naive.keys() - {"labels"}:
        ours = sample[name] if not row.reply or sample[name].ndim != 2 or name == "pixel_values" else sample[name][:, :start]
        assert torch.equal(ours, naive[name]), name
    ids, labels = sample["input_ids"][0], sample["labels"][0]
    assert (ids[labels >= 0] == labels[labels >= 0]).all()
    for k in (0, 1):
        said = built.words.decode(labels[(labels >= 0) & (sample["turn"][0] == k)])
        assert said.strip() == h.questions[k].reply + built.words.eos_token or said.strip().startswith(h.questions[k].reply + "<"), said
    if row.among:
        places = [(sample["image"][0] == i).nonzero()[:, 0] for i in range(3)]
        assert all(len(p) == p[-1] - p[0] + 1 for p in places) and sample["image"].max() == 2
        if built.text: assert [built.words.decode(ids[p]).strip() for p in places] == [p.text for p in h.images]


def check_collate(built):
    "Samples of unequal length and number of images read in a batch as they do alone, whatever side the tokenizer pads."
    model, side = built.model(), built.words.padding_side
    for built.words.padding_side in ("left", "right"):
        batch = HaystackCollator(built.reads)(built.haystacks)
        with torch.no_grad():
            together = model(**image_inputs(model, batch, "student"), position_ids=read_positions(model, batch)).logits
        for i, h in enumerate(built.haystacks):
            alone = built.logits(model, HaystackCollator(built.reads)([h]))[0]
            torch.testing.assert_close(together[i, :len(alone)], alone, atol=1e-3, rtol=1e-3)
    built.words.padding_side = side


def check_features(built):
    "Features computed once give the logits of the pixels."
    model, collate = built.model(), HaystackCollator(built.reads)
    pool = precompute(built.haystacks, collate, model, progress=False)
    if built.text:
        assert "student_features" not in pool[0]
        return
    batch = collate(pool)
    with torch.no_grad():
        seen = model(**image_inputs(model, batch, "student"), position_ids=read_positions(model, batch)).logits
    shown = built.logits(model, collate(built.haystacks))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(seen[real], shown[real], atol=1e-3, rtol=1e-3)


def check_sft(built): runs(built, method="sft")
def check_kd(built): runs(built, method="kd")
def check_laid(built): runs(built, method="laid")
def check_laid_plus(built): runs(built, method="laid+")
def check_lora(built): runs(built, method="sft", lora_rank=2)
def check_window(built): runs(built, method="kd", max_gap=50, max_multiplicity=4., ramp=0.)


def check_recompose(built): runs(built, method="kd", recompose=1.)


def check_pieces(built):
    "Samples put together from what was encoded once, features included, are what `encode` makes of them."
    collate, student = HaystackCollator(built.reads), built.model()
    pool = precompute(built.haystacks, collate, student, progress=False)
    fresh = Recomposed(pool, 1., collate, 0, lambda: 0)
    for i, sample in enumerate(pool):
        made, = precompute([fresh[i]["haystack"]], collate, student, progress=False)
        assert made["haystack"] != sample["haystack"] and made.keys() == fresh[i].keys()
        for name, x in made.items():
            if torch.is_tensor(x): torch.testing.assert_close(fresh[i][name], x, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def check_evaluate(built):
    "Questions asked behind images that are read once: the numbers of whole prompts, one by one."
    model, yes_no = built.exact, built.yes_no
    for h in (built.haystacks[2], replace(built.haystacks[0], images=built.haystacks[0].images[:1], id="one",
                                          questions=tuple(replace(q, needles=(0,)) for q in built.haystacks[0].questions))):
        longer = replace(h, questions=tuple(replace(q, wording="Look. "*i + q.text) for i, q in enumerate(h.questions)))
        alone = torch.stack([built.logits(model, built.whole(longer, [t], False))[0, -1].log_softmax(-1)[yes_no] for t in range(len(h.questions))])
        assert (alone - alone[0]).abs().max() > 1e-4  # the questions matter
        known = [None]
        if not built.text and family_of(model).features: known.append(precompute_prompts(model, built.reads, [longer], progress=False)[h.id])
        for features in known:
            torch.testing.assert_close(ask(model, built.reads, longer, features=features)[0].to(alone), alone, atol=built.error, rtol=0)


@torch.no_grad()
def check_choices(built):
    "Whole choices, which begin alike: against the whole conversation with that answer in it."
    model, h = built.exact, built.haystacks[1]
    texts = ("a cup", "a tie", "a cup and a tie")
    asked = replace(h, questions=tuple(replace(q, kind="choice", wording=q.text, answer=texts[0], choices=texts) for q in h.questions))
    ends, found, alone = sorted(_end_ids(model, built.words)), ask(model, built.reads, asked)[0], []
    for t in range(len(h.questions)):
        for choice in texts:
            given = encode(built.reads, replace(asked, questions=tuple(replace(q, answer=choice) for q in asked.questions)), [t])
            where = (given["labels"][0] >= 0).nonzero()[:, 0]
            log_p = built.logits(model, given)[0].log_softmax(-1)
            said = given["input_ids"][0, where[:-1]]
            alone.append(log_p[where[:-1] - 1].gather(1, said[:, None]).sum() + log_p[where[-1] - 1, ends].logsumexp(-1))
    torch.testing.assert_close(found.flatten().to(alone[0]), torch.stack(alone), atol=built.error, rtol=0)


@torch.no_grad()
def check_generate(built):
    "Answers that are written: those of the stock `generate` on whole prompts."
    model, h = built.model(), built.haystacks[1]
    written = ask(model, built.reads, h, max_new_tokens=5)[1]
    for t, text in enumerate(written):
        given = built.whole(h, [t], False)
        given.pop("labels", None)
        made = model.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=built.words.pad_token_id)[0, given["input_ids"].shape[1]:]
        assert text == built.words.decode(made, skip_special_tokens=True)


def check_heads(built):
    "Spectra of every head, and how much it looks at the needle; the latter of layers that attend causally to all tokens."
    found, sample = read_heads(built.model(), built.reads, [built.haystacks[1]], built.name), encode(built.reads, built.haystacks[1], [0], answers=False)
    other = layers_left_out(built.model(), image_inputs(built.model(), sample, "student"))
    read = [layer for layer in range(len(found.needle)) if other.get(layer) != "has no self-attention"]
    assert found.response[read].isfinite().all() and found.needle.isnan().all(1).nonzero()[:, 0].tolist() == list(other) and set(other) <= set(found.left_out)
    assert len(other) == len(found.needle) or found.needle.nan_to_num().max() > 0


def check_reload(built):
    "Trained a step, saved, and read again by the stock classes: the same logits, the same prompt."
    stock, reader = (AutoModelForCausalLM, AutoTokenizer) if built.text else (AutoModelForImageTextToText, AutoProcessor)
    given, fresh = built.whole(built.haystacks[0], [0], False), built.model()
    given.pop("labels", None)
    done = quiet_training(built.model(), built.reads, built.haystacks[:1], use_cpu=True, max_steps=1, method="sft", learning_rate=1e-2, warmup_steps=0)
    model = done.model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        done.save_student(Path(folder)/"model")
        again, reads = stock.from_pretrained(Path(folder)/"model"), reader.from_pretrained(Path(folder)/"model")
        assert type(again) is type(model)
        torch.testing.assert_close(again(**given).logits, model(**given).logits)
        assert not torch.equal(fresh(**given).logits, model(**given).logits)
        once = Built(built.name, built.folder)
        once.made = reads, None
        stored = once.whole(built.haystacks[0], [0], False)
        assert torch.equal(stored["input_ids"], given["input_ids"])


def check_pair(built):
    "A teacher with a processor of its own: each model gets the pixels that its own processor makes, and every term is computed."
    other, h = copy.deepcopy(built.reads), built.haystacks[1]
    if built.text: other.chat_template = other.chat_template.replace("{% for m in messages %}", "Look. {% for m in messages %}", 1)
    else: other.image_processor.image_mean, other.image_processor.image_std = [.3]*3, [.4]*3
    alike = read_pair(built.reads, other)
    assert alike.kind == ("tokens" if built.text else "pixels"), alike
    batch = PairCollator(HaystackCollator(built.reads, turns=1), other, alike)([h])
    made = []
    for reads, own in ((built.reads, batch), (other, batch["teacher"])):
        stock = reads.apply_chat_template(messages(h, [0], False), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
        start = stock["input_ids"].shape[1]
        assert torch.equal(own["input_ids"][:, :start], stock["input_ids"])
        for name in family_of(built.reads).pixels: assert built.text or torch.equal(own[name], stock[name])
        made.append(stock)
    assert built.text or not torch.equal(made[0]["pixel_values"], made[1]["pixel_values"])
    assert built.text == (made[0]["input_ids"].shape != made[1]["input_ids"].shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs(built, method="kd", teacher_processing_class=other)


CHECKS = {name.removeprefix("check_").replace("laid_plus", "laid+"): check for name, check in list(globals().items()) if name.startswith("check_")}


def result(built, check):
    "True, or the ValueError that refuses what cannot be."
    try: return CHECKS[check](built) is None
    except ValueError as e: return str(e)


def rows(table):
    "The table as Markdown: what works, and a number for each reason why not."
    reasons, lines = [], [f"| Family | {' | '.join(CHECKS)} |", f"|---|{'---|'*len(CHECKS)}"]
    for name, found in table.items():
        cells = []
        for check in CHECKS:
            why = found[check]
            if why is not True and why not in reasons: reasons.append(why)
            cells.append("✓" if why is True else f"[{reasons.index(why) + 1}](#why-not)")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## Why not", "", *(f"{i}. `{why}`" for i, why in enumerate(reasons, 1)), ""])


def meanings():
    "What each column says, from the first line of its check."
    return "\n".join(f"- **{name}**: {(check.__doc__ or MEANS.get(name, '')).strip()}" for name, check in CHECKS.items()) + "\n"


MEANS = {"sft": "One step of training on answers.", "kd": "One step with the teacher's softened answers.", "laid": "One step of Eq. 7 beside them.",
         "laid+": "One step of all terms.", "lora": "One step of adapters, merged.", "window": "One step with gaps and multiplicity.",
         "recompose": "One step on pictures put together anew."}


# --- tests --------------------------------------------------------------------
@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "built(name): a family, made once. What lives already is kept from the garbage collector, which accelerate calls at every start of a training."
    made, folder = {}, tmp_path_factory.mktemp("pictures")
    gc.collect()
    gc.freeze()
    yield lambda name: made.setdefault(name, Built(name, folder))
    gc.unfreeze()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_table_says_what_works(built, name, check):
    if name == "smolvlm": pytest.importorskip("num2words", reason="the stock SmolVLMProcessor cannot be made without num2words; Idefics3's is checked, which it was made from")
    assert result(built(name), check) == json.loads(TABLE.read_text())[name][check]


@pytest.mark.parametrize("name, features", [("idefics2", True), ("gemma4", "does more with image tokens"), ("ovis2", "does more with image tokens")])
def test_a_family_without_a_row_is_read_by_what_its_functions_take(built, name, features):
    "And features that would not stand for the pixels are refused; the processor of Idefics2 says nowhere where its images are."
    assert family_of(built(name).model()) is family_of(built(name).reads) is OTHER
    for check in ("encode", "collate", "laid", "choices", "generate", "heads"): assert result(built(name), check) is True, check
    for check in ("features", "evaluate"): assert features is result(built(name), check) or features in result(built(name), check)


def test_what_a_model_reads_beside_embeddings_is_found_without_a_row(built, monkeypatch):
    "Gemma 3's token_type_ids let image tokens see each other."
    monkeypatch.setattr("laid_nb.inputs.FAMILIES", {})
    assert family_of(built("gemma3").model()) is OTHER
    check_features(built("gemma3"))


def test_every_row_has_a_family_to_check(built):
    kinds = {built(name).model().config.model_type for name in families.FAMILIES if name != "smolvlm"}  # its processor wants num2words
    assert kinds | {"smolvlm"} == set(FAMILIES)


def test_sentences_count_the_rows():
    "Wherever a number of families is said."
    said = [(p.name, int(n)) for p in (ROOT/"README.md", ROOT/"CHANGELOG.md", *(ROOT/"docs").glob("*.md")) for n in re.findall(r"(\d+)\W+families", p.read_text(encoding="utf-8"))]
    assert said and set(said) == {(name, len(FAMILIES)) for name, _ in said}


def test_the_page_shows_the_table():
    assert PAGE.read_text(encoding="utf-8").endswith(rows(json.loads(TABLE.read_text()))) and meanings() in PAGE.read_text(encoding="utf-8")


def main(names):
    "Make the checks of some families, or of all and write the table."
    import time
    import traceback
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or families.FAMILIES:
            made, table[name] = Built(name, Path(scratch)), {}
            for check in CHECKS:
                start = time.process_time()
                try: table[name][check] = result(made, check)
                except Exception: table[name][check] = traceback.format_exc()
                print(f"{name:16s} {check:10s} {time.process_time() - start:5.1f} s {table[name][check]}", flush=True)
    if names or any("Traceback" in str(x) for found in table.values() for x in found.values()): return
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[:text.index("- **encode**")] + meanings() + "\n" + rows(table), encoding="utf-8")


if __name__ == "__main__":
    import sys
    main(sys.argv[1:])
