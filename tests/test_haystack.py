"Haystacks: scenes, questions, the proof that the needle is needed, VHs files, the dataset."
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from laid_nb.haystack import (
    Haystack, KINDS, OBJECTS, Question, SPLITS, Scene, _multi, haystack_dataset, picture_haystack, render,
    row_haystack, single_contents
)
from laid_nb.recompose import unlabelled
from laid_nb.vhs import export_vhs, read_vhs, vhs_name

ENTRY = {"conversations": [{"from": "human", "value": "For the image with a dog, is there an umbrella?"}, {"from": "gpt", "value": "yes"}],
         "pos_image": ["val2017/a.jpg"], "neg_image": ["val2017/b.jpg", "test2017/c.jpg"]}


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


def refused(error, *parts):
    "A context in which the error must come, on one line, naming all the parts."
    class Check:
        def __enter__(self): self.raises = pytest.raises(error); self.info = self.raises.__enter__()
        def __exit__(self, *exc):
            done = self.raises.__exit__(*exc)
            message = str(self.info.value)
            assert "\n" not in message and all(str(p) in message for p in parts), message
            return done
    return Check()


# scenes and haystacks

def test_import_is_light():
    code = "import sys, laid_nb.haystack; assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""

def test_every_object_is_drawn():
    blank = [np.asarray(render(Scene((name,), 0))) for name in OBJECTS]
    assert len({b.tobytes() for b in blank}) == len(OBJECTS) == 67

@pytest.mark.parametrize("kind", KINDS)
def test_haystack_depends_on_all_its_arguments(kind):
    made = [picture_haystack(seed, n, split=split, kind=kind) for seed in (0, 1) for n in (6, 7) for split in SPLITS]
    assert len({h.id for h in made}) == len(made)
    assert all([s.objects for s in a.images] != [s.objects for s in b.images] and not {s.seed for s in a.images} & {s.seed for s in b.images} for a, b in itertools.combinations(made, 2))
    assert made[0] == picture_haystack(0, 6, split="train", kind=kind)

