"""benchmarks/gpu.py: what it adds up, against a direct count. (That it runs is in test_benchmarks.py.)"""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laid_nb.anchors import build_processor

sys.path.insert(0, str(Path(__file__).parents[1]/"benchmarks"))
import gpu

TINY = gpu.Shape(256, 3, 2, 1, 384, 3000)


@pytest.mark.parametrize("rows", [1, 7])
def test_flops_are_those_of_a_model(rows):
    made, tokens = gpu.model(TINY, build_processor(), "cpu"), 40
    ids = torch.randint(100, (1, tokens))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        made(input_ids=ids, logits_to_keep=rows, use_cache=False)
    whole_square = TINY.layers*2*tokens**2*TINY.hidden  # the counter counts what the causal mask hides as well
    assert counted.get_total_flops() == TINY.flops(tokens, rows) + whole_square


def test_shapes_have_the_published_numbers_of_parameters():
    for name, billions in {"3B": 3.09, "7B": 7.62, "32B": 32.76}.items():  # without the tower, as the papers count
        shape = gpu.SHAPES[name]
        total = shape.layers*shape.layer_weights + shape.hidden*shape.vocabulary*(1 if shape.tied else 2)
        assert abs(total/1e9/billions - 1) < .01, (name, total)


def test_a_step_needs_the_teacher_where_it_is_read():
    own, other = TINY, replace(TINY, layers=9)
    alone = gpu.needed("SFT", own, other, 100, 5)
    assert alone == gpu.needed("LAid, cached teacher", own, other, 100, 5) == 3*own.flops(100, 5)
    for name in ("SFT + KL", "LAid", "LAid+", gpu.DENSE): assert gpu.needed(name, own, other, 100, 5) == alone + other.flops(100, 5)


def test_targets_stand_beside_what_was_measured_and_what_was_not():
    rows = [{"pair": "a", "tokens": 17_900, "method": name, "seconds": s, "share of the floor": .5, "peak GB": g}
            for name, s, g in (("SFT + KL", 2., 10.), ("LAid", 2.02, 11.), (gpu.DENSE, 3., 40.))]
    rows += [{"pair": "a", "tokens": 17_900, "method": "LAid+", "out of memory": True}]
    found = {line["target"]: line["measured"] for line in gpu.targets(rows)}
    assert list(found.values()) == pytest.approx([1.01, None, .5, .25, None])
    assert all(line["pair"] == "a" and line["wanted"] for line in gpu.targets(rows))
