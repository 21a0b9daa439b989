"The scripts of examples/, each as it stands, with fewer steps."
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from laid_nb import losses
from laid_nb.store import load_model

EXAMPLES = Path(__file__).resolve().parents[1]/"examples"


def script(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["distil", "self_anchor"])
def test_a_training_leaves_a_stock_checkpoint_that_has_moved(name, tmp_path):
    script(name).main(out=str(tmp_path), steps=2)  # the first of a warm-up has a rate of 0
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path/"model")
    start = dict(load_model("student")[0].named_parameters())
    moved = [n for n, x in trained.named_parameters() if (x != start[n]).any()]
    assert moved and not any("visual" in n for n in moved)


def test_spectra_are_drawn(tmp_path, capsys):
    script("spectra").main(out=str(tmp_path/"spectra.png"))
    assert (tmp_path/"spectra.png").stat().st_size > 10_000 and "layer 2 of student" in capsys.readouterr().out


def test_accuracies_are_printed(capsys):
    script("evaluate").main("student", questions=2)
    assert "student: 1:" in capsys.readouterr().out


def test_a_loss_of_ones_own_has_a_weight_and_stands_in_the_log(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import add_loss; add_loss.main({str(tmp_path)!r}, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # the term is for one process
    assert done.returncode == 0, done.stderr
    assert "loss_entropy" in done.stdout and "entropy" not in losses.TERMS
