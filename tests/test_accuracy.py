"Statistics against direct computations: accuracies, windows, ratios, gaps and what is printed of them."
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from laid_nb.accuracy import (
    HALF,
    PAPER,
    UNMEASURED,
    Results,
    by_depth,
    by_size,
    count,
    from_bits,
    half_way,
    interval,
    mean_relative_gain,
    numbers,
    plot_accuracy,
    plot_depth,
    redraws,
    table_cells,
    table_markdown,
    table_text,
    wilson,
    windows_markdown,
)

SIZES = (1, 10, 100)


def counted(*accuracy, sizes=SIZES, questions=1000):
    return count(sizes, np.array(accuracy)*questions, np.full(len(sizes), questions))


def only(*accuracy, samples=400, **how):
    return Results({"a": counted(*accuracy, **how)}, samples=samples)


def drawn(share, trainings=1, haystacks=30, questions=12, spread=.0, seed=0, sizes=SIZES):
    "Answers of trainings that differ: each is better or worse than the others at all sizes alike."
    rng = np.random.default_rng(seed)
    shifts = rng.normal(0, spread, trainings)
    groups = {s: np.repeat(np.arange(haystacks), questions) for s in sizes}
    def say(shift, a): return "".join("01"[int(x)] for x in rng.random(haystacks*questions) < a + shift)
    return from_bits([{s: say(shift, a) for s, a in zip(sizes, share)} for shift in shifts], groups)


# ---------------------------------------------------------------- Wilson

@pytest.mark.parametrize("confidence", [.8, .95, .99])
def test_wilson_is_scipys(confidence):
    k, n = np.array([0, 1, 7, 50, 99, 100]), np.array([1, 3, 7, 100, 100, 100])
    reference = [binomtest(int(a), int(b)).proportion_ci(confidence, "wilson") for a, b in zip(k, n)]
    low, high = wilson(k, n, confidence)
    np.testing.assert_allclose(low, [r.low for r in reference], atol=1e-12)
    np.testing.assert_allclose(high, [r.high for r in reference], atol=1e-12)


def test_wilson_by_hand():
    "Centre (k + z²/2)/(n + z²), half width z/(n + z²) sqrt(k(n - k)/n + z²/4)."
    k, n, z = 37, 50, 1.959963984540054
    centre, half = (k + z*z/2)/(n + z*z), z/(n + z*z)*math.sqrt(k*(n - k)/n + z*z/4)
    np.testing.assert_allclose([float(x) for x in wilson(k, n)], [centre - half, centre + half])


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5), ([1, 9], [5, 5])])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"): wilson(k, n)


# ---------------------------------------------------------------- counts

def test_counts_by_size_and_depth():
    records = [dict(size=n, haystack=f"h{n}", question=i, needles=[i], correct=i < n/2)
               for n in (1, 4, 10) for i in range(n)]
    c = by_size(records)
    assert c.sizes.tolist() == [1, 4, 10] and c.correct.tolist() == [1, 2, 5] and c.total.tolist() == [1, 4, 10]
    more = dict(size=4, haystack="m", question=0, needles=[0, 1], correct=True)
    sizes, correct, total = by_depth(records + [more], bins=5)
    assert total.tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2], [0, 1, 2]]
    assert correct[:, 2].tolist() == [2, 2, 1, 0, 0]
    with pytest.raises(ValueError, match="compliant"): by_size(records, key="compliant")
    with pytest.raises(ValueError, match="depth"): by_depth([more])


def test_trainings_must_have_been_asked_the_same():
    records = [dict(size=3, haystack=h, question=0, correct=True) for h in "ab"]
    assert by_size(records, records).right[0].tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="same questions"): by_size(records, records[::-1])


def test_texts_of_bits_are_the_same_answers_as_records():
    rng = np.random.default_rng(0)
    records = [dict(size=n, haystack=f"{n}-{h}", question=t, correct=bool(rng.random() < .7))
               for n in (1, 5) for h in range(4) for t in range(3)]
    texts = {n: "".join(str(int(r["correct"])) for r in records if r["size"] == n) for n in (1, 5)}
    groups = {n: [r["haystack"] for r in records if r["size"] == n] for n in (1, 5)}
    a, b = by_size(records), from_bits([texts], groups)
    assert [x.tolist() for x in a.right] == [x.tolist() for x in b.right] and a.asked[0].tolist() == [3]*4
    np.testing.assert_array_equal(redraws(a, 50), redraws(b, 50))
    with pytest.raises(ValueError, match="size 5: .11. answers to 12"): from_bits([texts | {5: texts[5][1:]}], groups)


