"""Functions as commands: what stands in a signature is what the command line takes."""
import argparse
import inspect
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from laid_nb.script import (
    CommandParser,
    _parameter_comments,
    _settings_of,
    add_command,
    call_command,
    command,
    command_line,
    layer_list,
    natural,
    number_list,
    numbers,
    plain_flags,
    positive,
)


def bake(
    cake: str,  # what is baked, "#1"
    layers: Annotated[int, positive] = 3,  # how many
    kind: Literal["plain", "iced"] = "plain",  # of cake
    sizes: Annotated[list[int], number_list] = (1, 2),  # in inches
    warm: bool = False,  # served at once
    candles: bool = True,  # without them
    names: list[str] | None = None,  # on top
):
    "Bake a cake."
    return cake, layers, kind, sizes, warm, candles, names


def mix(*things: str, **settings):
    "Mix things."
    return things, settings


@pytest.fixture
def run():
    top = CommandParser(prog="laid")
    commands = top.add_subparsers(dest="command", required=True)
    add_command(commands, "bake", bake)
    add_command(commands, "mix", mix)
    return lambda *argv: call_command(*top.parse_known_args(plain_flags(list(argv))))


def test_comments_are_those_of_the_signature():
    assert _parameter_comments(bake)["cake"] == 'what is baked, "#1"' and _parameter_comments(bake)["warm"] == "served at once"


def test_a_command_calls_its_function_with_the_same_values(run):
    assert run("bake", "sponge") == bake("sponge")
    called = run("bake", "sponge", "--layers", "2", "--kind", "iced", "--sizes", "2-4", "--warm", "--no-candles", "--names", "a", "b")
    assert called == bake("sponge", 2, "iced", [2, 3, 4], True, False, ["a", "b"])


def test_other_flags_become_settings_where_a_function_takes_them(run):
    assert run("mix", "a", "b", "--learning-rate", "0.1", "--x=1", "--on") == (("a", "b"), {"learning_rate": ["0.1"], "x": ["1"], "on": []})
    with pytest.raises(ValueError, match="laid bake does not know --loud"): run("bake", "sponge", "--loud")


@pytest.mark.parametrize("argv, words", [(("bake",), "cake"), (("bake", "x", "--layers", "0"), "'0' is not a whole number"),
                                         (("bake", "x", "--kind", "fried"), "fried"), (("bake", "x", "--sizes", "5-2"), "upwards")])
def test_what_does_not_fit_is_one_line(run, argv, words):
    with pytest.raises(ValueError, match=words): run(*argv)


def test_the_line_of_a_call_makes_the_call(run):
    given = dict(cake="sponge cake", layers=2, warm=True, candles=False, names=["a b", "c"])
    line = command_line("laid bake", bake, **given)
    assert line == "laid bake --cake 'sponge cake' --layers 2 --warm --no_candles --names 'a b' c"


def test_readers_leave_values_alone():
    assert number_list([3, 1]) == [1, 3] and positive(4) == 4 and numbers("A:B", int, int)((1, 2)) == (1, 2)
    with pytest.raises(argparse.ArgumentTypeError): numbers("A:B", int, int)("1")
    with pytest.raises(ValueError, match="stands behind no flag"): _settings_of(["x", "--y"])


@pytest.mark.parametrize("given", [dict(layers=2), dict(layers="2")])
@pytest.mark.parametrize("names", ["a", Path("a"), ["a"], ("a",), [Path("a")]])
def test_a_call_from_python_reads_values_as_the_command_line_reads_texts(run, given, names):
    made = command(bake)(Path("sponge"), sizes=3, names=names, **given)
    assert made == ("sponge", 2, "plain", [3], False, True, ["a"]) == run("bake", "sponge", "--layers", "2", "--sizes", "3", "--names", "a")
    assert command(mix)("a", Path("b"), on=True, x=[1]) == (("a", "b"), {"on": True, "x": [1]})


@pytest.mark.parametrize("given, words", [
    (dict(layers=0), "layers: 0 is not"), (dict(layers=True), "layers: True"), (dict(kind="fried"), "kind: 'fried' is none of plain, iced"),
    (dict(warm="yes"), "warm: 'yes' is str, need bool"), (dict(names=[3]), "names: 3 is int, need str"), (dict(sizes="5-2"), "sizes: '5-2'"), (dict(layers=None), "layers: None"),
])
def test_a_value_that_cannot_be_names_its_parameter(given, words):
    with pytest.raises(ValueError, match=words): command(bake)("sponge", **given)


def test_a_command_keeps_its_signature_and_comments():
    assert inspect.signature(command(bake)) == inspect.signature(bake) and _parameter_comments(command(bake)) == _parameter_comments(bake)


def test_layers_and_counts_are_numbers_texts_or_lists():
    assert layer_list("0, 3") == layer_list([0, 3]) == layer_list(("0", 3)) == layer_list(range(0, 4, 3)) == [0, 3] and layer_list(5) == [5] and layer_list("last") == "last"
    assert number_list(np.arange(1, 3)) == [1, 2] and natural(0) == natural("0") == 0 and numbers("ROUNDS", int)(2) == (2,)
    for reader, values in ((layer_list, ("0,", "", "x", -1, [], None)), (natural, ("-1", -1, 0.5, True)), (number_list, ("1,", "²", 0, None)), (numbers("A:B", float, int), ("nan:1", "1:1e400", (1, 2.5), (True, 2), 3))):
        for value in values:
            with pytest.raises(argparse.ArgumentTypeError): reader(value)
