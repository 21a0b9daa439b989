"""`python tests/mutate.py [--sample N] [--seed S] [--again] [MODULE …]`: do the tests notice when the core is wrong?

A mutant is a module of the core with one small change: a comparison or an operator turned into another, a constant moved by
one, a condition negated, a statement left out, None returned. The module's own tests run once without any change, and must
pass; then those of them that run the changed line, the quickest first, on a copy of the package that has the mutant, until
one fails. A mutant that no test notices has survived. A seeded sample of all mutants is taken; what is written says how
many there are and how many were run. A run that was stopped goes on; `--again` runs survivors again, after a new test."""
import argparse
import ast
import copy
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/"data/results/mutants.json"
TESTS = {  # module -> its tests
    "rope": "rope", "capture": "capture", "attention": "attention", "spectra": "spectra", "mixing": "mixing", "losses": "losses", "gain": "gain", "simulate": "simulate",
    "haystack": "haystack", "inputs": "inputs", "recompose": "recompose", "align": "train", "parts": "train guards", "train": "train guards", "accuracy": "accuracy", "evaluate": "evaluate"}
LEAST, TIMES = 20, 4  # seconds of processor time that the tests of a mutant may take, and how often that of the sound module; more is noticed too

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


class Watch:
    "A plugin of pytest: which lines of a module each test runs, and its seconds of processor time."
    def __init__(self, file):
        import coverage
        self.file, self.seconds = str(file), {}
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[self.file])
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid, location):
        self.begun = time.process_time()
        self.coverage.switch_context("shared")  # a fixture may serve other tests

    def pytest_runtest_call(self, item): self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logfinish(self, nodeid, location): self.seconds[nodeid] = time.process_time() - self.begun

    def found(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        return self.seconds, {int(line): names for line, names in data.contexts_by_lineno(self.file).items()}


def forked(folder, arguments, seconds, watched=None, answer=None):
    "pytest on the package in a folder, in a process of its own; whether it passed. What a watch found goes to the file `answer`."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgrp()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            signal.alarm(seconds*10)  # one that waits for ever
            os.chdir(folder)
            sys.path[:0] = [str(folder), str(folder/"tests")]
            os.environ["PYTHONPATH"] = str(folder)
            import pytest
            watch = [Watch(watched)] if watched else []
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], plugins=watch))
            if watch: answer.write_bytes(pickle.dumps(watch[0].found()))
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    try: os.killpg(pid, signal.SIGKILL)  # what a test has left behind
    except ProcessLookupError: pass
    return status == 0


def sound(module, folder):
    "(seconds of each test, tests that run each line) of a module without a change; SystemExit where they fail."
    answer = folder/"watched"
    files = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    if not forked(folder, files, 3600, folder/f"laid_nb/{module}.py", answer): raise SystemExit(f"{', '.join(files)}: a test fails without any change")
    seconds, lines = pickle.loads(answer.read_bytes())
    if not lines: raise SystemExit(f"{', '.join(files)}: no test runs laid_nb/{module}.py of the copy")
    return seconds, lines


def tests_of(span, seconds, lines):
    "Tests that run one of the lines, the quickest first: all of them where it runs on import or for several tests."
    names = {name for line in span for name in lines.get(line, ["shared"])}
    return sorted(seconds if names & {"", "shared"} or not names else names, key=seconds.__getitem__)


def span(source, place):
    "Lines of the statement that a node is in; of one with statements in it, as `if`, its head."
    tree = ast.parse(source)
    node = list(ast.walk(tree))[place]
    around = min((s for s in ast.walk(tree) if isinstance(s, ast.stmt) and any(n is node for n in ast.walk(s))), key=lambda s: s.end_lineno - s.lineno)
    inside = [s.lineno for s in getattr(around, "body", []) if s.lineno > around.lineno]
    return range(around.lineno, min(inside, default=around.end_lineno + 1))


def noticed(file, source, kind, place, found):
    "Whether the tests notice a mutant."
    seconds, lines = found
    tests = tests_of(span(source, place), seconds, lines)
    file.write_text(mutated(source, kind, place), encoding="utf-8")
    try: return not forked(file.parents[1], tests, int(LEAST + TIMES*sum(map(seconds.__getitem__, tests))))
    finally: file.write_text(source, encoding="utf-8")


def run(module, row, given, scratch, save):
    "A sample of the mutants of a module; its row of the table is saved after each."
    until, file = time.monotonic() + given.minutes*60, scratch/f"laid_nb/{module}.py"
    source = file.read_text(encoding="utf-8")
    every, mark = mutants(source), hashlib.sha256(source.encode()).hexdigest()[:16]
    random.Random(f"{given.seed} {module}").shuffle(every)
    if row.get("source") != mark or row.get("seed") != given.seed: row = dict(mutants=len(every), run=0, killed=0, survivors=[], seed=given.seed, source=mark)
    again, left = row["survivors"] if given.again else [], every[row["run"]:given.sample]
    if not again and not left: return row
    found, text = sound(module, scratch), source.splitlines()
    for survivor in list(again):
        if "why" not in survivor and noticed(file, source, survivor["kind"], survivor["place"], found):
            row["survivors"].remove(survivor)
            row["killed"] += 1
            save(row)
    for line, kind, place in left:
        if time.monotonic() > until: break
        killed = noticed(file, source, kind, place, found)
        row["run"], row["killed"] = row["run"] + 1, row["killed"] + killed
        if not killed: row["survivors"].append(dict(line=line, kind=kind, place=place, text=text[line - 1].strip()))
        save(row)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), help="of the core (default all)")
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module, drawn by chance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="for each module, at most")
    parser.add_argument("--again", action="store_true", help="run survivors without a reason again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    prepare()
    table = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT/"laid_nb", folder/"laid_nb", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("tests", "data", "nbs", "experiments", "docs", "settings.ini"): (folder/name).symlink_to(ROOT/name)
        sys.dont_write_bytecode = True
        for module in given.modules:
            def save(row, module=module):
                table[module] = row
                given.out.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            row = run(module, table.get(module, {}), given, folder, save)
            print(f"{module}: {row['killed']} of {row['run']} killed, of {row['mutants']} mutants", flush=True)
            for s in row["survivors"]: print(f"   {module}.py:{s['line']} {s['kind']}: {s['text']}", flush=True)


if __name__ == "__main__": main()