@pytest.mark.parametrize("sizes, correct, total, word", [
    ([1, 1], [1, 1], [2, 2], "increasing"), ([0, 1], [1, 1], [2, 2], "positive"), ([], [], [], "increasing"),
    ([1, 2], [1], [2, 2], "one count"), ([1, 2], [1, 3], [2, 2], "correct <= total"),
    ([1, 2], [0, 0], [2, 0], "total >= 1")])
def test_impossible_counts_are_refused(sizes, correct, total, word):
    with pytest.raises(ValueError, match=word): count(sizes, correct, total)


def test_models_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match=r"b was measured at \[1, 5\] images, a at \[1, 10, 100\]"):
        Results({"a": counted(.9, .9, .9), "b": counted(.9, .9, sizes=(1, 5))})


def test_models_are_compared_only_where_they_were_asked_the_same():
    records = [dict(size=3, haystack=h, fingerprint="f", question=0, correct=True) for h in "ab"]
    a = by_size(records)
    assert Results({"a": a, "b": by_size(records)}).sizes.tolist() == [3]
    for other in ([r | {"haystack": "c" + r["haystack"]} for r in records], [r | {"fingerprint": "g"} for r in records],
                  [*records, records[0] | {"question": 1}]):
        with pytest.raises(ValueError, match="b was asked about other haystacks of 3 images than a"):
            Results({"a": a, "b": by_size(other)})
    four = by_size([r | {"choices": list("ABCD")} for r in records])
    with pytest.raises(ValueError, match="guessing is right with 0.25"): Results({"a": a, "b": four})
    assert Results({"a": a, "b": count([3], [1], [2])}).difference("a", "b", [3])[0] == .5  # of counts nothing is known


def test_what_was_not_named_or_measured_is_an_error_that_says_so():
    results = Results({"a": counted(.9, .8, .7)})
    for call, text in ((lambda: Results({}), "no models"), (by_size, "no training"), (lambda: from_bits([], {1: [0]}), "nothing to count"),
                       (lambda: from_bits([{1: "1"}], {1: [0], 5: [0]}), r"size 5: \[0\] answers to 1"),
                       (lambda: Results({"a": counted(.9, .8, .7)}, "c"), "base 'c' is not one of the models: a"),
                       (lambda: results.ratio("a"), "which model is the base"), (lambda: results.closed("a", 1), "which model is the base"),
                       (lambda: results.window("b"), "no model 'b': there are a"), (lambda: results.interval("b", 1), "no model 'b'"),
                       (lambda: results.difference("a", "a", [20]), "20 images were not measured, only 1, 10, 100"),
                       (lambda: results.difference("a", "a", []), "at least one size")):
        with pytest.raises(ValueError, match=text): call()


# ---------------------------------------------------------------- redraws

def direct_redraws(answers, samples):
    "The same redraws, one haystack, one training and one size at a time."
    n = answers.trainings
    trainings = np.random.default_rng([0, 1]).multinomial(n, [1/n]*n, samples)  # one draw for all sizes
    found = np.zeros((samples, len(answers.sizes)))
    for j, size in enumerate(answers.sizes):
        h = len(answers.asked[j])
        haystacks = np.random.default_rng(int(size)).multinomial(h, [1/h]*h, samples)
        for s in range(samples):
            right = asked = 0
            for t in range(n):
                for i in range(h):
                    times = int(trainings[s, t]*haystacks[s, i])
                    right += times*answers.right[j][t, i]
                    asked += times*answers.asked[j][i]
            found[s, j] = right/asked
    return found


def test_redraws_are_those_of_a_plain_loop():
    answers = drawn((.9, .7, .5), trainings=3, haystacks=5, questions=4, spread=.1)
    np.testing.assert_allclose(redraws(answers, 40), direct_redraws(answers, 40))


