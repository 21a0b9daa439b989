"""Two runs of lmms-eval beside `laid eval --generate`, answer by answer; keeps data/results/lmms.json.

  for m in student distilled; do
    lmms-eval --model laid --model_args pretrained=$m --include_path $(laid lmms) --log_samples --output_path logs/$m \\
      --tasks laid_drawn_single_1,laid_drawn_single_5,laid_drawn_single_20,laid_drawn_single_50
  done
  python experiments/toolkit.py logs    # about two minutes on 2 cores"""
import json
import sys
from importlib import metadata
from pathlib import Path

from common import RESULTS, now
from laid_nb.evaluate import evaluate
from laid_nb.haystack import drawn_test
from laid_nb.lmms import read_samples
from laid_nb.store import hardware, load_model, versions, write_json

SIZES, MODELS = (1, 5, 20, 50), ("student", "distilled")
RUN = (f"lmms-eval --model laid --model_args pretrained=MODEL --include_path $(laid lmms) --log_samples --output_path "
       f"logs/MODEL --tasks {','.join(f'laid_drawn_single_{n}' for n in SIZES)}")


def written(folder: Path, task: str) -> list[tuple[str, float]]:
    "The answers that lmms-eval logged, and whether it counted them as right."
    path, = folder.rglob(f"*samples_{task}.jsonl")
    rows = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda r: r["doc_id"])
    return [(r["filtered_resps"], r["accuracy"]) for r in rows]


def beside(name: str, folder: Path) -> list[dict]:
    "For each size, how many answers and scores of lmms-eval are those of `laid eval --generate`."
    model, processor = load_model(name)
    rows = []
    for size in SIZES:
        ours = evaluate(model, processor, drawn_test([size], 144), generate=True, batch=12, progress=False)
        theirs = written(folder, f"laid_drawn_single_{size}")
        pairs = list(zip(theirs, ours, strict=True))
        rows.append(dict(
            model=name, size=size, questions=len(ours),
            same_answers=sum(a == r["response"].strip() for (a, _), r in pairs),
            same_scores=sum(bool(s) == r["correct"] for (_, s), r in pairs),
            lmms_eval=sum(s for _, s in theirs)/len(theirs), laid_eval=sum(r["correct"] for r in ours)/len(ours)))
        print(rows[-1], flush=True)
    return rows


def main(logs: Path):
    equal = [row for name in MODELS for row in beside(name, logs/name)]
    about = versions() | {"lmms_eval": sys.argv[2] if len(sys.argv) > 2 else metadata.version("lmms_eval")}
    write_json(RESULTS/"lmms.json", dict(
        made=dict(command=RUN, beside="python experiments/toolkit.py logs", finished=now(), versions=about,
                  hardware=hardware()),
        equal=equal, samples={name: read_samples(logs/name) for name in MODELS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
