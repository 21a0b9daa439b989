"""The open questions' experiments: what they measure is right, and they run."""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent/"experiments"
sys.path.insert(0, str(FOLDER))

import common
import features
import leakage
import retrieval
from laid_nb.evaluate import ask
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import encode, read_positions


@pytest.fixture(scope="module")
def student(): return common.load("student")


@pytest.fixture
def work(tmp_path, monkeypatch): monkeypatch.setattr(common, "WORK", tmp_path)


def test_reading_features_by_position_answers_as_reading_pictures(student, work):
    model, processor = student
    h = picture_haystack(3, 9, 6, "val")
    said = retrieval.answers(model, processor, features.embed(model, processor, h)[None], features.tails(processor, h))
    log_p, _ = ask(model, processor, h)
    torch.testing.assert_close(said, log_p[:, 0] - log_p[:, 1], rtol=0, atol=5e-3)  # features are kept in half precision


def test_positions_are_those_of_the_model(student):
    model, processor = student
    inputs = encode(processor, picture_haystack(0, 7, 1), [0])
    whole = read_positions(model, inputs)[:, 0]
    opening = int((inputs["input_ids"][0] == model.config.vision_start_token_id).nonzero()[0])
    assert torch.equal(features.positions(opening, 7), whole[:, :opening + 6*7 + 1])


