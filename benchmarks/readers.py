"""Reading files of haystacks: seconds and calls to the file system for a million image entries.

`python benchmarks/readers.py [--quick]`; one core, files of a benchmark made in a temporary folder."""
import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from laid_nb.benchmarks import read_haystacks
from measure import table, write

COUNTED = ("stat", "lstat", "scandir", "open")


def vhs_file(folder, rng, entries, images, pool):
    "A file of Visual Haystacks with `entries` questions about `images` images each, from a pool of COCO's size."
    names = [f"val2017/{i:012d}.jpg" for i in range(pool)]
    turns = [{"from": "human", "value": "For the image with a dog, is there a pizza?"}, {"from": "gpt", "value": "yes"}]
    made = []
    for _ in range(entries):
        needle, *others = rng.sample(names, images)
        made.append({"conversations": turns, "pos_image": [needle], "neg_image": others})
    (folder/f"visual_haystack_{images}.json").write_text(json.dumps(made), encoding="utf-8")
    return folder/f"visual_haystack_{images}.json"


def llava_file(folder, rng, entries, images, pool):
    "The same as conversations."
    names = [f"val2017/{i:012d}.jpg" for i in range(pool)]
    made = []
    for i in range(entries):
        turns = [{"from": "human", "value": "<image>"*images + "\nWhat is there?"}, {"from": "gpt", "value": "A dog."}]
        made.append({"id": i, "image": rng.sample(names, images), "conversations": turns})
    (folder/"llava.json").write_text(json.dumps(made), encoding="utf-8")
    return folder/"llava.json"


def counted(run):
    "(what `run` returns, seconds, calls to the file system)."
    calls, real = [0], {name: getattr(os, name) for name in COUNTED}

    def counting(function):
        def call(*args, **kwargs):
            calls[0] += 1
            return function(*args, **kwargs)
        return call
    for name, function in real.items():
        setattr(os, name, counting(function))
    start = time.perf_counter()
    try:
        found = run()
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    return found, time.perf_counter() - start, calls[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    entries = 1_000 if parser.parse_args().quick else 10_000
    rows = []
    with tempfile.TemporaryDirectory() as place:
        pool, root = 40_000, Path(place)/"coco"
        (root/"val2017").mkdir(parents=True)
        for i in range(pool):
            (root/f"val2017/{i:012d}.jpg").touch()
        for name, make in (("vhs", vhs_file), ("llava", llava_file)):
            file = make(Path(place), random.Random(0), entries, 100, pool)
            stacks, took, calls = counted(lambda: read_haystacks([file], root, name))
            assert sum(len(h.images) for h in stacks) == 100*entries
            rows.append({"reader": name, "image entries": 100*entries, "seconds": took, "calls": calls})
    print(table(rows))
    if entries == 10_000:
        write("bench_readers", rows)


if __name__ == "__main__":
    main()
