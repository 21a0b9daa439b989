"The experiments' arithmetic against direct computations, and what a training may share with another."
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent/"experiments"))
import ablation
import again
import analysis
import common
import labels
import length
import repeat
import reproduce
import teachers
import training_free
from laid_nb.accuracy import wilson
from laid_nb.anchors import PAIR, Namer, _take_towers, anchor_config, anchor_model
from laid_nb.evaluate import ask
from laid_nb.haystack import picture_haystack
from laid_nb.inputs import question_text
from laid_nb.losses import TERMS
from laid_nb.parts import GainPart
from laid_nb.store import data_path, save_model

RATES = dict.fromkeys(reproduce.METHODS, 1e-3)


SIZES = (1, 20, 50, 100, 150)


@pytest.fixture(scope="module")
def said():
    rng = np.random.default_rng(0)
    def say(*share): return {s: "".join("01"[int(rng.random() < a)] for _ in range(120)) for s, a in zip(SIZES, share)}
    return {"teacher": [say(*[.95]*5)], "student": [say(.95, .85, .7, .6, .5)],
            "good": [say(.95, .9, .85, .8, .8) for _ in range(3)]}


@pytest.fixture(scope="module")
def results(said): return analysis.results_of(said, {s: np.repeat(np.arange(20), 6) for s in SIZES})


def test_accuracy_and_gap_are_direct_counts(results, said):
    share = lambda name, s: np.mean([[c == "1" for c in t[s]] for t in said[name]])
    assert results.accuracy["good"][2] == pytest.approx(share("good", 50))
    gap = (share("good", 100) - share("student", 100))/(share("teacher", 100) - share("student", 100))
    value, low, high = results.closed("good", 100)
    assert value == pytest.approx(gap) and low < value < high
    d, low, high = results.difference("good", "student", [50, 150])
    assert d == pytest.approx(np.mean([share("good", s) - share("student", s) for s in (50, 150)]))
    assert 0 < low < d < high


