"Stored outputs: each fault is planted in a small notebook and must be found, and what may differ must pass."
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from check_notebooks import difference, fault, faults, flags, is_run, main, parts, passed_flags, read, run, stored_form

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def code(name, source, *outputs):
    return dict(cell_type="code", execution_count=None, id=name, metadata={}, outputs=list(outputs), source=source)


def printed(text): return dict(name="stdout", output_type="stream", text=text.splitlines(keepends=True))


def value(text):
    return dict(data={"text/plain": [text]}, execution_count=None, metadata={}, output_type="execute_result")


def picture(text="<Figure size 640x480 with 1 Axes>"):
    return dict(data={"image/png": PNG, "text/plain": [text]}, metadata={}, output_type="display_data")


def notebook(path, *cells):
    kernel = dict(display_name="python3", language="python", name="python3")
    nb = dict(cells=list(cells), metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def found(path, folder):
    "Cell id -> what is wrong, of a notebook that is run now."
    (folder/"kernel").mkdir()
    done = asyncio.run(run(path, folder/"kernel", passed_flags()))
    return {name: what for name, what, _ in faults(read(path), done)}


# --- whole notebooks ------------------------------------------------------------
def test_each_planted_fault_is_found_and_nothing_else(tmp_path):
    show = "from IPython.display import Image, display\nimport base64\npng = base64.b64decode('" + PNG + "')"
    path = notebook(
        tmp_path/"x.ipynb",
        code("imports", show),
        code("same", "print('two', 2)\n'a value'", printed("two 2\n"), value("'a value'")),
        code("timed", "print('took 3.2 s')", printed("took 12 ms\n")),
        code("warned", "import sys; print('beware', file=sys.stderr)"),
        code("missing", "print('never stored')"),
        code("stale", "print('five', 5)", printed("four 4\n")),
        code("silent", "x = 1", printed("once it spoke\n")),
        code("picture", "display(Image(png))", picture("<IPython.core.display.Image object>")),
        code("no-picture", "print('a picture once')", printed("a picture once\n"), picture()),
        code("flagged", "#| varies\nprint('speed', 7)", printed("speed 3\n")),
        code("slow", "#| slow\nraise SystemError", printed("of another day\n")),
        code("off", "#| eval: false\nraise SystemError"),
        code("export", "#| hide\nimport nbdev; nbdev.nbdev_export()"),
    )
    assert found(path, tmp_path) == {
        "missing": "shows something and has no stored output", "stale": "shows another text than the stored one",
        "silent": "has a stored output and shows nothing", "no-picture": "shows another kind of output"}


def test_a_cell_that_raises_is_named_and_ends_the_notebook(tmp_path):
    path = notebook(tmp_path/"x.ipynb", code("good", "print(1)", printed("1\n")), code("bad", "print(2)\n1/0"),
                    code("later", "print(3)"))
    assert found(path, tmp_path) == {"bad": "raises"}


def test_the_command_lists_faults_and_stores_outputs(tmp_path, capsys):
    path = notebook(tmp_path/"x.ipynb", code("kept", "print('took 5 s')", printed("took 7 s\n")),
                    code("stale", "print('five', 5)\n{'a': object()}", printed("four 4\n")),
                    code("slow", "#| slow\nprint(1)", printed("of another day\n")))
    assert main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "x.ipynb, cell stale: shows another kind of output" in text and "1 cells at fault" in text
    assert main(["--write", str(path)]) == 0
    stored = {cell["id"]: cell["outputs"] for cell in read(path)["cells"]}
    assert stored["kept"] == [printed("took 7 s\n")] and stored["slow"] == [printed("of another day\n")]
    assert stored["stale"] == [printed("five 5\n"), value("{'a': <object>}")]
    written = path.read_bytes()
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", str(path)], check=True)
    assert path.read_bytes() == written
    assert main(["--write", "--all", str(path)]) == 0
    assert read(path)["cells"][0]["outputs"] == [printed("took 5 s\n")]


def test_outputs_of_a_changed_cell_are_stored_though_its_text_is_the_same(tmp_path):
    draw = "from IPython.display import Image, display\nimport base64\ndisplay(Image(base64.b64decode('%s')))" % PNG
    path = notebook(tmp_path/"x.ipynb", code("draw", "display(old)", picture("<IPython.core.display.Image object>")))
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    old = picture("<IPython.core.display.Image object>")
    old["data"]["image/png"] = "of another day"
    notebook(path, code("draw", draw, old))
    assert main(["--write", str(path)]) == 0
    assert read(path)["cells"][0]["outputs"][0]["data"]["image/png"] == PNG


# --- what may differ --------------------------------------------------------------
@pytest.mark.parametrize("stored, now", [
    ("loss 1.234", "loss 1.229"),
    ("share 0.03", "share 0.04"),
    ("error 3e-07", "error 8.1e-08"),
    ("[0.00, -0.00]", "[-0.00, 0.00]"),
    ("1,234.5 of 2,000", "1,233.9 of 2,000"),
    ("3.2 ms ± 120 µs a call", "1.1 s ± 0.2 ms a call"),
    ("took 12 seconds and 812.5 MB", "took 1 second and 9.1 GB"),
    ("12 tokens/s", "900.2 tokens/s"),
    ("{'train_runtime': 3.21, 'epoch': 1.0}", "{'train_runtime': 12.9, 'epoch': 1.0}"),
    ("<a.B object at 0x7f00aa>", "<a.B object at 0x7fbbcc>"),
    ("wrote /tmp/tmpab12cd34/x.json", "wrote /var/folders/xy/x.json"),
    ("in tmpab12cd34", "in tmpzz99yy88"),
    ("torch 2.15.0+cpu", "torch 2.16.1"),
    ("http://127.0.0.1:41827/", "http://127.0.0.1:8866/"),
    ("weights a14483eae31d7176", "weights bc493168a7db35e3"),
    ("<Figure size 640x480 with 1 Axes>", "<Figure size 100x100 with 2 Axes>"),
    ("\r 10%|█         | 1/10 [00:00<00:01, 9.9it/s]\r100%|██████████| 10/10 [00:01<00:00, 9.9it/s]\ndone", "done"),
    ("| a  |  0.12 |\n|----|-------|", "| a |0.12 |\n|---|---|".replace("|0", "| 0")),
    ("on 2026-11-27 01:05:33", "on 2027-01-02 11:15:03"),
])
def test_this_may_differ(stored, now): assert difference(stored, now) == []


@pytest.mark.parametrize("stored, now", [
    ("loss 1.234", "loss 1.334"),
    ("12 heads", "13 heads"),
    ("layer 3", "layer 3.0 of 4"),
    ("share 0.03", "share 0.05"),
    ("1,234 tokens", "1,235 tokens"),
    ("rope 0.5", "rope -0.5"),
    ("a word", "another word"),
    ("one line", "one line\nand another"),
    ("16/24/24", "16/20/20"),
    ("float32", "float64"),
    ("shape (3, 4)", "shape (4, 3)"),
    ("at position 4 of 9", "at position 5 of 9"),
])
def test_this_may_not_differ(stored, now): assert difference(stored, now)


def test_of_a_cell_that_varies_only_the_form_is_compared():
    cell = code("x", "#| varies\nprint(speed)", printed("Intel Xeon | 5 times faster\n"))
    assert fault(cell, [printed("AMD EPYC | 80 times faster\n")]) is None
    assert fault(cell, [printed("something else\n")]) and fault(cell, [printed("5 times faster\n5 times faster\n")])
    assert fault(cell, [])[0] == "has a stored output and shows nothing"


def test_a_long_line_is_shown_where_it_differs():
    minus, plus = difference("x "*200 + "here 1 " + "y "*200, "x "*200 + "here 2 " + "y "*200)
    assert "here 1" in minus and "here 2" in plus and len(minus) < 160


# --- parts ------------------------------------------------------------------------
def test_what_is_printed_in_pieces_is_one_text_and_stderr_is_none():
    stream = [printed("a"), dict(name="stderr", output_type="stream", text=["oh\n"]), printed("b\n")]
    assert parts(stream) == [("stdout", "ab\n")]
    assert stored_form(stream) == [printed("ab\n")]


def test_progress_bars_and_widgets_are_not_stored():
    view = {"application/vnd.jupyter.widget-view+json": dict(model_id="1")}
    bar, grid = (dict(output_type="display_data", metadata={}, data={"text/plain": text} | view)
                 for text in ("  0%|   | 0/3 [00:00<?, ?it/s]", "Grid(value=1)"))
    kept = dict(data={"text/plain": ["Grid(value=1)"]}, metadata={}, output_type="display_data")
    assert stored_form([bar, grid]) == [kept]


def test_directives_of_a_cell():
    assert flags("#| eval: false\n#|slow\n#| fig-alt: A line: it falls.\nx") == {
        "eval": "false", "slow": "", "fig-alt": "A line: it falls."}
    assert not is_run(dict(cell_type="markdown", source="x"), set()) and "slow" in passed_flags()
