"""What a training costs: operations against a count by hand, and the arithmetic of budgets."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent/"experiments"))
import budget
import common
import step_cost
from laid_nb.haystack import drawn_training
from laid_nb.inputs import HaystackCollator, precompute
from laid_nb.losses import supervised_rows
from laid_nb.store import load_model
from laid_nb.train import quiet_training


@pytest.fixture(scope="module")
def pool():
    pair = common.pair()
    return precompute(drawn_training(range(1, 5), 8, 3), HaystackCollator(pair["processor"]), pair["student"], pair["teacher"], progress=False)


@pytest.fixture(scope="module")
def counted(pool):
    "A step of KL over all of the pool, counted."
    student, processor = load_model("student", torch.float32)
    return quiet_training(student, processor, pool, common.pair()["teacher"], trainer=step_cost.Counting, method="kd", max_steps=1,
                          per_device_train_batch_size=8, gradient_accumulation_steps=1, use_cpu=True)


def forward_by_hand(model, batch, columns: int) -> tuple[int, int]:
    "Operations of matrix products and of attention, by shapes alone."
    (samples, tokens), text = batch["input_ids"].shape, model.config.get_text_config()
    dim = text.hidden_size//text.num_attention_heads
    query, key = text.num_attention_heads*dim, text.num_key_value_heads*dim
    layer = text.hidden_size*(2*query + 2*key + 3*text.intermediate_size)
    products = 2*samples*tokens*layer*text.num_hidden_layers + 2*samples*columns*text.hidden_size*text.vocab_size
    return products, 4*samples*tokens**2*query*text.num_hidden_layers


def test_operations_of_a_step_are_those_counted_by_hand(counted, pool):
    batch = counted.data_collator(pool)
    rows, _ = supervised_rows(batch["input_ids"].where(batch["replies"], -100))
    columns = int(rows.any(0).sum())
    (teacher, student), = counted.steps
    assert teacher == sum(forward_by_hand(common.pair()["teacher"], batch, columns))
    products, attention = forward_by_hand(counted.model, batch, columns)
    assert student == 3*products + (1 + 2.5)*attention  # the kernel makes queries times keys anew for its gradient
    assert counted.before == 0


def test_a_teacher_that_is_not_asked_costs_nothing(pool):
    student, processor = load_model("student", torch.float32)
    made = quiet_training(student, processor, pool, common.pair()["teacher"], trainer=step_cost.Counting, method="sft", max_steps=1,
                          per_device_train_batch_size=2, gradient_accumulation_steps=1, use_cpu=True)
    assert made.steps[0][0] == 0 < made.steps[0][1]


def test_fourier_transforms_are_counted():
    with step_cost.counting() as counter:
        torch.fft.irfft(torch.fft.rfft(torch.randn(3, 64)))
    assert counter.get_total_flops() == 2*3*2.5*64*6
    with step_cost.counting() as counter:
        torch.fft.fft(torch.randn(2, 32, dtype=torch.complex64))
    assert counter.get_total_flops() == 2*5*32*5


def test_the_aligned_layers_cost_a_start_and_more_than_their_step_without(pool):
    run = common.Run("LAid", settings=dict(method="laid", per_device_train_batch_size=2), images=(1, 4))
    laid = step_cost.operations(run, 16)
    kd = step_cost.operations(replace(run, settings=dict(method="kd", per_device_train_batch_size=2)), 16)
    assert laid["start_flops"] > 0 == kd["start_flops"]
    assert laid["teacher_flops"] == kd["teacher_flops"] and laid["student_flops"] > kd["student_flops"]


def test_seconds_and_bytes_of_a_step(pool):
    run = common.Run("SFT", settings=dict(method="sft", per_device_train_batch_size=2), images=(1, 4))
    timed = step_cost.seconds({"SFT": run}, 16, 1)["SFT"]
    assert timed["seconds"] > 0 == timed["start_seconds"]
    parameters = sum(p.numel() for p in common.pair()["student"].parameters())
    assert parameters < step_cost.memory(run, 16)["peak_bytes"] < 1e9  # gradients of most of them, and more


def test_what_a_training_costs_is_the_sum_of_its_parts():
    cost = dict(teacher_flops=5., student_flops=7., start_flops=100., seconds=2., start_seconds=30.)
    seen = dict(alone=dict(flops=1., seconds=.1), teacher=dict(flops=3., seconds=.2), student=dict(flops=1., seconds=.05))
    whole = budget.whole(cost, seen, "teacher", 10, 20)
    assert whole == dict(teacher_flops=50 + 60, flops=50 + 60 + 70 + 100 + 20, seconds=pytest.approx(20 + 30 + 2 + 4))
    own = budget.whole(cost, seen, "student", 10, 20)
    assert own["teacher_flops"] == 50 + 20 and own["seconds"] == pytest.approx(20 + 30 + 2 + 1)
    alone = budget.whole(cost | dict(teacher_flops=0.), seen, None, 10, 20)
    assert alone == dict(teacher_flops=0, flops=70 + 100 + 20, seconds=pytest.approx(20 + 30 + 2))


def test_towers_are_added_to_what_is_drawn_once():
    found = step_cost.pictures(2)
    assert found["alone"]["flops"] == pytest.approx(found["student"]["flops"]) and found["teacher"]["flops"] > 0
    assert found["alone"]["seconds"] > 0


@pytest.mark.parametrize("accuracies, steps, last", [((.6, .79, .8, .805), 65, False), ((.6, .7, .75, .8), 520, True), ((.9, .5, .6, .7), 16, False)])
def test_the_first_budget_near_the_best_is_where_a_row_has_arrived(accuracies, steps, last):
    found = budget.arrived([dict(steps=s, accuracy=a) for s, a in zip((16, 65, 260, 520), accuracies)])
    assert (found["steps"], found["last"], found["plateau"]) == (steps, last, max(accuracies))


def test_rows_at_the_steps_of_the_table_are_its_trainings_and_two_go_on_for_four_times_as_many():
    made = budget.rows_of(budget.BUDGETS, budget.LONGEST, budget.HAYSTACKS)
    table = budget.runs("student", (0,), budget.STEPS, budget.HAYSTACKS)
    assert made[budget.STEPS] == {name: table[name] for name in budget.ROWS}
    assert set(made[budget.LONGEST]) == set(budget.EQ7) and budget.LONGEST == 4*budget.STEPS
    assert len({run.id for ways in made.values() for run, in ways.values()}) == 4*len(budget.ROWS) + 2
