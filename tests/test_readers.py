"""Readers of other people's files: tables in every form, and how often they ask the disk."""
import json
import sys

import pytest
from datasets import Dataset, Image, List

from laid_nb.haystack import Scene, render
from laid_nb.readers import read_llava, read_mmlongbench, read_table
from laid_nb.vhs import read_vhs

NAMES = ("dog.png", "cup.png", "tie.png")


@pytest.fixture
def root(tmp_path):
    "A folder of three pictures."
    folder = tmp_path/"images"
    folder.mkdir()
    for n, name in enumerate(NAMES): render(Scene((name[:-4],), n)).save(folder/name)
    return folder


def rows(root, paths):
    shown = [name if paths else {"bytes": (root/name).read_bytes(), "path": None} for name in NAMES]
    return {"images": [shown[:2], shown[1:]], "question": ["Is there a dog?", "Is there a bus?"], "answer": ["yes", "no"]}


def check(haystacks, root):
    assert [q.reply for h in haystacks for q in h.questions] == ["Yes", "No"]
    for h, names in zip(haystacks, (NAMES[:2], NAMES[1:]), strict=True):
        assert [h.image(i).tobytes() for i in range(2)] == [render(Scene((name[:-4],), NAMES.index(name))).tobytes() for name in names]


@pytest.mark.parametrize("inside", [True, False], ids=("pictures inside", "paths"))
def test_parquet(root, tmp_path, inside):
    table = Dataset.from_dict(rows(root, not inside))
    table = table.cast_column("images", List(Image())) if inside else table
    table.to_parquet(tmp_path/"table.parquet")
    check(read_table(tmp_path/"table.parquet", None if inside else root), root)


def test_csv(root, tmp_path):
    "A cell is one path."
    Dataset.from_dict({"image": list(NAMES[:2]), "question": ["Is it a dog?", "Is it a bus?"], "answer": ["yes", "no"]}).to_csv(tmp_path/"table.csv")
    found = read_table(tmp_path/"table.csv", root)
    assert [h.questions[0].reply for h in found] == ["Yes", "No"] and [h.images[0].name for h in found] == list(NAMES[:2])


def test_a_name_of_the_hub(root, tmp_path, monkeypatch):
    "`load_dataset` finds OWNER/NAME below the present folder before it asks the hub: the same call, offline."
    (tmp_path/"somebody/pictures/data").mkdir(parents=True)
    Dataset.from_dict(rows(root, False)).cast_column("images", List(Image())).to_parquet(tmp_path/"somebody/pictures/data/test-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    check(read_table("somebody/pictures"), root)
    with pytest.raises(ValueError, match="nobody/pictures cannot be read as a table"): read_table("nobody/pictures")


CALLS = []
sys.addaudithook(lambda event, args: CALLS.append((event, str(args[0]))) if CALLS is not None and event in ("open", "os.listdir", "os.scandir") else None)


@pytest.mark.parametrize("reader", ["vhs", "llava", "mmlongbench"])
def test_a_reader_asks_for_each_picture_once_whatever_the_entries(root, tmp_path, monkeypatch, reader):
    "Opened and listed files by the interpreter's audit, looked-at paths by os.stat: no more for 400 entries than for 4, but the file's own bytes."
    import os
    import pathlib
    def entry(n):
        if reader == "vhs":
            said = [{"from": "human", "value": "For the image with a dog, is there a cup?"}, {"from": "gpt", "value": "No"}]
            return {"conversations": said, "pos_image": ["dog.png"], "neg_image": ["cup.png", "tie.png"]}
        if reader == "llava": return {"image": list(NAMES), "conversations": [{"from": "human", "value": f"What {n}?"}, {"from": "gpt", "value": "A dog."}]}
        return {"id": str(n), "question": "For the image with a dog, is there a pizza?", "answer": "no", "ctxs": list(NAMES)}
    read = dict(vhs=read_vhs, llava=read_llava, mmlongbench=read_mmlongbench)[reader]
    looked, stat = [], os.stat
    def counted(path, *args, **kwargs):
        looked.append(path)
        return stat(path, *args, **kwargs)
    def count(n):
        file = tmp_path/f"{n}.jsonl" if reader == "mmlongbench" else tmp_path/f"{n}.json"
        file.write_text("\n".join(json.dumps(entry(i)) for i in range(n)) if reader == "mmlongbench" else json.dumps([entry(i) for i in range(n)]))
        looked.clear()
        CALLS.clear()
        with monkeypatch.context() as m:
            m.setattr(os, "stat", counted)
            m.setattr(pathlib.os, "stat", counted)
            read(file, root)
        return len(looked) + len([c for c in CALLS if str(root) in c[1] or str(file) in c[1]])
    few, many = count(4), count(400)
    assert many <= few + 3, (few, many)