def test_a_training_is_drawn_for_all_sizes_at_once():
    "Trainings without any noise of haystacks: accuracies of a redraw go up and down together."
    groups = {s: np.arange(40) for s in SIZES}
    good, bad = ({s: "1"*n + "0"*(40 - n) for s in SIZES} for n in (36, 20))
    flat = {s: np.zeros(40, dtype=int) for s in SIZES}  # one haystack: nothing but trainings is redrawn
    draws = redraws(from_bits([good, bad], flat))
    assert (draws == draws[:, :1]).all() and set(np.round(draws[:, 0], 3)) == {.5, .7, .9}
    assert interval(draws.mean(1)) == (.5, .9)  # a mean over sizes is as uncertain as one size
    assert not (redraws(from_bits([good, bad], groups))[:, 0] == redraws(from_bits([good, bad], groups))[:, 1]).all()


def test_joint_redraws_of_trainings_that_differ_are_wider_over_sizes():
    one = drawn((.8, .7, .6), trainings=4, spread=.08, haystacks=200)
    joint = redraws(one, 4000).mean(1).std()
    apart = np.stack([redraws(from_bits_of(one, i), 4000)[:, 0] for i in range(3)], 1)
    order = np.random.default_rng(9)
    apart = np.stack([order.permutation(apart[:, i]) for i in range(3)], 1).mean(1).std()  # each size with its own draw
    assert joint > 1.3*apart


def from_bits_of(answers, i):
    "One size of several."
    return type(answers)(answers.sizes[i:i + 1], answers.right[i:i + 1], answers.asked[i:i + 1])


def test_redraws_are_paired_between_models_and_reproducible():
    a, b = drawn((.9, .7, .5), seed=1), drawn((.9, .7, .5), seed=2)
    np.testing.assert_array_equal(redraws(a, 50), redraws(a, 50))
    results = Results({"a": a, "b": b, "c": a}, base="a")
    assert results.difference("c", "a", [1, 100]) == (0, 0, 0) and results.ratio("c").low == results.ratio("c").high == 1
    value, low, high = results.difference("b", "a", [10])
    assert low < value < high and value == pytest.approx(b.accuracy[1] - a.accuracy[1])


def test_bootstrap_of_one_haystack_a_question_has_the_binomials_spread():
    draws = redraws(counted(.7, .7, .7, questions=400), 4000)
    np.testing.assert_allclose(draws.std(0), math.sqrt(.7*.3/400), rtol=.06)


def test_an_interval_is_never_narrower_than_wilsons_of_the_questions_of_one_training():
    answers = from_bits([{s: "10"*60 for s in SIZES}], {s: np.repeat(np.arange(60), 2) for s in SIZES})  # no spread
    results = Results({"a": answers})
    low, high = (float(x) for x in wilson(60, 120))
    assert interval(results.draws["a"][:, 0]) == (.5, .5) and results.interval("a", 1) == (low, high)
    three = Results({"a": drawn((.7, .7, .7), trainings=3, spread=.15)})  # trainings that differ: wider than Wilson's
    assert three.interval("a", 10) == interval(three.draws["a"][:, 1])
    perfect = Results({"a": drawn((2, 2, 2), trainings=5)})
    assert interval(perfect.draws["a"][:, 0]) == (1, 1)
    assert perfect.interval("a", 1) == tuple(float(x) for x in wilson(360, 360))


# ---------------------------------------------------------------- windows

def window(accuracy, threshold=PAPER, **how): return only(*accuracy, **how).window("a", threshold)


def test_window_by_hand():
    assert window([.9, .6, .4]).size == pytest.approx(10*10**.5)
    assert window([.9, .6, .4], .75).size == pytest.approx(10**.5)
    assert window([.9, .4, .9]).size == pytest.approx(10**.8)  # the first crossing, whatever comes later


def test_window_that_touches_the_threshold_goes_on():
    assert window([.9, .5, .4]).size == pytest.approx(10)
    w = window([.9, .7, .5])
    assert w.size == 100 and w.censored


