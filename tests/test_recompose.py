"""Pictures put together anew: pools, samples from pieces, and a training set of which a share is drawn again."""
import copy
import random
from dataclasses import replace

import pytest
import torch

from laid_nb.haystack import Haystack, Question, haystack_dataset, picture_haystack, row_haystack
from laid_nb.inputs import HaystackCollator, precompute
from laid_nb.recompose import PicturePool, PieceEncoder, Recomposed, _encoder, has_unlabelled, is_recomposed, unlabelled


def test_unlabelled_keeps_all_but_the_answer():
    h = picture_haystack(3, 5, kind="multi")
    bare, = unlabelled([h])
    assert (bare.images, bare.id) == (h.images, h.id)
    assert [(q.text, q.needles, q.answer) for q in bare.questions] == [(q.text, q.needles, None) for q in h.questions]
    assert row_haystack(haystack_dataset([bare])[0]) == bare


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_recomposed_haystacks_keep_question_and_needle(kind):
    sources = [picture_haystack(i, 3 + i % 8, kind=kind) for i in range(40)]
    shows, targets, pool = {}, {}, PicturePool(sources)
    for h in sources:
        for q in h.questions:
            key = q.anchor, q.kind, frozenset(h.images[n] for n in q.needles)
            targets.setdefault(key, set()).add(q.target)
            for n in q.needles: shows.setdefault(h.images[n], set()).add(q.anchor)
    kept = []
    for i in range(100):
        h = pool.haystack(3 + i % 8, 6, random.Random(i))
        assert len(set(h.images)) == len(h.images) == 3 + i % 8 and len(h.questions) == 6
        for q in h.questions:
            needles = frozenset(h.images[n] for n in q.needles)
            kept.append(q.target in targets[q.anchor, q.kind, needles])  # KeyError: not a question of the pool
            assert q.answer is None and q.target != q.anchor and not any(q.anchor in shows.get(image, ()) for image in h.images if image not in needles)
    assert 0 < sum(kept) < len(kept)


def test_a_quarter_of_the_known_questions_gets_another_target():
    sources = [picture_haystack(i, 3 + i % 8) for i in range(40)]
    known = {(q.anchor, q.target, *(h.images[n] for n in q.needles)) for h in sources for q in h.questions}
    pool = PicturePool(sources)
    made = [(h, q) for h in (pool.haystack(8, 4, random.Random(i)) for i in range(100)) for q in h.questions]
    assert abs(sum((q.anchor, q.target, *(h.images[n] for n in q.needles)) in known for h, q in made)/len(made) - .75) < .06


def test_a_pool_too_small_to_choose_still_serves():
    h = picture_haystack(0, 4, 12)
    made = PicturePool([h]).haystack(4, 12, random.Random(0))
    assert set(made.images) == set(h.images) and len(made.questions) == 12
    twice = [Haystack((image,), (Question("dog", target, "single", True, (0,)),)) for image, target in zip(h.images, ("cup", "fork"))]
    assert {q.anchor for q in PicturePool(twice).haystack(2, 3, random.Random(0)).questions} == {"dog"}  # both show a dog: no other choice
    with pytest.raises(ValueError, match="no 5"): PicturePool([h]).haystack(5, 1, random.Random(0))
    with pytest.raises(ValueError, match="asked about by yes or no"): PicturePool([replace(h, questions=(Question("dog", "", "list", "cup", (0,)),))])


def test_a_file_s_wording_stays_with_its_target():
    image = picture_haystack(0, 2).images
    asks = tuple(Question(a, t, "single", True, (i,), f"{a} {t}!") for i, (a, t) in enumerate((("dog", "cup"), ("cat", "fork"))))
    pool = PicturePool([Haystack(image, asks)])
    made = [q for i in range(20) for q in pool.haystack(2, 4, random.Random(i)).questions]
    assert {q.text for q in made} == {"dog cup!", "cat fork!", "For the image with the dog, is there a fork?", "For the image with the cat, is there a cup?"}


@pytest.mark.parametrize("known", [True, False])
def test_piece_encoder_is_precompute(processor, haystacks, pool, tiny, known):
    collate = HaystackCollator(processor, turns=2)
    made = PicturePool(haystacks).haystack(4, 3, random.Random(0)) if not known else replace(haystacks[5], images=haystacks[5].images[::-1] + haystacks[0].images)
    slow, = precompute([made], collate, tiny("student"), tiny("teacher"), progress=False)
    encode = _encoder(precompute(haystacks, collate, tiny("student"), tiny("teacher"), progress=False), collate)
    assert isinstance(encode, PieceEncoder)
    fast = encode(made)
    assert fast.keys() == slow.keys() and (fast["needles"], fast["haystack"]) == (slow["needles"], slow["haystack"]) and len(fast["needles"]) == 2
    for name in slow.keys() - {"needles", "haystack", "prompt"}:
        assert fast[name].dtype == slow[name].dtype
        torch.testing.assert_close(fast[name], slow[name], **{} if "features" in name else dict(rtol=0, atol=0))


