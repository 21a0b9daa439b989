"""The experiments' own code: what it reads is what the package reads, and its scripts run."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent/"experiments"
sys.path.insert(0, str(FOLDER))


def run_quick(*argv):
    "A script's output with --quick; its result files are as they were."
    results = FOLDER.parent/"data/results"
    before = {p: p.stat().st_mtime_ns for p in results.iterdir()}
    done = subprocess.run([sys.executable, FOLDER/argv[0], "--quick", *argv[1:]], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in results.iterdir()} == before
    return done.stdout


# why, heads

@pytest.fixture(scope="module")
def read_student():
    "(model, processor, haystack of 30 images with 12 questions, its prompt)"
    from asking import prompts
    from laid_nb.haystack import picture_haystack
    from laid_nb.store import load_model
    model, processor = load_model("student")
    haystack = picture_haystack(3, 30, 12, "val")
    return model, processor, haystack, prompts(model, processor, [haystack], {})[0]


def smaller(haystack, kept):
    "The haystack that holds only these images."
    place = {old: new for new, old in enumerate(kept.tolist())}
    return replace(haystack, images=tuple(haystack.images[i] for i in place), questions=tuple(replace(q, needles=tuple(place[i] for i in q.needles)) for q in haystack.questions))


@pytest.mark.parametrize("count", [30, 15])
def test_questions_read_in_one_pass_get_the_answers_of_questions_asked_alone(read_student, count):
    from asking import few, read
    from laid_nb.evaluate import ask
    model, processor, haystack, prompt = read_student
    kept = few(prompt, count)
    reading = read(model, processor, prompt, kept, torch.arange(count)*prompt.step, count*prompt.step)
    scores, _ = ask(model, processor, smaller(haystack, kept))
    right = torch.tensor([1. if q.answer else -1. for q in haystack.questions])
    torch.testing.assert_close(reading.margin, (scores[:, 0] - scores[:, 1])*right, atol=1e-4, rtol=1e-4)


def test_images_side_by_side_stand_where_the_model_itself_puts_them(read_student):
    import why
    from asking import few, read
    from laid_nb.inputs import encode, read_positions
    model, processor, haystack, prompt = read_student
    kept = few(prompt, 15)
    alone = read_positions(model, encode(processor, smaller(haystack, kept), [0], answers=False))[:, 0]
    even = read(model, processor, prompt, kept, *why.layout(kept, 30, 15, "even", prompt.step)).positions
    assert torch.equal(even[:, :alone.shape[1]], alone)  # the prompt of the first question comes first
    shifted = read(model, processor, prompt, kept, *why.layout(kept, 30, 30, "shifted", prompt.step))
    asks = shifted.turn >= 0
    assert torch.equal(shifted.positions[:, ~asks], even[:, ~asks]) and torch.equal(shifted.positions[:, asks], even[:, asks] + 15*prompt.step)
    left = read(model, processor, prompt, kept, *why.layout(kept, 30, 30, "left", prompt.step)).positions
    whole = read_positions(model, encode(processor, haystack, [0], answers=False))[:, 0]
    stays = torch.isin(prompt.image, kept) | (prompt.turn == 0) | (prompt.image + prompt.turn == -2)
    assert torch.equal(left[:, :alone.shape[1]], whole[:, stays[:whole.shape[1]]])


def test_smaller_haystacks_hold_the_needles_and_are_parts_of_larger_ones(read_student):
    from asking import few
    prompt = read_student[-1]
    sets = [set(few(prompt, n).tolist()) for n in (12, 20, 30)]
    assert set(prompt.needles.tolist()) <= sets[0] < sets[1] < sets[2] and [len(s) for s in sets] == [12, 20, 30]
    with pytest.raises(ValueError, match="11 images cannot hold 12 needles"): few(prompt, 11)


def test_row_weights_are_those_of_eager_attention(read_student):
    from asking import read, row_weights
    from laid_nb.inputs import OURS, encode
    from laid_nb.store import load_model
    model, processor, haystack, prompt = read_student
    reading = read(model, processor, prompt, torch.arange(30), torch.arange(30)*prompt.step, 30*prompt.step)
    eager, _ = load_model("student")
    eager.set_attn_implementation("eager")
    for question in (0, 7):
        inputs = {k: v for k, v in encode(processor, haystack, [question], answers=False).items() if k not in OURS}
        with torch.no_grad(): wanted = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0, :, -1]  # [layers, heads, tokens], of the row that answers
        weights, _ = row_weights(reading, reading.last[question:question + 1])
        sees = (reading.turn < 0) | (reading.turn == question)
        torch.testing.assert_close(weights[:, :, 0, sees].float(), wanted, atol=1e-4, rtol=1e-3)
        assert (weights[:, :, 0, ~sees] == 0).all()


def test_entropy_of_a_key_that_counts_several_times_is_that_of_as_many_keys():
    from asking import entropy
    logits, counts = torch.randn(5, 7, dtype=torch.float64), torch.tensor([1, 3, 1, 2, 1, 1, 4])
    repeated = torch.distributions.Categorical(logits=logits.repeat_interleave(counts, 1)).entropy()/counts.sum().log()
    bias = counts.double().log().expand(5, -1)
    torch.testing.assert_close(entropy((logits + bias).softmax(-1), bias), repeated)


def test_counted_distractors_weigh_what_is_asked_of_them(read_student):
    import why
    from asking import read
    model, processor, haystack, prompt = read_student
    place = torch.arange(30)*prompt.step, 30*prompt.step
    once, often = (why.look(read(model, processor, prompt, torch.arange(30), *place, times)) for times in (1., 5.))
    first = once["mass"][0], often["mass"][0]  # what goes into the first layer does not change with the count
    torch.testing.assert_close(once["edge"][0], often["edge"][0])
    assert (first[0] > first[1]).all()


def test_needle_by_head_is_the_activation_of_a_prompt_with_one_question(read_student):
    import heads
    from asking import read
    from laid_nb.capture import capture
    from laid_nb.inputs import OURS, encode, read_groups
    from laid_nb.spectra import key_activation
    model, processor, haystack, prompt = read_student
    found = heads.on_needle(read(model, processor, prompt, torch.arange(30), torch.arange(30)*prompt.step, 30*prompt.step))
    sample = encode(processor, haystack, [4], answers=False)
    needle, rows = read_groups(model, sample) == haystack.questions[4].needles[0], sample["turn"] >= 0
    with torch.no_grad(), capture(model) as cache: model(**{k: v for k, v in sample.items() if k not in OURS})
    wanted = torch.cat([key_activation(cache["q", l], cache["k", l], needle, rows, scaling=cache.scaling[l]) for l in cache.layers])
    torch.testing.assert_close(found[0, ..., 4], wanted, atol=1e-4, rtol=1e-3)


def test_shares_of_the_fall_add_up_to_it():
    import why
    rng = np.random.default_rng(0)
    right = {cell: (rng.random(48) < p).astype(float) for cell, p in zip(why.cells(), rng.random(len(why.cells())))}
    parts = why.compare(right, why.formulas())
    assert parts["position"]["value"] + parts["count"]["value"] == pytest.approx(parts["fall"]["value"], abs=2e-4)
    assert parts["fall"]["value"] == pytest.approx(right["20 over 20"].mean() - right["150 over 150"].mean(), abs=1e-4)
    assert all(p["interval"][0] <= p["value"] <= p["interval"][1] for p in parts.values())


def test_why_runs(): assert "by position" in run_quick("why.py", "--models", "student")

def test_heads_runs(): assert "key activation of the best head" in run_quick("heads.py", "--models", "student")


# art

def test_pictures_read_in_batches_are_what_the_stock_towers_make_of_them():
    import art
    from laid_nb.haystack import picture_haystack
    from laid_nb.inputs import precompute_prompts
    from laid_nb.store import load_model
    plain, look = picture_haystack(0, 3, 2, "val"), picture_haystack(0, 3, 2, "val", art="noto", background="texture")
    features = art.features_of(art.eyes("varied"), [plain], [look], art.prompts_as_taught([plain]))
    for role, found in features.items():
        model, processor = load_model(role)
        stock = precompute_prompts(art.with_tower(model, "varied"), processor, [look], progress=False)[look.id]
        assert stock.keys() == found[look.id].keys()
        for name, x in found[look.id].items():
            torch.testing.assert_close(x, stock[name], atol=1e-4, rtol=1e-4)