@pytest.mark.parametrize("kind, n", [("single", 1), ("single", 2), ("single", 4), ("single", 5), ("single", 13), ("single", 150), ("multi", 2), ("multi", 5), ("multi", 150)])
def test_questions_are_true(kind, n):
    for seed in range(3):
        h = picture_haystack(seed, n, kind=kind)
        anchors = {q.anchor for q in h.questions}
        assert len(h.questions) == (12 if kind == "single" else max(n//3, 1) if n < 36 else 12)
        for q in h.questions:
            assert q.needles == tuple(i for i, s in enumerate(h.images) if q.anchor in s.objects)  # the anchor stands in the needles only
            holds = [q.target in h.images[i].objects for i in q.needles]
            assert q.answer == {"single": all, "all": all, "any": any}[q.kind](holds) and q.target not in anchors
            assert len(q.needles) == 1 if kind == "single" else len(q.needles) in (2, 3)

def test_contents_of_a_seed_stay():
    "The embedded pair was trained on these contents: a change here changes every figure."
    rng = np.random.default_rng([0, 3, 0, 0])
    contents, questions = single_contents(rng, 3, 2)
    assert (contents, [(q.anchor, q.target, q.answer, q.needles) for q in questions]) == PINNED

PINNED = ([("cell phone", "donut", "elephant"), ("apple", "elephant"), ("bear",)], [("cell phone", "donut", True, (0,)), ("apple", "banana", False, (1,))])

@pytest.mark.parametrize("arguments, error, part", [
    (dict(seed=0, n_images=0), ValueError, "n_images"), (dict(seed=0, n_images=3, n_questions=0), ValueError, "n_questions"), (dict(seed=-1, n_images=3), ValueError, "seed"),
    (dict(seed=0, n_images="3"), TypeError, "'3'"), (dict(seed=0, n_images=3, split="dev"), ValueError, "'dev'"), (dict(seed=0, n_images=3, kind="double"), ValueError, "'double'"),
    (dict(seed=0, n_images=1, kind="multi"), ValueError, "at least 2")])
def test_bad_picks(arguments, error, part):
    with refused(error, part): picture_haystack(**arguments)
    with refused(error, part, "pick 1"): haystack_dataset([dict(seed=0, n_images=3), arguments])

@pytest.mark.parametrize("objects, split, part", [((), "train", "1 to 3"), (("dog",)*4, "train", "1 to 3"), (("dog", "unicorn"), "train", "'unicorn'"), (("dog",), "dev", "'dev'")])
def test_bad_scenes(objects, split, part):
    with refused(ValueError, part): Scene(objects, 0, split)

def test_unreadable_images(tmp_path):
    (tmp_path/"text.png").write_text("no picture")
    render(Scene(("dog",), 0)).save(tmp_path/"whole.png")
    (tmp_path/"cut.png").write_bytes((tmp_path/"whole.png").read_bytes()[:-900])
    h = Haystack(tuple(tmp_path/n for n in ("text.png", "cut.png", "gone.png", "whole.png")), ())
    with refused(ValueError, "text.png"): h.image(0)
    with refused(ValueError, "cut.png"): h.image(1)
    with refused(FileNotFoundError, "gone.png"): h.image(2)
    assert h.image(3).mode == "RGB" and h.image(3).size == (56, 56)


# the needle is needed

def pairs(kind, n, wanted):
    "Independent pairs of contents and question."
    rng, found = np.random.default_rng([7, n, KINDS.index(kind)]), []
    while len(found) < wanted:
        contents, questions = (single_contents if kind == "single" else _multi)(rng, n, 12)
        found += [(contents, q) for q in (questions if n >= 50 else [questions[len(found) % len(questions)]])]
    return found

def features(contents, q):
    "What a reader without the needle can know: the words, and where which distractor shows the target, and how full it is."
    rest = [c for i, c in enumerate(contents) if i not in q.needles]
    hits = np.array([q.target in c for c in rest] or [False], dtype=float)
    words = np.zeros(2*len(OBJECTS))
    words[[OBJECTS.index(q.anchor), len(OBJECTS) + OBJECTS.index(q.target)]] = 1
    near = [float(any(q.target in contents[j] for j in (i - 1, i + 1) if 0 <= j < len(contents) and j not in q.needles)) for i in q.needles[:1]]
    return [1, hits.sum(), hits.mean(), hits.any(), hits[0], hits[-1], *near, np.mean([len(c) for c in rest] or [0]), len(q.needles), q.kind == "all", *words]

@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_without_the_needle_scores_half(kind):
    "Ridge regression on words and distractors, by size; all sizes together within Wilson's 95% interval of one half."
    from laid_nb.accuracy import wilson
    right = total = yes = asked = 0
    for n in (1, 2, 5, 20, 60)[kind == "multi":]:
        found = pairs(kind, n, 600)
        x, y = np.array([features(*p) for p in found], dtype=float), np.array([1. if q.answer else -1. for _, q in found])
        w = np.linalg.solve(x[:300].T @ x[:300] + 3*np.eye(x.shape[1]), x[:300].T @ y[:300])
        right, total, yes, asked = right + int(((x[300:] @ w > 0) == (y[300:] > 0)).sum()), total + 300, yes + int((y > 0).sum()), asked + len(y)
    for k, n in ((right, total), (yes, asked)):  # the score, and the balance of yes and no
        low, high = wilson(k, n)
        assert low < .5 < high

def test_the_classifier_finds_a_leak_that_is_there():
    "The same classifier, shown the needle's target too, scores far above one half: the test above can fail."
    found = pairs("single", 5, 600)
    x = np.array([features(c, q) + [sum(q.target in o for o in c)] for c, q in found], dtype=float)
    y = np.array([1. if q.answer else -1. for _, q in found])
    w = np.linalg.solve(x[:300].T @ x[:300] + 3*np.eye(x.shape[1]), x[:300].T @ y[:300])
    assert ((x[300:] @ w > 0) == (y[300:] > 0)).mean() > .6

@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_as_full_for_yes_as_for_no(kind):
    "The number of objects in the needles does not tell the answer."
    sizes = {key: [np.mean([len(c[i]) for i in q.needles]) for c, q in pairs(kind, 50, 1500) if (q.answer, q.kind) == key] for key in itertools.product((True, False), ("single",) if kind == "single" else ("all", "any"))}
    for k in {k for _, k in sizes}:
        yes, no = sizes[True, k], sizes[False, k]
        assert abs(np.mean(yes) - np.mean(no)) < 3*np.sqrt(np.var(yes)/len(yes) + np.var(no)/len(no))


# VHs files

def test_reads_vhs(tmp_path, root):
    h, other = read_vhs(write(tmp_path, ENTRY, ENTRY), root)
    q = h.questions[0]
    assert (q.anchor, q.target, q.kind, q.answer, q.text) == ("dog", "umbrella", "single", True, ENTRY["conversations"][0]["value"])
    assert sorted(h.images) == sorted(root/n for n in ENTRY["pos_image"] + ENTRY["neg_image"]) and h.images[q.needles[0]] == root/"val2017/a.jpg"
    assert h.image(q.needles[0]).size == (8, 6) and h.id == "single_needle/visual_haystack_3/000" != other.id

def test_order_is_a_seeded_uniform_shuffle(tmp_path, root):
    path = write(tmp_path, *[ENTRY]*600)
    places = [h.questions[0].needles[0] for h in read_vhs(path, root)]
    assert places == [h.questions[0].needles[0] for h in read_vhs(path, root)] != [h.questions[0].needles[0] for h in read_vhs(path, root, seed=1)]
    assert all(150 < places.count(p) < 250 for p in range(3))

@pytest.mark.parametrize("pos, neg", [(1, 3), (2, 2)])
def test_needle_at_is_the_toolkits_position_experiment(tmp_path, root, pos, neg):
    names = [f"{i}.png" for i in range(pos + neg)]
    for n in names: Image.new("RGB", (2, 2)).save(root/n)
    path = write(tmp_path, ENTRY | {"pos_image": names[:pos], "neg_image": names[pos:]})
    for p in range(neg + 1):
        h = read_vhs(path, root, needle_at=p)[0]
        assert [i.name for i in h.images] == names[pos:][:p] + names[:pos] + names[pos:][p:] and h.questions[0].needles == tuple(range(p, p + pos))
    with refused(ValueError, "entry 0", "needle_at"): read_vhs(path, root, needle_at=neg + 1)

@pytest.mark.parametrize("text, found", [
    ("For the image with a dog, is there a pizza?", ("dog", "pizza", "single")), ("For the image with an orange, is there a wine glass?", ("orange", "wine glass", "single")),
    ("For all images with a fire hydrant, do all of them contain a tv?", ("fire hydrant", "tv", "all")), ("for all images with the dog, do any of them contain an oven?", ("dog", "oven", "any"))])
def test_words_of_vhs(tmp_path, root, text, found):
    q = read_vhs(write(tmp_path, ENTRY | {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "No"}]}), root)[0].questions[0]
    assert (q.anchor, q.target, q.kind) == found and q.text == text and q.answer is False

