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
from laid_nb.store import hardware, load_model, versions, write_json
from laid_nb.vhs import export_vhs, picture_names

SIZES, MODELS, QUESTIONS = (1, 5, 20, 50), ("student", "distilled"), 144
VHS = {kind: f"VHs_qa/{kind}_needle/visual_haystack_20.json" for kind in ("single", "multi")}
MMLONGBENCH = {"single": "NIAH/vh_single_test_1000_K8_dep6.jsonl", "multi": "NIAH/vh_multi_test_1000_K8_dep3.jsonl"}
DRAWN = {f"laid_drawn_single_{n}": n for n in SIZES}
FILES = {f"laid_vhs_{kind}_20": ("vhs", file) for kind, file in VHS.items()} | {
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
    "144 questions of each kind about 20 images, in both forms, with the same pictures."
    drawn = {kind: drawn_test([20], QUESTIONS, kind=kind) for kind in VHS}
    export_vhs([h for found in drawn.values() for h in found], folder)
    for kind, file in MMLONGBENCH.items():
        (folder/file).parent.mkdir(exist_ok=True)
        (folder/file).write_text("".join(json.dumps(row) + "\n" for row in mmlongbench_lines(drawn[kind])))


def read_task(task: str, folder: Path) -> tuple[list[Haystack], str]:
    "The haystacks that a task asks about, and what stands before each question."
    if task in DRAWN: return drawn_test([DRAWN[task]], QUESTIONS), ""
    benchmark, file = FILES[task]
    return read_haystacks([folder/file], folder/"images", benchmark), BENCHMARKS[benchmark].prompt


def written(folder: Path, task: str) -> list[tuple[str, float]]:
    "The answers that lmms-eval logged, and whether it counted them as right."
    path, = folder.rglob(f"*samples_{task}.jsonl")
    rows = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda r: r["doc_id"])
    return [(r["filtered_resps"], r["accuracy"]) for r in rows]


def beside(name: str, made: Path, logs: Path) -> list[dict]:
    "For each task, how many answers and scores of lmms-eval are those of `laid eval --generate`."
    model, processor = load_model(name)
    rows = []
    for task in TASKS:
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


def compare(made: Path, logs: Path):
    command = ("LAID_DATA=made LAID_IMAGE_ROOT=made/images lmms-eval --model laid --model_args pretrained=MODEL "
               f"--include_path $(laid lmms) --log_samples --output_path logs/MODEL --tasks {','.join(TASKS)}")
    equal = [row for name in MODELS for row in beside(name, made, logs/name)]
    samples = {name: {task: read_samples(logs/name)[task] for task in DRAWN} for name in MODELS}
    write_json(RESULTS/"lmms.json", dict(
        made=dict(files="python experiments/toolkit.py files made", command=command,
                  beside="python experiments/toolkit.py compare made logs", finished=now(),
                  versions=versions() | {"lmms_eval": metadata.version("lmms_eval")}, hardware=hardware()),
        equal=equal, samples=samples))


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "tasks":
        print(",".join(TASKS))
    else:
        {"files": write_files, "compare": compare}[command](*map(Path, folders))
