"The files of Visual Haystacks: read, written, and results for the toolkit's scorer."
import json
import os

import pytest
from PIL import Image

from laid_nb import vhs as module
from laid_nb.haystack import Haystack, Question, Scene, picture_haystack
from laid_nb.vhs import _vhs_name, export_vhs, read_vhs, write_vhs
from refusals import refused

TURNS = [{"from": "human", "value": "For the image with a dog, is there an umbrella?"}, {"from": "gpt", "value": "yes"}]
ENTRY = {"conversations": TURNS, "pos_image": ["val2017/a.jpg"], "neg_image": ["val2017/b.jpg", "test2017/c.jpg"]}
UNKNOWN = Haystack((Scene(("dog",), 0),), (Question("dog", "cup", "single", None, (0,)),), "a")
LISTED = Haystack((Scene(("dog",), 0),), (Question("dog", "", "list", "a cup", (0,)),), "a")


@pytest.fixture
def root(tmp_path):
    "An image root with three pictures."
    for i, name in enumerate(("val2017/a.jpg", "val2017/b.jpg", "test2017/c.jpg")):
        path = tmp_path/"coco"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (80*i, 0, 0)).save(path)
    return tmp_path/"coco"


def write(folder, *entries):
    path = folder/"visual_haystack_3.json"
    path.write_text(entries[0] if entries and isinstance(entries[0], str) else json.dumps(list(entries)))
    return path


# reading

def test_reads_vhs(tmp_path, root):
    h, other = read_vhs(write(tmp_path, ENTRY, ENTRY), root)
    q = h.questions[0]
    assert (q.anchor, q.target, q.kind, q.answer, q.text) == ("dog", "umbrella", "single", True, TURNS[0]["value"])
    assert sorted(h.images) == sorted(root/n for n in ENTRY["pos_image"] + ENTRY["neg_image"])
    assert h.images[q.needles[0]] == root/"val2017/a.jpg" and h.image(q.needles[0]).size == (8, 6)
    assert h.id == "single_needle/visual_haystack_3/000" != other.id


def test_order_is_a_seeded_uniform_shuffle(tmp_path, root):
    path = write(tmp_path, *[ENTRY]*600)
    places, again, other = ([h.questions[0].needles[0] for h in read_vhs(path, root, seed=seed)] for seed in (0, 0, 1))
    assert places == again != other
    assert all(150 < places.count(p) < 250 for p in range(3))


@pytest.mark.parametrize("pos, neg", [(1, 3), (2, 2)])
def test_needle_at_is_the_toolkits_position_experiment(tmp_path, root, pos, neg):
    names = [f"{i}.png" for i in range(pos + neg)]
    for n in names: Image.new("RGB", (2, 2)).save(root/n)
    path = write(tmp_path, ENTRY | {"pos_image": names[:pos], "neg_image": names[pos:]})
    for p in range(neg + 1):
        h = read_vhs(path, root, needle_at=p)[0]
        assert [i.name for i in h.images] == names[pos:][:p] + names[:pos] + names[pos:][p:]
        assert h.questions[0].needles == tuple(range(p, p + pos))
    with refused(ValueError, "entry 0", "needle_at"): read_vhs(path, root, needle_at=neg + 1)


@pytest.mark.parametrize("text, found", [
    ("For the image with a dog, is there a pizza?", ("dog", "pizza", "single")),
    ("For the image with an orange, is there a wine glass?", ("orange", "wine glass", "single")),
    ("For all images with a fire hydrant, do all of them contain a tv?", ("fire hydrant", "tv", "all")),
    ("for all images with the dog, do any of them contain an oven?", ("dog", "oven", "any"))])
def test_words_of_vhs(tmp_path, root, text, found):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "No"}]
    q = read_vhs(write(tmp_path, ENTRY | {"conversations": turns}), root)[0].questions[0]
    assert (q.anchor, q.target, q.kind) == found and q.text == text and q.answer is False


MIXED = [{"from": "human", "value": "For all images with a dog, is there a cat?"}, TURNS[1]]
MAYBE = [TURNS[0], {"from": "gpt", "value": "maybe"}]
OUTSIDE = ("../outside.jpg", "val2017/../../outside.jpg", "val2017/..", "/etc/hostname", "C:\\a.jpg", "..\\outside.jpg",
           "", ".", "a\0b")

