"Benchmarks: rows of the table, and their readers."
import json
from contextlib import contextmanager

import pytest
from PIL import Image

from laid_nb.benchmarks import BENCHMARKS, read_choices, read_haystacks
from laid_nb.haystack import Question, picture_haystack
from laid_nb.vhs import export_vhs, read_vhs

ENTRY = {"images": ["a.png", "b/c.png"], "question": "What is there?", "choices": ["a cup", "a tie", "a bus"],
         "answer": "B", "needles": [1]}


@contextmanager
def refused(error, *parts):
    "The error must come, on one line, naming all the parts."
    with pytest.raises(error) as info: yield
    message = str(info.value)
    assert "\n" not in message and all(str(p) in message for p in parts), message


@pytest.fixture
def root(tmp_path):
    "An image root with two pictures."
    (tmp_path/"images"/"b").mkdir(parents=True)
    for i, name in enumerate(ENTRY["images"]): Image.new("RGB", (8, 6), (80*i, 0, 0)).save(tmp_path/"images"/name)
    return tmp_path/"images"


@pytest.fixture
def write(tmp_path):
    def write(*entries):
        (tmp_path/"file.json").write_text(json.dumps(list(entries)))
        return tmp_path/"file.json"
    return write


# the table

@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_complete(name):
    row = BENCHMARKS[name]
    assert callable(row.read) and row.means and "\n" not in row.means and row.prompt == row.prompt.lstrip()


def test_files_one_behind_the_other(tmp_path):
    folder = export_vhs([picture_haystack(0, n, 2, "test") for n in (2, 3)], tmp_path/"out")
    files = sorted(folder.glob("VHs_qa/*/*.json"))
    read = read_haystacks(files, folder/"images", "vhs")
    assert read == [h for f in files for h in read_vhs(f, folder/"images")] and len(read) == 4


@pytest.mark.parametrize("image_root, benchmark, word", [(None, "vhs", "--image_root"), (".", "vqa", "one of vhs")])
def test_what_cannot_be_read(image_root, benchmark, word):
    with pytest.raises(ValueError, match=word): read_haystacks(["a.json"], image_root, benchmark)


# several choices

@pytest.mark.parametrize("answer", ["B", "a tie"])
def test_reads_choices(root, write, answer):
    h, = read_choices(write(ENTRY | {"answer": answer}), root)
    assert h.images == (root/"a.png", root/"b/c.png") and h.id == "choices/file/000"
    assert h.questions == (Question("", "", "choice", "a tie", (1,), "What is there?", ("a cup", "a tie", "a bus")),)


def test_needles_may_be_left_out(root, write):
    h, = read_choices(write({k: v for k, v in ENTRY.items() if k != "needles"}), root)
    assert h.questions[0].needles == ()


def test_entries_about_the_same_images_are_one_haystack(root, write):
    other = ENTRY | {"images": ENTRY["images"][::-1]}
    first, second = read_choices(write(ENTRY, other, ENTRY | {"question": "And now?"}), root)
    assert [q.text for q in first.questions] == ["What is there?", "And now?"] and len(second.questions) == 1
    assert first.images == second.images[::-1] and first.id != second.id


def test_letters_may_be_the_choices(root, write):
    q = read_choices(write(ENTRY | {"choices": ["C", "B", "A"]}), root)[0].questions[0]
    assert q.answer == "B" and q.choices == ("C", "B", "A")


@pytest.mark.parametrize("answer, right", [("Yes", True), ("No", False), ("B", False)])
def test_yes_and_no_are_choices_too(root, write, answer, right):
    q = read_choices(write(ENTRY | {"choices": ["Yes", "No"], "answer": answer}), root)[0].questions[0]
    assert q.answer is right and q.text == "What is there?"


@pytest.mark.parametrize("change, error, parts", [
    *[({name: None}, ValueError, [repr(name), "missing"]) for name in ("images", "question", "choices", "answer")],
    (dict(images=[]), ValueError, ["'images'", "empty"]), (dict(images="a.png"), ValueError, ["'images'", "str"]),
    (dict(images=[3]), ValueError, ["'images'", "int"]), (dict(images=["gone.png"]), FileNotFoundError, ["'gone.png'"]),
    (dict(images=["../file.json"]), ValueError, ["'../file.json'", "image root"]),
    (dict(question=3), ValueError, ["'question'", "int"]), (dict(question=""), ValueError, ["needs its wording"]),
    (dict(choices="ABC"), ValueError, ["'choices'", "str"]),
    (dict(choices=["a", 3]), ValueError, ["'choices'", "a text"]),
    (dict(choices=["a tie"]), ValueError, ["at least two"]), (dict(choices=["a", "a"]), ValueError, ["all different"]),
    (dict(choices=["B", " "]), ValueError, ["texts"]),
    (dict(choices=["Yes", "No"], answer="maybe"), ValueError, ["'maybe'"]),
    (dict(answer="a cat"), ValueError, ["'a cat'"]), (dict(answer="D"), ValueError, ["'D'"]),
    (dict(answer=1), ValueError, ["'answer'", "int"]), (dict(needles=1), ValueError, ["'needles'", "int"]),
    *[(dict(needles=bad), ValueError, ["'needles'", "2 images"]) for bad in ([2], [-1], ["a.png"], [True], [None])]])
def test_a_bad_entry_is_named(root, write, change, error, parts):
    bad = {k: v for k, v in (ENTRY | change).items() if v is not None}
    path = write(ENTRY, bad)
    with refused(error, path, "entry 1", *parts): read_choices(path, root)


@pytest.mark.parametrize("entries, parts", [([], ["not a file of choices"]), ([3], ["entry 0", "int"])])
def test_a_bad_file_is_named(root, write, entries, parts):
    path = write(*entries)
    with refused(ValueError, path, *parts): read_choices(path, root)
