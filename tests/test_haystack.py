"Haystacks: scenes, questions, the proof that the needle is needed, the dataset, sets and fingerprints."
import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laid_nb.haystack import (
    ART,
    BACKGROUNDS,
    KINDS,
    OBJECTS,
    SPLITS,
    YES_NO,
    Haystack,
    Question,
    Scene,
    _multi_contents,
    drawn_test,
    drawn_training,
    haystack_dataset,
    haystack_fingerprint,
    picture_haystack,
    render,
    row_haystack,
    single_contents,
)
from laid_nb.store import data_path
from refusals import refused

LETTERS = ("A", "B", "C", "D")


# scenes and haystacks

def test_import_is_light():
    code = ("import sys, laid_nb.haystack; "
            "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""


def test_every_object_is_drawn():
    blank = [np.asarray(render(Scene((name,), 0))) for name in OBJECTS]
    assert len({b.tobytes() for b in blank}) == len(OBJECTS) == 67


@pytest.mark.parametrize("kind", KINDS)
def test_haystack_depends_on_all_its_arguments(kind):
    made = [picture_haystack(seed, n, split=split, kind=kind) for seed in (0, 1) for n in (6, 7) for split in SPLITS]
    assert len({h.id for h in made}) == len(made)
    for a, b in itertools.combinations(made, 2):
        assert [s.objects for s in a.images] != [s.objects for s in b.images]
        assert not {s.seed for s in a.images} & {s.seed for s in b.images}
    assert made[0] == picture_haystack(0, 6, split="train", kind=kind)


@pytest.mark.parametrize("kind, n", [("single", 1), ("single", 2), ("single", 4), ("single", 5), ("single", 13),
                                     ("single", 150), ("multi", 2), ("multi", 5), ("multi", 150)])
def test_questions_are_true(kind, n):
    for seed in range(3):
        h = picture_haystack(seed, n, kind=kind)
        anchors = {q.anchor for q in h.questions}
        assert len(h.questions) == (12 if kind == "single" else max(n//3, 1) if n < 36 else 12)
        for q in h.questions:
            assert q.needles == tuple(i for i, s in enumerate(h.images) if q.anchor in s.objects)  # nowhere else
            holds = [q.target in h.images[i].objects for i in q.needles]
            assert q.answer == {"single": all, "all": all, "any": any}[q.kind](holds) and q.target not in anchors
            assert len(q.needles) == 1 if kind == "single" else len(q.needles) in (2, 3)


def test_contents_of_a_seed_stay():
    "The embedded pair was trained on these contents: a change here changes every figure."
    contents, questions = single_contents(np.random.default_rng([0, 3, 0, 0]), 3, 2)
    assert contents == [("cell phone", "donut", "elephant"), ("apple", "elephant"), ("bear",)]
    assert [(q.anchor, q.target, q.answer, q.needles) for q in questions] == [
        ("cell phone", "donut", True, (0,)), ("apple", "banana", False, (1,))]


@pytest.mark.parametrize("arguments, error, part", [
    (dict(seed=0, n_images=0), ValueError, "n_images"),
    (dict(seed=0, n_images=3, n_questions=0), ValueError, "n_questions"),
    (dict(seed=-1, n_images=3), ValueError, "seed"),
    (dict(seed=0, n_images="3"), TypeError, "'3'"),
    (dict(seed=0, n_images=3, split="dev"), ValueError, "'dev'"),
    (dict(seed=0, n_images=3, kind="double"), ValueError, "'double'"),
    (dict(seed=0, n_images=1, kind="multi"), ValueError, "at least 2")])
def test_bad_picks(arguments, error, part):
    with refused(error, part): picture_haystack(**arguments)
    with refused(error, part, "pick 1"): haystack_dataset([dict(seed=0, n_images=3), arguments])


@pytest.mark.parametrize("objects, split, part", [
    ((), "train", "1 to 3"), (("dog",)*4, "train", "1 to 3"),
    (("dog", "unicorn"), "train", "'unicorn'"), (("dog",), "dev", "'dev'")])
def test_bad_scenes(objects, split, part):
    with refused(ValueError, part): Scene(objects, 0, split)


# other drawings and backgrounds

USUAL = {  # what is written of a scene -> hash of its pixels, from before there were other drawings
    "Scene(objects=('dog',), seed=1, split='train')": "fa05c92dad489734",
    "Scene(objects=('cup', 'tie'), seed=7, split='val')": "8795b7d89dd02fc6",
    "Scene(objects=('person', 'hot dog', 'kite'), seed=2147483647, split='test')": "e7d3a9f7eb33a5d3"}


@pytest.mark.parametrize("written", USUAL)
def test_scenes_are_those_from_before_there_were_other_drawings(written):
    "Every record, cache and figure of the project is of these pixels."
    scene = eval(written)
    assert repr(scene) == written and scene == Scene(scene.objects, scene.seed, scene.split, "fluent", "gradient")
    assert hashlib.sha256(render(scene).tobytes()).hexdigest()[:16] == USUAL[written]


def test_usual_haystacks_are_those_from_before_there_were_other_drawings():
    usual = picture_haystack(3, 4, 2, "val")
    assert usual.id == "val-single-4-3" and haystack_fingerprint(usual) == "53c6b9fbdb384645"
    assert haystack_dataset([usual])[0]["images"][0] == {
        "objects": ["airplane", "laptop"], "seed": 1526311112, "split": "val", "path": ""}
    assert usual == picture_haystack(3, 4, 2, "val", art="fluent", background="gradient")


def test_a_look_changes_nothing_but_the_pixels():
    "Objects keep their places: what covers the background is the same on every other."
    usual = picture_haystack(0, 5, 4, "test")
    stacks = [picture_haystack(0, 5, 4, "test", art=a, background=b) for a in ART for b in BACKGROUNDS]
    assert usual in stacks and len({h.id for h in stacks}) == len({haystack_fingerprint(h) for h in stacks}) == 25
    assert all(h.questions == usual.questions for h in stacks)
    assert all([(s.objects, s.seed) for s in h.images] == [(s.objects, s.seed) for s in usual.images] for h in stacks)
    assert len({h.image(0).tobytes() for h in stacks}) == 25
    for art in ART:
        drawn = [np.asarray(render(Scene(("stop sign",), 3, "val", art, b)), dtype=int) for b in BACKGROUNDS]
        same = np.all([np.abs(d - drawn[0]).max(-1) < 10 for d in drawn], 0)  # covered, but for what shines through
        assert .05 < same.mean() < .3


def test_backgrounds_are_what_they_are_called():
    def picture(background): return np.asarray(render(Scene(("dog",), 5, "val", background=background)), dtype=int)
    corner = {b: picture(b)[-14:] for b in BACKGROUNDS}  # below the dog
    assert np.ptp(corner["plain"].reshape(-1, 3), axis=0).max() == 0
    assert corner["dark"].max() <= 51 < corner["plain"].max()
    def rough(x): return np.abs(np.diff(x, axis=1)).mean()
    assert rough(corner["gradient"]) < min(rough(corner["texture"]), rough(corner["clutter"]))


@pytest.mark.parametrize("art", ART)
def test_every_set_has_every_object_and_its_licence(art):
    folder = data_path("objects", *([art] if art != ART[0] else []))
    drawn = {render(Scene((name,), 0, art=art)).tobytes() for name in OBJECTS}
    assert len(drawn) == len(OBJECTS) and "icen" in (folder/"LICENSE").read_text()
    assert len(list(folder.glob("*.png"))) == len(OBJECTS)


@pytest.mark.parametrize("look, part", [(dict(art="cubist"), "'cubist'"), (dict(background="sky"), "'sky'")])
def test_unknown_looks(look, part):
    for make in (lambda: Scene(("dog",), 0, **look), lambda: picture_haystack(0, 3, **look)):
        with refused(ValueError, part, "one of"): make()
    with refused(ValueError, "pick 0", part): haystack_dataset([dict(seed=0, n_images=3) | look])


def test_looks_are_kept_by_tables():
    varied, usual = picture_haystack(0, 3, art="noto", background="dark"), picture_haystack(1, 2)
    only_art = picture_haystack(2, 2, art="flat")
    files = Haystack((Path("a.jpg"),), usual.questions[:1], "file")
    stacks = [usual, varied, only_art, files]
    assert [row_haystack(r) for r in haystack_dataset(stacks)] == stacks
    picks = [dict(seed=0, n_images=3), dict(seed=0, n_images=3, art="twemoji")]
    assert [row_haystack(r) for r in haystack_dataset(picks)] == [picture_haystack(**p) for p in picks]
    assert drawn_test([2], 4, 1, "val", art="openmoji")[0] == picture_haystack(100_000, 2, 2, "val", art="openmoji")


def test_unreadable_images(tmp_path):
    (tmp_path/"text.png").write_text("no picture")
    render(Scene(("dog",), 0)).save(tmp_path/"whole.png")
    (tmp_path/"cut.png").write_bytes((tmp_path/"whole.png").read_bytes()[:-900])
    h = Haystack(tuple(tmp_path/n for n in ("text.png", "cut.png", "gone.png", "whole.png")), ())
    with refused(ValueError, "text.png"): h.image(0)
    with refused(ValueError, "cut.png"): h.image(1)
    with refused(FileNotFoundError, "gone.png"): h.image(2)
    assert h.image(3).mode == "RGB" and h.image(3).size == (56, 56)


# choices

def choice(answer="a cup", choices=("a cup", "a tie", "a bus"), wording="What is there?"):
    return Question("dog", "", "choice", answer, (0,), wording, choices)


def test_reply_is_the_choice():
    assert [choice(answer).reply for answer in ("a cup", "a bus")] == ["a cup", "a bus"]
    assert choice("B", LETTERS).reply == "B"
    assert Question("dog", "cup", "single", False, (0,)).choices == YES_NO


@pytest.mark.parametrize("arguments, parts", [
    (dict(answer="a cat"), ["'a cat'", "not one of its choices"]),
    (dict(answer=True), ["True"]),
    (dict(choices=("a cup",)), ["at least two"]),
    (dict(choices=("a cup", "a cup")), ["all different"]),
    (dict(choices=("a cup", "")), ["tuple of texts"]),
    (dict(choices=["a cup", "a tie"]), ["tuple of texts"]),
    (dict(wording=""), ["'choice'", "needs its wording"])])
def test_bad_choices(arguments, parts):
    with refused(ValueError, *parts): choice(**arguments)


def test_a_free_question_is_answered_by_a_text():
    free = choice("A dog runs.", choices=())
    assert free.reply == "A dog runs." and row_haystack(haystack_dataset([Haystack((), (free,))])[0]).questions == (free,)
    for answer in (None, True, " "):
        with refused(ValueError, repr(answer), "not a text"): choice(answer, choices=())


def test_yes_and_no_are_true_and_false():
    with refused(ValueError, "'yes'", "True (yes)"): Question("dog", "cup", "single", "yes", (0,))


def test_a_list_question_needs_its_answer():
    with refused(ValueError, "cannot stay unlabelled"): Question("dog", "", "list", None, (0,))


def coins(n, **more):
    return [Question(a, t, "single", None, (i,), **more).reply
            for a in OBJECTS[:10] for t in OBJECTS[10:30] for i in range(n)]


def test_the_reply_of_nobody_is_a_fair_coin_that_does_not_change():
    asks = coins(5)
    assert abs(asks.count("Yes")/len(asks) - .5) < 4*.5/len(asks)**.5
    code = ("from laid_nb.haystack import Question; "
            "print(*(Question('dog', 'cup', 'single', None, (i,)).reply for i in range(20)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONHASHSEED": "7"})
    said = "Yes Yes No No Yes No No Yes Yes Yes No No Yes Yes Yes Yes No Yes Yes Yes"  # before there were choices
    assert done.stdout.split() == said.split(), done.stderr


def test_the_coin_has_as_many_sides_as_choices():
    asks = coins(10, choices=LETTERS)
    assert asks == coins(10, choices=LETTERS)
    for letter in LETTERS: assert abs(asks.count(letter)/len(asks) - .25) < 4*(.25*.75/len(asks))**.5


# the needle is needed

def pairs(kind, n, wanted):
    "Independent pairs of contents and question."
    rng, found = np.random.default_rng([7, n, KINDS.index(kind)]), []
    while len(found) < wanted:
        contents, questions = (single_contents if kind == "single" else _multi_contents)(rng, n, 12)
        found += [(contents, q) for q in (questions if n >= 50 else [questions[len(found) % len(questions)]])]
    return found


def features(contents, q):
    "What a reader without the needle can know: the words, where which distractor shows the target, how full it is."
    rest = [c for i, c in enumerate(contents) if i not in q.needles]
    hits = np.array([q.target in c for c in rest] or [False], dtype=float)
    words = np.zeros(2*len(OBJECTS))
    words[[OBJECTS.index(q.anchor), len(OBJECTS) + OBJECTS.index(q.target)]] = 1
    beside = [[j for j in (i - 1, i + 1) if 0 <= j < len(contents) and j not in q.needles] for i in q.needles[:1]]
    near = [float(any(q.target in contents[j] for j in places)) for places in beside]
    return [1, hits.sum(), hits.mean(), hits.any(), hits[0], hits[-1], *near,
            np.mean([len(c) for c in rest] or [0]), len(q.needles), q.kind == "all", *words]


def ridge(x, y):
    "Weights fitted to the first 300 rows."
    return np.linalg.solve(x[:300].T @ x[:300] + 3*np.eye(x.shape[1]), x[:300].T @ y[:300])


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_without_the_needle_scores_half(kind):
    "Ridge regression on words and distractors, by size; all sizes together within Wilson's 95% interval of one half."
    from laid_nb.accuracy import wilson
    right = total = yes = asked = 0
    for n in (1, 2, 5, 20, 60)[kind == "multi":]:
        found = pairs(kind, n, 600)
        x = np.array([features(*p) for p in found], dtype=float)
        y = np.array([1. if q.answer else -1. for _, q in found])
        right += int(((x[300:] @ ridge(x, y) > 0) == (y[300:] > 0)).sum())
        yes += int((y > 0).sum())
        total, asked = total + 300, asked + len(y)
    for k, n in ((right, total), (yes, asked)):  # the score, and the balance of yes and no
        low, high = wilson(k, n)
        assert low < .5 < high


def test_the_classifier_finds_a_leak_that_is_there():
    "The same classifier, shown the needle's target too, scores far above one half: the test above can fail."
    found = pairs("single", 5, 600)
    x = np.array([features(c, q) + [sum(q.target in o for o in c)] for c, q in found], dtype=float)
    y = np.array([1. if q.answer else -1. for _, q in found])
    assert ((x[300:] @ ridge(x, y) > 0) == (y[300:] > 0)).mean() > .6


@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_as_full_for_yes_as_for_no(kind):
    "The number of objects in the needles does not tell the answer."
    found = pairs(kind, 50, 1500)
    for k in ("single",) if kind == "single" else ("all", "any"):
        yes, no = ([np.mean([len(c[i]) for i in q.needles]) for c, q in found if (q.answer, q.kind) == (answer, k)]
                   for answer in (True, False))
        assert abs(np.mean(yes) - np.mean(no)) < 3*np.sqrt(np.var(yes)/len(yes) + np.var(no)/len(no))


# the dataset

FROM_FILE = Haystack((Path("coco/a.jpg"), Path("coco/b.jpg")),
                     (Question("dog", "cup", "single", True, (1,), "With a dog, is there a cup?"),), "file/0")
LISTED = Haystack((Scene(("dog", "cup"), 3),), (Question("dog", "", "list", "a cup", (0,)),), "list")
CHOSEN = Haystack((Scene(("dog", "cup"), 3),), (choice(), choice("B", LETTERS, "Which?"), choice(None)), "choices")


def test_dataset_rows_are_the_haystacks():
    stacks = [picture_haystack(0, 3), picture_haystack(1, 5, kind="multi", split="test"), FROM_FILE, LISTED, CHOSEN]
    data = haystack_dataset(stacks)
    assert data.column_names == ["id", "n_images", "images", "questions"] and [row_haystack(r) for r in data] == stacks
    assert data[0]["questions"][0]["text"] == stacks[0].questions[0].text
    assert data[2]["images"][0]["path"] == str(stacks[2].images[0])


def test_rows_from_before_there_were_choices():
    row = haystack_dataset([picture_haystack(0, 3)])[0]
    old = row | {"questions": [{k: v for k, v in q.items() if k != "choices"} for q in row["questions"]]}
    assert row_haystack(old) == picture_haystack(0, 3)


def test_unlabelled_rows():
    bare = replace(CHOSEN, questions=tuple(replace(q, answer=None) for q in CHOSEN.questions))
    assert row_haystack(haystack_dataset([bare])[0]) == bare


def test_picks_are_made_when_read():
    picks = [dict(seed=0, n_images=3), dict(seed=1, n_images=4, kind="multi"),
             dict(seed=2, n_images=2, split="test", n_questions=1)]
    data = haystack_dataset(picks)
    assert [row_haystack(r) for r in data] == [picture_haystack(**p) for p in picks]
    assert [r["id"] for r in data.select([2, 0])] == ["test-single-2-2", "train-single-3-0"]
    assert data[1:]["n_images"] == [4, 2]
    assert data.with_format(None).column_names == ["seed", "n_images", "n_questions", "split", "kind"]


def test_unfit_picks():
    with refused(ValueError, "no haystacks"): haystack_dataset([])
    with refused(ValueError, "pick 0", "'sizes'"): haystack_dataset([dict(seed=0, sizes=3)])
    with refused(TypeError, "pick 0", "n_images"): haystack_dataset([dict(seed=0)])


# sets

@pytest.mark.parametrize("kind", KINDS)
def test_as_many_questions_at_every_size(kind):
    sizes = (1, 2, 5, 30)[kind == "multi":]
    tests = drawn_test(sizes, 31, seed=2, split="val", kind=kind)
    assert {n: sum(len(h.questions) for h in tests if len(h.images) == n) for n in sizes} == dict.fromkeys(sizes, 31)
    assert tests[0] == picture_haystack(200_000, sizes[0], 2, "val", kind) and len({h.id for h in tests}) == len(tests)


def test_training_takes_sizes_in_turn():
    assert drawn_training([4, 9], 3, seed=1) == [picture_haystack(100_000 + i, n) for i, n in enumerate((4, 9, 4))]


# fingerprints

def test_fingerprints_of_drawn_haystacks_are_those_from_before_there_were_choices():
    "Records and read-outs are resumed by them."
    bare = picture_haystack(0, 2, 2)
    bare = replace(bare, questions=tuple(replace(q, answer=None) for q in bare.questions))
    stacks = picture_haystack(0, 6, 5, split="test"), picture_haystack(3, 9, kind="multi"), bare
    assert [haystack_fingerprint(h) for h in stacks] == [
        "5419ce72a8425daa", "82489de2c72d40de", "2a0397836c990877"]


def test_a_fingerprint_is_of_contents_not_of_names(tmp_path):
    files = [tmp_path/name for name in ("a.png", "b/a.png", "c.png")]
    (tmp_path/"b").mkdir()
    for seed, file in zip((0, 1, 0), files): render(Scene(("dog",), seed)).save(file)
    one, other, copy = (haystack_fingerprint(Haystack((file,), (choice(),))) for file in files)
    assert one == copy != other
    files[2].write_bytes(files[1].read_bytes())
    assert haystack_fingerprint(Haystack((files[2],), (choice(),))) == other


def test_a_system_turn_is_a_part_of_the_fingerprint_and_of_the_row():
    plain, told = CHOSEN, replace(CHOSEN, system="Answer briefly.")
    assert haystack_fingerprint(plain) != haystack_fingerprint(told)
    assert [row_haystack(r) for r in haystack_dataset([plain, told])] == [plain, told]


def test_a_fingerprint_depends_on_what_is_asked():
    q = CHOSEN.questions[0]
    asked = [q, choice("a tie"), choice(choices=q.choices[::-1]), choice(wording="What?"), replace(q, needles=(1,))]
    stacks = [replace(CHOSEN, questions=(q,)) for q in asked] + [replace(CHOSEN, images=(Scene(("dog", "cup"), 4),))]
    assert len({haystack_fingerprint(h) for h in stacks}) == len(stacks)
