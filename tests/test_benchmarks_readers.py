"Benchmarks: rows of the table, and their readers."
import json
from dataclasses import replace

import pytest
from PIL import Image

from laid_nb.accuracy import by_size
from laid_nb.benchmarks import BENCHMARKS, choice_haystack, export_choices, read_choices, read_haystacks
from laid_nb.evaluate import evaluate
from laid_nb.haystack import Haystack, Question, Scene, picture_haystack
from laid_nb.vhs import export_vhs, read_vhs
from refusals import refused

ENTRY = {"images": ["a.png", "b/c.png"], "question": "What is there?", "choices": ["a cup", "a tie", "a bus"],
         "answer": "B", "needles": [1]}


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


# letters

def test_letters_list_the_choices(root, write):
    h, = BENCHMARKS["letters"].read(write(ENTRY), root)
    words = "What is there?\nA. a cup\nB. a tie\nC. a bus"
    assert h.questions[0] == Question("", "", "choice", "B", (1,), words, ("A", "B", "C"))
    yes_no, = BENCHMARKS["letters"].read(write(ENTRY | {"choices": ["Yes", "No"]}), root)
    assert yes_no.questions[0].reply == "B" and yes_no.questions[0].text.endswith("\nA. Yes\nB. No")


def test_there_are_26_letters(root, write):
    many = [f"{i} cups" for i in range(27)]
    read = BENCHMARKS["letters"].read
    assert read(write(ENTRY | {"choices": many[:26], "answer": "Z"}), root)[0].questions[0].answer == "Z"
    with refused(ValueError, "file.json", "26"): read(write(ENTRY | {"choices": many, "answer": "A"}), root)


# drawn, written and read

@pytest.mark.parametrize("n, n_choices", [(6, 4), (20, 4), (20, 2), (20, 30)])
def test_choices_are_what_needles_show(n, n_choices):
    made = [choice_haystack(picture_haystack(s, n), n_choices) for s in range(3)]
    assert made == [choice_haystack(picture_haystack(s, n), n_choices) for s in range(3)]
    for s, h in enumerate(made):
        beside = {q.anchor: set(h.images[q.needles[0]].objects) - {q.anchor} for q in h.questions}
        assert h.images == picture_haystack(s, n).images and len(beside) == len(h.questions)
        for q in h.questions:
            shown = [set(c[2:].split(" and a ")) for c in q.choices]
            assert set(q.reply[2:].split(" and a ")) == beside[q.anchor] and len(shown) == min(n_choices, len(beside))
            assert all(list(beside.values()).count(c) == 1 for c in shown)


def test_the_place_of_the_right_choice_is_random():
    places = [q.choices.index(q.answer) for s in range(60) for q in choice_haystack(picture_haystack(s, 20)).questions]
    for i in range(4): assert abs(places.count(i)/len(places) - .25) < 4*(.25*.75/len(places))**.5


@pytest.mark.parametrize("stack", [
    picture_haystack(0, 4), picture_haystack(0, 20, 1), picture_haystack(0, 20, kind="multi")])
def test_nothing_to_choose_from(stack):
    with refused(ValueError, stack.id, "at least 5 images and 2 needles"): choice_haystack(stack)


def test_export_and_back(tmp_path):
    made = [choice_haystack(picture_haystack(s, 6, split="test")) for s in range(2)] + [picture_haystack(0, 2, 2)]
    folder = export_choices(made, tmp_path/"deep"/"out", size=28)
    assert sorted(p.name for p in folder.iterdir()) == ["choices.json", "images"]
    back = read_choices(folder/"choices.json", folder/"images")
    for b, h in zip(back, made, strict=True):
        assert [(q.text, q.reply, q.choices, q.needles) for q in b.questions] == [
            (q.text, q.reply, q.choices, q.needles) for q in h.questions]
        assert all(b.image(i).tobytes() == h.image(i, 28).tobytes() for i in range(len(h.images)))
    assert [q.answer for q in back[2].questions] == [q.answer for q in made[2].questions]


SCENES = (Scene(("dog",), 0),)
LISTED = Question("dog", "", "list", "a cup", (0,))
UNKNOWN = Question("dog", "cup", "single", None, (0,))

@pytest.mark.parametrize("stacks, part", [
    ([], "no haystacks"), ([picture_haystack(0, 2)]*2, "same id"), ([Haystack(SCENES, (), "a")], "0 questions"),
    ([Haystack(SCENES, (LISTED,), "../a")], "'../a'"), ([Haystack(SCENES, (LISTED,), "a")], "by one of its choices"),
    ([Haystack(SCENES, (UNKNOWN,), "a")], "by one of its choices")])
def test_unfit_haystacks_are_not_exported(tmp_path, stacks, part):
    with refused(ValueError, part): export_choices(stacks, tmp_path/"out")
    assert not list(tmp_path.iterdir())


def test_export_is_all_or_nothing(tmp_path, root):
    bad = Haystack((root/"gone.png",), (replace(UNKNOWN, answer=True),), "bad")
    before = sorted(tmp_path.rglob("*"))
    with refused(FileNotFoundError, "gone.png"): export_choices([picture_haystack(0, 2), bad], tmp_path/"out")
    assert sorted(tmp_path.rglob("*")) == before
    with refused(ValueError, root, "exists"): export_choices([picture_haystack(0, 2)], root)


def test_the_pair_is_asked_as_vhs_is(tmp_path):
    "A file, a row of the table, and what any benchmark goes through: nothing else knows of choices."
    from laid_nb.store import load_model
    model, processor = load_model("student")
    folder = export_choices([choice_haystack(picture_haystack(s, 10, split="test")) for s in range(3)], tmp_path/"out")
    accuracy = {}
    for name in ("choices", "letters"):
        stacks = read_haystacks([folder/"choices.json"], folder/"images", name)
        records = evaluate(model, processor, stacks, prompt=BENCHMARKS[name].prompt, progress=False)
        assert len(records) == sum(len(h.questions) for h in stacks) and {r["size"] for r in records} == {10}
        assert by_size(records).chance == .25
        accuracy[name] = by_size(records).accuracy[0]
    assert accuracy["choices"] > .6 > accuracy["letters"]  # in its training, it was never asked for letters
