"""A real student with eyes: what `laid real --pictures` left, stopped or not, and the same of text with longer tests;
writes data/results/real_pictures.json.

  laid real --pictures --out laid-real-pictures --questions 96 --sizes 1,5,20,50,100,150,300,600 --seeds 0 1 2
  laid real --rows anchor --out laid-real --questions 96 --sizes 1,5,20,50,100,150,300,600
  python experiments/pictured.py laid-real-pictures laid-real

A row whose tests were stopped counts in the second table alone, which ends at SHORTER."""
import argparse
import time
from pathlib import Path

from common import log, write
from laid_nb.accuracy import Results, by_size, numbers
from laid_nb.evaluate import read_records
from laid_nb.real import ROWS, added, farther, made_folder, read_rows
from laid_nb.store import read_json

SEEDS = (0, 1, 2)
SHORTER = 100  # pictures: what a second training of most rows was asked about


def records(folder: Path, name: str) -> list[list[dict]]:
    "What each training of a row answered, as far as it came."
    paths = sorted({folder/"records"/f"{made_folder(folder, name, seed).name}.jsonl" for seed in SEEDS})
    return [read_records(p)[1] for p in paths if p.exists()]


def shorter(folder: Path, questions: int, sizes: list[int]) -> Results:
    "Rows over all trainings that were asked about all haystacks up to `SHORTER`."
    most, found = questions*sum(n <= SHORTER for n in sizes), {}
    for name in ROWS:
        some = [[r for r in rows if r["size"] <= SHORTER] for rows in records(folder, name)]
        whole = [rows for rows in some if len(rows) == most]
        if whole:
            found[name] = by_size(*whole)
    return Results(found, "student", "anchor")


def told(results: Results) -> dict:
    "A table as numbers."
    return dict(trainings={name: a.trainings for name, a in results.models.items()}, models=numbers(results),
                farther=farther(results), added=added(results))


def of_folder(folder: Path) -> dict:
    "What stands in a folder of `laid real`: its table, perplexities, seconds of each training, and where it was made."
    if not (folder/"results.json").is_file(): raise SystemExit(f"{folder} holds no results.json: run laid real first")
    ran = read_json(folder/"results.json")
    runs = {p.parent.name: read_json(p)["seconds"] for p in sorted(folder.glob("models/*/run.json"))}
    read = {p.stem: read_json(p) for p in sorted((folder/"records").glob("*.json"))}
    kept = {k: ran[k] for k in ("settings", "versions", "hardware")}
    return kept | told(read_rows(folder, SEEDS)) | dict(training_seconds=runs, read=read)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder of laid real --pictures")
    parser.add_argument("text", type=Path, help="folder of laid real")
    args, start = parser.parse_args(), time.time()
    shown = of_folder(args.pictures)
    asked = shown["settings"]
    shown["shorter"] = told(shorter(args.pictures, asked["questions"], asked["sizes"]))
    rows = {name: dict(anchor=row.anchor, items=row.items, steps=row.picture_steps, labels=row.labels,
                       lora="lora_rank" in row.settings) for name, row in ROWS.items() if name in shown["models"]}
    log({name: round(row["accuracy"][-1], 2) for name, row in shown["models"].items()})
    commands = [line.strip() for line in __doc__.splitlines() if line.strip().startswith("laid real")]
    write("real_pictures", dict(commands=commands, pictures=shown | dict(rows=rows), text=of_folder(args.text)), start)


if __name__ == "__main__":
    main()