def test_window_interval_is_the_bootstraps():
    results, ends = only(.9, .7, .3, questions=50), []
    for row in results.draws["a"]:  # one redraw at a time
        if row[0] < .5: ends.append(1)
        elif (row >= .5).all(): ends.append(100)
        else:
            i = next(i for i, a in enumerate(row) if a < .5)
            ends.append(10**(i - 1 + (row[i - 1] - .5)/(row[i - 1] - row[i])))
    w = results.window("a", .5)
    np.testing.assert_allclose(results.windows("a", .5), ends)
    np.testing.assert_allclose([w.low, w.high], np.quantile(ends, [.025, .975]))


def test_window_is_reproducible_and_narrows():
    assert window([.9, .6, .4]) == window([.9, .6, .4])
    few, many = window([.9, .6, .4], questions=20), window([.9, .6, .4])
    assert few.low < many.low < many.high < few.high


def test_ends_of_an_interval_that_were_cut_off_are_marked():
    assert str(window([.9, .7, .52], questions=200)).endswith(", ≥100]")
    w = window([.9, .7, .48], questions=200)
    assert not w.censored and w.high == 100 and str(w) == f"{w.size:.3g} [{w.low:.3g}, ≥100]"
    low = window([.52, .3, .2], questions=100)
    assert not low.failed and low.low == 1 and str(low).startswith(f"{low.size:.3g} [<1, ")
    assert not set("<≥") & set(str(window([.9, .6, .4])))
    at_once = window([.5, .3, .2], questions=100)  # on the line at the first size, and perhaps below it
    assert not at_once.failed and str(at_once).startswith("1 [<1, ")


def test_window_out_of_sight_is_not_measured():
    high, low = window([.9, .9, .9]), window([.4, .9, .9])
    assert (high.size, high.censored, high.failed, high.measured) == (100, True, False, False)
    assert (low.size, low.censored, low.failed, low.measured) == (1, False, True, False)
    assert str(high) == f"≥100 {UNMEASURED}" and str(low) == f"<1 {UNMEASURED}"


@pytest.mark.parametrize("accuracy", [.9, .4])
def test_one_size_measures_no_window(accuracy):
    w = window([accuracy], sizes=[5])
    assert w.censored == (accuracy > .5) and w.failed == (accuracy < .5)
    assert not w.measured and str(w) == UNMEASURED == "not measured: give more sizes"


@pytest.mark.parametrize("threshold", [0, -1, 75])
def test_threshold_is_an_accuracy(threshold):
    with pytest.raises(ValueError, match="threshold"): window([.9, .6, .4], threshold)


def test_half_way_starts_from_chance():
    assert HALF == half_way(.5) == .75 and half_way(.25) == .625
    four = [dict(size=n, haystack=f"{n}-{i}", question=0, correct=i % 8 < k, choices=list("ABCD"))
            for n, k in zip(SIZES, (8, 6, 3)) for i in range(80)]
    answers = by_size(four)
    results = Results({"a": answers})
    assert answers.chance == .25 and results.half == .625 and results.window("a").threshold == .625
    assert results.window("a").size == pytest.approx(10**(1 + (.75 - .625)/(.75 - .375)))
    assert table_cells(results)[0][-2:] == [("window at 0.62", ""), ("window at 0.50", "")]
    chance = [line for line in plot_accuracy(results).axes[0].lines if line.get_linestyle() == "--"]
    assert chance[0].get_ydata()[0] == .25


def test_chance_of_each_size_is_the_start_of_its_own_threshold():
    "Two choices with one image, four with more: half-way is 0.75 there and 0.625 here."
    right = {1: 14, 10: 13, 100: 8}  # of 16: 0.875, 0.8125, 0.5
    records = [dict(size=n, haystack=f"{n}-{i}", question=0, correct=i % 16 < right[n], needles=[0],
                    choices=list("AB" if n == 1 else "ABCD")) for n in SIZES for i in range(160)]
    results = Results({"a": by_size(records)})
    assert results.half.tolist() == [.75, .625, .625]
    w = results.window("a")
    share = (.8125 - .625)/(.8125 - .5)
    assert w.size == pytest.approx(10**(1 + share)) and w.threshold == (.75, .625, .625) and w.low < w.size < w.high
    assert table_cells(results)[0][-2:] == [("window half-way", ""), ("window at 0.50", "")]
    assert set(json.loads(json.dumps(numbers(results)))["a"]["window"]) == {"half-way", "0.5"}
    dashed, dotted = (next(x for x in plot_accuracy(results).axes[0].lines if x.get_linestyle() == s) for s in ("--", ":"))
    assert list(dashed.get_ydata()) == [.5, .25, .25] and list(dotted.get_ydata()) == [.75, .625, .625]


