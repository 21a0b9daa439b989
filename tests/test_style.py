"""The style that ruff has no rule for: short exported cells, one statement a line, no private name across modules."""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_CELL, LONGEST_LINE = 50, 120
NOTEBOOKS = sorted(ROOT.glob("nbs/**/*.ipynb"))
SCRIPTS = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])
MODULES = sorted(path for path in ROOT.glob("laid_nb/*.py") if path.name != "_modidx.py")
LEAVING = (ast.Raise, ast.Return, ast.Continue, ast.Break)
LEAVING_CALLS = {"exit", "error"}  # sys.exit, parser.error

notebooks = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
files = pytest.mark.parametrize("file", MODULES + SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")


# --- what is looked for ---------------------------------------------------------
def exported_cells(notebook):
    "(cell id, source) of the cells that go into the package."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\|\s*export[si]?\b", source, re.M): yield cell["id"], source


def semicolons(source):
    "Lines in which a statement stands behind a semicolon."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.start[0] for token in tokens if token.type == tokenize.OP and token.string == ";"]


def leaves(body):
    "Whether a suite is one statement that leaves: what may stand behind the colon of a guard."
    if len(body) != 1: return False
    if isinstance(body[0], LEAVING): return True
    call = body[0].value if isinstance(body[0], ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "attr", None) in LEAVING_CALLS


def suites(node):
    "(suite, whether it may stand behind its colon) of a compound statement."
    allowed = {ast.If: leaves, ast.match_case: leaves, ast.FunctionDef: lambda body: len(body) == 1,
               ast.ExceptHandler: lambda body: leaves(body) or isinstance(body[0], ast.Pass)}
    body = getattr(node, "body", None)
    if not isinstance(body, list) or isinstance(node, ast.Module): return
    yield body, allowed.get(type(node), lambda body: False)(body)
    for name in ("orelse", "finalbody"): yield getattr(node, name, []), False


def compounds(source):
    "Lines in which a statement stands behind a colon, guards and short functions left aside."
    lines, found = source.encode().split(b"\n"), []
    for node in ast.walk(ast.parse(source)):
        for suite, allowed in suites(node):
            if suite and not allowed and lines[suite[0].lineno - 1][:suite[0].col_offset].strip():
                found.append(suite[0].lineno)
    return sorted(found)


def is_private(name): return name.startswith("_") and not name.startswith("__")


def private_names(source, ours):
    "Private names of other modules of ours that a source imports, or reads from an imported module."
    tree, found, modules = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] in ours}
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in ours):
            found += [alias.name for alias in node.names if is_private(alias.name)]
            modules |= {alias.asname or alias.name for alias in node.names if node.module in (None, "laid_nb")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules:
            found.append(ast.unparse(node))
    return found


OURS = {"laid_nb", *(path.stem for path in SCRIPTS)}


# --- the checks themselves --------------------------------------------------------
@pytest.mark.parametrize("source", [
    "if x: raise ValueError(y)", "for a in b:\n    if a: continue\n    f(a)", "def f(x): return x", "f = lambda x: x",
    "if x: sys.exit(1)", "try:\n    f()\nexcept E: pass", "if x:\n    y = 1\nelif z: return 2\nelse:\n    y = 3",
    "class A:\n    def f(self): return 'ä: ü'", "x = {1: 2}[1]",
])
def test_these_may_stand_behind_a_colon(source): assert compounds(source) == []


@pytest.mark.parametrize("source", [
    "for p in xs: p.grad = None", "if x: y = 1", "if x:\n    return 1\nelse: return 2", "with a: f()",
    "while x: x -= 1", "try: f()\nexcept E:\n    g()", "try:\n    f()\nexcept E: x = 1", "def f(x): y = x; return y",
    "class A: x = 1",
    "try:\n    f()\nfinally: g()", "if x: y = 1; return y", "async def f():\n    async with a: g()",
])
def test_these_may_not(source): assert len(compounds(source)) == 1


def test_a_semicolon_is_found_but_not_in_a_text():
    assert semicolons("a = 1; b = 2\nc = ';'  # ;") == [1]


def test_private_names_of_other_modules_are_found():
    source = ("from .capture import _active, capture\nimport laid_nb.gain as g\n"
              "g._hidden\nself._own\nfrom torch import _C")
    assert private_names(source, {"laid_nb"}) == ["_active", "g._hidden"]
    assert private_names("from . import store\nstore._x\nfrom . import __version__", {"laid_nb"}) == ["store._x"]
    assert private_names("from common import _write\nimport os\nos._exit(0)", {"common"}) == ["_write"]


# --- the sources ------------------------------------------------------------------
@notebooks
def test_exported_cells_are_short(notebook):
    long = {name: n for name, source in exported_cells(notebook) if (n := len(source.splitlines())) > LONGEST_CELL}
    assert long == {}, f"cells of more than {LONGEST_CELL} lines"


@notebooks
def test_exported_lines_are_short(notebook):
    cells = {name: [len(line) for line in source.splitlines()] for name, source in exported_cells(notebook)}
    long = {name: [n for n in lengths if n > LONGEST_LINE] for name, lengths in cells.items()}
    assert {name: lengths for name, lengths in long.items() if lengths} == {}, f"lines of more than {LONGEST_LINE}"


@notebooks
def test_an_exported_line_holds_one_statement(notebook):
    cells = {name: sorted(semicolons(source) + compounds(source)) for name, source in exported_cells(notebook)}
    assert {name: lines for name, lines in cells.items() if lines} == {}, "lines (in their cell) with two statements"


@scripts
def test_a_line_of_a_script_holds_one_statement(script):
    source = script.read_text(encoding="utf-8")
    assert sorted(semicolons(source) + compounds(source)) == []


@files
def test_no_private_name_of_another_module_is_used(file):
    assert private_names(file.read_text(encoding="utf-8"), OURS - {file.stem}) == []