@pytest.mark.parametrize("change, error, parts", [
    (dict(conversations=None), ValueError, ["'conversations'", "missing"]),
    (dict(pos_image=None), ValueError, ["'pos_image'", "missing"]),
    (dict(neg_image=None), ValueError, ["'neg_image'", "missing"]),
    (dict(pos_image=[]), ValueError, ["no needle"]),
    (dict(pos_image=[], neg_image=[]), ValueError, ["no images"]),
    (dict(neg_image="b.jpg"), ValueError, ["'neg_image'", "str"]),
    (dict(neg_image=[3]), ValueError, ["'neg_image'", "int"]),
    (dict(conversations=[]), ValueError, ["'human'"]),
    (dict(conversations=[{"from": "human"}]), ValueError, ["'value'"]),
    (dict(conversations=["hello"]), ValueError, ["str"]),
    (dict(conversations=TURNS[:1]), ValueError, ["'gpt'"]),
    (dict(conversations=MAYBE), ValueError, ["'maybe'"]),
    (dict(conversations=MIXED), ValueError, ["not a question"]),
    (dict(pos_image=["val2017/gone.jpg"]), FileNotFoundError, ["'val2017/gone.jpg'"]),
    (dict(pos_image=["val2017"]), FileNotFoundError, ["'val2017'"]),
    *[(dict(neg_image=[name]), ValueError, [repr(name), "image root"]) for name in OUTSIDE]])
def test_a_bad_entry_is_named(tmp_path, root, change, error, parts):
    Image.new("RGB", (2, 2)).save(tmp_path/"outside.jpg")
    bad = {k: v for k, v in (ENTRY | change).items() if v is not None}
    path = write(tmp_path, ENTRY, bad)
    with refused(error, path, "entry 1", *parts): read_vhs(path, root)


@pytest.mark.parametrize("link, target", [
    ("val2017/link.jpg", "../../outside.jpg"), ("away/outside.jpg", None), ("val2017/loop.jpg", "loop.jpg")])
def test_links_that_lead_out_are_refused(tmp_path, root, link, target):
    Image.new("RGB", (2, 2)).save(tmp_path/"outside.jpg")
    if target: os.symlink(target, root/link)
    else: os.symlink(tmp_path, root/"away")
    path = write(tmp_path, ENTRY | {"pos_image": [link]})
    with refused((ValueError, FileNotFoundError), "entry 0", link): read_vhs(path, root)


def test_links_that_stay_inside_are_followed(tmp_path, root):
    os.symlink("a.jpg", root/"val2017/link.jpg")
    os.symlink(root, tmp_path/"root")
    assert read_vhs(write(tmp_path, ENTRY | {"pos_image": ["val2017/link.jpg"]}), tmp_path/"root")[0].image(0)


@pytest.mark.parametrize("text, parts", [
    ("[{]", ["line 1, column 3"]), ("[\n{'a': 1}]", ["line 2"]), ("", ["line 1"]), ("{}", ["list"]),
    ("[]", ["at least one"]), ("[3]", ["entry 0", "int"]), ("["*100000, ["not a VHs file"])])
def test_bad_json_is_named(tmp_path, root, text, parts):
    path = write(tmp_path, text)
    with refused(ValueError, path, *parts): read_vhs(path, root)


def test_bad_paths(tmp_path, root):
    with refused(FileNotFoundError, "nowhere.json"): read_vhs(tmp_path/"nowhere.json", root)
    with refused(FileNotFoundError, tmp_path): read_vhs(tmp_path, root)
    with refused(FileNotFoundError, "nothing"): read_vhs(write(tmp_path, ENTRY), tmp_path/"nothing")
    (tmp_path/"latin.json").write_bytes(b'["\xe9"]')
    with refused(ValueError, "latin.json", "byte 2"): read_vhs(tmp_path/"latin.json", root)


# writing

@pytest.mark.parametrize("kind, n", [("single", 1), ("single", 4), ("multi", 7)])
def test_export_and_back(tmp_path, kind, n):
    made = [picture_haystack(s, n, 3, "test", kind) for s in range(2)]
    folder = export_vhs(made, tmp_path/"deep"/"out", size=28)
    assert sorted(p.name for p in folder.iterdir()) == ["VHs_qa", "images"]
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    path, = folder.rglob("*.json")
    assert path.relative_to(folder).as_posix() == f"VHs_qa/{kind}_needle/{_vhs_name(n)}"
    for e in json.loads(path.read_text()):
        assert set(e) == {"conversations", "pos_image", "neg_image"}
        assert [t["from"] for t in e["conversations"]] == ["human", "gpt"]
        assert e["conversations"][1]["value"] in ("yes", "no")
    back, asked = read_vhs(path, folder/"images", seed=5), [(h, q) for h in made for q in h.questions]
    assert len(back) == len(asked)
    for b, (h, q) in zip(back, asked):
        old = [int(p.stem) for p in b.images]
        assert sorted(old) == list(range(n)) and all(p.parent.name == h.id for p in b.images)
        assert b.questions[0] == Question(q.anchor, q.target, q.kind, q.answer, b.questions[0].needles)
        assert sorted(old[i] for i in b.questions[0].needles) == list(q.needles)
        assert all(b.image(i).tobytes() == h.image(k, 28).tobytes() for i, k in enumerate(old))


