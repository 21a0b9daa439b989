"lmms-eval: task files that ask and score as `laid eval` does, a model entry, and two runs compared."
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import yaml

from laid_nb import lmms
from laid_nb.benchmarks import BENCHMARKS, choice_haystack, export_choices, read_haystacks
from laid_nb.cli import main
from laid_nb.evaluate import evaluate
from laid_nb.haystack import drawn_test
from laid_nb.inputs import question_text
from laid_nb.lmms import (
    LmmsModel,
    difference_cells,
    doc_to_messages,
    doc_to_text,
    doc_to_visual,
    paired_differences,
    paired_interval,
    process_results,
    read_samples,
)
from laid_nb.store import data_path, load_model, read_json, save_model
from laid_nb.vhs import export_vhs

FOLDER = data_path("lmms")
TASKS = sorted(FOLDER.glob("*.yaml"))


def functions():
    "utils.py as lmms-eval loads it: from its file."
    spec = importlib.util.spec_from_file_location("utils", FOLDER/"utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(path):
    "A task file with what it includes; `!function utils.f` is f."
    utils = functions()

    class Loader(yaml.FullLoader): pass
    Loader.add_constructor("!function", lambda loader, node: getattr(utils, loader.construct_scalar(node).removeprefix("utils.")))
    own = yaml.load(path.read_text(), Loader)
    return (config(FOLDER/own.pop("include")) if "include" in own else {}) | own


@pytest.mark.parametrize("path", TASKS, ids=lambda p: p.stem)
def test_every_task_file_is_whole(path):
    found = config(path)
    assert found["task"] == path.stem and callable(found["process_docs"]) and found["output_type"] == "generate_until"
    assert found["doc_to_messages"].__name__ == "doc_to_messages" and found["process_results"].__name__ == "process_results"
    assert {m["metric"] for m in found["metric_list"]} == {"accuracy", "compliance"}
    assert (FOLDER/found["dataset_kwargs"]["data_files"]).read_text() == '{"reply": ""}\n'


def test_there_is_a_task_for_every_size_of_visual_haystacks_and_of_ours():
    names = {path.stem for path in TASKS}
    for needles in ("single", "multi"):
        assert {f"laid_vhs_{needles}_{n}" for n in ("oracle", 2, 3, 5, 10, 20, 50, 100, 150, 200, 500, 1000, 10000)} <= names
        assert {f"laid_mmlongbench_{needles}_{n}k" for n in (4, 8, 16, 32, 64, 128)} <= names
        assert {f"laid_drawn_{needles}_{n}" for n in (2, 5, 10, 20, 50, 100, 150)} <= names


def test_the_drawn_task_asks_what_laid_eval_asks():
    docs = config(FOLDER/"laid_drawn_single_5.yaml")["process_docs"](None)
    haystacks = {h.id: h for h in drawn_test([5], 144)}
    assert [(d["haystack"], d["question"]) for d in docs] == [(h.id, t) for h in haystacks.values() for t in range(len(h.questions))]
    assert [d["reply"] for d in docs] == [q.reply for h in haystacks.values() for q in h.questions] and len(docs) == 144


@pytest.fixture(scope="module")
def pair(): return load_model("distilled")


def as_template(chat):
    "A conversation without its pictures, for a chat template."
    return [t | {"content": [{k: v for k, v in part.items() if k != "url"} for part in t["content"]]} for t in chat]


@pytest.mark.parametrize("benchmark", ["vhs", "letters"])
def test_files_are_asked_and_scored_as_laid_eval_does(benchmark, pair, tmp_path, monkeypatch):
    "Prompt, pictures and every answer and score, question by question; through the functions that a task file names."
    model, processor = pair
    drawn = drawn_test([5], 12)
    if benchmark == "vhs":
        folder, file = export_vhs(drawn, tmp_path/"made"), "VHs_qa/single_needle/visual_haystack_5.json"
    else:
        folder, file = export_choices([choice_haystack(h) for h in drawn], tmp_path/"made"), "choices.json"
    for name, value in dict(LAID_DATA=str(folder/file), LAID_IMAGE_ROOT=str(folder/"images"), LAID_BENCHMARK=benchmark).items():
        monkeypatch.setenv(name, value)
    docs = config(FOLDER/"laid_files.yaml")["process_docs"](None)
    haystacks, prompt = read_haystacks([folder/file], folder/"images", benchmark), BENCHMARKS[benchmark].prompt
    asked = [(h, t) for h in haystacks for t in range(len(h.questions))]
    entry = LmmsModel("distilled", device="cpu")
    records = evaluate(model, processor, haystacks, generate=True, prompt=prompt, progress=False)
    for doc, (h, t), record in zip(docs, asked, records, strict=True):
        chat = doc_to_messages(doc)
        assert processor.apply_chat_template(as_template(chat), tokenize=False, add_generation_prompt=True) == question_text(processor, h, t, prompt)
        assert [x.tobytes() for x in doc_to_visual(doc)] == [h.image(i).tobytes() for i in range(len(h.images))]
        assert doc_to_text(doc) == prompt + h.questions[t].text
        said = entry.answer(chat, {"max_new_tokens": 16})
        assert said == record["response"]
        assert process_results(doc, [said]) == {"accuracy": record["correct"], "compliance": record["compliant"]}


def test_files_of_visual_haystacks_are_found_by_needles_and_size(tmp_path, monkeypatch):
    folder = export_vhs(drawn_test([1, 5], 12) + drawn_test([5], 4, kind="multi"), tmp_path/"made")
    monkeypatch.setenv("LAID_DATA", str(folder/"VHs_qa"))
    monkeypatch.setenv("LAID_IMAGE_ROOT", str(folder/"images"))
    for name, kinds, size in (("single_oracle", {"single"}, 1), ("single_5", {"single"}, 5), ("multi_5", {"all", "any"}, 5)):
        docs = config(FOLDER/f"laid_vhs_{name}.yaml")["process_docs"](None)
        assert set(docs["kind"]) <= kinds and set(docs["size"]) == {size}
    with pytest.raises(ValueError, match="for single needles and 20 images, no file"): lmms.vhs_documents("single", 20)
    copy = folder/"VHs_qa/again/single_needle"
    copy.mkdir(parents=True)
    (copy/"visual_haystack_5.json").write_text("[]")
    with pytest.raises(ValueError, match="2 files: .*; set it to one folder"): lmms.vhs_documents("single", 5)
    monkeypatch.delenv("LAID_IMAGE_ROOT")
    with pytest.raises(ValueError, match="set LAID_IMAGE_ROOT"): lmms.vhs_documents("multi", 5)


def as_mmlongbench(folder, name, haystacks):
    "Drawn haystacks as a file of MMLongBench: (folder of files, folder of images)."
    (folder/"NIAH").mkdir(parents=True, exist_ok=True)
    (folder/"mmlb_image").mkdir(exist_ok=True)
    lines = []
    for n, h in enumerate(haystacks):
        names = [f"{name}-{n}-{i}.png" for i in range(len(h.images))]
        for i, image in enumerate(names): h.image(i).save(folder/"mmlb_image"/image)
        for q in h.questions: lines.append(json.dumps(dict(id=len(lines), question=q.text, answer=q.reply.lower(), ctxs=names, positive_ctxs=[names[i] for i in q.needles])))
    (folder/f"NIAH/{name}.jsonl").write_text("\n".join(lines))
    return folder/"NIAH", folder/"mmlb_image"


def test_files_of_mmlongbench_are_found_by_needles_and_length(pair, tmp_path, monkeypatch):
    "And their answers and scores are those of `laid eval`."
    model, processor = pair
    data, images = as_mmlongbench(tmp_path, "vh_single_test_1000_K8_dep6", drawn_test([3], 4))
    as_mmlongbench(tmp_path, "vh_multi_test_1000_K8_dep3", drawn_test([3], 2, kind="multi"))
    monkeypatch.setenv("LAID_DATA", str(tmp_path))
    monkeypatch.setenv("LAID_IMAGE_ROOT", str(images))
    docs = config(FOLDER/"laid_mmlongbench_single_8k.yaml")["process_docs"](None)
    haystacks, prompt = read_haystacks([data/"vh_single_test_1000_K8_dep6.jsonl"], images, "mmlongbench"), BENCHMARKS["mmlongbench"].prompt
    records = evaluate(model, processor, haystacks, generate=True, prompt=prompt, progress=False)
    entry = LmmsModel("distilled", device="cpu")
    for doc, record in zip(docs, records, strict=True):
        said = entry.answer(doc_to_messages(doc), {"max_new_tokens": 16})
        assert said == record["response"] and process_results(doc, [said])["accuracy"] == record["correct"]
    assert len(config(FOLDER/"laid_mmlongbench_multi_8k.yaml")["process_docs"](None)) == 2
    with pytest.raises(ValueError, match="for single needles and 16K tokens, no file"): lmms.mmlongbench_documents("single", 16)


# ---------------------------------------------------------------- the model

def test_the_model_answers_requests_of_lmms_eval_greedily_whatever_the_checkpoint_says(pair, tmp_path):
    "A saved folder whose generation settings sample and penalise: the answers are those of `laid eval --generate`."
    model, processor = pair
    save_model(model, processor, tmp_path/"saved")
    own = read_json(tmp_path/"saved/generation_config.json") | dict(do_sample=True, temperature=5., repetition_penalty=9.)
    (tmp_path/"saved/generation_config.json").write_text(json.dumps(own))
    docs = lmms.documents(sizes=[20], questions=12)
    entry = LmmsModel(str(tmp_path/"saved"), device="cpu", batch_size=1, max_batch_size=None)
    entry.task_dict = {"task": {"train": docs}}
    requests = [types.SimpleNamespace(args=("", doc_to_messages, {"max_new_tokens": 16, "do_sample": False}, i, "task", "train")) for i in range(len(docs))]
    records = evaluate(model, processor, drawn_test([20], 12), generate=True, progress=False)
    assert entry.generate_until(requests) == [r["response"] for r in records]


def test_the_model_refuses_what_it_does_not_do(pair):
    entry = LmmsModel("student", device="cpu")
    with pytest.raises(ValueError, match="takes pretrained and device, not max_frames"): LmmsModel("student", max_frames=3)
    with pytest.raises(ValueError, match="cannot sample"): entry.answer(doc_to_messages(lmms.documents(sizes=[2], questions=2)[0]), {"do_sample": True})
    with pytest.raises(ValueError, match="reads no video"): entry.answer([{"role": "user", "content": [{"type": "video", "url": "x"}]}], {})
    for call in (entry.loglikelihood, entry.generate_until_multi_round):
        with pytest.raises(NotImplementedError): call([])


def test_lmms_eval_finds_tasks_and_model():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not a dependency: where it is installed, it must find what we ship")
    from lmms_eval.api.model import lmms as base
    from lmms_eval.tasks import TaskManager
    assert {p.stem for p in TASKS} <= set(TaskManager(include_path=str(FOLDER)).all_tasks)
    assert issubclass(lmms.Laid, base) and lmms.lmms_models().model_id == "laid"


def test_the_module_needs_no_lmms_eval():
    assert "lmms_eval" not in sys.modules or importlib.util.find_spec("lmms_eval")
    with pytest.raises(AttributeError, match="no attribute 'Other'"): lmms.Other  # noqa: B018


# ---------------------------------------------------------------- two runs

def write_log(folder, task, scores, metric="accuracy", words="asked"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(doc_id=i, target="Yes", filtered_resps="Yes", doc_hash="x", token_counts=[3], input=f"{words} {i}") | {metric: s} for i, s in enumerate(scores)]
    (folder/f"20261127_131729_samples_{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_two_runs_are_paired_question_by_question(tmp_path):
    before, after = [1., 1, 1, 0, 0, 1]*20, [1., 0, 1, 1, 0, 1]*20
    for name, scores in (("a", before), ("b", after)):
        write_log(tmp_path/name/"model", "pope", scores)
        write_log(tmp_path/name/"model", "mm_bench", [{"question_id": i, "score": s} for i, s in enumerate(scores)], "gpt_score")
    a, b = (read_samples(tmp_path/n) for n in "ab")
    rows = {r["task"]: r for r in paired_differences(a, b)}
    assert rows["pope"]["questions"] == 120 and rows["pope"]["before"] == pytest.approx(4/6) == rows["pope"]["after"]
    assert rows["pope"]["difference"] == 0 and rows["mm_bench"]["metric"] == "gpt_score" and rows["mm_bench"]["interval"] == rows["pope"]["interval"]
    n, discordant = 122, 41  # Agresti and Min: half a question more in each of four cells
    assert rows["pope"]["interval"] == pytest.approx((-1.959964*discordant**.5/n, 1.959964*discordant**.5/n))
    cells = difference_cells(a, b)
    assert [c[0] for c in cells[0]] == ["task", "metric", "questions", "before", "after", "difference"] and len(cells) == 3


def test_scores_between_right_and_wrong_are_redrawn_by_question():
    rng = np.random.default_rng(1)
    a, change = rng.random(500)*.5, rng.normal(.05, .1, 500)
    low, high = paired_interval(a, a + change)
    assert (low, high) == pytest.approx((change.mean() - 1.96*change.std()/500**.5, change.mean() + 1.96*change.std()/500**.5), abs=2e-3)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    write_log(tmp_path/"a", "pope", [1, 0])
    write_log(tmp_path/"b", "pope", [1, 0, 1])
    write_log(tmp_path/"c", "pope", [1, 0], words="another")
    write_log(tmp_path/"d", "mmmu", [1, 0])
    runs = {n: read_samples(tmp_path/n) for n in "abcd"}
    for other in "bc":
        with pytest.raises(ValueError, match="logs of pope are not of the same questions"): paired_differences(runs["a"], runs[other])
    with pytest.raises(ValueError, match="before has the tasks pope, after mmmu"): paired_differences(runs["a"], runs["d"])
    with pytest.raises(ValueError, match="run it with --log_samples"): read_samples(tmp_path/"none")
    with pytest.raises(ValueError, match="two logs of pope"): read_samples(tmp_path)


def test_the_kept_run_is_equal_and_its_differences_are_printed(tmp_path, capsys):
    made = read_json(data_path("results", "lmms.json"))
    drawn = [f"laid_drawn_single_{n}" for n in (1, 5, 20, 50)]
    files = ["laid_vhs_single_20", "laid_vhs_multi_20", "laid_mmlongbench_single_8k", "laid_mmlongbench_multi_8k"]
    assert [(r["model"], r["task"]) for r in made["equal"]] == [(m, t) for m in ("student", "distilled") for t in drawn + files]
    for row in made["equal"]:
        assert row["same_answers"] == row["same_scores"] == row["questions"] == 144 and row["lmms_eval"] == row["laid_eval"]
    logs = made["samples"]
    assert all(r["interval"][0] <= r["difference"] <= r["interval"][1] for r in paired_differences(logs["student"], logs["distilled"]))
    assert main(["lmms"]) == 0 and capsys.readouterr().out.strip() == str(FOLDER)
    write_log(tmp_path/"a", "pope", [1, 0])
    assert main(["lmms", str(tmp_path/"a"), str(tmp_path/"a")]) == 0 and "pope  accuracy" in capsys.readouterr().out
    assert main(["lmms", "a"]) == 2 and "two folders" in capsys.readouterr().err
