"""Two runs of lmms-eval beside `laid eval --generate`, answer by answer; keeps data/results/lmms.json.

  python experiments/toolkit.py files made      # drawn haystacks as files of Visual Haystacks and of MMLongBench
  export LAID_DATA=made LAID_IMAGE_ROOT=made/images
  for m in student distilled; do
    lmms-eval --model laid --model_args pretrained=$m --include_path $(laid lmms) --log_samples --output_path logs/$m \\
      --tasks $(python experiments/toolkit.py tasks)
  done
  python experiments/toolkit.py compare made logs    # a few minutes on a core"""
import json
import sys
from importlib import metadata
from pathlib import Path

from common import RESULTS, now
from laid_nb.benchmarks import BENCHMARKS, read_haystacks
from laid_nb.evaluate import evaluate
from laid_nb.haystack import Haystack, drawn_test
from laid_nb.lmms import read_samples
from laid_nb.store import hardware, load_model, read_json, versions, write_json
from laid_nb.vhs import export_vhs, picture_names

SIZES, MODELS = (1, 5, 20, 50), ("student", "distilled")
VHS = {kind: f"VHs_qa/{kind}_needle/visual_haystack_5.json" for kind in ("single", "multi")}
MMLONGBENCH = {"single": "NIAH/vh_single_test_1000_K8_dep6.jsonl", "multi": "NIAH/vh_multi_test_1000_K8_dep3.jsonl"}
DRAWN = {f"laid_drawn_single_{n}": n for n in SIZES}
FILES = {f"laid_vhs_{kind}_5": ("vhs", file) for kind, file in VHS.items()} | {
    f"laid_mmlongbench_{kind}_8k": ("mmlongbench", file) for kind, file in MMLONGBENCH.items()}
TASKS = [*DRAWN, *FILES]


def mmlongbench_lines(haystacks: list[Haystack]) -> list[dict]:
    "Questions as a file of MMLongBench has them; the images that are asked about stand in `positive_ctxs` again."
    rows = []
    for h in haystacks:
        names = picture_names(h)
        for q in h.questions:
            rows.append(dict(id=str(len(rows)), question=q.text, answer=q.reply, ctxs=names,
                             positive_ctxs=[names[i] for i in q.needles]))
    return rows


def write_files(folder: Path):
    "48 questions of each kind about 5 images, in both forms, with the same pictures."
    drawn = {kind: drawn_test([5], 48, kind=kind) for kind in VHS}
    export_vhs([h for found in drawn.values() for h in found], folder)
    for kind, file in MMLONGBENCH.items():
        (folder/file).parent.mkdir(exist_ok=True)
        (folder/file).write_text("".join(json.dumps(row) + "\n" for row in mmlongbench_lines(drawn[kind])))


def read_task(task: str, folder: Path) -> tuple[list[Haystack], str]:
    "The haystacks that a task asks about, and what stands before each question."
    if task in DRAWN: return drawn_test([DRAWN[task]], 144), ""
    benchmark, file = FILES[task]
    return read_haystacks([folder/file], folder/"images", benchmark), BENCHMARKS[benchmark].prompt


def written(folder: Path, task: str) -> list[tuple[str, float]]:
    "The answers that lmms-eval logged, and whether it counted them as right."
    path, = folder.rglob(f"*samples_{task}.jsonl")
    rows = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda r: r["doc_id"])
    return [(r["filtered_resps"], r["accuracy"]) for r in rows]


def beside(name: str, made: Path, logs: Path, tasks: list[str]) -> list[dict]:
    "For each task, how many answers and scores of lmms-eval are those of `laid eval --generate`."
    model, processor = load_model(name)
    rows = []
    for task in tasks:
        haystacks, prompt = read_task(task, made)
        ours = evaluate(model, processor, haystacks, generate=True, batch=12, prompt=prompt, progress=False)
        theirs = written(logs, task)
        pairs = list(zip(theirs, ours, strict=True))
        rows.append(dict(
            model=name, task=task, questions=len(ours),
            same_answers=sum(a == r["response"].strip() for (a, _), r in pairs),
            same_scores=sum(bool(s) == r["correct"] for (_, s), r in pairs),
            lmms_eval=sum(s for _, s in theirs)/len(theirs), laid_eval=sum(r["correct"] for r in ours)/len(ours)))
        print(rows[-1], flush=True)
    return rows


def about(tasks: list[str]) -> dict:
    "How a run was made."
    command = ("LAID_DATA=made LAID_IMAGE_ROOT=made/images lmms-eval --model laid --model_args pretrained=MODEL --include_path "
               f"$(laid lmms) --log_samples --output_path logs/MODEL --tasks {','.join(tasks)}")
    return dict(tasks=tasks, files="python experiments/toolkit.py files made", command=command,
                beside="python experiments/toolkit.py compare made logs", finished=now(),
                versions=versions() | {"lmms_eval": metadata.version("lmms_eval")}, hardware=hardware())


def compare(made: Path, logs: Path):
    "Of the tasks in the logs; rows of other tasks stay as they were."
    kept, samples = read_json(RESULTS/"lmms.json"), {name: read_samples(logs/name) for name in MODELS}
    tasks = [task for task in TASKS if task in samples[MODELS[0]]]
    rows = {(r["model"], r["task"]): r for r in kept["equal"]}
    rows |= {(r["model"], r["task"]): r for name in MODELS for r in beside(name, made, logs/name, tasks)}
    kept["made"] = [run for run in kept["made"] if not set(run["tasks"]) <= set(tasks)] + [about(tasks)]
    kept["equal"] = [rows[name, task] for name in MODELS for task in TASKS if (name, task) in rows]
    for name, found in samples.items():
        kept["samples"][name] |= {task: found[task] for task in tasks if task in DRAWN}
    write_json(RESULTS/"lmms.json", kept)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "tasks": print(",".join(TASKS))
    else: {"files": write_files, "compare": compare}[command](*map(Path, folders))