@pytest.mark.parametrize("change, error, parts", [
    (dict(conversations=None), ValueError, ["'conversations'", "missing"]), (dict(pos_image=None), ValueError, ["'pos_image'", "missing"]), (dict(neg_image=None), ValueError, ["'neg_image'", "missing"]),
    (dict(pos_image=[]), ValueError, ["no needle"]), (dict(pos_image=[], neg_image=[]), ValueError, ["no images"]), (dict(neg_image="b.jpg"), ValueError, ["'neg_image'", "str"]), (dict(neg_image=[3]), ValueError, ["'neg_image'", "int"]),
    (dict(conversations=[]), ValueError, ["'human'"]), (dict(conversations=[{"from": "human"}]), ValueError, ["'value'"]), (dict(conversations=["hello"]), ValueError, ["str"]),
    (dict(conversations=ENTRY["conversations"][:1]), ValueError, ["'gpt'"]), (dict(conversations=[ENTRY["conversations"][0], {"from": "gpt", "value": "maybe"}]), ValueError, ["'maybe'"]),
    (dict(conversations=[{"from": "human", "value": "For all images with a dog, is there a cat?"}, ENTRY["conversations"][1]]), ValueError, ["not a question"]),
    (dict(pos_image=["val2017/gone.jpg"]), FileNotFoundError, ["'val2017/gone.jpg'"]), (dict(pos_image=["val2017"]), FileNotFoundError, ["'val2017'"]),
    *[(dict(neg_image=[name]), ValueError, [repr(name), "image root"]) for name in ("../outside.jpg", "val2017/../../outside.jpg", "val2017/..", "/etc/hostname", "C:\\a.jpg", "..\\outside.jpg", "", ".", "a\0b")]])
