"The experiments' arithmetic against direct computations, and what a training may share with another."
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent/"experiments"))
import ablation
import analysis
import common
import labels
import reproduce

from laid_nb.haystack import picture_haystack

RATES = dict.fromkeys(reproduce.METHODS, 1e-3)


@pytest.fixture
def results():
    rng = np.random.default_rng(0)
    groups = {s: np.repeat(np.arange(20), 6) for s in (1, 20, 50, 100, 150)}
    said = lambda share: {s: "".join("01"[int(rng.random() < a)] for _ in range(120)) for s, a in zip(groups, share)}
    return analysis.Results({"teacher": [said([.95]*5)], "student": [said([.95, .85, .7, .6, .5])], "good": [said([.95, .9, .85, .8, .8]) for _ in range(3)]}, groups)


def test_accuracy_and_gap_are_direct_counts(results):
    share = lambda name, s: np.mean([[c == "1" for c in t[s]] for t in results.models[name]])
    assert results.accuracy["good"][2] == pytest.approx(share("good", 50))
    gap = (share("good", 100) - share("student", 100))/(share("teacher", 100) - share("student", 100))
    value, low, high = results.closed("good", 100)
    assert value == pytest.approx(gap) and low < value < high
    d, low, high = results.difference("good", "student", [50, 150])
    assert d == pytest.approx(np.mean([share("good", s) - share("student", s) for s in (50, 150)])) and 0 < low < d < high


def test_window_is_evaluates(results):
    from laid_nb.accuracy import HALF, effective_window
    correct = [results.models["student"][0][s].count("1") for s in results.sizes]
    assert results.window("student").size == pytest.approx(effective_window(results.sizes, correct, [120]*5, HALF).size)
    assert results.ratio("student").value == 1 and results.ratio("student").low == results.ratio("student").high == 1  # the same redraws above and below
    assert results.window("teacher").censored and results.ratio("teacher").bound == "≥"


def test_table_has_a_line_for_each_model(results):
    lines = results.markdown([1, 50, 150]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["teacher", "student", "good"] and len({line.count("|") for line in lines}) == 1
    assert set(results.summary()["good"]["closed"]) == {50, 100, 150}


def test_groups_follow_the_order_of_the_answers():
    haystacks = [picture_haystack(0, 2, 2, "test"), picture_haystack(1, 2, 3, "test"), picture_haystack(0, 6, 4, "test")]
    found = analysis.groups(haystacks)
    assert found[2].tolist() == [0, 0, 1, 1, 1] and found[6].tolist() == [2]*4


@pytest.mark.parametrize("share, least, most", [(0, 0, 0), (.15, 10, 45), (1, 180, 180)])
def test_flipped_labels(share, least, most):
    before = [picture_haystack(s, 8, 12, "train") for s in range(15)]
    after = common.flip_labels(before, share, 0)
    pairs = [(a, b) for x, y in zip(before, after) for a, b in zip(x.questions, y.questions)]
    sizes = [len(h.questions) for h in before]
    assert sum(sizes) == len(pairs) >= 100
    changed = sum(a.answer != b.answer for a, b in pairs)
    assert least <= changed*180/len(pairs) <= most and all(replace(a, answer=b.answer) == b for a, b in pairs)


def test_equal_runs_have_one_name_and_unequal_ones_two():
    run = common.Run("LAid", 0, dict(method="laid", learning_rate=1e-3))
    assert run.id == common.Run("LAid", 0, dict(learning_rate=1e-3, method="laid")).id
    others = [replace(run, seed=1), replace(run, steps=9), replace(run, flipped=.1), replace(run, labels=False), replace(run, settings=run.settings | dict(alpha=1.0)), replace(run, images=(2, 20))]
    assert len({run.id, *(r.id for r in others)}) == 7


def test_every_run_of_the_tables_is_a_valid_config(tmp_path):
    from laid_nb.train import LaidConfig
    table = [rs[0] for rs in reproduce.runs(RATES, (0,), 300, 417).values()]
    table += [r for ways in labels.runs(RATES, 300, 417, (60,)).values() for r in ways.values()] + [rs[0] for rows in ablation.runs(RATES, 300, 417, (0,)).values() for rs in rows.values()]
    for run in table: LaidConfig(str(tmp_path), use_cpu=True, report_to="none", **run.settings)
    assert len(table) > 60


def test_experiments_share_the_trainings_of_the_table():
    own = {r.id for rs in reproduce.runs(RATES, (0, 1, 2), 300, 417).values() for r in rs}
    full = [r.id for r in labels.runs(RATES, 300, 417, (60,))["417"].values()]
    assert set(full) <= own and {r.id for r in ablation.runs(RATES, 300, 417, (0,))["Eq. 8"]["full"]} <= own


def test_what_the_teacher_said_is_kept_and_changes_nothing(tmp_path, monkeypatch):
    "Two trainings that read the same batches: the second does not ask the teacher, and ends where one ends that does."
    monkeypatch.setattr(common, "WORK", tmp_path/"kept")
    pair = common.pair()
    run = common.Run("LAid", 0, dict(method="laid", learning_rate=1e-3, **common.SIMULATION), haystacks=8, images=(1, 3), steps=2)
    asked = []
    hook = pair["teacher"].register_forward_pre_hook(lambda *_: asked.append(1))
    weights = lambda r: {k: v.clone() for k, v in common.load(common.train(r))[0].state_dict().items()}
    try:
        first = weights(run)
        once = len(asked)
        kd = replace(run, name="KD", settings=run.settings | dict(method="kd"))
        shared = weights(kd)
        assert once >= 2 and len(asked) == once
        monkeypatch.setattr(common, "WORK", tmp_path/"anew")
        fresh = weights(kd)
    finally: hook.remove()
    assert len(asked) > once and all(torch.equal(shared[k], fresh[k]) for k in fresh) and not all(torch.equal(shared[k], first[k]) for k in fresh)