def test_table_has_a_line_for_each_model(results):
    lines = analysis.markdown(results, [1, 50, 150]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["teacher", "student", "good"]
    assert len({line.count("|") for line in lines}) == 1
    assert "| 150 | short | long | window | ratio |" in lines[0] and lines[3].endswith("| 1 |")
    assert lines[2].count("not measured: give more sizes") == 1


def test_summary_is_what_the_methods_say(results):
    found = json.loads(json.dumps(analysis.summary(results)))["good"]
    assert set(found["closed"]) == {"50", "100", "150"} and found["trainings"] == 3
    assert found["window"] == str(results.window("good")) and found["ratio"] == str(results.ratio("good"))
    assert found["accuracy"]["50"] == pytest.approx(results.accuracy["good"][2], abs=1e-4)
    low, high = wilson(results.models["good"].correct[0], 360)
    assert found["wilson"]["1"] == [round(float(low), 4), round(float(high), 4)]


def test_figure_has_the_bands_of_the_intervals(results):
    figure = analysis.plot_lines(results, {"a": ["teacher", "student"]})
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(results.interval("student", 150)[0])


# statistics of result files, again

@pytest.fixture(scope="module")
def table(): return again.Table()


def test_the_tables_file_holds_the_statistics_of_its_answers(table):
    found = table.results({name: table.models[name] for name in ("teacher", "student", "LAid")}, table.haystacks)
    wanted = {name: table.data["summary"][name] for name in ("teacher", "student", "LAid")}
    assert json.loads(json.dumps(analysis.summary(found))) == wanted


def test_the_haystacks_kept_with_the_answers_are_those_that_are_drawn(table):
    drawn = analysis.groups(common.tests((1, 50), common.QUESTIONS))
    for size, groups in drawn.items():
        kept = np.array(table.haystacks[size])
        assert (np.unique(kept, return_inverse=True)[1] == np.unique(groups, return_inverse=True)[1]).all()


def test_rows_without_answers_are_the_tables_only_where_they_agree(table):
    row = table.data["summary"]["SFT"]
    assert table.answers_of("SFT", row) == table.models["SFT"]
    assert table.answers_of("SFT", row | dict(trainings=1)) is None
    assert table.answers_of("KD", row) is None and table.answers_of(None, row) is None


@pytest.mark.parametrize("window, ratio, shown", [
    ("12 [8, 20]", "1.20 [0.80, 2.00]", ("12 [8, 20]", "1.20 [0.80, 2.00]")),
    ("≥150 [≥150, ≥150]", "≥4.95 [3.81, 6.38]", ("≥150 not measured: give more sizes", "≥4.95 [≥3.81, ≥6.38]")),
    ("≥150 [130, ≥150]", "≥4.95 [3.60, 6.32]", ("≥150 [130, ≥150]", "≥4.95 [3.60, ≥6.32]")),
    ("<1 [<1, 1.5]", "0.03 [0.03, 0.06]", ("<1 [<1, 1.5]", "0.03 [≤0.03, 0.06]"))])
def test_bounds_of_rows_without_answers_are_marked(window, ratio, shown):
    found = again.marked(dict(window=window, ratio=ratio, trainings=1))
    assert (found["window"], found["ratio"]) == shown and again.marked(found) == found


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
    alpha = run.settings | dict(alpha=1.0)
    changes = [dict(seed=1), dict(steps=9), dict(flipped=.1), dict(labels=False), dict(settings=alpha), dict(images=(2, 20))]
    assert len({run.id, *(replace(run, **change).id for change in changes)}) == 7
    on = replace(run, start=run)
    assert on.id != run.id and on.id != replace(run, start=replace(run, seed=1)).id
    assert on.id == replace(run, start=replace(run, name="another")).id


def test_a_training_goes_on_from_the_weights_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WORK", tmp_path)
    still = dict(method="sft", learning_rate=0.0)
    run = common.Run("SFT", 0, dict(method="sft", learning_rate=1e-3), haystacks=8, images=(1, 3), steps=2)
    weights = lambda r: common.load(r)[0].state_dict()
    common.train(replace(run, settings=still, start=run))  # trains the other one first
    first, on = weights(run), weights(replace(run, settings=still, start=run))
    assert all(torch.equal(x, on[name]) for name, x in first.items())
    assert any(not torch.equal(x, first[name]) for name, x in common.load("student")[0].state_dict().items())


def test_both_tasks_come_by_turns():
    found = common.drawn("both", range(1, 5), 9, 0)
    single = [all(q.kind == "single" for q in h.questions) for h in found]
    assert single == [True, False]*4 + [True]
    assert [len(h.images) for h in found[::2]] == [1, 2, 3, 4, 1] and min(len(h.images) for h in found[1::2]) == 2


def test_teachers_are_the_models_that_runs_name():
    run = common.Run("KD", 0, dict(method="kd"), student="near")
    assert common.anchor_of(run) is common.pair()["teacher"]
    assert common.anchor_of(replace(run, anchor="student")) is common.frozen("near")
    assert common.anchor_of(replace(run, anchor="small")) is common.frozen("small")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder of work with an untrained `foreign`, which sees as the student does."
    work, processor = tmp_path_factory.mktemp("work"), common.pair()["processor"]
    namer = Namer({name: anchor_config(name, processor.tokenizer) for name in PAIR})
    _take_towers(namer, data_path("anchors"))
    save_model(anchor_model("foreign", processor.tokenizer, namer), processor, work/"made/foreign")
    return work


def test_an_anchor_of_other_heads_teaches_by_distance_and_is_refused_by_dimension(made, monkeypatch):
    monkeypatch.setattr(common, "WORK", made)
    monkeypatch.setattr(common, "frozen", common.frozen.__wrapped__)
    rows = teachers.rows_of(("foreign",), (0,), 2, 8)
    (by_distance,), (kd,) = rows.values()
    assert (by_distance.anchor, kd.anchor) == ("foreign", "foreign") and kd.settings["method"] == "kd"
    weights = lambda model: {k: v for k, v in model.state_dict().items() if "visual." not in k}
    before, after = weights(common.load("student")[0]), weights(common.load(common.train(replace(by_distance, images=(1, 3))))[0])
    assert any(not torch.equal(x, after[k]) for k, x in before.items())
    with pytest.raises(ValueError, match="head dimensions differ: student 64, teacher 128"):
        common.train(replace(by_distance, images=(1, 3), settings=by_distance.settings | dict(lambda_laid=.3)))


def test_an_anchor_that_is_not_there_is_asked_of_the_recipe(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "WORK", tmp_path)
    asked = []
    monkeypatch.setattr(common, "make_anchors", lambda *args: asked.append(args))
    assert teachers.there(teachers.ANCHORS, train=False) == ("small", "near", "teacher", "student") and not asked
    folder = common.anchor_folder("medium")
    assert asked == [(tmp_path/"anchors-work", folder.parent, ["medium"], data_path("anchors"), common.pair()["device"])]
    assert "laid anchors --models medium" in capsys.readouterr().out
    monkeypatch.setattr(common, "WORK", made)
    assert common.anchor_folder("foreign").is_dir() and len(asked) == 1


def test_every_way_of_asking_has_a_colour():
    assert {*training_free.NAMES.values(), "numbered images"} <= analysis.COLOURS.keys()


def test_numbered_images_stand_in_the_prompt_and_are_questions_like_others(processor):
    haystack, made = picture_haystack(3, 3, 2, "val"), training_free.numbered(processor)
    text = question_text(made, haystack, 0)
    assert [text.count(f"Image {n}: <|vision_start|>") for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert "Image" not in question_text(processor, haystack, 0)
    model = common.frozen("student")
    asked = training_free.ask_numbered(model, processor, [haystack])
    alone = [ask(model, made, replace(haystack, questions=(q,)))[0][0] for q in haystack.questions]
    np.testing.assert_allclose([r["margin"] for r in asked], [(a[0] - a[1]).item() for a in alone], atol=1e-4)


def test_runs_have_the_names_under_which_the_table_knows_them():
    kept = json.loads((common.RESULTS/"reproduce.json").read_text(encoding="utf-8"))
    found = reproduce.runs(kept["search"]["chosen"], common.SEEDS, reproduce.STEPS, reproduce.HAYSTACKS)
    assert {name: [r.id for r in rs] for name, rs in found.items()} == kept["runs"]


def test_every_run_of_the_tables_is_a_valid_config(tmp_path):
    from transformers import HfArgumentParser

    from laid_nb.simulate import WindowSimulation
    from laid_nb.train import LaidConfig
    table = [rs[0] for rs in reproduce.runs(RATES, (0,), 300, 417).values()]
    table += [rs[0] for ways in labels.runs(RATES, 300, 417, (60,)).values() for rs in ways.values()]
    table += [rs[0] for rows in ablation.runs(RATES, 300, 417, (0,)).values() for rs in rows.values()]
    table += [rs[0] for ways in length.runs(RATES, 300, 417, 150).values() for rs in ways.values()]
    parser = HfArgumentParser((LaidConfig, WindowSimulation))
    for run in table: parser.parse_dict(dict(output_dir=str(tmp_path), use_cpu=True, report_to="none") | run.settings)
    assert len(table) > 60


def test_experiments_share_the_trainings_of_the_table():
    own = {r.id for rs in reproduce.runs(RATES, (0, 1, 2), 300, 417).values() for r in rs}
    full = [rs[0].id for rs in labels.runs(RATES, 300, 417, (60,))["417"].values()]
    assert set(full) <= own and {r.id for r in ablation.runs(RATES, 300, 417, (0,))["Eq. 8"]["full"]} <= own


def test_what_the_teacher_said_is_kept_and_changes_nothing(tmp_path, monkeypatch):
    "Two trainings that read the same batches: the second does not ask the teacher, and ends where one ends that does."
    monkeypatch.setattr(common, "WORK", tmp_path/"kept")
    pair = common.pair()
    how = dict(method="laid", learning_rate=1e-3, **common.SIMULATION)
    run = common.Run("LAid", 0, how, haystacks=8, images=(1, 3), steps=2)
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


def test_an_anchor_that_is_a_running_average_is_the_mean_of_the_students_that_were(tmp_path, monkeypatch):
    "After every step: the sum of the students before it, gain and all, by powers of what is kept."
    monkeypatch.setattr(common, "WORK", tmp_path)
    anchors, students, kept = [], [], common.RunningAverage.KEPT
    step = common.RunningAverage.training_step
    def watched(self, *inputs, **how):
        loss = step(self, *inputs, **how)
        weight = self.model.model.language_model.layers[0].self_attn.q_proj.weight.detach().double()
        gain = self.part(GainPart).gains["0"].by_dimension().double().detach()
        students.append(gain.reshape(-1, 1)*weight)
        anchors.append(self.teacher.model.language_model.layers[0].self_attn.q_proj.weight.double().clone())
        return loss
    monkeypatch.setattr(common.RunningAverage, "training_step", watched)
    how = dict(method="kd", gain=True, learning_rate=1e-2, mixing_learning_rate=.1, thin=-3.0)
    common.train(common.Run("KD", 0, how, haystacks=8, images=(1, 2), steps=3, labels=False, anchor="average"))
    start = students[0]  # no step has been made
    for n, anchor in enumerate(anchors, 1):
        wanted = kept**n*start + (1 - kept)*sum(kept**(n - i)*s for i, s in enumerate(students[:n], 1))
        assert (anchor - wanted).abs().max() < 1e-6
    assert (anchors[-1] - anchors[0]).abs().max() > 1e-5


def test_eq7_at_the_needle_counts_rows_of_questions_and_the_images_they_ask_about(tmp_path, monkeypatch):
    "The loss that is trained on against a direct sum over those rows alone."
    monkeypatch.setattr(common, "WORK", tmp_path)
    pairs, evidence = [], common.AtNeedle.evidence
    def watched(self, model, inputs):
        found = evidence(self, model, inputs)
        pairs.append((inputs, next(iter(found[1].values())), found[0].groups()))
        return found
    monkeypatch.setattr(common.AtNeedle, "evidence", watched)
    how = dict(method="laid", gain=True, learning_rate=1e-3)
    common.train(common.Run("LAid", 0, how, haystacks=8, images=(16, 18), steps=1, where="needle"))
    inputs, seen, groups = pairs[0]
    total = 0
    for x, rows in ((0, seen.turn >= 0), (1, torch.zeros_like(seen.turn, dtype=torch.bool))):
        for b, turns in enumerate(inputs["needles"] if x else ()):
            for image in {image for asked in turns for image in asked}: rows[b] |= groups[b] == image
        error = (seen.heads[x] - seen.heads[x + 2]).double().square().mean((1, 3))[rows]
        total = total + (error.mean()/seen.scales[x]).item()
    assert TERMS["laid"].loss(seen).item() == pytest.approx(total, rel=1e-5)
    assert seen.counts[1].sum() < (groups >= 0).sum()  # images that nobody asks about


def test_a_training_made_again_is_compared_with_its_own_answers():
    models = json.loads(data_path("results", "students.json").read_text())["models"]
    found = repeat.committed(models)
    for run, told in found:
        assert {str(size): text for size, text in told.items()} == models[run.student][run.name][run.seed]
    untrained = ("teacher", "student", *training_free.NAMES.values(), "numbered images")
    assert len(found) == sum(len(kept) for rows in models.values() for name, kept in rows.items() if name not in untrained)
    assert repeat.different({1: "1010", 5: "11"}, {1: "1001", 5: "11"}) == {1: 2, 5: 0}
    with pytest.raises(ValueError): repeat.different({1: "10"}, {1: "101"})


def test_trainings_are_not_compared_with_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(repeat, "WORK", tmp_path/"again")
    repeat.claim_folder()
    repeat.claim_folder()  # goes on
    (tmp_path/"other"/"models").mkdir(parents=True)
    monkeypatch.setattr(repeat, "WORK", tmp_path/"other")
    with pytest.raises(SystemExit, match="empty folder"): repeat.claim_folder()