def test_a_bad_entry_is_named(tmp_path, root, change, error, parts):
    Image.new("RGB", (2, 2)).save(tmp_path/"outside.jpg")
    bad = {k: v for k, v in (ENTRY | change).items() if v is not None}
    path = write(tmp_path, ENTRY, bad)
    with refused(error, path, "entry 1", *parts): read_vhs(path, root)

@pytest.mark.parametrize("link, target", [("val2017/link.jpg", "../../outside.jpg"), ("away/outside.jpg", None), ("val2017/loop.jpg", "loop.jpg")])
def test_links_that_lead_out_are_refused(tmp_path, root, link, target):
    Image.new("RGB", (2, 2)).save(tmp_path/"outside.jpg")
    if target: os.symlink(target, root/link)
    else: os.symlink(tmp_path, root/"away")
    with refused((ValueError, FileNotFoundError), "entry 0", link): read_vhs(write(tmp_path, ENTRY | {"pos_image": [link]}), root)

def test_links_that_stay_inside_are_followed(tmp_path, root):
    os.symlink("a.jpg", root/"val2017/link.jpg")
    os.symlink(root, tmp_path/"root")
    assert read_vhs(write(tmp_path, ENTRY | {"pos_image": ["val2017/link.jpg"]}), tmp_path/"root")[0].image(0)

@pytest.mark.parametrize("text, parts", [("[{]", ["line 1, column 3"]), ("[\n{'a': 1}]", ["line 2"]), ("", ["line 1"]), ("{}", ["list"]), ("[]", ["at least one"]), ("[3]", ["entry 0", "int"]), ("["*100000, ["not a VHs file"])])
def test_bad_json_is_named(tmp_path, root, text, parts):
    path = write(tmp_path, text)
    with refused(ValueError, path, *parts): read_vhs(path, root)

def test_bad_paths(tmp_path, root):
    with refused(FileNotFoundError, "nowhere.json"): read_vhs(tmp_path/"nowhere.json", root)
    with refused(FileNotFoundError, tmp_path): read_vhs(tmp_path, root)
    with refused(FileNotFoundError, "nothing"): read_vhs(write(tmp_path, ENTRY), tmp_path/"nothing")
    (tmp_path/"latin.json").write_bytes(b'["\xe9"]')
    with refused(ValueError, "latin.json", "byte 2"): read_vhs(tmp_path/"latin.json", root)

@pytest.mark.parametrize("kind, n", [("single", 1), ("single", 4), ("multi", 7)])
def test_export_and_back(tmp_path, kind, n):
    made = [picture_haystack(s, n, 3, "test", kind) for s in range(2)]
    folder = export_vhs(made, tmp_path/"deep"/"out", size=28)
    assert sorted(p.name for p in folder.iterdir()) == ["VHs_qa", "images"] and [p.name for p in folder.parent.iterdir()] == ["out"]
    path, = folder.rglob("*.json")
    assert path.relative_to(folder).as_posix() == f"VHs_qa/{kind}_needle/{vhs_name(n)}"
    assert all(set(e) == {"conversations", "pos_image", "neg_image"} and [t["from"] for t in e["conversations"]] == ["human", "gpt"] and e["conversations"][1]["value"] in ("yes", "no") for e in json.loads(path.read_text()))
    back, asked = read_vhs(path, folder/"images", seed=5), [(h, q) for h in made for q in h.questions]
    assert len(back) == len(asked)
    for b, (h, q) in zip(back, asked):
        old = [int(p.stem) for p in b.images]
        assert sorted(old) == list(range(n)) and all(p.parent.name == h.id for p in b.images)
        assert b.questions[0] == Question(q.anchor, q.target, q.kind, q.answer, b.questions[0].needles) and sorted(old[i] for i in b.questions[0].needles) == list(q.needles)
        assert all(b.image(i).tobytes() == h.image(k, 28).tobytes() for i, k in enumerate(old))