def test_piece_encoder_neither_draws_nor_renders_nor_tokenises_again(processor, haystacks, pool, monkeypatch):
    encode_pieces, calls = PieceEncoder(pool, HaystackCollator(processor)), []
    encode_pieces(haystacks[0])
    for owner, name in ((type(processor), "__call__"), (type(processor), "apply_chat_template"), (type(processor.tokenizer), "__call__"), (type(haystacks[0]), "image")):
        monkeypatch.setattr(owner, name, lambda *a, name=name, **k: calls.append(name))
    again = encode_pieces(haystacks[0])
    assert not calls and torch.equal(again["input_ids"], pool[0]["input_ids"])


def test_a_template_that_counts_pictures_is_refused(processor, haystacks, tiny):
    counting = copy.deepcopy(processor)
    counting.chat_template = counting.chat_template.replace("<|vision_start|>", "dog{{ loop.index0 }}<|vision_start|>")
    assert counting.chat_template != processor.chat_template
    collate = HaystackCollator(counting)
    with pytest.raises(ValueError, match="cannot be put together from pieces"): PieceEncoder(precompute(haystacks[:2], collate, tiny("student"), progress=False), collate)


@pytest.mark.parametrize("data", ["pixels", "features"])
def test_recomposed_samples_depend_on_seed_epoch_and_index_alone(processor, haystacks, pool, data):
    source, collate = haystacks if data == "pixels" else pool, HaystackCollator(processor)
    stack = lambda s: s["haystack"] if isinstance(s, dict) else s
    read = lambda seed, epoch, order: {i: stack(made[i]) for made in [Recomposed(source, .5, collate, seed, lambda: epoch)] for i in order}
    first, n = read(0, 0, range(12)), len(source)
    assert first == read(0, 0, reversed(range(12))) and first != read(0, 1, range(12)) and first != read(1, 0, range(12))
    fresh = [i for i in range(n) if first[i] != haystacks[i]]
    assert 0 < len(fresh) < n and all([len(first[i].images), len(first[i].questions)] == [len(haystacks[i].images), 3] for i in range(n))
    assert all(q.answer is None for i in fresh for q in first[i].questions)


def test_the_share_is_that_of_what_is_put_together_anew(processor, haystacks):
    epoch = 0
    def anew(share):
        nonlocal epoch
        made, fresh = Recomposed(haystacks, share, HaystackCollator(processor), 0, lambda: epoch), 0
        for epoch in range(20): fresh += sum(is_recomposed(made[i]) for i in range(12))
        return fresh
    assert (anew(0), anew(1)) == (0, 240) and 30 < anew(.2) < 66  # 48 of 240, within three standard deviations


def test_a_picture_that_was_not_seen_is_named(processor, pool):
    with pytest.raises(ValueError, match="of haystack 'train-single-2-99' is in none of the samples"):
        PieceEncoder(pool, HaystackCollator(processor))(picture_haystack(99, 2))


def test_which_samples_have_an_unanswered_question(processor, haystacks, pool):
    h = haystacks[0]
    half = replace(h, questions=(h.questions[0], *unlabelled([h])[0].questions[1:]))
    assert has_unlabelled(half, 12) and not has_unlabelled(half, 1) and not has_unlabelled(h, 12)
    encode = PieceEncoder(pool, HaystackCollator(processor))
    assert has_unlabelled(encode(half), 12) and not has_unlabelled(pool[0], 12)


def test_contents_of_a_draw_stay():
    "What a seed puts together is part of a run: a change makes no two runs comparable."
    made = PicturePool([picture_haystack(i, 3 + i % 8) for i in range(40)]).haystack(3, 3, random.Random(0))
    assert [(q.anchor, q.target, q.needles) for q in made.questions] == [
        ("dog", "toothbrush", (2,)), ("dog", "truck", (2,)), ("zebra", "banana", (0,))]


def test_a_quarter_of_the_questions_is_swapped_where_nothing_else_is_said():
    pool = PicturePool([picture_haystack(i, 3 + i % 8) for i in range(40)])
    drawn = lambda *swap: [pool.haystack(8, 3, random.Random(seed), *swap).questions for seed in range(20)]
    assert drawn() == drawn(.25) and drawn(.25) != drawn(0)
