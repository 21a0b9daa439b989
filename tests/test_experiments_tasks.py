"""The tasks beside the needle: their answers are right, and cannot be told without reading the images."""
import functools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent/"experiments"))

import common
import drawn_tasks
import tasks
from drawn_tasks import CHANCE, FEWEST, MADE, TASKS, TURNS, task_haystack, task_test
from laid_nb.evaluate import answer_ids, ask
from laid_nb.haystack import drawn_training

QUESTIONS = 600
PLACES = [(kind, n) for kind in MADE for n in (FEWEST[kind], 5, 20)]


def places_of(haystack, name): return [i for i, scene in enumerate(haystack.images) if name in scene.objects]


def offered(question):
    "The names that may be answered."
    return [choice.removeprefix("a ") for choice in question.choices]


@functools.cache
def asked(kind, n): return [(h, q) for h in task_test([n], QUESTIONS, 1, "test", kind) for q in h.questions]


@pytest.mark.parametrize("kind, n", PLACES)
def test_the_answer_is_what_the_images_show(kind, n):
    for h, q in asked(kind, n)[:120]:
        assert len(h.images) == n and q.answer in q.choices and all(1 <= len(s.objects) <= 3 for s in h.images)
        if kind == "count":
            assert int(q.answer) == len(places_of(h, q.anchor)) == len(q.needles)
        elif kind == "order":
            assert q.answer == "a " + min(offered(q), key=lambda name: places_of(h, name)[0])
        else:
            needle, = places_of(h, q.anchor)
            assert [f"a {name}" for name in offered(q) if name in h.images[needle].objects] == [q.answer]


@pytest.mark.parametrize("kind, n", PLACES)
def test_guesses_that_do_not_look_for_the_needle_get_chance(kind, n):
    """By the place in the question, by how often a name stands in the haystack, by how full or how early its image is;
    of counts, by the number itself and by the answer before. (How early an image is, is the answer of order.)"""
    pairs = asked(kind, n)
    guesses = {f"choice {i}": [q.choices[i] for _, q in pairs] for i in range(len(pairs[0][1].choices))}
    guesses["the answer before"] = [q.choices[a.choices.index(a.answer)] for (_, a), (_, q) in zip(pairs, pairs[1:])]
    if kind != "count":
        assert {len(places_of(h, name)) for h, q in pairs for name in offered(q)} == {1}
        full = lambda h, name: len(h.images[places_of(h, name)[0]].objects)
        guesses["the fullest"] = ["a " + max(offered(q), key=lambda name: full(h, name)) for h, q in pairs]
    if kind == "choice":
        guesses["the first"] = ["a " + min(offered(q), key=lambda name: places_of(h, name)) for h, q in pairs]
    for name, made in guesses.items():
        answers = [q.answer for _, q in pairs][len(pairs) - len(made):]
        share = sum(map(str.__eq__, made, answers))/len(made)
        assert abs(share - CHANCE[kind]) < 4*(CHANCE[kind]*(1 - CHANCE[kind])/len(made))**.5, name


def test_a_haystack_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match="choice needs at least 4 images, not 3"): task_haystack(0, 3, 4, "val", "choice")


def test_all_tasks_come_by_turns_at_the_sizes_they_can_have():
    found = common.drawn("mixed", range(1, 6), 30*len(TURNS), 0)
    kinds = ["multi" if h.questions[0].kind in ("all", "any") else h.questions[0].kind for h in found]
    assert kinds == list(TURNS)*30 and {*TURNS} == {*TASKS}
    sizes = {kind: Counter(len(h.images) for k, h in zip(kinds, found) if k == kind) for kind in TASKS}
    assert {kind: min(some) for kind, some in sizes.items()} == FEWEST
    assert all(max(some) == 5 and max(some.values()) - min(some.values()) <= 2 for some in sizes.values())
    assert max(len(h.questions) for h in found) == drawn_tasks.TAUGHT < len(drawn_training([5], 1)[0].questions)


@pytest.mark.parametrize("kind", MADE)
def test_choices_are_scored_in_their_order(kind):
    model, processor = common.load("student")
    h = task_haystack(5, 6, 4, "val", kind)
    log_p, _ = ask(model, processor, h)
    assert log_p.shape == (len(h.questions), len(h.questions[0].choices)) and log_p.isfinite().all()
    if kind == "count":
        assert len({*answer_ids(processor.tokenizer, h.questions[0].choices)}) == 4


def test_all_starts_are_taught_the_same_from_a_training_of_the_same_seed():
    needles, taught = tasks.rows_of((0, 1), 3, 24, 3)
    runs = [run for some in taught.values() for run in some]
    assert all(run.settings == runs[0].settings and run.images == (1, 5) and run.kind == "mixed" for run in runs)
    assert not {"gain", "max_gap", "max_multiplicity", "recompose"} & runs[0].settings.keys()
    for who in tasks.STARTS:
        assert [run.start for run in taught[tasks.mixed(who)]] == needles[who]
        assert all(run.seed == run.start.seed for run in taught[tasks.mixed(who)])
    for who in tasks.AS_THEY_ARE:
        assert [(run.start, run.student) for run in taught[tasks.mixed(who)]] == [(None, who)]*2


def test_a_teacher_learns_from_what_its_own_tower_sees():
    run = common.Run("teacher", 0, dict(method="sft"), haystacks=len(TURNS), images=(4, 5), kind="mixed")
    width = {who: common.pool_of(replace(run, student=who))[0]["student_features"].shape[-1] for who in tasks.AS_THEY_ARE}
    assert width == {who: common.load(who)[0].config.text_config.hidden_size for who in tasks.AS_THEY_ARE}


def test_differences_of_trained_rows_are_paired_over_trainings():
    found = {"a": [{1: "11"}, {1: "10"}], "b": [{1: "10"}, {1: "00"}, {1: "11"}], "student": [{1: "00"}]}
    assert tasks.more(found, {1: [0, 0]}, "a", "b") == {"one": (.5, .5, .5)}
    assert tasks.more(found, {1: [0, 0]}, "a", "student")["one"][0] == .75