def test_export_of_vhs_haystacks(tmp_path, root):
    "Haystacks from files go out again with their words and pictures."
    h = read_vhs(write(tmp_path, ENTRY), root)[0]
    folder = export_vhs([h], tmp_path/"out")
    path = folder/"VHs_qa/single_needle/visual_haystack_3.json"
    again = read_vhs(path, folder/"images", needle_at=h.questions[0].needles[0])[0]
    assert again.questions == h.questions and again.id == h.id
    assert all(again.image(i).tobytes() == h.image(i).tobytes() for i in range(3))


SCENES = (Scene(("dog",), 0),)

@pytest.mark.parametrize("stacks, part", [
    ([], "no haystacks"), ([picture_haystack(0, 2)]*2, "same id"), ([Haystack((), (), "a")], "0 images"),
    ([Haystack(SCENES, (), "a")], "0 questions"), ([Haystack(SCENES, LISTED.questions, "../a")], "'../a'"),
    ([LISTED], "yes or no"), ([UNKNOWN], "yes or no")])
def test_unfit_haystacks_are_not_exported(tmp_path, stacks, part):
    with refused(ValueError, part): export_vhs(stacks, tmp_path/"out")
    assert not list(tmp_path.iterdir())


def test_export_is_all_or_nothing(tmp_path, root):
    bad = Haystack((root/"gone.jpg",), (Question("dog", "cup", "single", True, (0,)),), "bad")
    before = sorted(tmp_path.rglob("*"))
    with refused(FileNotFoundError, "gone.jpg"): export_vhs([picture_haystack(0, 2), bad], tmp_path/"out")
    assert sorted(tmp_path.rglob("*")) == before
    with refused(ValueError, root, "exists"): export_vhs([picture_haystack(0, 2)], root)


@pytest.mark.parametrize("make", [lambda folder: export_vhs([picture_haystack(0, 2)], folder),
                                  lambda folder: write_vhs([], [], folder)])
def test_others_may_read_what_is_written(tmp_path, make):
    before = os.umask(0o022)
    try: folder = make(tmp_path/"out")
    finally: os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755


# results

STACKS = [picture_haystack(seed, n, 3, split="test") for n in (1, 3) for seed in range(2)]

def records(stacks):
    "Records of a reader whose margins go up and down."
    return [dict(haystack=h.id, question=t, size=len(h.images), margin=(-1)**(k + t)*.5, mass=.9)
            for k, h in enumerate(stacks) for t in range(len(h.questions))]


def test_vhs_layout(tmp_path):
    stacks = STACKS + [picture_haystack(0, 6, 2, kind="multi")]
    answers = {h.id: [q.answer for q in h.questions] for h in stacks}
    folder = write_vhs(records(stacks), stacks, tmp_path/"result")
    written = {p.name: len(list(p.glob("*.json"))) for p in folder.iterdir()}
    assert written == {"oracle_images": 6, "3_images": 6, "6_images": len(stacks[-1].questions)}
    for size in (1, 3, 6):
        files = folder.glob(f"{'oracle' if size == 1 else size}_images/*.json")
        found = [json.loads(p.read_text()) for p in files]
        said = [e["result"]["response"].lower().split() for e in found]
        right = [r for r in records(stacks) if r["size"] == size
                 and (r["margin"] > 0) == answers[r["haystack"]][r["question"]]]
        assert sum(e["conversations"][1]["value"] in s for e, s in zip(found, said)) == len(right)  # the toolkit's rule
        for e in found:
            assert sorted(e["pos_image"] + e["neg_image"]) == sorted(e["result"]["image_paths"])
            assert len(e["result"]["image_paths"]) == size


def test_vhs_needle_place():
    question = STACKS[3].questions[2]
    entry = module._result_entry(records(STACKS)[-1], STACKS[3])
    assert entry["result"]["image_paths"].index(entry["pos_image"][0]) == question.needles[0]
    assert entry["conversations"][0]["value"] == question.text
    assert entry["conversations"][1]["value"] in ("yes", "no")


def test_written_answers_are_handed_on():
    entry = module._result_entry(records(STACKS)[0] | {"response": "No, none."}, STACKS[0])
    assert entry["result"]["response"] == "No, none."


def test_vhs_is_all_or_nothing(tmp_path, monkeypatch):
    found = records(STACKS)
    with refused(ValueError, "not among those given"): write_vhs(found, STACKS[1:], tmp_path/"a")
    real = module._result_entry
    monkeypatch.setattr(module, "_result_entry", lambda r, h: real(r, h) if r is not found[-1] else 1/0)
    with pytest.raises(ZeroDivisionError): write_vhs(found, STACKS, tmp_path/"a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path/"a").mkdir()
    with refused(ValueError, "exists"): write_vhs(found, STACKS, tmp_path/"a")


def test_results_of_other_choices_are_not_written(tmp_path):
    question = Question("dog", "", "choice", "B", (0,), "Which?", ("A", "B"))
    h = Haystack(SCENES, (question,), "letters")
    with refused(ValueError, "'letters'", "yes or no"): write_vhs(records([h]), [h], tmp_path/"a")
