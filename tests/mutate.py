"""`python tests/mutate.py [--sample N] [--seed S] [MODULE …]`: do the tests notice when the core is wrong?

A mutant is a module of the core with one small change: a comparison or an operator turned into another, a constant moved by
one, a condition negated, a statement left out, None returned. The module's own tests run on a copy of the package that has it
(the first failure ends them). A mutant that no test notices has survived. A seeded sample of all mutants is taken, since each
costs a run of tests; what is written says how many there are and how many were run."""
import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/"data/results/mutants.json"
TESTS = {"rope": "rope", "capture": "capture", "spectra": "spectra", "mixing": "mixing", "losses": "losses", "gain": "gain", "simulate": "simulate", "recompose": "recompose", "align": "train", "parts": "train", "accuracy": "accuracy"}  # module -> its tests
LIMIT = 300  # seconds that the tests of a mutant may take; more is noticed too

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult}


def changes(node):
    "What can be changed about a node: (name, function that changes it in place or gives another)."
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED: yield "compare", lambda n: setattr(n, "ops", [COMPARED[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED: yield "operator", lambda n: setattr(n, "op", COMPUTED[type(n.op)]())
    if isinstance(node, ast.BoolOp): yield "and-or", lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.Constant) and type(node.value) is bool: yield "boolean", lambda n: setattr(n, "value", not n.value)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "plus one", lambda n: setattr(n, "value", n.value + 1)
        yield "minus one", lambda n: setattr(n, "value", n.value - 1)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)): yield "negate", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)): yield "sign", lambda n: n.operand
    if isinstance(node, ast.Return) and node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None): yield "return None", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call): yield "no call", lambda n: ast.copy_location(ast.Pass(), n)
    if isinstance(node, ast.AugAssign): yield "no update", lambda n: ast.copy_location(ast.Pass(), n)


def passed_over(tree):
    "Nodes that make no difference to what is computed: messages of errors, plots, defaults of docstrings and annotations."
    skipped = set()
    for node in ast.walk(tree):
        drop = isinstance(node, ast.Raise) or isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (node.name.startswith(("plot_", "_plot")) or node.name in ("describe", "__repr__"))
        for n in ast.walk(node) if drop else (): skipped.add(n)
        if isinstance(node, ast.JoinedStr): skipped.update(ast.walk(node))
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)): skipped.update(ast.walk(part) if part is not None else ())
    return skipped


def mutants(source):
    "(line, kind, place among the nodes) of every mutant of a module."
    tree = ast.parse(source)
    skipped, found = passed_over(tree), []
    for i, node in enumerate(ast.walk(tree)):
        if node not in skipped: found += [(node.lineno, kind, i) for kind, _ in changes(node) if hasattr(node, "lineno")]
    return found


def mutated(source, kind, place):
    "The source with one change."
    tree = ast.parse(source)
    node = list(ast.walk(tree))[place]
    change = dict(changes(node))[kind]
    new = change(node)
    if isinstance(new, ast.AST):
        class Put(ast.NodeTransformer):
            def generic_visit(self, n): return new if n is node else super().generic_visit(n)
            def visit(self, n): return new if n is node else super().visit(n)
        tree = Put().visit(tree)
    return ast.unparse(ast.fix_missing_locations(copy.copy(tree)))


def prepare():
    "What every run of tests imports, once."
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    import accelerate  # noqa: F401
    import pytest  # noqa: F401
    import transformers
    return transformers.Qwen2_5_VLForConditionalGeneration, transformers.Trainer


def tested(folder, tests):
    "Run tests on the package in a folder, in a forked process: (noticed, seconds)."
    begun, pid = time.monotonic(), os.fork()
    if pid == 0:
        os.setpgrp()
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.chdir(folder)
            sys.path[:0] = [str(folder), str(folder/"tests")]
            os.environ["PYTHONPATH"] = str(folder)
            import pytest
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/test_{tests}.py"]))
        finally: os._exit(code)
    while time.monotonic() - begun < LIMIT:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended: return status != 0, time.monotonic() - begun
        time.sleep(.1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True, LIMIT


def run(module, sample, seed, minutes, scratch):
    "A sample of the mutants of a module -> a row of the table."
    until, file = time.monotonic() + minutes*60, scratch/f"laid_nb/{module}.py"
    source = file.read_text(encoding="utf-8")
    every = mutants(source)
    chosen = random.Random(f"{seed} {module}").sample(every, min(sample, len(every)))
    noticed, _ = tested(scratch, TESTS[module])
    if noticed: raise SystemExit(f"tests/test_{TESTS[module]}.py fails without any change")
    killed, survivors, lines = 0, [], source.splitlines()
    for line, kind, place in chosen:
        if time.monotonic() > until: break
        file.write_text(mutated(source, kind, place), encoding="utf-8")
        noticed, _ = tested(scratch, TESTS[module])
        killed += noticed
        if not noticed: survivors.append(dict(line=line, kind=kind, text=lines[line - 1].strip()))
    file.write_text(source, encoding="utf-8")
    return dict(mutants=len(every), run=killed + len(survivors), killed=killed, survivors=survivors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="of the core (default all)")
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module, drawn by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="for each module, at most")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("laid_nb", "tests", "data", "nbs", "experiments", "docs", "settings.ini"):
            if (ROOT/name).is_dir() and name != "laid_nb": (Path(folder)/name).symlink_to(ROOT/name)
            elif name == "laid_nb": shutil.copytree(ROOT/name, Path(folder)/name, ignore=shutil.ignore_patterns("__pycache__"))
            else: shutil.copyfile(ROOT/name, Path(folder)/name)
        sys.dont_write_bytecode = True
        for module in given.modules:
            row = run(module, given.sample, given.seed, given.minutes, Path(folder))
            table = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
            table[module] = row | dict(seed=given.seed)
            given.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{module}: {row['killed']} of {row['run']} killed, of {row['mutants']} mutants", flush=True)
            for s in row["survivors"]: print(f"   {module}.py:{s['line']} {s['kind']}: {s['text']}", flush=True)


if __name__ == "__main__": main()