# ---------------------------------------------------------------- ratios, gaps, gains

@pytest.mark.parametrize("base, other, value, bound", [
    ((.9, .6, .4), (.9, .9, .4), 10**.3, ""), ((.9, .6, .4), (.9, .9, .9), 10**.5, "≥"),
    ((.4, .4, .4), (.9, .6, .4), 10**1.5, "≥"), ((.9, .9, .9), (.9, .6, .4), 10**-.5, "≤"),
    ((.9, .9, .9), (.9, .9, .9), 1, "?")])
def test_ratio(base, other, value, bound):
    r = Results({"base": counted(*base), "other": counted(*other)}, base="base").ratio("other", PAPER)
    assert r.value == pytest.approx(value) and r.bound == bound and r.low <= r.value <= r.high
    if bound == "?": assert str(r) == UNMEASURED
    else: assert str(r).startswith(f"{bound}{value:.2f} [")


def test_ends_of_a_ratio_that_were_cut_off_are_marked():
    r = Results({"base": counted(.9, .4, .2), "other": counted(.9, .8, .48, questions=200)}, base="base").ratio("other", .5)
    assert (r.bound, r.low_bound, r.high_bound) == ("", "", "≥")
    assert str(r) == f"{r.value:.2f} [{r.low:.2f}, ≥{r.high:.2f}]"
    r = Results({"base": counted(.9, .8, .48, questions=200), "other": counted(.9, .4, .2)}, base="base").ratio("other", .5)
    assert (r.bound, r.low_bound, r.high_bound) == ("", "≤", "")


def test_share_of_the_gap_is_a_ratio_of_differences_on_the_same_redraws():
    models = {"teacher": drawn((.95, .9, .9), seed=1), "student": drawn((.95, .7, .5), seed=2),
              "good": drawn((.95, .85, .8), 3, seed=3)}
    results = Results(models, "student", "teacher")
    a, d = ({name: x[name][..., 2] for name in models} for x in (results.accuracy, results.draws))
    value, low, high = results.closed("good", 100)
    gap = lambda x: (x["good"] - x["student"])/(x["teacher"] - x["student"])
    assert value == pytest.approx(gap(a)) and (low, high) == interval(gap(d)) and low < value < high


def test_a_ratio_of_windows_that_were_not_measured_says_so():
    r = Results({"a": counted(.6, .6, .6), "b": counted(.99, .99, .99)}, "a").ratio("b")
    assert str(r) == f"≥100.00 {UNMEASURED}" and not r.measured
    assert str(Results({"a": counted(.9, .6, .4), "b": counted(.99, .99, .99)}, "a").ratio("b")).startswith("≥31.62 [≥")


def test_a_share_of_no_gap_is_not_measured_and_of_a_small_one_is_open():
    same = drawn((.9, .8, .7))
    assert str(Results({"a": same, "b": same}, "a", "b").closed("a", 10)) == "not measured: no gap"
    models = {"a": drawn((.8, .8, .8), seed=1), "b": drawn((.81, .81, .81), seed=2), "c": drawn((.9, .9, .9), seed=3)}
    share = Results(models, "a", "b").closed("c", 10)
    assert share.value == share.value and math.isnan(share.low) and math.isnan(share.high) and str(share).endswith("% [?, ?]")


def test_gain_of_table_1():
    images = [1, 5, 10, 20, 50, 100, 150]
    base = dict(zip(images, [80.22, 68.45, 62.19, 57.21, 54.73, 51.08, 47.43]))
    laid = dict(zip(images, [92.83, 83.26, 80.46, 74.09, 67.04, 63.37, 60.17]))
    gain = mean_relative_gain(base, laid)
    assert (round(100*gain["short"], 1), round(100*gain["long"], 1)) == (24.1, 24.5)
    assert math.isnan(mean_relative_gain({1: .5}, {1: .6})["long"])


def test_gain_refuses():
    with pytest.raises(ValueError, match="unequal sizes"): mean_relative_gain({1: .5}, {2: .5})
    with pytest.raises(ValueError, match="not over 0"): mean_relative_gain({1: 0.}, {1: .5})