def test_scores_are_those_of_eager_attention(student, work):
    model, processor = student
    h = picture_haystack(4, 8, 3, "val")
    x, words = features.embed(model, processor, h), features.tails(processor, h)
    opening = features.read(model, processor, x[None]).length - 6*8
    scores = retrieval.chunk_scores(model, processor, x, words, 8, None)
    whole = encode(processor, h, [1], answers=False)
    whole = {k: whole[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
    model.set_attn_implementation({"text_config": "eager"})
    try: weights = model(**whole, output_attentions=True).attentions
    finally: model.set_attn_implementation({"text_config": "sdpa"})
    for layer, head, row in ((0, 0, 5), (1, 1, 5), (2, 0, 3)):
        line = weights[layer][0, head, opening + 6*8 + row].detach()
        images = torch.stack([line[opening + 6*i + 1:opening + 6*i + 5].sum() for i in range(8)])
        text = line[:opening].sum() + line[opening + 6*8:].sum()
        torch.testing.assert_close(scores["share"][1, layer, head, row].exp(), images, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(scores["contrast"][1, layer, head, row].exp(), images/text, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(scores["logits"][1, layer, head, row].softmax(0), images/images.sum(), rtol=2e-3, atol=1e-5)


def test_one_head_is_scored_as_all_heads_are(student, work):
    model, processor = student
    h = picture_haystack(5, 11, 4, "val")
    x, words = features.embed(model, processor, h), features.tails(processor, h)
    every = retrieval.chunk_scores(model, processor, x, words, 4, None)  # chunks of 4, 4 and 3 images
    one = retrieval.chunk_scores(model, processor, x, words, 4, (1, 1, 5, "contrast"))
    assert one.shape == (4, 11)
    torch.testing.assert_close(one, every["contrast"][:, 1, 1, 5], rtol=1e-4, atol=1e-4)


def test_ranks_and_best_agree_with_sorting():
    scores, needles = torch.randn(6, 30), torch.randint(30, (6,))
    order = scores.argsort(-1, descending=True)
    rank = retrieval.ranks(scores, needles)
    for question in range(6):
        assert order[question].tolist().index(int(needles[question])) == rank[question]
        assert retrieval.best(scores, 4)[question].tolist() == sorted(order[question, :4].tolist())
    perfect = retrieval.with_needle(needles, 30, 5, 0)
    assert all(int(n) in row and len(set(row)) == 5 and row == sorted(row) for n, row in zip(needles, perfect.tolist()))


def test_tokens_read_are_those_of_a_prompt(student):
    model, processor = student
    h = picture_haystack(1, 20, 1, "test")
    prompt = encode(processor, h, [0], answers=False)["input_ids"].shape[1]
    n, pairs = retrieval.tokens(20, len(features.tails(processor, h)[0]))
    assert (n, pairs) == (prompt, sum(range(1, prompt + 1)))
    assert retrieval.tokens(1000, 17, 5)[1] < retrieval.tokens(1000, 17)[1]/10  # no token sees more than its chunk


def test_a_question_of_the_recall_task_follows_its_item():
    keys, values, item, positions = (x.numpy() for x in leakage.sequences(np.random.default_rng(0), 5, 12))
    assert (item.sum(1) == 12).all() and (np.diff(positions) > 0).all() and positions.max() < leakage.SPAN
    for k, v, is_item in zip(keys, values, item):
        said = {}
        for key, value, put in zip(k, v, is_item):
            if put: said[key] = value
            else: assert said[key] == value


def test_response_by_position_is_the_mean_over_pairs():
    model = leakage.build(16, 2, 64, 1e4, 0)
    batch = leakage.sequences(np.random.default_rng(0), 40, 16)
    found, positions = leakage.responses(model, batch), batch[3]
    with torch.no_grad(), leakage.capture(model, 1) as cache: leakage.states(model, batch)
    q, k = cache["q", 1].double(), cache["k", 1].double().repeat_interleave(2, 1)
    logits, apart = (q @ k.mT)/4, positions[:, :, None] - positions[:, None]
    for distance in (0, 1, 50, 383):
        pairs = apart == distance
        torch.testing.assert_close(found[1, :, distance], torch.stack([logits[:, h][pairs].mean() for h in range(4)]), rtol=1e-4, atol=1e-5)


def test_leaks_tell_lines_self_and_noise_apart():
    window = 385  # 384 without distance 0
    d = torch.arange(window, dtype=torch.float64)
    line, foreign = 2*math.pi*torch.tensor([10., 40.])/384, 2*math.pi*100/384
    lines = torch.cos(line[:, None]*d).sum(0)
    noise = .5*torch.randn(2, window, dtype=torch.float64)
    value = lambda halves, form: leakage.leaks(halves[:, None, None], line)[form][0][0]
    plain, spike = lines.expand(2, -1), lines + 20*(d == 0)
    assert value(plain, "apart") < 1e-3
    assert value(spike.expand(2, -1), "whole") > .3 and value(spike.expand(2, -1), "apart") < 1e-3
    assert value(plain + noise, "apart") > .08 and value(plain + noise, "clean") < .03
    mixed = plain + torch.cos(foreign*d) + noise  # a third of the power that is no noise lies off the lines
    assert abs(value(mixed, "clean") - 1/3) < .04
    assert leakage.leaks(noise[:, None, None], line)["clean"] == [[None]] or value(noise, "clean") > .5


def test_fit_finds_a_plane_and_predicts_what_was_left_out():
    points = [c | dict(seed=s) for c in leakage.grid() for s in (0, 1)]
    plane = lambda p: .3 + .1*math.log2(p["head_dim"]/32) - .05*math.log10(p["theta"]/1e4)
    found = leakage.fit(points, plane)
    estimate = {k: v["estimate"] for k, v in found["coefficients"].items()}
    assert found["error_left_out"] < 1e-9 < found["error_of_mean"] and found["n"] == 32
    assert all(abs(estimate[k] - v) < 1e-9 for k, v in dict(constant=.3, head_dim=.1, depth=0, width=0, theta=-.05).items())
    noise = {(*[p[f] for f in leakage.FACTORS], p["seed"]): x for p, x in zip(points, np.random.default_rng(0).normal(size=32))}
    guess = leakage.fit(points, lambda p: noise[(*[p[f] for f in leakage.FACTORS], p["seed"])])
    assert guess["error_left_out"] > guess["error_of_mean"]*.95  # nothing to predict


@pytest.mark.parametrize("name", ["leakage", "retrieval"])
def test_quick_run_writes_nothing_but_its_cache(name, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in common.RESULTS.iterdir()}
    done = subprocess.run([sys.executable, FOLDER/f"{name}.py", "--quick"], capture_output=True, text=True, env=os.environ | {"LAID_WORK": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout and {p: p.stat().st_mtime_ns for p in common.RESULTS.iterdir()} == before