def test_export_of_vhs_haystacks(tmp_path, root):
    "Haystacks from files go out again with their words and pictures."
    h = read_vhs(write(tmp_path, ENTRY), root)[0]
    folder = export_vhs([h], tmp_path/"out")
    again = read_vhs(folder/"VHs_qa/single_needle/visual_haystack_3.json", folder/"images", needle_at=h.questions[0].needles[0])[0]
    assert again.questions == h.questions and again.id == h.id and all(again.image(i).tobytes() == h.image(i).tobytes() for i in range(3))

@pytest.mark.parametrize("stacks, part", [
    ([], "no haystacks"), ([picture_haystack(0, 2)]*2, "same id"), ([Haystack((), (), "a")], "0 images"), ([Haystack((Scene(("dog",), 0),), (), "a")], "0 questions"), ([Haystack((Scene(("dog",), 0),), (), "../a")], "'../a'"),
    ([Haystack((Scene(("dog",), 0),), (Question("dog", "", "list", "a cup", (0,)),), "a")], "yes or no")])
def test_unfit_haystacks_are_not_exported(tmp_path, stacks, part):
    with refused(ValueError, part): export_vhs(stacks, tmp_path/"out")
    assert not list(tmp_path.iterdir())

def test_export_is_all_or_nothing(tmp_path, root):
    good, bad = picture_haystack(0, 2), Haystack((root/"gone.jpg",), (Question("dog", "cup", "single", True, (0,)),), "bad")
    before = sorted(tmp_path.rglob("*"))
    with refused(FileNotFoundError, "gone.jpg"): export_vhs([good, bad], tmp_path/"out")
    assert sorted(tmp_path.rglob("*")) == before
    with refused(ValueError, root, "exists"): export_vhs([good], root)


# the dataset

def test_dataset_rows_are_the_haystacks(tmp_path, root):
    stacks = [picture_haystack(0, 3), picture_haystack(1, 5, kind="multi", split="test"), *read_vhs(write(tmp_path, ENTRY), root),
              Haystack((Scene(("dog", "cup"), 3),), (Question("dog", "", "list", "a cup", (0,)),), "list")]
    data = haystack_dataset(stacks)
    assert data.column_names == ["id", "n_images", "images", "questions"] and [row_haystack(r) for r in data] == stacks
    assert data[0]["questions"][0]["text"] == stacks[0].questions[0].text and data[2]["images"][0]["path"] == str(stacks[2].images[0])

def test_picks_are_made_when_read():
    picks = [dict(seed=0, n_images=3), dict(seed=1, n_images=4, kind="multi"), dict(seed=2, n_images=2, split="test", n_questions=1)]
    data = haystack_dataset(picks)
    assert [row_haystack(r) for r in data] == [picture_haystack(**p) for p in picks]
    assert [r["id"] for r in data.select([2, 0])] == ["test-single-2-2", "train-single-3-0"] and data[1:]["n_images"] == [4, 2]
    assert data.with_format(None).column_names == ["seed", "n_images", "n_questions", "split", "kind"]

def test_unfit_picks():
    with refused(ValueError, "no haystacks"): haystack_dataset([])
    with refused(ValueError, "pick 0", "'sizes'"): haystack_dataset([dict(seed=0, sizes=3)])
    with refused(TypeError, "pick 0", "n_images"): haystack_dataset([dict(seed=0)])


# --- without labels -----------------------------------------------------------
def test_the_reply_of_nobody_is_a_fair_coin_that_does_not_change():
    asks = [Question(a, t, "single", None, (i,)) for a in OBJECTS[:10] for t in OBJECTS[10:30] for i in range(5)]
    yes = sum(q.reply == "Yes" for q in asks)
    assert abs(yes/len(asks) - .5) < 4*.5/len(asks)**.5
    done = subprocess.run([sys.executable, "-c", "from laid_nb.haystack import Question; print(*(Question('dog', 'cup', 'single', None, (i,)).reply for i in range(20)))"],
                          capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert done.stdout.split() == [Question("dog", "cup", "single", None, (i,)).reply for i in range(20)], done.stderr


def test_what_nobody_answered_is_not_scored_or_exported(tmp_path):
    bare = unlabelled([picture_haystack(0, 3)])
    with pytest.raises(ValueError, match="not answered by yes or no"): export_vhs(bare, tmp_path/"out")
    with pytest.raises(ValueError, match="cannot stay unlabelled"): Question("dog", "", "list", None, (0,))