# ---------------------------------------------------------------- tables

@pytest.fixture(scope="module")
def pair(): return Results({"student": counted(.9, .7, .4), "good": counted(.9, .85, .7)}, "student")


def test_table_has_every_accuracy_window_and_ratio(pair):
    head, student, good = table_cells(pair)
    assert [c[0] for c in head] == ["images", "1", "10", "100", "window at 0.75", "times student's", "window at 0.50"]
    assert [c[0] for c in student[:4]] == ["student", "90", "70", "40"] and student[5] == ("1", "")
    assert " ".join(good[5]) == str(pair.ratio("good")) and " ".join(good[4]) == str(pair.window("good"))
    assert good[6] == ("≥100", UNMEASURED)
    low, high = pair.interval("good", 10)
    assert good[2] == ("85", f"{100*low:.0f}–{100*high:.0f}")


def test_a_table_without_a_base_has_no_ratios():
    rows = table_cells(only(.9, .7, .4))
    assert len(rows[0]) == 6 and not any("times" in c for c, _ in rows[0])


def test_tables_as_text_and_markdown(pair):
    text, markdown = table_text(table_cells(pair)).splitlines(), table_markdown(table_cells(pair)).splitlines()
    assert len(text) == 5 and len(markdown) == 4 and len({line.count("|") for line in markdown}) == 1
    assert "<br><sub>" in markdown[2] and markdown[2].startswith("| student | 90<br>")


def test_windows_over_thresholds(pair):
    head, _, *lines = windows_markdown(pair, ["good"], (.5, .75)).splitlines()
    assert head == "| threshold | 0.50 | 0.75 |" and len(lines) == 1
    size, ends = str(pair.window("good", .75)).split(" ", 1)
    assert lines[0] == f"| good | ≥100<br><sub>{UNMEASURED}</sub> | {size}<br><sub>{ends}</sub> |"
    assert len(windows_markdown(pair).splitlines()) == 4 and "| 0.90 |" in windows_markdown(pair).splitlines()[0]


def test_numbers_are_json_and_those_of_the_methods(pair):
    found = json.loads(json.dumps(numbers(pair)))["good"]
    assert found["correct"] == [900, 850, 700] and found["interval"][1] == list(pair.interval("good", 10))
    assert found["window"]["0.75"]["size"] == pair.window("good").size
    assert found["ratio"]["0.75"]["value"] == pair.ratio("good").value
    assert found["gain"]["long"] == pytest.approx(.7/.4 - 1)


# ---------------------------------------------------------------- figures

def test_figures_draw():
    records = [dict(size=n, haystack=f"{n}", question=i, needles=[i], correct=i % 3 > 0)
               for n in (3, 10) for i in range(n)]
    figure = plot_accuracy(Results({"a": by_size(records), "b": by_size(records)}), HALF)
    assert figure.axes[0].get_xscale() == "log"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["3", "10"]
    assert plot_depth(records).axes[0].images[0].get_clim() == (0, 1)
    figure.canvas.draw()


def test_a_second_way_has_the_colour_of_the_first():
    counts = counted(1, 1, 1)
    figure = plot_accuracy(Results(dict.fromkeys(("a", "a + b", "c + b"), counts)), dashed=" + b")
    lines = {x.get_label(): (x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
    assert [lines[name] for name in ("a", "a + b", "c + b")] == [("C0", "-"), ("C0", "--"), ("C1", "--")]


def test_models_of_which_only_counts_are_known_are_not_paired():
    counts = {name: count([1, 10], [160, 140], [200, 200]) for name in "ab"}
    difference = Results(counts, "a").difference("b", "a", [1])
    spread = 1.96*(2*.8*.2/200)**.5  # of two independent shares
    assert difference[0] == 0 and abs(difference[2] - spread) < .02 and abs(difference[1] + spread) < .02


def test_one_record_is_enough_and_depth_is_in_fifths():
    one = dict(haystack="a", question=0, size=3, correct=True, needles=[1])
    assert by_size([one]).accuracy.tolist() == [1.0]
    assert [x.shape for x in by_depth([one])] == [(1,), (5, 1), (5, 1)]
